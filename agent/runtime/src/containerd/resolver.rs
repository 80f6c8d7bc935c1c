//! Which workload a container belongs to that a gate holds.
//!
//! Owns the answer for gates that know a container's id and its first process. Never asks for a task: a shim answers such
//! questions only when the start that is being held is over, also about the other containers of a pod.

use pillion_workload::{Instance, Pid, Sighting, Workload};
use tokio::sync::watch;

use super::{
    ContainerdConfig, Key,
    client::{Client, ClientError},
    look::{Look, NotAWorkload, subject, whole},
    record::{Record, named},
};
use crate::{
    cgroup2::{Cgroup2Error, Cgroup2Mounts},
    chain,
    gate::Unidentified,
    instance::InstanceError,
    pod::PodError,
};

/// containerd's namespace for the containers of pods.
const KUBERNETES: &str = "k8s.io";

/// What a held container is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// A workload of its own.
    Container(Box<Workload>),
    /// The same, of which not all is known that policies select on: another policy may be the one than this says.
    Partly(Box<Workload>, Box<Unidentified>),
    /// The sandbox of a pod: this is the pod. What is held runs `pause`, and nothing of the pod is there yet.
    Sandbox(Box<Workload>),
    /// A container of a pod: this is the pod.
    Member(Box<Workload>),
    /// A workload that cannot be attached.
    Unreachable(Box<Unidentified>),
    /// No workload, for this reason.
    Nothing(String),
}

/// Why it cannot be told what a container is.
#[derive(Debug, thiserror::Error)]
pub enum UnresolvedError {
    /// There is no connection.
    #[error("containerd does not answer, so it cannot be told which workload a container belongs to")]
    NotConnected,
    /// containerd gave no answer.
    #[error("cannot ask containerd about container {id}: {reason}")]
    Containerd {
        /// Namespace and id.
        id: String,
        /// containerd's words.
        reason: String,
    },
    /// containerd does not know it.
    #[error("containerd knows no container {id}")]
    Unknown {
        /// Namespace and id.
        id: String,
    },
    /// The process is not identified.
    #[error("cannot identify container {id}")]
    Instance {
        /// Namespace and id.
        id: String,
        /// Why.
        source: InstanceError,
    },
    /// The pod is not identified.
    #[error("cannot identify the pod of container {id}")]
    Pod {
        /// Namespace and id.
        id: String,
        /// Why.
        source: PodError,
    },
    /// No cgroup2.
    #[error(transparent)]
    Cgroups(#[from] Cgroup2Error),
}

/// Tells which workload a held container belongs to. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ContainerdResolver {
    client: watch::Receiver<Option<Client>>,
}

impl ContainerdResolver {
    pub(super) fn new(client: watch::Receiver<Option<Client>>) -> Self {
        Self { client }
    }

    /// Connects once, for who asks once. Without a connection every question is answered by that.
    pub async fn connect(config: &ContainerdConfig) -> Self {
        let connected = Client::connect(config).await;
        let connected = connected.inspect_err(|error| tracing::debug!(error = chain(error), "no containerd"));
        Self { client: watch::channel(connected.ok()).1 }
    }

    /// One whose connection does not come, as long as the other value lives.
    #[cfg(test)]
    pub(crate) fn unconnected() -> (Self, Box<dyn std::any::Any + Send>) {
        let (sender, client) = watch::channel(None);
        (Self { client }, Box::new(sender))
    }

    /// The workload of a container in a containerd namespace whose first process is `pid`, as the source tells it too.
    /// Waits for a connection to containerd, so give it a deadline.
    pub async fn resolve(
        &self,
        namespace: &str,
        container: &str,
        pid: Pid,
    ) -> Result<Resolved, UnresolvedError> {
        let key = Key::new(namespace, container);
        let client = self.connected().await?;
        let said =
            |error: ClientError| UnresolvedError::Containerd { id: key.to_string(), reason: chain(&error) };
        let unknown = || UnresolvedError::Unknown { id: key.to_string() };
        let look = Look::new(client.clone(), Cgroup2Mounts::discover()?);
        let record = client.container(namespace, container).await.map_err(said)?.ok_or_else(unknown)?;
        let record = Record::parse(record);
        let sandbox = look.sandbox(&key, &record).await.map_err(said)?;
        let own = look
            .own_instance(pid, &record)
            .map_err(|source| UnresolvedError::Instance { id: key.to_string(), source })?;
        let of_pod = |source| UnresolvedError::Pod { id: key.to_string(), source };

        let pod = sandbox.as_ref().filter(|sandbox| record.is_part_of(sandbox));
        if let (Some(sandbox), Some(id)) = (pod, record.sandbox())
            && let Some(pod) = sandbox.whole_pod()
        {
            let instance =
                pod.instance_beside(look.mounts(), &own.cgroup.path, container, id).map_err(of_pod)?;
            let key = Key::new(namespace, id);
            return Ok(told(&look, &key, instance, (sandbox, None), Resolved::Member));
        }
        let kind = if record.pod().is_some() { Resolved::Sandbox } else { Resolved::Container };
        let instance = whole(own, &record).map_err(of_pod)?;
        Ok(told(&look, &key, instance, (&record, sandbox.as_ref()), kind))
    }

    /// The ids of all containers that Kubernetes knows by this name, in whichever pods. Waits for a connection to containerd, so
    /// give it a deadline.
    pub async fn containers_named(&self, name: &str) -> Result<Vec<String>, UnresolvedError> {
        let client = self.connected().await?;
        let mut ids = Vec::new();
        let listed =
            client.containers(KUBERNETES, vec![named(name)], |container| ids.push(container.id)).await;
        let said =
            |error: ClientError| UnresolvedError::Containerd { id: name.to_owned(), reason: chain(&error) };
        listed.map_err(said)?;
        Ok(ids)
    }

    async fn connected(&self) -> Result<Client, UnresolvedError> {
        let mut client = self.client.clone();
        let found = client.wait_for(Option::is_some).await.map_err(|_| UnresolvedError::NotConnected)?;
        found.clone().ok_or(UnresolvedError::NotConnected)
    }
}

fn told(
    look: &Look,
    key: &Key,
    instance: Instance,
    (record, sandbox): (&Record, Option<&Record>),
    kind: fn(Box<Workload>) -> Resolved,
) -> Resolved {
    match look.workload(key, instance, record, sandbox) {
        Ok(workload) => kind(Box::new(workload)),
        // Its containers are asked for one by one.
        Err(error @ NotAWorkload::SharedCgroup) => Resolved::Nothing(error.to_string()),
        Err(error @ (NotAWorkload::Root | NotAWorkload::OwnKernel(_) | NotAWorkload::Name(_))) => {
            Resolved::Unreachable(Box::new(Unidentified {
                id: key.workload_id().ok(),
                sightings: vec![Sighting::from(subject(key, record, sandbox))],
                reason: format!("container {} cannot be attached: {error}", key.container),
            }))
        }
    }
}
