//! Looks at containers: at one, or at all of them.
//!
//! Owns the joining of a task, its record and its process to a workload. Never remembers anything.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use containerd_client::types::v1::{Process, Status};
use pillion_workload::{FirstInstruction, Instance, InvalidName, Pid, Subject, Workload, WorkloadId};

use super::{
    Key,
    cgroup::{enclosing, own_cgroup},
    client::{Client, ClientError},
    members,
    record::{Record, first_instruction},
};
use crate::{
    cgroup2::Cgroup2Mounts,
    chain,
    instance::{InstanceError, instance_in},
    inventory::Observation,
    pod::PodError,
};

/// What a look at a container finds.
#[derive(Debug)]
pub(super) enum Looked {
    /// What is true of the workload of this name.
    Seen(Observation),
    /// It is a part of the pod with this sandbox: that is where to look.
    PartOf(Key),
}

/// Why a container is left alone.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotAWorkload {
    #[error(
        "it runs in the root cgroup, and what is attached there is attached to everything on the machine"
    )]
    Root,
    #[error(
        "its runtime {0} has a kernel of its own between it and this one, which sees none of its sockets"
    )]
    OwnKernel(String),
    #[error("the pod has no cgroup of its own, so its containers are workloads, each for itself")]
    SharedCgroup,
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// Asks containerd and `/proc`. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Look {
    client: Client,
    mounts: Arc<Cgroup2Mounts>,
}

impl Look {
    pub(super) fn new(client: Client, mounts: Cgroup2Mounts) -> Self {
        Self { client, mounts: Arc::new(mounts) }
    }

    /// Looks at one container. An error means that containerd gave no answer.
    pub(super) async fn at(&self, key: &Key) -> Result<Looked, ClientError> {
        let Key { namespace, container } = key;
        let record = self.client.container(namespace, container).await?.map(Record::parse);
        let Some(record) = record else {
            let task = self.client.task(namespace, container).await?;
            return Ok(Looked::Seen(if task.is_some() { Observation::Unclear } else { Observation::Absent }));
        };
        let sandbox = self.sandbox(key, &record).await?;
        if let (Some(id), Some(sandbox)) = (record.sandbox(), &sandbox)
            && record.is_part_of(sandbox)
        {
            return Ok(Looked::PartOf(Key::new(namespace, id)));
        }
        let task = self.client.task(namespace, container).await?;
        let Some(task) = task else { return Ok(Looked::Seen(Observation::Absent)) };
        let first = match record.whole_pod() {
            Some(_) => members::of_pod(&self.client, key, &record).await?,
            None => first_instruction(task.status()),
        };
        Ok(Looked::Seen(self.join(key, &task, &record, sandbox.as_ref(), first)))
    }

    /// Looks at a container that has just been created, by the pid that its event tells. Does not ask for its task,
    /// because that answer waits until the task's start is over, and being early is what counts here. `None` when the
    /// process is not in the cgroup of the container's specification: then the event may be an old one. `None` also for a
    /// part of a pod: the pod is known by its sandbox.
    pub(super) async fn glimpse(&self, key: &Key, pid: Pid) -> Result<Option<Observation>, ClientError> {
        let record = self.client.container(&key.namespace, &key.container).await?.map(Record::parse);
        let Some(record) = record else { return Ok(None) };
        let sandbox = self.sandbox(key, &record).await?;
        if sandbox.as_ref().is_some_and(|sandbox| record.is_part_of(sandbox)) {
            return Ok(None);
        }
        let Ok(instance) = self.own_instance(pid, &record) else { return Ok(None) };
        let agrees =
            record.cgroup.as_deref().is_some_and(|path| enclosing(&instance.cgroup.path, path).is_some());
        if !agrees {
            return Ok(None);
        }
        let instance = whole(instance, &record).ok();
        let first = FirstInstruction::Unknown;
        Ok(instance.map(|instance| self.present(key, instance, first, &record, sandbox.as_ref())))
    }

    pub(super) async fn sandbox(&self, key: &Key, record: &Record) -> Result<Option<Record>, ClientError> {
        match record.sandbox() {
            Some(id) => Ok(self.client.container(&key.namespace, id).await?.map(Record::parse)),
            None => Ok(None),
        }
    }

    /// Looks at everything. What is in `known` and was not listed is asked for by itself, because a listing leaves out
    /// tasks whose shim hangs: only a clear answer makes a known workload absent.
    pub(super) async fn at_all(
        &self,
        known: Vec<WorkloadId>,
    ) -> Result<BTreeMap<WorkloadId, Observation>, ClientError> {
        let mut seen = BTreeMap::new();
        for namespace in self.client.namespaces().await? {
            self.at_namespace(&namespace, &mut seen).await?;
        }
        for id in known {
            if !seen.contains_key(&id)
                && let Some(key) = Key::of(&id)
            {
                let looked = self.at(&key).await.unwrap_or_else(|error| {
                    tracing::warn!(workload = %id, %error, "cannot look at the workload; keeping what is known");
                    Looked::Seen(Observation::Unclear)
                });
                let observation = match looked {
                    Looked::Seen(observation) => observation,
                    // A part of a pod is no workload of its own.
                    Looked::PartOf(_) => Observation::Absent,
                };
                seen.insert(id, observation);
            }
        }
        Ok(seen)
    }

