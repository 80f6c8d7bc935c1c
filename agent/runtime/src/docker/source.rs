//! The task that keeps a connection to an engine for ever, and which workload each container is.
//!
//! Owns the attempts to connect and the names. Never gives up, and never declares a workload gone because the engine is.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    future::Future,
};

use pillion_workload::WorkloadId;
use tokio::{sync::mpsc, task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{ContainerId, EngineConfig, session};
use crate::{
    RuntimeEvent,
    backoff::Backoff,
    chain,
    inventory::Observation,
    tracker::{Closed, Tracker},
};

/// Watches one engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineSource;

impl EngineSource {
    /// Begins to watch. The task ends when `stop` is cancelled or when nobody receives events any more.
    ///
    /// When the receiver is slow the source waits for it; what happens meanwhile is told later, at worst as a snapshot.
    pub fn spawn(
        config: EngineConfig,
        events: mpsc::Sender<RuntimeEvent>,
        stop: CancellationToken,
    ) -> JoinHandle<()> {
        let known = Known::new(Tracker::new(config.engine.source(), events));
        tokio::spawn(async move {
            stop.run_until_cancelled(run(config, known)).await;
        })
    }
}

async fn run(config: EngineConfig, mut known: Known) {
    let mut backoff = Backoff::new(config.backoff);
    let mut told = None;
    loop {
        let error = match session::run(&config, &mut known).await {
            Ok(session::Ended { error, was_up }) => {
                if was_up {
                    backoff.reset();
                    told = None;
                }
                chain(&error)
            }
            Err(Closed) => return,
        };
        // One word for one cause, however often it is met.
        if told.as_ref() != Some(&error) {
            let down = RuntimeEvent::Down { source: config.engine.source(), error: error.clone() };
            if known.send(down).await.is_err() {
                return;
            }
            told = Some(error);
        }
        if known.during(sleep(backoff.pause())).await.is_err() {
            return;
        }
    }
}

/// What is known of an engine's containers. A workload has its container's name, and names change hands: by renaming, or when
/// a container is removed and another made.
pub(crate) struct Known {
    tracker: Tracker,
    ids: BTreeMap<ContainerId, WorkloadId>,
}

impl Known {
    pub(crate) fn new(tracker: Tracker) -> Self {
        Self { tracker, ids: BTreeMap::new() }
    }

    /// Does something else, and reports exits meanwhile.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Closed> {
        self.tracker.during(work).await
    }

    /// Takes in a look at one container.
    pub(crate) async fn observe(&mut self, container: &ContainerId, seen: Observation) -> Result<(), Closed> {
        match &seen {
            Observation::Present(workload, _) => {
                let id = workload.id.clone();
                self.ids.retain(|other, theirs| other == container || *theirs != id);
                if let Some(before) = self.ids.insert(container.clone(), id.clone())
                    && before != id
                {
                    self.tracker.observe(&before, Observation::Absent).await?;
                }
                self.tracker.observe(&id, seen).await
            }
            // An engine's own look makes none that it cannot reach.
            Observation::Absent | Observation::Unreachable(..) => match self.ids.remove(container) {
                Some(id) => self.tracker.observe(&id, seen).await,
                None => Ok(()),
            },
            Observation::Unclear => Ok(()),
        }
    }

    /// Takes in a look at everything and tells all of it: `opening`, then a snapshot.
    pub(crate) async fn snapshot(
        &mut self,
        opening: Vec<RuntimeEvent>,
        seen: Vec<(ContainerId, Observation)>,
    ) -> Result<(), Closed> {
        let mut ids = BTreeMap::new();
        let mut observations = BTreeMap::new();
        for (container, seen) in seen {
            let id = match &seen {
                Observation::Present(workload, _) => workload.id.clone(),
                Observation::Absent | Observation::Unreachable(..) => continue,
                Observation::Unclear => match self.ids.get(&container) {
                    Some(id) => id.clone(),
                    None => continue,
                },
            };
            match observations.entry(id.clone()) {
                Entry::Vacant(entry) => _ = entry.insert(seen),
                // The name of one that was not seen is another's by now.
                Entry::Occupied(mut entry) if *entry.get() == Observation::Unclear => _ = entry.insert(seen),
                Entry::Occupied(_) => continue,
            }
            ids.retain(|_, theirs| *theirs != id);
            ids.insert(container, id);
        }
        self.ids = ids;
        self.tracker.snapshot(opening, observations).await
    }

    /// Takes in a look at everything: as a snapshot after `opening`, else told as what has changed.
    pub(crate) async fn take_all(
        &mut self,
        opening: Option<RuntimeEvent>,
        seen: Vec<(ContainerId, Observation)>,
    ) -> Result<(), Closed> {
        if let Some(opening) = opening {
            return self.snapshot(vec![opening], seen).await;
        }
        let gone: Vec<ContainerId> =
            self.ids.keys().filter(|id| !seen.iter().any(|(seen, _)| seen == *id)).cloned().collect();
        for container in gone {
            self.observe(&container, Observation::Absent).await?;
        }
        for (container, seen) in seen {
            self.observe(&container, seen).await?;
        }
        Ok(())
    }

    /// Tells something else.
    pub(crate) async fn send(&mut self, event: RuntimeEvent) -> Result<(), Closed> {
        self.tracker.send(vec![event]).await
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::{Cgroup, CgroupId, FirstInstruction, Instance, NetnsId, Pid, ProcessId, Workload};

    use super::*;
    use crate::{
        docker::{EngineKind, api},
        instance::start_time,
    };

    fn container(number: u8) -> ContainerId {
        format!("{number:02x}").repeat(32).parse().expect("valid")
    }

    /// A container whose first process is this one, so that it is alive.
    fn present(name: &str, cgroup: u64) -> Observation {
        let pid = Pid(std::process::id().try_into().expect("a pid fits an i32"));
        let subject = api::subject(EngineKind::Docker, name, None, None, None);
        let instance = Instance {
            cgroup: Cgroup { id: CgroupId(cgroup), path: "/sys/fs/cgroup/x".into() },
            netns: NetnsId { device: 4, inode: 1 },
            process: ProcessId { pid, started: start_time(pid).expect("alive") },
        };
        let id = EngineKind::Docker.workload_id(name).expect("valid");
        Observation::Present(Box::new(Workload { id, subject, instance }), FirstInstruction::After)
    }

    fn told(received: &mut mpsc::Receiver<RuntimeEvent>) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(event) = received.try_recv() {
            told.push(match event {
                RuntimeEvent::Started { workload, .. } => format!("+{}", workload.id),
                RuntimeEvent::Changed { workload } => format!("~{}", workload.id),
                RuntimeEvent::Stopped { id } => format!("-{id}"),
                RuntimeEvent::Snapshot { workloads, .. } => {
                    let ids: Vec<String> =
                        workloads.iter().map(|(workload, _)| workload.id.to_string()).collect();
                    format!("={}", ids.join(","))
                }
                RuntimeEvent::Up { .. } | RuntimeEvent::Down { .. } | RuntimeEvent::Unattachable { .. } => {
                    "?".to_owned()
                }
            });
        }
        told
    }

    #[tokio::test]
    async fn names_change_hands() {
        let (events, mut received) = mpsc::channel(64);
        let mut known = Known::new(Tracker::new(EngineKind::Docker.source(), events));
        let (a, b) = (container(1), container(2));
        for (container, seen, expected) in [
            (&a, present("web", 1), &["+docker/web"][..]),
            (&a, present("web", 1), &[]),
            // Renamed, and its name given to another.
            (&a, present("old", 1), &["-docker/web", "+docker/old"]),
            (&b, present("web", 2), &["+docker/web"]),
            (&a, Observation::Unclear, &[]),
            // Removed, and its name given to another before the removal was heard of.
            (&b, present("old", 2), &["-docker/web", "-docker/old", "+docker/old"]),
            (&a, Observation::Absent, &[]),
            (&b, Observation::Absent, &["-docker/old"]),
            (&b, Observation::Absent, &[]),
        ] {
            known.observe(container, seen).await.expect("the receiver is there");
            assert_eq!(told(&mut received), expected);
        }
    }

    #[tokio::test]
    async fn a_snapshot_keeps_what_could_not_be_seen_and_forgets_what_is_not_there() {
        let (events, mut received) = mpsc::channel(64);
        let mut known = Known::new(Tracker::new(EngineKind::Docker.source(), events));
        let (a, b, c) = (container(1), container(2), container(3));
        let seen = vec![(a.clone(), present("a", 1)), (b.clone(), present("b", 2))];
        known.snapshot(Vec::new(), seen).await.expect("the receiver is there");
        let seen = vec![(b.clone(), Observation::Unclear), (c.clone(), Observation::Unclear)];
        known.snapshot(Vec::new(), seen).await.expect("the receiver is there");
        let seen = vec![(b, Observation::Unclear), (c, present("b", 3))];
        known.snapshot(Vec::new(), seen).await.expect("the receiver is there");
        known.observe(&a, Observation::Absent).await.expect("the receiver is there");
        assert_eq!(told(&mut received), ["=docker/a,docker/b", "=docker/b", "=docker/b"]);
        assert_eq!(known.ids.len(), 1);
    }
}
