//! The task that keeps a connection to containerd for ever, and what is known between connections.
//!
//! Owns the inventory, the exits and the sending of events. Never gives up, and never declares a workload gone because
//! containerd is.

use std::{collections::BTreeMap, future::Future, pin::pin};

use pillion_workload::{Workload, WorkloadId};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{ContainerdConfig, ContainerdResolver, FirstInstructionProbe, Key, client::Client, session};
use crate::{
    RuntimeEvent, SourceName,
    backoff::Backoff,
    chain,
    exits::Exits,
    inventory::{Inventory, Observation},
};

/// Watches one containerd.
#[derive(Debug, Clone, Copy)]
pub struct ContainerdSource;

impl ContainerdSource {
    /// Begins to watch. The task ends when `stop` is cancelled or when nobody receives events any more.
    ///
    /// When the receiver is slow the source waits for it; what happens meanwhile is told later, at worst as a snapshot.
    pub fn spawn(
        config: ContainerdConfig,
        events: mpsc::Sender<RuntimeEvent>,
        stop: CancellationToken,
    ) -> (JoinHandle<()>, FirstInstructionProbe, ContainerdResolver) {
        let (current, probe) = watch::channel(None);
        let tracker = Tracker { inventory: Inventory::default(), exits: Exits::default(), events };
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(run(config, tracker, current)).await;
        });
        (task, FirstInstructionProbe::new(probe.clone()), ContainerdResolver::new(probe))
    }
}

/// Nobody receives events any more.
#[derive(Debug, thiserror::Error)]
#[error("the receiver of events is gone")]
pub(super) struct Closed;

async fn run(config: ContainerdConfig, mut tracker: Tracker, current: watch::Sender<Option<Client>>) {
    let mut backoff = Backoff::new(config.backoff);
    let mut told = None;
    loop {
        let error = match session::run(&config, &mut tracker, &current).await {
            Ok(session::Ended { error, was_up }) => {
                if was_up {
                    backoff.reset();
                    told = None;
                }
                chain(&error)
            }
            Err(Closed) => return,
        };
        current.send_replace(None);
        // One word for one cause, however often it is met.
        if told.as_ref() != Some(&error) {
            let down = RuntimeEvent::Down { source: SourceName::CONTAINERD, error: error.clone() };
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

/// What is known of containerd's workloads, whether it is there or not.
pub(super) struct Tracker {
    inventory: Inventory,
    exits: Exits,
    events: mpsc::Sender<RuntimeEvent>,
}

impl Tracker {
    /// Does something else, and reports exits meanwhile.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Closed> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                exit = self.exits.next() => self.exited(exit).await?,
            }
        }
    }

    /// Takes in a look at one workload.
    pub(super) async fn observe(&mut self, id: &WorkloadId, seen: Observation) -> Result<(), Closed> {
        let seen = self.watch(id, seen);
        let events = self.inventory.observe(id, seen);
        self.send(events).await
    }

    /// Takes in a glimpse at a new workload. It may be older than what is known, so it counts only when nothing is.
    pub(super) async fn discover(&mut self, key: &Key, seen: Observation) -> Result<(), Closed> {
        match key.workload_id() {
            Ok(id) if self.inventory.get(&id).is_none() => self.observe(&id, seen).await,
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Takes in a look at everything and tells all of it: `opening`, then a snapshot.
    pub(super) async fn snapshot(
        &mut self,
        opening: Vec<RuntimeEvent>,
        seen: BTreeMap<WorkloadId, Observation>,
    ) -> Result<(), Closed> {
        let seen = seen.into_iter().map(|(id, seen)| (id.clone(), self.watch(&id, seen))).collect();
        // The snapshot says it all, so the differences need not be told.
        drop(self.inventory.reconcile(seen));
        let snapshot = self.inventory.snapshot(SourceName::CONTAINERD);
        self.send(opening.into_iter().chain([snapshot]).collect()).await
    }

    pub(super) fn ids(&self) -> Vec<WorkloadId> {
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

    async fn exited(&mut self, exit: (WorkloadId, pillion_workload::ProcessId)) -> Result<(), Closed> {
        let (id, process) = exit;
        let stopped = self.inventory.exited(&id, process);
        self.send(stopped.into_iter().collect()).await
    }

    async fn send(&mut self, events: Vec<RuntimeEvent>) -> Result<(), Closed> {
        for event in events {
            self.events.send(event).await.map_err(|_| Closed)?;
        }
        Ok(())
    }
}
