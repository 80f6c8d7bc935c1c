//! Looks at containers: at one, or at all of them.
//!
//! Owns the joining of a task, its record and its process to a workload. Never remembers anything.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use containerd_client::types::v1::{Process, Status};
use pillion_workload::{FirstInstruction, Instance, Pid, Workload, WorkloadId};

use super::{
    Key,
    cgroup::enclosing,
    client::{Client, ClientError},
    record::{Record, first_instruction},
};
use crate::{
    cgroup2::{Cgroup2Error, Cgroup2Mounts, inspect},
    instance::{InstanceError, instance_in},
    inventory::Observation,
};

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
    pub(super) async fn at(&self, key: &Key) -> Result<Observation, ClientError> {
        let Key { namespace, container } = key;
        let (task, record) = tokio::try_join!(
            self.client.task(namespace, container),
            self.client.container(namespace, container)
        )?;
        let Some(task) = task else { return Ok(Observation::Absent) };
        let Some(record) = record.map(Record::parse) else { return Ok(Observation::Unclear) };
        let sandbox = self.sandbox(key, &record).await?;
        Ok(self.join(key, &task, &record, sandbox.as_ref()))
    }

    /// Looks at a container that has just been created, by the pid that its event tells. Does not ask for its task,
    /// because that answer waits until the task's start is over, and being early is what counts here. `None` when the
    /// process is not in the cgroup of the container's specification: then the event may be an old one.
    pub(super) async fn glimpse(&self, key: &Key, pid: Pid) -> Result<Option<Observation>, ClientError> {
        let record = self.client.container(&key.namespace, &key.container).await?.map(Record::parse);
        let Some(record) = record.filter(|record| !record.is_sandbox()) else { return Ok(None) };
        let sandbox = self.sandbox(key, &record).await?;
        let own_cgroup = |instance: &Instance| {
            record.cgroup.as_deref().is_some_and(|path| enclosing(&instance.cgroup.path, path).is_some())
        };
        Ok(self.instance(pid, &record).ok().filter(own_cgroup).map(|instance| {
            self.present(key, instance, FirstInstruction::Unknown, &record, sandbox.as_ref())
        }))
    }

    async fn sandbox(&self, key: &Key, record: &Record) -> Result<Option<Record>, ClientError> {
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
                let observation = self.at(&key).await.unwrap_or_else(|error| {
                    tracing::warn!(workload = %id, %error, "cannot look at the workload; keeping what is known");
                    Observation::Unclear
                });
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
            .containers(namespace, |mut container| {
                let id = std::mem::take(&mut container.id);
                records.insert(id, Record::parse(container));
            })
            .await?;
        for task in tasks {
            // `id` is the container's for a container's first process; 1.6 leaves `container_id` empty in lists.
            let key = Key::new(namespace, &task.id);
            let Some(record) = records.get(&task.id) else { continue };
            let sandbox = record.sandbox().and_then(|id| records.get(id));
            match key.workload_id() {
                Ok(id) => _ = seen.insert(id, self.join(&key, &task, record, sandbox)),
                Err(error) => tracing::warn!(%key, %error, "container left alone"),
            }
        }
        Ok(())
    }

    fn join(&self, key: &Key, task: &Process, record: &Record, sandbox: Option<&Record>) -> Observation {
        for fault in &record.faults {
            tracing::warn!(workload = %key, fault, "part of the container's record is left out");
        }
        let status = task.status();
        match status {
            Status::Created | Status::Running | Status::Paused | Status::Pausing => {}
            Status::Stopped => return Observation::Absent,
            Status::Unknown => return Observation::Unclear,
        }
        if record.is_sandbox() {
            return Observation::Absent;
        }
        let pid = Pid(i32::try_from(task.pid).unwrap_or(0));
        let instance = match self.instance(pid, record) {
            Ok(instance) => instance,
            Err(error) if error.is_gone() => return Observation::Absent,
            Err(error) => {
                tracing::warn!(workload = %key, error = chain(&error), "cannot identify the workload");
                return Observation::Unclear;
            }
        };
        self.present(key, instance, first_instruction(status), record, sandbox)
    }

    fn present(
        &self,
        key: &Key,
        instance: Instance,
        first: FirstInstruction,
        record: &Record,
        sandbox: Option<&Record>,
    ) -> Observation {
        if instance.cgroup.path == self.mounts.mount_point() {
            // Attaching there would be attaching to everything on the machine.
            tracing::warn!(workload = %key, "container left alone: it runs in the root cgroup");
            return Observation::Absent;
        }
        match key.workload_id() {
            Ok(id) => {
                let workload = Workload { id, subject: record.subject(key, sandbox), instance };
                Observation::Present(Box::new(workload), first)
            }
            Err(error) => {
                tracing::warn!(%key, %error, "container left alone");
                Observation::Absent
            }
        }
    }

    fn instance(&self, pid: Pid, record: &Record) -> Result<Instance, InstanceError> {
        let mut instance = instance_in(&self.mounts, pid)?;
        let path = record.cgroup.as_deref().and_then(|path| enclosing(&instance.cgroup.path, path));
        if let Some(path) = path.filter(|path| *path != instance.cgroup.path) {
            instance.cgroup = match inspect(path.to_owned()) {
                Ok(cgroup) => cgroup,
                // An ancestor goes after its descendants, and those after the process.
                Err(Cgroup2Error::Gone { .. }) => return Err(InstanceError::Gone { pid }),
                Err(source) => return Err(InstanceError::Cgroup { pid, source }),
            };
        }
        Ok(instance)
    }
}

/// An error with all of its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Many wrappers repeat their cause's text as their own.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
