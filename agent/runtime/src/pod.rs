//! Kubernetes' pods as workloads: what is known of one, and which cgroup and process it is.
//!
//! Owns the rule for which cgroup is a pod's own, and the finding of its sandbox's process. Never asks a runtime.
//!
//! A pod is attached at the cgroup that holds its sandbox and its containers, so that containers to come, init containers
//! first of all, are covered before they exist. The kubelet makes one for each pod and names it after the pod's uid:
//!
//! | cgroup driver | the sandbox's cgroup | the pod's |
//! | --- | --- | --- |
//! | cgroupfs | `…/kubepods/burstable/pod<uid>/<sandbox id>` | its parent |
//! | systemd | `…/kubepods-burstable-pod<uid, - as _>.slice/cri-containerd-<sandbox id>.scope` | its parent |
//!
//! Any other parent may hold other pods too, now or later (without a `cgroup_parent` all of them share `/k8s.io`), and
//! what is attached there is attached to all of them. So a pod whose parent does not bear its uid is never attached as a
//! whole: its containers are workloads of their own.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use pillion_workload::{Instance, InvalidName, Pid, RuntimeKind, Subject, WorkloadId};

use crate::{
    cgroup2::{Cgroup2Error, Cgroup2Mounts, inspect, read_limited},
    instance::{InstanceError, instance_in},
};

/// containerd's namespace for everything of Kubernetes (`k8sContainerdNamespace` of its CRI plug-in).
pub(crate) const NAMESPACE: &str = "k8s.io";
/// A pod's texts: the API server bounds annotations to 256 KiB, and nobody bounds other clients of CRI.
pub(crate) const TEXT_LIMIT: usize = 1 << 20;
/// A sandbox runs `pause`, one process.
const PROCS_LIMIT: u64 = 4096;

/// What is known of a pod, by whatever told it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Why a pod's cgroup or process cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The parent of its cgroups is not its own.
    #[error(
        "the pod cannot be attached as a whole: cgroup {parent:?} does not bear its uid {uid:?}, so other pods may be in it"
    )]
    Shared {
        /// The parent of the container's cgroup.
        parent: PathBuf,
        /// The pod's.
        uid: String,
    },
    /// The sandbox has no process.
    #[error("the pod's sandbox has no process in cgroup {cgroup:?}")]
    NoSandbox {
        /// Where it was looked for.
        cgroup: PathBuf,
    },
    /// A process of it cannot be identified.
    #[error("cannot identify the pod")]
    Instance(#[from] InstanceError),
    /// The pod's cgroup cannot be looked at.
    #[error("cannot look at the pod's cgroup")]
    Cgroup(#[from] Cgroup2Error),
}

impl PodError {
    /// Whether the pod has just ended, which is an ordinary thing to happen.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Instance(error) => error.is_gone(),
            Self::Cgroup(error) => matches!(error, Cgroup2Error::Gone { .. }),
            Self::NoSandbox { .. } => true,
            Self::Shared { .. } => false,
        }
    }
}

impl Pod {
    /// The id of the pod with this sandbox, within containerd's namespace for Kubernetes.
    pub(crate) fn id(sandbox: &str) -> Result<WorkloadId, InvalidName> {
        WorkloadId::try_from(format!("{}/{NAMESPACE}/{sandbox}", RuntimeKind::Containerd))
    }

    /// What policies select on. Image and executable are the containers', which differ.
    pub(crate) fn subject(&self) -> Subject {
        let named = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        Subject {
            namespace: named(&self.namespace),
            labels: bounded(&self.labels),
            annotations: bounded(&self.annotations),
            ..Subject::new(RuntimeKind::Containerd, self.name.clone())
        }
    }

    /// Whether a cgroup holds this pod and nothing else, by its name.
    pub(crate) fn owns(&self, cgroup: &Path) -> bool {
        let Some(name) = cgroup.file_name().and_then(|name| name.to_str()) else { return false };
        let (name, uid) = match name.strip_suffix(".slice") {
            // systemd takes `-` as a level of slices.
            Some(name) => (name, self.uid.replace('-', "_")),
            None => (name, self.uid.clone()),
        };
        let before = name.strip_suffix(uid.as_str()).and_then(|rest| rest.strip_suffix("pod"));
        !uid.is_empty() && before.is_some_and(|before| before.is_empty() || before.ends_with('-'))
    }

    /// The pod that a process belongs to whose container's own cgroup is `own`; the process is the sandbox's.
    pub(crate) fn instance_of_sandbox(&self, own: &Path, process: &Instance) -> Result<Instance, PodError> {
        let parent = self.parent(own)?;
        Ok(Instance { cgroup: inspect(parent)?, ..process.clone() })
    }

