//! The companions of an attachment: their starts, what is heard of them, and what follows for redirection.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use pillion_companion::CompanionRecord;
use pillion_workload::{CompanionName, Pid, Plan};
use tokio::{
    task::JoinError,
    time::{Instant, timeout},
};
use tracing::warn;

use crate::{
    driver::Driver,
    machinery::{CompanionNews, Fault, LaunchOf, Machinery},
    ports::Resolved,
    report::Happening,
    slot::{Slot, Stage},
    state::State,
};

/// What a start may take beyond the companion's own readiness timeout.
const START_MARGIN: Duration = Duration::from_secs(15);
/// What a task that starts or takes up a companion brings back.
pub(crate) type Started<M> = Result<(<M as Machinery>::Companion, Option<<M as Machinery>::Ready>), Fault>;

impl<M: Machinery> Driver<M> {
    pub(crate) fn spawn_start(&mut self, index: usize, earlier: Option<CompanionRecord>) {
        let machinery = self.machinery.clone();
        let slot = &mut self.kept.slots[index];
        let launch = LaunchOf {
            spec: slot.spec.clone(),
            workload: self.workload.clone(),
            netns: self.netns.clone(),
            ports: slot.ports.clone(),
        };
        let limit = slot.spec.ready.timeout.saturating_add(START_MARGIN);
        // What somebody else runs is not started, but taken up wherever it is.
        let record = || CompanionRecord::external(self.workload.id.clone(), slot.spec.name.clone());
        let earlier = earlier.or_else(|| slot.spec.is_external().then(record));
        slot.stage = Stage::Starting(self.kept.starts.spawn(async move {
            let work = async {
                match earlier {
                    Some(record) => machinery.adopt(launch, record).await.map(|companion| (companion, None)),
                    None => machinery.start(launch).await.map(|(companion, ready)| (companion, Some(ready))),
                }
            };
            timeout(limit, work)
                .await
                .unwrap_or_else(|_| Err(Fault(format!("the start did not end within {limit:?}"))))
        }));
    }

    pub(crate) async fn started(
        &mut self,
        done: Result<(tokio::task::Id, Started<M>), JoinError>,
    ) -> Result<(), Fault> {
        let (id, result) = match done {
            Ok((id, result)) => (id, result),
            Err(error) => (error.id(), Err(Fault(format!("the start was aborted: {error}")))),
        };
        let ours = |slot: &Slot<M>| matches!(&slot.stage, Stage::Starting(task) if task.id() == id);
        // Not found: the slot was replaced meanwhile, and dropping the companion kills it.
        let Some(index) = self.kept.slots.iter().position(ours) else { return Ok(()) };
        match result {
            Ok((companion, proof)) => {
                let process = self.machinery.companion_record(&companion).process;
                self.kept.slots[index].stage = Stage::Up(companion);
                match (proof, process) {
                    (Some(ready), Some(process)) => self.ready(index, ready, process.pid).await,
                    // It may be within what is held, and come only when that may run: nobody waits for it.
                    _ if self.kept.slots[index].spec.is_external() => {
                        self.kept.slots[index].tried = true;
                        Ok(())
                    }
                    // Taken up from an earlier agent: whether it is ready follows as an event.
                    _ => Ok(()),
                }
            }
            Err(fault) => {
                let slot = &mut self.kept.slots[index];
                slot.retry_later(&fault.0);
                let companion = slot.spec.name.clone();
                self.lost(Happening::CompanionFailed { companion, reason: fault.0 }).await
            }
        }
    }

    pub(crate) async fn heard(
        &mut self,
        index: usize,
        news: Option<CompanionNews<M::Ready>>,
    ) -> Result<(), Fault> {
        let companion = self.kept.slots[index].spec.name.clone();
        match news {
            Some(CompanionNews::Ready { ready, pid }) => self.ready(index, ready, pid).await,
            Some(CompanionNews::Exited { how }) => {
                self.kept.slots[index].not_ready(&how);
                self.disconnect(&companion);
                self.lost(Happening::CompanionExited { companion, how }).await
            }
            Some(CompanionNews::NotReady { reason }) => {
                self.kept.slots[index].not_ready(&reason);
                self.lost(Happening::CompanionFailed { companion, reason }).await
            }
            None => {
                let reason = "its supervisor has ended".to_owned();
                self.disconnect(&companion);
                self.kept.slots[index].retry_later(&reason);
                self.lost(Happening::CompanionFailed { companion, reason }).await
            }
        }
    }

    async fn ready(&mut self, index: usize, ready: M::Ready, pid: Pid) -> Result<(), Fault> {
        let slot = &mut self.kept.slots[index];
        let companion = slot.spec.name.clone();
        let restarted = slot.ready(pid);
        let connected = if let Some(guard) = &mut self.kept.guard {
            self.machinery.companion_ready(guard, ready)
        } else {
            slot.proof = Some(ready);
            Ok(())
        };
        // The last one that was waited for: what follows is recorded with it.
        if !matches!(self.kept.state, State::Starting) || self.kept.slots.iter().any(|slot| !slot.tried) {
            self.save().await;
        }
        match connected {
            Ok(()) => {
                self.refresh()?;
                self.report(Happening::CompanionReady { companion, restarted }).await;
                Ok(())
            }
            Err(fault) => {
                let reason = format!("it is ready, but connections cannot be redirected to it: {fault}");
                self.kept.slots[index].not_ready(&reason);
                self.lost(Happening::CompanionFailed { companion, reason }).await
            }
        }
    }

    async fn lost(&mut self, happening: Happening) -> Result<(), Fault> {
        self.refresh()?;
        self.report(happening).await;
        Ok(())
    }

    pub(crate) fn retry(&mut self) {
        let now = Instant::now();
        for index in 0..self.kept.slots.len() {
            if self.kept.slots[index].retry_at().is_some_and(|at| at <= now) {
                self.spawn_start(index, None);
            }
        }
    }

    pub(crate) fn disconnect(&mut self, name: &CompanionName) {
        if let Some(guard) = &mut self.kept.guard
            && let Err(fault) = self.machinery.companion_gone(guard, name)
        {
            // The kernel drops a dead listener by itself: this only tidies up.
            warn!(workload = %self.workload.id, companion = %name, error = %fault, "companion could not be disconnected");
        }
    }
}

pub(crate) fn slots_of<M: Machinery>(plan: &Plan, resolved: &Resolved) -> Vec<Slot<M>> {
    let ports = |name| resolved.companions.get(name).cloned().unwrap_or_default();
    plan.companions.iter().map(|spec| Slot::new(spec.clone(), ports(&spec.name))).collect()
}

/// The next event of any companion.
pub(crate) async fn next_news<M: Machinery>(
    machinery: &M,
    slots: &mut [Slot<M>],
) -> (usize, Option<CompanionNews<M::Ready>>) {
    std::future::poll_fn(|context: &mut Context<'_>| {
        for (index, slot) in slots.iter_mut().enumerate() {
            if let Stage::Up(companion) = &mut slot.stage
                && let Poll::Ready(news) = machinery.poll_event(companion, context)
            {
                return Poll::Ready((index, news));
            }
        }
        Poll::Pending
    })
    .await
}
