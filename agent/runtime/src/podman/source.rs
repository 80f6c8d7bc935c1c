//! Follows Podman's containers by its files.
//!
//! Owns the interval. There is nobody to subscribe to: Podman has no daemon, and its journal is read by Podman alone. So the files are
//! looked at every two seconds; a gate is what holds a container. Ends are seen by pidfd, at once.

use std::time::Duration;

use pillion_workload::{FirstInstruction, Pid, Workload};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::PodmanFiles;
use crate::{
    RuntimeEvent, SourceName,
    cgroup2::Cgroup2Mounts,
    chain,
    docker::{ContainerId, Known, container_instance},
    hook::Described,
    inventory::Observation,
    tracker::{Closed, Tracker},
};

/// How often the files are looked at: a directory, and a file of a few bytes for each container.
const EVERY: Duration = Duration::from_secs(2);
/// Looks at everything although nothing seems to have changed, each so many times: a name may have.
const ALL_OF: u32 = 30;

/// Follows Podman without its API service.
#[derive(Debug, Clone, Copy)]
pub struct PodmanSource;

impl PodmanSource {
    /// Begins to watch. The task ends when `stop` is cancelled or when nobody receives events any more.
    pub fn spawn(
        files: PodmanFiles,
        events: mpsc::Sender<RuntimeEvent>,
        stop: CancellationToken,
    ) -> JoinHandle<()> {
        let known = Known::new(Tracker::new(SourceName::PODMAN, events));
        tokio::spawn(async move {
            // Ends only when nobody listens.
            stop.run_until_cancelled(run(files, known)).await;
        })
    }
}

async fn run(files: PodmanFiles, mut known: Known) -> Result<(), Closed> {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut up, mut told, mut last, mut unchanged) = (false, None, Vec::new(), 0);
    loop {
        known.during(ticks.tick()).await?;
        let processes = files.processes();
        if up && processes.as_ref().is_ok_and(|now| *now == last) && unchanged < ALL_OF {
            unchanged += 1;
            continue;
        }
        unchanged = 0;
        let looked = async { look(&files, &Cgroup2Mounts::discover().map_err(|error| chain(&error))?).await };
        match known.during(looked).await? {
            Ok(seen) => {
                last = processes.unwrap_or_default();
                let opening = (!up).then_some(RuntimeEvent::Up { source: SourceName::PODMAN });
                known.take_all(opening, seen).await?;
                (up, told) = (true, None);
            }
            Err(error) => {
                up = false;
                // One word for one cause, however often it is met.
                if told.as_ref() != Some(&error) {
                    let down = RuntimeEvent::Down { source: SourceName::PODMAN, error: error.clone() };
                    known.send(down).await?;
                    told = Some(error);
                }
            }
        }
    }
}

async fn look(
    files: &PodmanFiles,
    mounts: &Cgroup2Mounts,
) -> Result<Vec<(ContainerId, Observation)>, String> {
    let running = files.running().await.map_err(|error| chain(&error))?;
    let seen = running.into_iter().map(|(container, pid, Described { id, subject, .. })| {
        let seen = match instance(mounts, pid, &container) {
            Some(instance) => {
                let workload = Workload { id, subject, instance };
                Observation::Present(Box::new(workload), FirstInstruction::After)
            }
            None => Observation::Absent,
        };
        (container, seen)
    });
    Ok(seen.collect())
}

/// `None` when the process of the pidfile has ended, and its number perhaps been given to another.
fn instance(mounts: &Cgroup2Mounts, pid: Pid, id: &ContainerId) -> Option<pillion_workload::Instance> {
    match container_instance(mounts, pid, id) {
        Ok(instance) => instance,
        Err(error) if error.is_gone() => None,
        Err(error) => {
            tracing::warn!(engine = "podman", container = %id, error = chain(&error), "cannot identify the container");
            None
        }
    }
}
