//! From a held container to the workload that it is, or is a part of.
//!
//! Owns the order in which it is found out: whose it is, what that engine says, what the specification says. Never asks anything
//! that waits for the container's start.

use std::{path::PathBuf, sync::Arc};

use pillion_common::hook::{Container, ContainerId, Spec};
use pillion_workload::{
    Facet, Instance, InvalidName, Pid, RuntimeKind, Sighting, Subject, Workload, WorkloadId,
};

use super::{
    crio::{self, CrioError},
    engine::{AskError, Described, Engine, UnitManager},
    owner::{Owner, owner},
    sighting,
};
use crate::{
    cgroup2::{Cgroup2Error, Cgroup2Mounts},
    chain,
    containerd::{ContainerdResolver, Resolved, UnresolvedError, own_cgroup},
    gate::Unidentified,
    instance::{InstanceError, instance_in},
};

/// Whom to ask. What is absent is left alone by this agent.
#[derive(Debug, Clone, Default)]
pub struct Engines {
    /// containerd.
    pub containerd: Option<ContainerdResolver>,
    /// Docker Engine.
    pub docker: Option<Arc<dyn Engine>>,
    /// Podman's service.
    pub podman: Option<Arc<dyn Engine>>,
    /// systemd.
    pub units: Option<Arc<dyn UnitManager>>,
}

