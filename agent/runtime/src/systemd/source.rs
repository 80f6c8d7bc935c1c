//! The task that keeps a connection to systemd for ever, and what is known between connections.
//!
//! Owns the inventory and the sending of events. Never gives up, and never declares a unit gone because the bus is.

use std::{collections::BTreeMap, sync::Arc};

use pillion_workload::WorkloadId;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{
    SystemdConfig, UnitSelection,
    hold::{Told, Units},
    look::{Look, Seen},
    session,
};
use crate::{
    RuntimeEvent, SourceName,
    backoff::Backoff,
    chain,
    inventory::{Inventory, Observation},
};

/// Hooks whose units wait to be taken note of.
const QUEUE: usize = 64;

/// Watches one systemd.
#[derive(Debug, Clone, Copy)]
pub struct SystemdSource;

impl SystemdSource {
    /// Begins to watch. The task ends when `stop` is cancelled or when nobody receives events any more.
    ///
    /// `selection` says which units are to be held; while it says nothing, drop-ins stay as they are.
    pub fn spawn(
        config: SystemdConfig,
        events: mpsc::Sender<RuntimeEvent>,
        selection: watch::Receiver<Option<Arc<dyn UnitSelection>>>,
        stop: CancellationToken,
    ) -> (JoinHandle<()>, Units) {
        let (current, looks) = watch::channel(None);
        let (told, tell) = mpsc::channel(QUEUE);
        let tracker = Tracker::new(events, tell);
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(Box::pin(run(config, tracker, selection, current))).await;
        });
        (task, Units::new(looks, told))
    }
}

/// Nobody receives events any more.
#[derive(Debug, thiserror::Error)]
#[error("the receiver of events is gone")]
pub(super) struct Closed;

async fn run(
    config: SystemdConfig,
    mut tracker: Tracker,
    selection: watch::Receiver<Option<Arc<dyn UnitSelection>>>,
    current: watch::Sender<Option<Look>>,
) {
    let mut backoff = Backoff::new(config.backoff);
    let mut told = None;
    loop {
        let (error, was_up) = match session::run(&config, &mut tracker, selection.clone(), &current).await {
            Ok(ended) => ended,
            Err(Closed) => return,
        };
        current.send_replace(None);
        if was_up {
            backoff.reset();
            told = None;
        }
        let error = chain(&error);
        // One word for one cause, however often it is met.
        if told.as_ref() != Some(&error) {
            let down = RuntimeEvent::Down { source: SourceName::SYSTEMD, error: error.clone() };
            if tracker.send(vec![down]).await.is_err() {
                return;
            }
            told = Some(error);
        }
        if tracker.during(sleep(backoff.pause())).await.is_err() {
            return;
        }
    }
}

/// A moment in the tracker's order of things.
#[derive(Debug, Clone, Copy)]
pub(super) struct Since(u64);

/// What is known of systemd's workloads, whether it is there or not.
#[derive(Debug)]
pub(super) struct Tracker {
    inventory: Inventory,
    /// Which start of each known unit.
    invocations: BTreeMap<WorkloadId, Vec<u8>>,
    /// How many hooks have asked, and for each known unit after how many its own did: a look that began before that has seen
    /// the unit as it was then.
    asked: u64,
    holds: BTreeMap<WorkloadId, u64>,
    events: mpsc::Sender<RuntimeEvent>,
    told: mpsc::Receiver<Told>,
}

impl Tracker {
    fn new(events: mpsc::Sender<RuntimeEvent>, told: mpsc::Receiver<Told>) -> Self {
        Self {
            inventory: Inventory::default(),
            invocations: BTreeMap::new(),
            asked: 0,
            holds: BTreeMap::new(),
            events,
            told,
        }
    }

