//! Holding: from what the runtime tells of a pod and a container to the gate's question, and back.
//!
//! Owns the finding of the workload and the end of a hold whose container ends. Never holds longer than it is told.

use std::path::PathBuf;

use pillion_workload::{Facet, Gate, Instance, InvalidName, Pid, Sighting, Workload};
use tokio::time::{Instant, timeout_at};

use super::{
    messages::{Container, PodSandbox},
    plugin::{Answer, Event},
};
use crate::{
    Admission, ContainerdResolver, Gatekeeper, Resolved, Unidentified, UnresolvedError,
    cgroup2::{Cgroup2Error, Cgroup2Mounts},
    chain,
    instance::{InstanceError, instance_in},
    pidfd::Pidfd,
    pod::{self, Pod, PodError},
};

/// Asks the gate for what the runtime tells. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Holder {
    gatekeeper: Gatekeeper,
    resolver: ContainerdResolver,
}

/// Why it cannot be said what is held.
#[derive(Debug, thiserror::Error)]
enum HoldError {
    #[error("cannot find cgroups")]
    Cgroups(#[from] Cgroup2Error),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error(transparent)]
    Unresolved(#[from] UnresolvedError),
    #[error("containerd did not tell in time which workload it belongs to")]
    Late,
    #[error("the runtime does not tell its process")]
    NoProcess,
}

impl HoldError {
    /// Whether what was to be held has just ended.
    fn is_gone(&self) -> bool {
        match self {
            Self::Instance(error) => error.is_gone(),
            Self::Pod(error) => error.is_gone(),
            Self::Unresolved(UnresolvedError::Instance { source, .. }) => source.is_gone(),
            Self::Unresolved(UnresolvedError::Pod { source, .. }) => source.is_gone(),
            Self::Unresolved(_) | Self::Cgroups(_) | Self::Name(_) | Self::Late | Self::NoProcess => false,
        }
    }
}

/// What is held.
enum Held {
    /// A workload, or a part of one.
    Workload {
        workload: Box<Workload>,
        /// The container's own process, in which nothing of it has run yet.
        container: Instance,
    },
    /// Nothing that could be attached.
    Unreachable(Unidentified),
    /// No workload.
    Nothing,
}

impl Holder {
    pub(super) fn new(gatekeeper: Gatekeeper, resolver: ContainerdResolver) -> Self {
        Self { gatekeeper, resolver }
    }

    /// Handles one event, by `deadline` at the latest.
    pub(super) async fn handle(&self, event: Event, deadline: Instant) -> Answer {
        match event {
            Event::RunPodSandbox(pod) => self.announce(&pod, deadline).await,
            Event::StartContainer(pod, container) => self.hold(&pod, &container, deadline).await,
        }
    }

    /// Nothing of a sandbox is to be held; an error would leave its process behind.
    async fn announce(&self, sandbox: &PodSandbox, deadline: Instant) -> Answer {
        match whole_pod(sandbox) {
            Ok(Some(workload)) => {
                let id = workload.id.clone();
                if self.gatekeeper.announce(Gate::Nri, workload, deadline).await.is_err() {
                    tracing::warn!(workload = %id, "the pod could not be announced; its containers are held all the same");
                }
            }
            // Each of its containers is held for itself.
            Ok(None) => {}
            Err(error) if error.is_gone() => {}
            Err(error) => {
                tracing::warn!(pod = sandbox.id, error = chain(&error), "cannot identify the pod's sandbox");
            }
        }
        Answer::Empty
    }

    async fn hold(&self, pod: &PodSandbox, container: &Container, deadline: Instant) -> Answer {
        let (workload, own) = match self.find(pod, container, deadline).await {
            Ok(Held::Workload { workload, container }) => (workload, container),
            Ok(Held::Unreachable(what)) => return self.without_identity(what),
            Ok(Held::Nothing) => return Answer::Empty,
            Err(error) => {
                let reason = format!("container {} cannot be identified: {}", container.id, chain(&error));
                let id = Pod::id(&pod.id).ok();
                return self.without_identity(Unidentified {
                    id,
                    sightings: sightings(pod, container),
                    reason,
                });
            }
        };
        let id = workload.id.clone();
        // A deleted pod loses its sandbox first, and a killed container its process: neither is worth waiting for.
        let ended = [Pidfd::open(own.process), Pidfd::open(workload.instance.process)];
        if ended.iter().any(|process| matches!(process, Ok(None))) {
            return ended_while_held();
        }
        tracing::debug!(workload = %id, container = container.id, "held before its start");
        let [of_container, of_pod] = ended.map(|process| process.ok().flatten());
        let known = Sighting::from(workload.subject.clone());
        tokio::select! {
            admission = self.gatekeeper.admit(Gate::Nri, *workload, deadline) => match admission {
                Ok(admission) => answer(&admission),
                Err(undecided) => self.without_identity(Unidentified {
                    id: Some(id),
                    sightings: vec![known],
                    reason: undecided.to_string(),
                }),
            },
            () = end_of(of_container) => ended_while_held(),
            () = end_of(of_pod) => ended_while_held(),
        }
    }

    fn without_identity(&self, what: Unidentified) -> Answer {
        answer(&self.gatekeeper.without_identity(Gate::Nri, what))
    }

    async fn find(
        &self,
        pod: &PodSandbox,
        container: &Container,
        deadline: Instant,
    ) -> Result<Held, HoldError> {
        let mounts = Cgroup2Mounts::discover()?;
        if container.pid == 0 {
            return Err(HoldError::NoProcess);
        }
        let pid = pid(container.pid);
        let own = instance_in(&mounts, pid)?;
        let known = described(pod);
        if own.cgroup.path.parent().is_some_and(|parent| known.owns(parent)) {
            let instance = known.instance_beside(&mounts, &own.cgroup.path, &container.id, &pod.id)?;
            let workload = Workload { id: Pod::id(&pod.id)?, subject: known.subject(), instance };
            return Ok(Held::Workload { workload: Box::new(workload), container: own });
        }
        // A workload of its own, of which containerd's record knows more than the runtime tells here.
        let asked = self.resolver.resolve(pod::NAMESPACE, &container.id, pid);
        Ok(match timeout_at(deadline, asked).await.map_err(|_| HoldError::Late)?? {
            Resolved::Container(workload)
            | Resolved::Partly(workload, _)
            | Resolved::Sandbox(workload)
            | Resolved::Member(workload) => Held::Workload { workload, container: own },
            Resolved::Unreachable(what) => Held::Unreachable(*what),
            Resolved::Nothing(reason) => {
                tracing::debug!(container = container.id, reason, "no workload");
                Held::Nothing
            }
        })
    }
}

/// What a container may be by the runtime's word alone: a part of its pod, or a workload of its own.
fn sightings(pod: &PodSandbox, container: &Container) -> Vec<Sighting> {
    let known = described(pod);
    let of_pod = known.subject();
    let mut own = of_pod.clone();
    own.labels.extend(container.labels.clone());
    own.name.clone_from(&container.name);
    own.executable = container.args.first().map(PathBuf::from).filter(|program| program.is_absolute());
    // containerd's record has the name under which it is selected.
    vec![of_pod.into(), Sighting { subject: own, unknown: vec![Facet::Image, Facet::Name] }]
}

/// The pod as a workload, from its sandbox; `None` when it is none of its own.
fn whole_pod(sandbox: &PodSandbox) -> Result<Option<Workload>, HoldError> {
    let own = instance_in(&Cgroup2Mounts::discover()?, pid(sandbox.pid))?;
    let known = described(sandbox);
    match known.instance_of_sandbox(&own.cgroup.path, &own) {
        Ok(instance) => Ok(Some(Workload { id: Pod::id(&sandbox.id)?, subject: known.subject(), instance })),
        Err(PodError::Shared { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn described(pod: &PodSandbox) -> Pod {
    Pod {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        uid: pod.uid.clone(),
        labels: pod.labels.clone(),
        annotations: pod.annotations.clone(),
    }
}

/// A pid that is none is that of a process that is gone.
fn pid(pid: u32) -> Pid {
    Pid(i32::try_from(pid).unwrap_or(0))
}

fn answer(admission: &Admission) -> Answer {
    match (admission.admits(), admission.message()) {
        (false, message) => Answer::refused(message.unwrap_or_default()),
        (true, Some(message)) => {
            tracing::warn!("{message}");
            Answer::Empty
        }
        (true, None) => Answer::Empty,
    }
}

fn ended_while_held() -> Answer {
    Answer::refused("pillion: it ended while it was held".to_owned())
}

/// The end of a process; never, when that cannot be watched.
async fn end_of(process: Option<Pidfd>) {
    match process {
        Some(process) if process.ended().await.is_ok() => {}
        Some(_) | None => std::future::pending().await,
    }
}
