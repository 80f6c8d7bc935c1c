//! The containerd source: watches one containerd over its socket, all of its namespaces.
//!
//! Owns the connection, its recovery, and what is known of containerd's tasks. Never changes anything in containerd,
//! except that it publishes a marker event of its own on connecting (see `events`).
//!
//! How nothing is missed and nothing is told twice:
//! 1. Subscribe to the events and wait until a marker comes back: from here on nothing is lost.
//! 2. Take a snapshot: namespaces, then tasks, then containers of each.
//! 3. An event says only *which* container to look at again; what is reported comes from looking. So events may be
//!    late, doubled or in any order, and one that belongs to an earlier container of the same name does no harm.
//!    One exception: a create event tells the first process's pid, and a container whose record and process agree with
//!    it is told at once, because the question about its task would wait until its start is over.
//! 4. Exits of first processes are also seen by pidfd, with containerd or without.
//!
//! What is a workload: every task that is created, running or paused, and every pod of Kubernetes. A pod is its sandbox
//! (`io.cri-containerd.kind=sandbox`), which is there before and after its containers; these are parts of it and no
//! workloads. Where a pod has no cgroup of its own (see `pod`) its containers are workloads, with the pod's labels, and
//! the sandbox is none: it runs `pause`, which opens no socket.

mod cgroup;
mod client;
mod events;
mod look;
mod members;
mod probe;
mod record;
mod resolver;
mod session;
mod source;

use std::{collections::BTreeSet, fmt, path::PathBuf, time::Duration};

use pillion_workload::{InvalidName, RuntimeKind, WorkloadId};

pub(crate) use cgroup::own_cgroup;
pub use probe::FirstInstructionProbe;
pub use resolver::{ContainerdResolver, Resolved, UnresolvedError};
pub use source::ContainerdSource;

/// Where containerd is, and how patient to be with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdConfig {
    /// Its gRPC socket.
    pub socket: PathBuf,
    /// For connecting and for each question about one thing.
    pub deadline: Duration,
    /// For each listing: containerd waits up to 2 s for each shim that hangs.
    pub list_deadline: Duration,
    /// How often to ask whether it still answers.
    pub health_interval: Duration,
    /// The first and the longest pause between attempts to connect.
    pub backoff: (Duration, Duration),
    /// Namespaces of containerd that are another source's to tell of. [`ContainerdConfig::DOCKERS`] stands for all of Docker's.
    pub left_alone: BTreeSet<String>,
}

impl ContainerdConfig {
    /// containerd's namespace in which Docker Engine keeps its containers.
    pub const DOCKERS: &str = "moby";

    /// Whether a namespace is Docker Engine's: with `userns-remap` newer ones (28, and not 20.10) add the ids of the root user in their
    /// containers, as in `moby-100000.100000`.
    pub(crate) fn is_dockers(namespace: &str) -> bool {
        let Some(rest) = namespace.strip_prefix(Self::DOCKERS) else { return false };
        let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let ids = rest.strip_prefix('-').and_then(|ids| ids.split_once('.'));
        rest.is_empty() || ids.is_some_and(|(user, group)| number(user) && number(group))
    }

    /// The defaults for a containerd at `socket`.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            deadline: Duration::from_secs(3),
            list_deadline: Duration::from_secs(30),
            health_interval: Duration::from_secs(10),
            backoff: (Duration::from_millis(100), Duration::from_secs(10)),
            left_alone: BTreeSet::new(),
        }
    }
}

impl Default for ContainerdConfig {
    fn default() -> Self {
        Self::at("/run/containerd/containerd.sock")
    }
}

/// Why a containerd did not tell its version.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct VersionError(client::ClientError);

/// Connects and asks for the version, once: whether containerd is there and answers. For `pillion check`.
pub async fn containerd_version(config: &ContainerdConfig) -> Result<String, VersionError> {
    let client = client::Client::connect(config).await.map_err(VersionError)?;
    client.version().await.map_err(VersionError)
}

/// A container: id within a containerd namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key {
    namespace: String,
    container: String,
}

impl Key {
    fn new(namespace: impl Into<String>, container: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), container: container.into() }
    }

    /// containerd's own rules for both names are stricter than ours, so this fails only for a broken containerd.
    fn workload_id(&self) -> Result<WorkloadId, InvalidName> {
        WorkloadId::try_from(self.to_string())
    }

    /// The container behind an id of this source; `None` for other ids.
    fn of(id: &WorkloadId) -> Option<Self> {
        let mut parts = id.as_str().split('/');
        let (kind, namespace, container) = (parts.next()?, parts.next()?, parts.next()?);
        (kind == RuntimeKind::Containerd.as_str() && parts.next().is_none())
            .then(|| Self::new(namespace, container))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", RuntimeKind::Containerd, self.namespace, self.container)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_namespaces() {
        for (namespace, dockers) in [
            ("moby", true),
            ("moby-100000.100000", true),
            ("moby-0.65536", true),
            ("moby-", false),
            ("moby-1", false),
            ("moby-1.", false),
            ("moby-1.x", false),
            ("mobydick", false),
            ("k8s.io", false),
        ] {
            assert_eq!(ContainerdConfig::is_dockers(namespace), dockers, "{namespace}");
        }
    }

    #[test]
    fn ids_lead_back_to_containers() {
        let key = Key::new("k8s.io", "a1");
        assert_eq!(Key::of(&key.workload_id().expect("valid")), Some(key));
        for other in ["process/1-2", "containerd/x", "containerd/x/y/z"] {
            assert_eq!(Key::of(&other.parse().expect("valid")), None, "{other}");
        }
        assert!(Key::new("a b", "c").workload_id().is_err());
    }
}
