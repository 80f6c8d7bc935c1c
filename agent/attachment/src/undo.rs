//! The way back: an attachment is taken back, given up or left for the next agent.
//!
//! One order for all: no connection is redirected any more, so that nothing is sent to a companion that is leaving; those
//! that were are given time to be asked for; the companions end, from the last to the first; and only then does the
//! kernel forget what it could still answer them.

use std::{mem, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use crate::{
    claims::Claims,
    driver::Driver,
    machinery::{Fault, Machinery},
    report::Happening,
    slot::{Slot, Stage},
    state::{State, Transition},
};

/// What a stop may take beyond the companion's own grace; the companion's own limit is shorter.
const STOP_MARGIN: Duration = Duration::from_secs(20);
/// A companion that has not asked by then is not going to.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
const DRAIN_LOOK: Duration = Duration::from_millis(20);
const ABORT_LOOK: Duration = Duration::from_millis(5);

impl<M: Machinery> Driver<M> {
    pub(crate) async fn take_back(&mut self) {
        if let Err(fault) = self.step(Transition::Detach) {
            return self.give_up(fault).await;
        }
        self.report(Happening::Detaching).await;
        let left = self.undo().await;
        let (transition, happening) = if left.is_empty() {
            (Transition::Detached, Happening::Detached)
        } else {
            let reason = format!("could not be taken back completely: {}", left.join("; "));
            (Transition::Fail { reason }, Happening::Failed)
        };
        if let Err(Fault(reason)) = self.step(transition) {
            self.kept.state = State::Failed { reason };
        }
        self.report(happening).await;
    }

    pub(crate) async fn give_up(&mut self, fault: Fault) {
        let left = self.undo().await;
        let mut reason = fault.0;
        if !left.is_empty() {
            reason = format!("{reason}; and could not be rolled back completely: {}", left.join("; "));
        }
        if self.step(Transition::Fail { reason: reason.clone() }).is_err() {
            self.kept.state = State::Failed { reason };
        }
        self.report(Happening::Failed).await;
    }

    /// Goes on over errors and tells them.
    async fn undo(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        self.kept.starts.shutdown().await;
        let mut guard = self.kept.guard.take();
        if let Some(guard) = &mut guard {
            self.drain(guard).await;
        }
        for slot in mem::take(&mut self.kept.slots).into_iter().rev() {
            let name = slot.spec.name.clone();
            if let Some(fault) = self.stop(slot).await {
                left.push(format!("companion {name}: {fault}"));
            }
        }
        if let Some(guard) = guard
            && let Err(fault) = self.machinery.detach(guard)
        {
            left.push(format!("redirection: {fault}"));
        }
        self.kept.claims = Claims::default();
        // With something left the record stays: the next agent tries again.
        if left.is_empty()
            && let Err(error) = self.ledger.erase(&self.workload.id).await
        {
            left.push(format!("journal: {error}"));
        }
        left
    }

    /// A connection may have been made and not yet be accepted when redirection ends: its companion has to be told yet
    /// where it was to go.
    async fn drain(&self, guard: &mut M::Guard) {
        let deadline = Instant::now() + DRAIN_LIMIT;
        loop {
            match self.machinery.drain(guard) {
                // Nobody is there to ask.
                Ok(_) if !self.kept.slots.iter().any(|slot| slot.is_ready) => return,
                Ok(0) => return,
                Ok(waiting) if Instant::now() >= deadline => {
                    warn!(workload = %self.workload.id, waiting, "companions did not ask for all connections");
                    return;
                }
                Ok(_) => sleep(DRAIN_LOOK).await,
                Err(error) => {
                    warn!(workload = %self.workload.id, %error, "redirection could not be drained");
                    return;
                }
            }
        }
    }

    pub(crate) async fn stop(&self, slot: Slot<M>) -> Option<Fault> {
        let companion = match slot.stage {
            Stage::Up(companion) => companion,
            Stage::Starting(task) => {
                task.abort();
                // What it made has the names of what may be started next: it must be gone before that is.
                let ended = async {
                    while !task.is_finished() {
                        sleep(ABORT_LOOK).await;
                    }
                };
                let ended = timeout(STOP_MARGIN, ended).await;
                return ended.err().map(|_| Fault(format!("its start did not end within {STOP_MARGIN:?}")));
            }
            Stage::Idle | Stage::Waiting(_) => return None,
        };
        let grace = slot.spec.stop_grace;
        let limit = grace.saturating_add(STOP_MARGIN);
        let stopped = timeout(limit, self.machinery.stop(companion, grace)).await;
        let fault = stopped.unwrap_or_else(|_| Err(Fault(format!("did not stop within {limit:?}")))).err()?;
        warn!(workload = %self.workload.id, companion = %slot.spec.name, error = %fault, "companion could not be stopped");
        Some(fault)
    }

    pub(crate) fn leave(mut self) {
        if let Some(guard) = self.kept.guard.take() {
            self.machinery.leave_redirect(guard);
        }
        for slot in mem::take(&mut self.kept.slots) {
            if let Stage::Up(companion) = slot.stage {
                self.machinery.leave(companion);
            }
        }
    }
}
