//! What a source knows of its workloads, with its runtime or without, and the telling of it.
//!
//! Owns the inventory, the exits and the sending of events. Never asks a runtime.

use std::{collections::BTreeMap, future::Future, pin::pin};

use pillion_workload::{ProcessId, Subject, Workload, WorkloadId};
use tokio::sync::mpsc;

use crate::{
    RuntimeEvent, SourceName,
    exits::Exits,
    inventory::{Inventory, Observation},
};

/// Nobody receives events any more.
#[derive(Debug, thiserror::Error)]
#[error("the receiver of events is gone")]
pub(crate) struct Closed;

/// What is known of a runtime's workloads, whether it is there or not.
pub(crate) struct Tracker {
    source: SourceName,
    inventory: Inventory,
    /// What is there and cannot be attached.
    unreachable: BTreeMap<WorkloadId, (Box<Subject>, String)>,
    exits: Exits,
    events: mpsc::Sender<RuntimeEvent>,
}

impl Tracker {
    pub(crate) fn new(source: SourceName, events: mpsc::Sender<RuntimeEvent>) -> Self {
        Self {
            source,
            inventory: Inventory::default(),
            unreachable: BTreeMap::new(),
            exits: Exits::default(),
            events,
        }
    }

    /// Does something else, and reports exits meanwhile.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Closed> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                exit = self.exits.next() => self.exited(exit).await?,
            }
        }
    }

    /// Takes in a look at one workload.
    pub(crate) async fn observe(&mut self, id: &WorkloadId, seen: Observation) -> Result<(), Closed> {
        let seen = self.watch(id, seen);
        let told = self.reach(id, &seen);
        let mut events = self.inventory.observe(id, seen);
        events.extend(told);
        self.send(events).await
    }

    /// Takes in a glimpse at a new workload. It may be older than what is known, so it counts only when nothing is.
    pub(crate) async fn discover(&mut self, id: &WorkloadId, seen: Observation) -> Result<(), Closed> {
        if self.inventory.get(id).is_some() {
            return Ok(());
        }
        self.observe(id, seen).await
    }

    /// Takes in a look at everything and tells all of it: `opening`, then a snapshot.
    pub(crate) async fn snapshot(
        &mut self,
        opening: Vec<RuntimeEvent>,
        seen: BTreeMap<WorkloadId, Observation>,
    ) -> Result<(), Closed> {
        let seen: BTreeMap<_, _> =
            seen.into_iter().map(|(id, seen)| (id.clone(), self.watch(&id, seen))).collect();
        self.unreachable.retain(|id, _| seen.contains_key(id));
        for (id, seen) in &seen {
            self.reach(id, seen);
        }
        // The snapshot says it all, so the differences need not be told.
        drop(self.inventory.reconcile(seen));
        let snapshot = self.inventory.snapshot(self.source);
        let unreachable: Vec<RuntimeEvent> =
            self.unreachable.keys().map(|id| self.cannot_reach(id)).collect();
        self.send(opening.into_iter().chain([snapshot]).chain(unreachable).collect()).await
    }

    /// Remembers whether a workload can be reached, and tells it when that is news.
    fn reach(&mut self, id: &WorkloadId, seen: &Observation) -> Option<RuntimeEvent> {
        match seen {
            Observation::Unreachable(subject, reason) => {
                let known = self.unreachable.insert(id.clone(), (subject.clone(), reason.clone()));
                let same = known.is_some_and(|(before, why)| before == *subject && why == *reason);
                (!same).then(|| self.cannot_reach(id))
            }
            Observation::Present(..) => {
                // That it is there now says the rest.
                self.unreachable.remove(id);
                None
            }
            Observation::Absent => {
                self.unreachable.remove(id).map(|_| RuntimeEvent::Stopped { id: id.clone() })
            }
            Observation::Unclear => None,
        }
    }

    fn cannot_reach(&self, id: &WorkloadId) -> RuntimeEvent {
        match self.unreachable.get(id) {
            Some((subject, reason)) => RuntimeEvent::Unattachable {
                source: self.source,
                id: id.clone(),
                subject: subject.clone(),
                reason: reason.clone(),
            },
            None => RuntimeEvent::Stopped { id: id.clone() },
        }
    }

    pub(crate) fn ids(&self) -> Vec<WorkloadId> {
        self.inventory.ids().chain(self.unreachable.keys()).cloned().collect()
    }

    /// An instance that was not known gets a pidfd. One that has ended meanwhile is not told at all: the look at it may
    /// be older than its exit.
    fn watch(&self, id: &WorkloadId, seen: Observation) -> Observation {
        let Observation::Present(workload, _) = &seen else { return seen };
        let process = workload.instance.process;
        if self.inventory.get(id).is_some_and(|known: &Workload| known.instance.process == process) {
            return seen;
        }
        match self.exits.watch(id.clone(), process) {
            Ok(true) => seen,
            Ok(false) => Observation::Absent,
            Err(error) => {
                tracing::warn!(workload = %id, %error, "cannot wait for the workload's exit; relying on its runtime");
                seen
            }
        }
    }

    async fn exited(&mut self, exit: (WorkloadId, ProcessId)) -> Result<(), Closed> {
        let (id, process) = exit;
        let stopped = self.inventory.exited(&id, process);
        self.send(stopped.into_iter().collect()).await
    }

    pub(crate) async fn send(&mut self, events: Vec<RuntimeEvent>) -> Result<(), Closed> {
        for event in events {
            self.events.send(event).await.map_err(|_| Closed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::RuntimeKind;

    use super::*;

    fn unreachable(reason: &str) -> Observation {
        let subject = Subject::new(RuntimeKind::Containerd, "sandboxed");
        Observation::Unreachable(Box::new(subject), reason.to_owned())
    }

    /// What cannot be attached is told once, after each snapshot again, and when it is gone.
    #[tokio::test]
    async fn what_cannot_be_reached_is_told() {
        let (events, mut told) = mpsc::channel(16);
        let mut tracker = Tracker::new(SourceName::CONTAINERD, events);
        let id: WorkloadId = "containerd/default/sandboxed".parse().expect("valid");
        for seen in [unreachable("gVisor"), unreachable("gVisor"), Observation::Unclear, unreachable("Kata")]
        {
            tracker.observe(&id, seen).await.expect("somebody listens");
        }
        assert_eq!(tracker.ids(), std::slice::from_ref(&id));
        tracker.snapshot(vec![], BTreeMap::from([(id.clone(), unreachable("Kata"))])).await.expect("heard");
        tracker.observe(&id, Observation::Absent).await.expect("heard");
        tracker.observe(&id, Observation::Absent).await.expect("heard");
        tracker.observe(&id, unreachable("again")).await.expect("heard");
        tracker.snapshot(vec![], BTreeMap::new()).await.expect("heard");
        drop(tracker);
        let mut words = Vec::new();
        while let Some(event) = told.recv().await {
            words.push(match event {
                RuntimeEvent::Unattachable { reason, .. } => reason,
                RuntimeEvent::Snapshot { workloads, .. } => format!("snapshot of {}", workloads.len()),
                RuntimeEvent::Stopped { .. } => "stopped".to_owned(),
                other => panic!("{other:?}"),
            });
        }
        assert_eq!(words, ["gVisor", "Kata", "snapshot of 0", "Kata", "stopped", "again", "snapshot of 0"]);
    }
}
