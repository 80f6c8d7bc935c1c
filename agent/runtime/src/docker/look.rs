//! Looks at containers: at one, or at all that run.
//!
//! Owns the joining of what an engine says with the process that it names. Never remembers anything.

use std::{path::Path, sync::Arc};

use futures_util::{StreamExt as _, stream};
use pillion_workload::{FirstInstruction, Instance, Pid, Subject, Workload};

use super::{
    ContainerId, EngineKind,
    api::Summary,
    client::{Client, ClientError},
};
use crate::{
    cgroup2::{Cgroup2Error, Cgroup2Mounts, inspect},
    chain,
    instance::{InstanceError, instance_in},
    inventory::Observation,
};

/// Questions in flight at once.
const AT_ONCE: usize = 8;

/// Asks an engine and `/proc`. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Look {
    client: Client,
    engine: EngineKind,
    mounts: Arc<Cgroup2Mounts>,
}

impl Look {
    pub(super) fn new(client: Client, engine: EngineKind, mounts: Cgroup2Mounts) -> Self {
        Self { client, engine, mounts: Arc::new(mounts) }
    }

    /// Looks at one container. An error means that the engine gave no answer.
    pub(super) async fn at(&self, id: &ContainerId) -> Result<Observation, ClientError> {
        let Some(inspection) = self.client.inspect(id).await? else { return Ok(Observation::Absent) };
        let Some(pid) = inspection.pid() else { return Ok(Observation::Absent) };
        Ok(self.join(id, pid, inspection.subject(self.engine)))
    }

    /// Looks at everything that runs. What could not be seen is unclear.
    pub(super) async fn at_all(&self) -> Result<Vec<(ContainerId, Observation)>, ClientError> {
        let list = self.client.running().await?;
        let ids: Vec<ContainerId> = list.iter().filter_map(Summary::id).collect();
        let looks = stream::iter(ids).map(|id| async move {
            let seen = self.at(&id).await.unwrap_or_else(|error| {
                let (engine, error) = (self.engine.kind(), chain(&error));
                tracing::warn!(%engine, container = %id, error, "cannot look at the container; trying again");
                Observation::Unclear
            });
            (id, seen)
        });
        Ok(looks.buffer_unordered(AT_ONCE).collect().await)
    }

    fn join(&self, id: &ContainerId, pid: Pid, subject: Subject) -> Observation {
        let engine = self.engine.kind();
        let instance = match container_instance(&self.mounts, pid, id) {
            Ok(Some(instance)) => instance,
            Ok(None) => {
                tracing::warn!(%engine, container = %id, "container left alone: it has no cgroup of its own");
                return Observation::Absent;
            }
            Err(error) if error.is_gone() => return Observation::Absent,
            Err(error) => {
                tracing::warn!(%engine, container = %id, error = chain(&error), "cannot identify the container");
                return Observation::Unclear;
            }
        };
        match self.engine.workload_id(&subject.name) {
            // An engine starts a container and only then says that it runs.
            Ok(id) => {
                let workload = Workload { id, subject, instance };
                Observation::Present(Box::new(workload), FirstInstruction::After)
            }
            Err(error) => {
                tracing::warn!(%engine, container = %id, %error, "container left alone");
                Observation::Absent
            }
        }
    }
}

/// Identifies a container by its first process; `None` when it has no cgroup of its own. That is the one that bears the
/// container's id: the process may have moved to one below, as systemd does in a container, and as Podman has it from the start.
pub(crate) fn container_instance(
    mounts: &Cgroup2Mounts,
    pid: Pid,
    id: &ContainerId,
) -> Result<Option<Instance>, InstanceError> {
    let mut instance = instance_in(mounts, pid)?;
    let Some(path) = own_cgroup(&instance.cgroup.path, id) else { return Ok(None) };
    if path != instance.cgroup.path {
        instance.cgroup = match inspect(path.to_owned()) {
            Ok(cgroup) => cgroup,
            // An ancestor goes after its descendants, and those after the process.
            Err(Cgroup2Error::Gone { .. }) => return Err(InstanceError::Gone { pid }),
            Err(source) => return Err(InstanceError::Cgroup { pid, source }),
        };
    }
    Ok(Some(instance))
}

/// The outermost that bears the id: a container may make cgroups of any name within its own.
fn own_cgroup<'a>(path: &'a Path, id: &ContainerId) -> Option<&'a Path> {
    let bears = |path: &&Path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(id.as_str()))
    };
    path.ancestors().filter(bears).last()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_the_containers_own() {
        let id = "ab".repeat(32);
        let container: ContainerId = id.parse().expect("valid");
        for (path, own) in [
            (format!("/cg/docker/{id}"), Some(format!("/cg/docker/{id}"))),
            (format!("/cg/docker/{id}/init.scope"), Some(format!("/cg/docker/{id}"))),
            (
                format!("/cg/system.slice/docker-{id}.scope"),
                Some(format!("/cg/system.slice/docker-{id}.scope")),
            ),
            (
                format!("/cg/m.slice/libpod-{id}.scope/container"),
                Some(format!("/cg/m.slice/libpod-{id}.scope")),
            ),
            (format!("/cg/docker/{id}/docker/{id}"), Some(format!("/cg/docker/{id}"))),
            ("/cg/user.slice/session-1.scope".to_owned(), None),
            ("/".to_owned(), None),
        ] {
            assert_eq!(own_cgroup(Path::new(&path), &container), own.as_deref().map(Path::new), "{path}");
        }
    }
}
