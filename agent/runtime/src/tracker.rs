//! What a source knows of its workloads, with its runtime or without, and the telling of it.
//!
//! Owns the inventory, the exits and the sending of events. Never asks a runtime.

use std::{collections::BTreeMap, future::Future, pin::pin};

use pillion_workload::{ProcessId, Workload, WorkloadId};
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
    exits: Exits,
    events: mpsc::Sender<RuntimeEvent>,
}

impl Tracker {
    pub(crate) fn new(source: SourceName, events: mpsc::Sender<RuntimeEvent>) -> Self {
        Self { source, inventory: Inventory::default(), exits: Exits::default(), events }
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
        let events = self.inventory.observe(id, seen);
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
        let seen = seen.into_iter().map(|(id, seen)| (id.clone(), self.watch(&id, seen))).collect();
        // The snapshot says it all, so the differences need not be told.
        drop(self.inventory.reconcile(seen));
        let snapshot = self.inventory.snapshot(self.source);
        self.send(opening.into_iter().chain([snapshot]).collect()).await
    }

    pub(crate) fn ids(&self) -> Vec<WorkloadId> {
        self.inventory.ids().cloned().collect()
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