/// Why it cannot be told what is held. Then the hook does as without an agent.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// containerd's container, but this agent has no containerd.
    #[error("container {id} is containerd's, which this agent leaves alone; --containerd-socket names one")]
    NoContainerd {
        /// Its id.
        id: String,
    },
    /// containerd does not help.
    #[error(transparent)]
    Containerd(#[from] UnresolvedError),
    /// What CRI-O wrote does not help.
    #[error(transparent)]
    Crio(#[from] CrioError),
    /// Another engine does not help.
    #[error("{engine} cannot be asked about container {id}")]
    Engine {
        /// Which.
        engine: RuntimeKind,
        /// The container's id.
        id: String,
        /// Why.
        source: AskError,
    },
    /// Another engine does not know it.
    #[error("{engine} knows no container {id}: is it another {engine}'s?")]
    Unknown {
        /// Which.
        engine: RuntimeKind,
        /// The container's id.
        id: String,
    },
    /// Its process.
    #[error("cannot identify container {id}")]
    Instance {
        /// Its id.
        id: String,
        /// Why.
        source: InstanceError,
    },
    /// The machine's cgroups.
    #[error(transparent)]
    Cgroups(#[from] Cgroup2Error),
    /// Its name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

impl Engines {
    /// What a held container is. To be bounded by a deadline: it waits for engines.
    pub async fn resolve(&self, container: &Container) -> Result<Resolved, ResolveError> {
        let (id, spec, pid) = (&container.id, &container.spec, Pid(container.pid));
        let described = match owner(id, spec) {
            Owner::Containerd { namespace } => {
                let containerd = self.containerd.as_ref();
                let containerd =
                    containerd.ok_or_else(|| ResolveError::NoContainerd { id: id.id.clone() })?;
                return Ok(containerd.resolve(&namespace, &id.id, pid).await?);
            }
            Owner::Docker => self.docker(id, spec).await?,
            Owner::Podman => self.podman(id, spec).await?,
            Owner::Crio => {
                let own = self.instance(container)?;
                return Ok(crio::resolve(&Cgroup2Mounts::discover()?, id, spec, own)?);
            }
            Owner::Nobody => {
                let instance = self.instance(container)?;
                let name = format!("{}/{}-{}", RuntimeKind::Process, pid, instance.process.started.0);
                let subject = subject(RuntimeKind::Process, id, spec);
                return Ok(whole(Described { id: name.try_into()?, subject, unknown: Vec::new() }, instance));
            }
        };
        Ok(whole(described, self.instance(container)?))
    }

    /// What is known of a container that could not be resolved, for this reason.
    pub fn unresolved(&self, container: &Container, reason: &str) -> Unidentified {
        sighting::unidentified(container, reason)
    }

    async fn docker(&self, id: &ContainerId, spec: &Spec) -> Result<Described, ResolveError> {
        let engine = RuntimeKind::Docker;
        let Some(docker) = &self.docker else { return by_specification(engine, id, spec) };
        match docker.describe(&id.id).await {
            Ok(Some(described)) => Ok(described),
            Ok(None) => Err(ResolveError::Unknown { engine, id: id.id.clone() }),
            Err(source) => Err(ResolveError::Engine { engine, id: id.id.clone(), source }),
        }
    }

    /// Podman works without its service, and usually does.
    async fn podman(&self, id: &ContainerId, spec: &Spec) -> Result<Described, ResolveError> {
        let why = match &self.podman {
            None => "this agent leaves Podman's service alone".to_owned(),
            Some(podman) => match podman.describe(&id.id).await {
                Ok(Some(described)) => return Ok(described),
                Ok(None) => "Podman's service does not know it".to_owned(),
                Err(error) => chain(&*error),
            },
        };
        tracing::warn!(container = id.id, why, "name, labels and image of the container are not known");
        by_specification(RuntimeKind::Podman, id, spec)
    }

    #[expect(clippy::unused_self, reason = "what it asks is the machine's")]
    fn instance(&self, container: &Container) -> Result<Instance, ResolveError> {
        let mounts = Cgroup2Mounts::discover()?;
        let found = instance_in(&mounts, Pid(container.pid));
        let of = |source| ResolveError::Instance { id: container.id.id.clone(), source };
        let instance = found.map_err(of)?;
        let path = container.spec.cgroups_path.as_deref();
        own_cgroup(instance, path).map_err(of)
    }
}

/// A container as a workload of its own, unless it has no cgroup of its own.
fn whole(described: Described, instance: Instance) -> Resolved {
    let shared = Cgroup2Mounts::discover().is_ok_and(|mounts| instance.cgroup.path == mounts.mount_point());
    if shared {
        let why = "it runs in the root cgroup, and what is attached there is attached to everything";
        let Described { id, subject, unknown } = described;
        let reason = format!("container {} cannot be attached: {why}", subject.name);
        let sightings = vec![Sighting { subject, unknown }];
        return Resolved::Unreachable(Box::new(Unidentified { id: Some(id), sightings, reason }));
    }
    let Described { id, subject, unknown } = described;
    let reason =
        format!("of container {} it is not known what policies select on: {unknown:?}", subject.name);
    let what = (!unknown.is_empty()).then(|| {
        let sightings = vec![Sighting { subject: subject.clone(), unknown }];
        Box::new(Unidentified { id: Some(id.clone()), sightings, reason })
    });
    let workload = Box::new(Workload { id, subject, instance });
    match what {
        Some(what) => Resolved::Partly(workload, what),
        None => Resolved::Container(workload),
    }
}

fn by_specification(runtime: RuntimeKind, id: &ContainerId, spec: &Spec) -> Result<Described, ResolveError> {
    let name: WorkloadId = format!("{runtime}/{}", id.id).try_into()?;
    let unknown = vec![Facet::Name, Facet::Labels, Facet::Image];
    Ok(Described { id: name, subject: subject(runtime, id, spec), unknown })
}

/// What the specification says: neither labels nor an image.
pub(super) fn subject(runtime: RuntimeKind, id: &ContainerId, spec: &Spec) -> Subject {
    let executable = spec.program.as_ref().map(PathBuf::from).filter(|program| program.is_absolute());
    Subject { annotations: spec.annotations.clone(), executable, ..Subject::new(runtime, id.id.clone()) }
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;
    use pillion_common::hook::Point;

    use super::*;

    const STORE: &str = "/var/lib/containers/storage/overlay-containers/c1/userdata";
    const MOBY: &str = "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby/c1";

    #[derive(Debug)]
    enum Fake {
        Knows,
        KnowsNot,
        Fails,
    }

    impl Engine for Fake {
        fn describe<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Described>, AskError>> {
            let container = ContainerId { id: "web".into(), bundle: "/".into(), root: None };
            let described = by_specification(RuntimeKind::Docker, &container, &Spec::default());
            Box::pin(std::future::ready(match self {
                Self::Knows => Ok(described.ok().filter(|_| id == "c1")),
                Self::KnowsNot => Ok(None),
                Self::Fails => Err("silent".into()),
            }))
        }
    }

    fn held(bundle: &str) -> Container {
        Container {
            point: Point::Start,
            id: ContainerId { id: "c1".into(), bundle: bundle.into(), root: None },
            pid: std::process::id().try_into().expect("a pid fits an i32"),
            started: None,
            spec: Spec { program: Some("/bin/web".into()), ..Spec::default() },
        }
    }

    async fn resolved(engines: &Engines, bundle: &str) -> Result<(String, Option<PathBuf>), ResolveError> {
        match engines.resolve(&held(bundle)).await? {
            Resolved::Container(workload) | Resolved::Partly(workload, _) => {
                Ok((workload.id.as_str().to_owned(), workload.subject.executable.clone()))
            }
            // Where tests run in the root cgroup.
            Resolved::Unreachable(what) => panic!("run the tests in a cgroup: {}", what.reason),
            other => panic!("{other:?}"),
        }
    }

    fn in_root_cgroup() -> bool {
        let mounts = Cgroup2Mounts::discover().expect("this machine has cgroup2");
        let own = instance_in(&mounts, Pid(std::process::id().try_into().expect("fits")));
        own.expect("alive").cgroup.path == mounts.mount_point()
    }

    #[tokio::test]
    async fn engines_describe_their_own() {
        let with = |docker: Fake| Engines { docker: Some(Arc::new(docker)), ..Engines::default() };
        let unknown = with(Fake::KnowsNot).resolve(&held(MOBY)).await;
        assert!(matches!(unknown, Err(ResolveError::Unknown { .. })), "{unknown:?}");
        let failed = with(Fake::Fails).resolve(&held(MOBY)).await;
        assert!(matches!(failed, Err(ResolveError::Engine { .. })), "{failed:?}");
        let nobody = Engines::default()
            .resolve(&held("/run/containerd/io.containerd.runtime.v2.task/default/c1"))
            .await;
        assert!(matches!(nobody, Err(ResolveError::NoContainerd { .. })), "{nobody:?}");
        if in_root_cgroup() {
            return;
        }
        assert_eq!(resolved(&with(Fake::Knows), MOBY).await.expect("known").0, "docker/web");
        let program = Some(PathBuf::from("/bin/web"));
        for (engines, bundle, id) in [
            (Engines::default(), MOBY, "docker/c1"),
            (Engines::default(), STORE, "podman/c1"),
            (Engines { podman: Some(Arc::new(Fake::Fails)), ..Engines::default() }, STORE, "podman/c1"),
        ] {
            let (found, executable) = resolved(&engines, bundle).await.expect("described");
            assert_eq!((found.as_str(), &executable), (id, &program));
        }
        let (found, _) = resolved(&Engines::default(), "/home/me/bundle").await.expect("described");
        assert!(found.starts_with("process/"), "{found}");
    }

    #[test]
    fn of_what_is_known_in_part_more_policies_may_be_the_one() {
        let instance = || Instance {
            cgroup: pillion_workload::Cgroup { id: pillion_workload::CgroupId(1), path: "/cg/c1".into() },
            netns: pillion_workload::NetnsId { device: 1, inode: 1 },
            process: pillion_workload::ProcessId { pid: Pid(1), started: pillion_workload::StartTime(1) },
        };
        let container = ContainerId { id: "c1".into(), bundle: "/".into(), root: None };
        let described = by_specification(RuntimeKind::Podman, &container, &Spec::default()).expect("valid");
        let Resolved::Partly(workload, what) = whole(described.clone(), instance()) else {
            panic!("labels are not known")
        };
        assert_eq!((workload.id.as_str(), what.id.as_ref()), ("podman/c1", Some(&workload.id)));
        let [Sighting { subject, unknown }] = &what.sightings[..] else { panic!("{what:?}") };
        assert_eq!(
            (subject, &unknown[..]),
            (&workload.subject, &[Facet::Name, Facet::Labels, Facet::Image][..])
        );
        let known = Described { unknown: Vec::new(), ..described };
        assert!(matches!(whole(known, instance()), Resolved::Container(_)));
    }

    #[tokio::test]
    async fn the_dead_are_not_identified() {
        let dead = Container { pid: i32::MAX, ..held("/home/me/bundle") };
        let error = Engines::default().resolve(&dead).await.expect_err("it is dead");
        assert!(matches!(&error, ResolveError::Instance { source, .. } if source.is_gone()), "{error:?}");
    }
}