    /// Does something else, and takes note of held units meanwhile.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Closed> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                // Without anybody who asks there is nothing to take note of.
                Some(told) = self.told.recv() => self.held(told).await?,
            }
        }
    }

    /// A hook asks for a unit. From here on it is known, so that its end will be told whatever becomes of it.
    ///
    /// The same instance with another invocation is one that has kept its cgroup, with a process of before in it. Its
    /// attachment is in force and stays: detaching it would open a gap.
    async fn held(&mut self, told: Told) -> Result<(), Closed> {
        let Told { workload, invocation, done } = told;
        let id = workload.id.clone();
        self.invocations.insert(id.clone(), invocation);
        self.asked += 1;
        self.holds.insert(id.clone(), self.asked);
        let present = Observation::Present(Box::new(workload), pillion_workload::FirstInstruction::Before);
        let events = self.inventory.observe(&id, present);
        self.send(events).await?;
        // Who asked may have gone meanwhile.
        let _ = done.send(());
        Ok(())
    }

    /// To be asked before a look, and given with what it has seen.
    pub(super) fn now(&self) -> Since {
        Since(self.asked)
    }

    /// Takes in a look at one unit. False when it is too old to count.
    pub(super) async fn observe(
        &mut self,
        id: &WorkloadId,
        seen: Seen,
        since: Since,
    ) -> Result<bool, Closed> {
        if self.is_older(id, since) {
            return Ok(false);
        }
        let mut events = Vec::new();
        if self.is_restarted(id, &seen) {
            events.extend(self.inventory.observe(id, Observation::Absent));
        }
        self.note(id, &seen);
        events.extend(self.inventory.observe(id, seen.observation));
        self.send(events).await?;
        Ok(true)
    }

    fn is_older(&self, id: &WorkloadId, since: Since) -> bool {
        self.holds.get(id).is_some_and(|held| *held > since.0)
    }

    /// Takes in a look at everything and tells all of it: `opening`, then a snapshot.
    pub(super) async fn snapshot(
        &mut self,
        opening: Vec<RuntimeEvent>,
        mut seen: BTreeMap<WorkloadId, Seen>,
        since: Since,
    ) -> Result<(), Closed> {
        for id in self.holds.iter().filter(|(_, held)| **held > since.0).map(|(id, _)| id.clone()) {
            seen.insert(id, Seen { observation: Observation::Unclear, invocation: Vec::new() });
        }
        let mut events = Vec::new();
        for (id, seen) in &seen {
            // A snapshot tells another instance, but not another start of the same.
            if self.is_restarted(id, seen) {
                events.extend(self.inventory.observe(id, Observation::Absent));
            }
            self.note(id, seen);
        }
        events.extend(opening);
        let seen = seen.into_iter().map(|(id, seen)| (id, seen.observation)).collect();
        // The snapshot says it all, so the differences need not be told.
        drop(self.inventory.reconcile(seen));
        events.push(self.inventory.snapshot(SourceName::SYSTEMD));
        self.send(events).await
    }

    pub(super) fn ids(&self) -> Vec<WorkloadId> {
        self.inventory.ids().cloned().collect()
    }

    /// Another start of a unit that looks the same, because its cgroup has stayed.
    fn is_restarted(&self, id: &WorkloadId, seen: &Seen) -> bool {
        let Observation::Present(workload, _) = &seen.observation else { return false };
        self.inventory.get(id).is_some_and(|known| known.instance == workload.instance)
            && self.invocations.get(id).is_some_and(|known| *known != seen.invocation)
    }

    fn note(&mut self, id: &WorkloadId, seen: &Seen) {
        match seen.observation {
            Observation::Present(..) => _ = self.invocations.insert(id.clone(), seen.invocation.clone()),
            Observation::Absent | Observation::Unreachable(..) => {
                self.invocations.remove(id);
                self.holds.remove(id);
            }
            Observation::Unclear => {}
        }
    }

    async fn send(&mut self, events: Vec<RuntimeEvent>) -> Result<(), Closed> {
        for event in events {
            self.events.send(event).await.map_err(|_| Closed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::{
        Cgroup, CgroupId, FirstInstruction, Instance, NetnsId, Pid, ProcessId, RuntimeKind, StartTime,
        Subject, Workload,
    };
    use tokio::sync::oneshot;

    use super::*;
    use crate::systemd::UnitName;

    fn workload(cgroup: u64) -> Workload {
        let unit = UnitName::try_from("a.service").expect("valid");
        let subject =
            Subject { unit: Some(unit.to_string()), ..Subject::new(RuntimeKind::Systemd, unit.to_string()) };
        let instance = Instance {
            cgroup: Cgroup { id: CgroupId(cgroup), path: "/sys/fs/cgroup/system.slice/a.service".into() },
            netns: NetnsId { device: 4, inode: 1 },
            process: ProcessId { pid: Pid(1), started: StartTime(0) },
        };
        Workload { id: unit.id(), subject, instance }
    }

    fn present(cgroup: u64, invocation: u8) -> Seen {
        let observation = Observation::Present(Box::new(workload(cgroup)), FirstInstruction::After);
        Seen { observation, invocation: vec![invocation] }
    }

    fn absent() -> Seen {
        Seen { observation: Observation::Absent, invocation: Vec::new() }
    }

    fn tracker() -> (Tracker, mpsc::Receiver<RuntimeEvent>, mpsc::Sender<Told>) {
        let (events, received) = mpsc::channel(64);
        let (told, tell) = mpsc::channel(4);
        let tracker = Tracker::new(events, tell);
        (tracker, received, told)
    }

    /// The events so far, by name.
    fn told(received: &mut mpsc::Receiver<RuntimeEvent>) -> Vec<String> {
        let mut names = Vec::new();
        while let Ok(event) = received.try_recv() {
            names.push(match event {
                RuntimeEvent::Started { workload, .. } => {
                    format!("started {}", workload.instance.cgroup.id.0)
                }
                RuntimeEvent::Stopped { .. } => "stopped".to_owned(),
                RuntimeEvent::Snapshot { workloads, .. } => format!("snapshot of {}", workloads.len()),
                other => format!("{other:?}"),
            });
        }
        names
    }

    #[tokio::test]
    async fn a_restart_is_told_also_when_the_cgroup_stays() {
        let (mut tracker, mut events, _told) = tracker();
        let id = workload(1).id;
        for (seen, wanted) in [
            (present(1, 1), &["started 1"][..]),
            (present(1, 1), &[]),
            (present(1, 2), &["stopped", "started 1"]),
            (present(2, 3), &["stopped", "started 2"]),
            (absent(), &["stopped"]),
            (absent(), &[]),
        ] {
            let now = tracker.now();
            assert!(tracker.observe(&id, seen, now).await.expect("received"));
            assert_eq!(told(&mut events), wanted);
        }
        let now = tracker.now();
        assert!(tracker.observe(&id, present(1, 1), now).await.expect("received"));
        assert_eq!(told(&mut events), ["started 1"]);
        let seen = BTreeMap::from([(id.clone(), present(1, 2))]);
        tracker.snapshot(Vec::new(), seen, now).await.expect("received");
        assert_eq!(told(&mut events), ["stopped", "snapshot of 1"]);
    }

    #[tokio::test]
    async fn a_held_unit_is_known_and_its_end_is_told() {
        let (mut tracker, mut events, tell) = tracker();
        let id = workload(1).id;
        let asked = |cgroup, invocation| {
            let (done, held) = oneshot::channel();
            (Told { workload: workload(cgroup), invocation: vec![invocation], done }, held)
        };
        let early = tracker.now();
        let (message, held) = asked(1, 1);
        tell.send(message).await.expect("received");
        tracker.during(async { held.await.expect("taken note of") }).await.expect("received");
        assert_eq!(told(&mut events), ["started 1"]);
        // What began to be looked at before it was held was not there yet.
        assert!(!tracker.observe(&id, absent(), early).await.expect("received"));
        tracker.snapshot(Vec::new(), BTreeMap::new(), early).await.expect("received");
        assert_eq!(told(&mut events), ["snapshot of 1"]);
        let now = tracker.now();
        assert!(tracker.observe(&id, present(1, 1), now).await.expect("received"));
        assert!(told(&mut events).is_empty(), "a look at what is known");

        // The same cgroup with another start that asked: the attachment stays.
        let (message, held) = asked(1, 2);
        tell.send(message).await.expect("received");
        tracker.during(async { held.await.expect("taken note of") }).await.expect("received");
        let now = tracker.now();
        assert!(tracker.observe(&id, present(1, 2), now).await.expect("received"));
        assert!(told(&mut events).is_empty());
        assert!(tracker.observe(&id, absent(), now).await.expect("received"));
        assert_eq!(told(&mut events), ["stopped"]);
    }
}