    /// The pod of a container, found through the container's `own` cgroup alone: the sandbox's is beside it, and its name
    /// has the sandbox's id where the container's has its own. Asks nobody, so it works while a runtime holds its locks.
    pub(crate) fn instance_beside(
        &self,
        mounts: &Cgroup2Mounts,
        own: &Path,
        container: &str,
        sandbox: &str,
    ) -> Result<Instance, PodError> {
        let parent = self.parent(own)?;
        let name = own.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let cgroup = parent.join(name.replace(container, sandbox));
        let nobody = || PodError::NoSandbox { cgroup: cgroup.clone() };
        if container.is_empty() || sandbox.is_empty() || !name.contains(container) {
            return Err(nobody());
        }
        let procs = read_limited(&cgroup.join("cgroup.procs"), PROCS_LIMIT).map_err(|_| nobody())?;
        let pids = String::from_utf8_lossy(&procs);
        let instances = pids.lines().filter_map(|pid| instance_in(mounts, Pid(pid.parse().ok()?)).ok());
        // The first one, should it ever have children.
        let first = instances.min_by_key(|instance| instance.process.started.0).ok_or_else(nobody)?;
        self.instance_of_sandbox(&cgroup, &first)
    }

    fn parent(&self, own: &Path) -> Result<PathBuf, PodError> {
        let parent = own.parent().unwrap_or(Path::new("/")).to_owned();
        if self.owns(&parent) { Ok(parent) } else { Err(PodError::Shared { parent, uid: self.uid.clone() }) }
    }
}

/// Texts beyond the limit are left out as a whole: a part of them could be taken for all.
fn bounded(texts: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let size: usize = texts.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size <= TEXT_LIMIT { texts.clone() } else { BTreeMap::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_pods_own_cgroup() {
        let uid = "7f0b6e8a-4b5f-4a52-9d0e-1f3b8a2c4d5e";
        let scope = uid.replace('-', "_");
        for (cgroup, uid, owns) in [
            (format!("/cg/kubepods/burstable/pod{uid}"), uid, true),
            (format!("/cg/kubepods/pod{uid}"), uid, true),
            (format!("/cg/kubepods-besteffort-pod{scope}.slice"), uid, true),
            (format!("/cg/kubelet-kubepods-pod{scope}.slice"), uid, true),
            (format!("/cg/kubepods-besteffort-pod{uid}.slice"), uid, false),
            (format!("/cg/kubepods-pod{scope}"), uid, false),
            (format!("/cg/kubepods/pod{uid}x"), uid, false),
            (format!("/cg/kubepods/xpod{uid}"), uid, false),
            (format!("/cg/kubepods/{uid}"), uid, false),
            ("/cg/k8s.io".to_owned(), uid, false),
            ("/cg/kubepods/pod".to_owned(), "", false),
            ("/cg".to_owned(), uid, false),
            ("/".to_owned(), uid, false),
        ] {
            let pod = Pod { uid: uid.to_owned(), ..Pod::default() };
            assert_eq!(pod.owns(Path::new(&cgroup)), owns, "{cgroup}");
        }
    }

    #[test]
    fn a_pod_in_a_shared_cgroup_is_not_attached_and_says_why() {
        let mounts = Cgroup2Mounts::discover().expect("this machine has cgroup2");
        let pod = Pod { uid: "u-1".to_owned(), ..Pod::default() };
        let found = pod.instance_beside(&mounts, Path::new("/cg/k8s.io/c1"), "c1", "s1");
        let error = found.expect_err("others are in there");
        assert!(!error.is_gone());
        assert!(error.to_string().contains("/cg/k8s.io"), "{error}");
        // Its own, but nobody is there.
        for own in ["/cg/podu-1/c1", "/cg/podu-1/other", "/podu-1/"] {
            let found = pod.instance_beside(&mounts, Path::new(own), "c1", "s1");
            assert!(found.is_err(), "{own}");
        }
    }

    #[test]
    fn too_much_text_is_left_out() {
        let mut pod = Pod { name: "web".into(), namespace: "shop".into(), ..Pod::default() };
        pod.labels.insert("app".into(), "web".into());
        pod.annotations.insert("a".into(), "x".repeat(TEXT_LIMIT + 1));
        let subject = pod.subject();
        assert_eq!((subject.name.as_str(), subject.namespace.as_deref()), ("web", Some("shop")));
        assert_eq!(subject.labels["app"], "web");
        assert!(subject.annotations.is_empty());
        assert_eq!((subject.image, subject.executable), (None, None));
    }
}