    /// Tasks first, then containers: so each task's record is among them, unless it has been deleted since.
    async fn at_namespace(
        &self,
        namespace: &str,
        seen: &mut BTreeMap<WorkloadId, Observation>,
    ) -> Result<(), ClientError> {
        let tasks = self.client.tasks(namespace).await?;
        if tasks.is_empty() {
            return Ok(());
        }
        let mut records = HashMap::new();
        self.client
            .containers(namespace, Vec::new(), |mut container| {
                let id = std::mem::take(&mut container.id);
                records.insert(id, Record::parse(container));
            })
            .await?;
        // `id` is the container's for a container's first process; 1.6 leaves `container_id` empty in lists.
        let states: HashMap<&str, Status> =
            tasks.iter().map(|task| (task.id.as_str(), task.status())).collect();
        for task in &tasks {
            let key = Key::new(namespace, &task.id);
            let Some(record) = records.get(&task.id) else { continue };
            let sandbox = record.sandbox().and_then(|id| records.get(id));
            if sandbox.is_some_and(|sandbox| record.is_part_of(sandbox)) {
                continue;
            }
            let first = match record.whole_pod() {
                Some(_) => {
                    let members = records.iter().filter(|(_, other)| other.sandbox() == Some(&task.id));
                    members::of_states(members.map(|(id, _)| states.get(id.as_str()).copied()))
                }
                None => first_instruction(task.status()),
            };
            match key.workload_id() {
                Ok(id) => _ = seen.insert(id, self.join(&key, task, record, sandbox, first)),
                Err(error) => tracing::warn!(%key, %error, "container left alone"),
            }
        }
        Ok(())
    }

    fn join(
        &self,
        key: &Key,
        task: &Process,
        record: &Record,
        sandbox: Option<&Record>,
        first: FirstInstruction,
    ) -> Observation {
        for fault in &record.faults {
            tracing::warn!(workload = %key, fault, "part of the container's record is left out");
        }
        match task.status() {
            Status::Created | Status::Running | Status::Paused | Status::Pausing => {}
            Status::Stopped => return Observation::Absent,
            Status::Unknown => return Observation::Unclear,
        }
        let pid = Pid(i32::try_from(task.pid).unwrap_or(0));
        let found = self.own_instance(pid, record).map_err(PodError::from);
        match found.and_then(|instance| whole(instance, record)) {
            Ok(instance) => self.present(key, instance, first, record, sandbox),
            Err(error) if error.is_gone() => Observation::Absent,
            Err(error) => {
                tracing::warn!(workload = %key, error = chain(&error), "cannot identify the workload");
                Observation::Unclear
            }
        }
    }

    fn present(
        &self,
        key: &Key,
        instance: Instance,
        first: FirstInstruction,
        record: &Record,
        sandbox: Option<&Record>,
    ) -> Observation {
        match self.workload(key, instance, record, sandbox) {
            Ok(workload) => Observation::Present(Box::new(workload), first),
            Err(error @ NotAWorkload::SharedCgroup) => {
                tracing::debug!(workload = %key, %error, "sandbox left alone");
                Observation::Absent
            }
            Err(error @ (NotAWorkload::Root | NotAWorkload::OwnKernel(_))) => {
                Observation::Unreachable(Box::new(subject(key, record, sandbox)), error.to_string())
            }
            Err(error @ NotAWorkload::Name(_)) => {
                tracing::warn!(workload = %key, %error, "container left alone");
                Observation::Absent
            }
        }
    }

    /// The workload of a container or of a whole pod.
    pub(super) fn workload(
        &self,
        key: &Key,
        instance: Instance,
        record: &Record,
        sandbox: Option<&Record>,
    ) -> Result<Workload, NotAWorkload> {
        if instance.cgroup.path == self.mounts.mount_point() {
            return Err(NotAWorkload::Root);
        }
        if record.pod().is_some() && record.whole_pod().is_none() {
            return Err(NotAWorkload::SharedCgroup);
        }
        if let Some(runtime) = record.own_kernel() {
            return Err(NotAWorkload::OwnKernel(runtime.to_owned()));
        }
        Ok(Workload { id: key.workload_id()?, subject: subject(key, record, sandbox), instance })
    }

    /// The process in its container's own cgroup.
    pub(super) fn own_instance(&self, pid: Pid, record: &Record) -> Result<Instance, InstanceError> {
        own_cgroup(instance_in(&self.mounts, pid)?, record.cgroup.as_deref())
    }

    pub(super) fn mounts(&self) -> &Cgroup2Mounts {
        &self.mounts
    }
}

/// What policies select on, of a container or of a whole pod.
pub(super) fn subject(key: &Key, record: &Record, sandbox: Option<&Record>) -> Subject {
    match record.whole_pod() {
        Some(pod) => pod.subject(),
        None => record.subject(key, sandbox),
    }
}

/// A sandbox's process stands for its pod, in the pod's cgroup; any other for itself.
pub(super) fn whole(own: Instance, record: &Record) -> Result<Instance, PodError> {
    match record.whole_pod() {
        Some(pod) => pod.instance_of_sandbox(&own.cgroup.path, &own),
        None => Ok(own),
    }
}
