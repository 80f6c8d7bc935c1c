//! Supervision of one companion: a task that owns it, from its first readiness to its removal.
//!
//! ```text
//!              ┌────────────── ready ─────────────┐
//!              ▼                                  │
//!  start ─▶ Running ── ends ─▶ Ended ─ back-off ─▶ Starting ─ fails ─▶ Ended
//!  adopt ─▶ Adopted ─ ready ─▶ Running
//!  any ── stop, or the owner has dropped it ─▶ Stop
//! ```

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Arc, OnceLock},
    time::Duration,
};

use pillion_workload::ReadyCompanion;
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};

use crate::{
    cgroup::{CgroupGuard, CgroupPath},
    companion::{CompanionEvent, Shared},
    directory::LOG,
    error::CompanionError,
    exec::{self, Prepared},
    host::{Host, Launch},
    netns::NetnsThread,
    probe::Prober,
    process::{Doomed, Ending, Process},
    readiness::Candidate,
};

const SHORTEST_BACK_OFF: Duration = Duration::from_millis(100);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);
/// A companion that ran this long was healthy: its next failure counts as the first.
const HEALTHY: Duration = Duration::from_secs(60);
/// Failures in a row that make a crash loop.
const CRASH_LOOP: u32 = 5;
/// Between two rounds of questions to an adopted companion that does not become ready.
const ADOPTED_PAUSE: Duration = Duration::from_secs(30);
/// A process that was killed is reaped within this.
const REAP: Duration = Duration::from_secs(2);

/// What a companion has besides its process: directory, cgroup, followed output. Kept over restarts.
#[derive(Debug)]
pub(crate) struct Installed {
    host: Host,
    launch: Launch,
    prepared: Option<Prepared>,
    cgroup: Option<CgroupGuard>,
    shared: OnceLock<Arc<Shared>>,
}

impl Installed {
    /// Makes everything anew.
    pub(crate) async fn install(host: &Host, launch: Launch) -> Result<Self, CompanionError> {
        let path = CgroupPath::companion(&launch.workload, &launch.spec.name);
        let resources = launch.spec.resources.clone();
        let (prepared, cgroup) =
            tokio::join!(prepare(host, launch, true), host.config().cgroups.create(&path, &resources));
        let (launch, prepared) = prepared?;
        let installed = Self {
            host: host.clone(),
            launch,
            prepared: Some(prepared),
            cgroup: Some(cgroup?),
            shared: OnceLock::new(),
        };
        installed.follow_output().await?;
        Ok(installed)
    }

    /// Takes up what is there and makes what is missing. Gives the process back when it is the companion's.
    pub(crate) async fn take_up(
        host: &Host,
        launch: Launch,
        process: Option<Process>,
    ) -> Result<(Self, Option<Process>), CompanionError> {
        let path = CgroupPath::companion(&launch.workload, &launch.spec.name);
        let found = host.config().cgroups.open(&path).await?;
        let alive = match (&found, process) {
            (Some(cgroup), Some(process)) if cgroup.holds(process.id().pid) => Some(process),
            _ => None,
        };
        let resources = launch.spec.resources.clone();
        let mut cgroup = match (found, alive.is_some()) {
            (Some(cgroup), true) => cgroup,
            (leftover, _) => {
                // `create` kills and removes it.
                if let Some(leftover) = leftover {
                    leftover.leave();
                }
                host.config().cgroups.create(&path, &resources).await?
            }
        };
        // An error must not kill a companion that runs.
        cgroup.set_armed(alive.is_none());
        let (launch, mut prepared) = prepare(host, launch, alive.is_none()).await?;
        prepared.directory.set_armed(alive.is_none());
        let mut installed = Self {
            host: host.clone(),
            launch,
            prepared: Some(prepared),
            cgroup: Some(cgroup),
            shared: OnceLock::new(),
        };
        installed.follow_output().await?;
        installed.set_armed(true);
        Ok((installed, alive))
    }

    pub(crate) fn launch(&self) -> &Launch {
        &self.launch
    }

    /// From now on the owner may say that the companion is to be left.
    pub(crate) fn share(&self, shared: &Arc<Shared>) {
        let _ = self.shared.set(shared.clone());
    }

    fn set_armed(&mut self, armed: bool) {
        if let Some(cgroup) = &mut self.cgroup {
            cgroup.set_armed(armed);
        }
        if let Some(prepared) = &mut self.prepared {
            prepared.directory.set_armed(armed);
        }
    }

    fn is_leaving(&self) -> bool {
        self.host.is_leaving() || self.shared.get().is_some_and(|shared| shared.is_leaving())
    }

    fn prepared(&self) -> &Prepared {
        self.prepared.as_ref().expect("only `uninstall` and `drop` take it")
    }

    fn cgroup(&self) -> &CgroupGuard {
        self.cgroup.as_ref().expect("only `uninstall` and `drop` take it")
    }

    async fn follow_output(&self) -> Result<(), CompanionError> {
        let directory = self.prepared().directory.path().join(LOG);
        let followed =
            self.host.logs().follow(&self.launch.workload, &self.launch.spec.name, &directory).await;
        followed.map_err(|source| CompanionError::Logs { source })
    }

    /// Starts the process and waits until it is ready. When this fails or is dropped the process is killed; what it
    /// has started meanwhile is killed with its cgroup.
    pub(crate) async fn bring_up(
        &self,
        shared: &Shared,
    ) -> Result<(Process, ReadyCompanion), CompanionError> {
        let limit = self.launch.spec.ready.timeout;
        let deadline = Instant::now() + limit;
        let request = self.prepared().main_request(&self.launch, self.cgroup())?;
        let launching = self.host.launchers().spawn(&request).await?;
        shared.change(|record| {
            record.process = Some(launching.id());
            record.starts = record.starts.saturating_add(1);
        });
        let process = Doomed::new(launching.executed(limit).await?);
        let ready = self.ask(process.get(), deadline).await?;
        Ok((process.spare(), ready))
    }

    async fn ask(&self, process: &Process, deadline: Instant) -> Result<ReadyCompanion, CompanionError> {
        use std::os::fd::AsFd;
        let netns = NetnsThread::enter(self.launch.netns.as_fd()).await?;
        let place = Some((self.prepared(), self.cgroup()));
        let prober = Prober { host: &self.host, launch: &self.launch, netns: &netns, place };
        Candidate { prober, cgroup: self.cgroup(), process }.ready(deadline).await
    }

    /// Kills what is left, hands on the last output, removes cgroup and directory; all of it, also when a part fails.
    pub(crate) async fn uninstall(mut self, process: Option<Process>) -> Result<(), CompanionError> {
        let removed = match self.cgroup.take() {
            Some(cgroup) => cgroup.remove().await.map_err(CompanionError::from),
            None => Ok(()),
        };
        if let Some(process) = process {
            let _ = timeout(REAP, process.ended()).await;
        }
        let Some(prepared) = self.prepared.take() else { return removed };
        self.host.logs().finish(&prepared.directory.path().join(LOG)).await;
        let directory = tokio::task::spawn_blocking(move || prepared.directory.remove());
        let directory = directory.await.unwrap_or(Err(CompanionError::Abandoned));
        removed.and(directory)
    }

    /// Gives up ownership of everything.
    fn leave(&mut self) {
        if let Some(cgroup) = self.cgroup.take() {
            cgroup.leave();
        }
        if let Some(prepared) = self.prepared.take() {
            self.host.logs().finish_later(&prepared.directory.path().join(LOG));
            prepared.directory.leave();
        }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if self.is_leaving() {
            self.leave();
        } else if let Some(prepared) = &self.prepared {
            self.host.logs().finish_later(&prepared.directory.path().join(LOG));
        }
        // Else the guards clean up: the cgroup first, so that nobody writes to the directory any more.
        drop(self.cgroup.take());
    }
}

async fn prepare(host: &Host, launch: Launch, render: bool) -> Result<(Launch, Prepared), CompanionError> {
    let host = host.clone();
    let work = move || exec::prepare(host.config(), &launch, render).map(|prepared| (launch, prepared));
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(CompanionError::Abandoned))
}

/// What the owner wants.
#[derive(Debug)]
pub(crate) enum Order {
    /// The end of the companion.
    Stop { grace: Duration, done: oneshot::Sender<Result<(), CompanionError>> },
}

/// Where a companion is.
#[derive(Debug)]
pub(crate) enum Phase {
    /// It runs and was ready.
    Running(Process),
    /// It runs; whether it is ready is to be asked.
    Adopted(Process),
    /// It does not run; it is to be started after the delay.
    Ended { ending: Ending, oom: bool, delay: Duration },
    /// It could not be started; it is to be started after the delay.
    Failed { error: CompanionError, delay: Duration },
    /// It is being started.
    Starting,
    /// It is to end. Without an order the owner has dropped it.
    Stop { process: Option<Process>, order: Option<Order> },
}

/// Owns a companion.
#[derive(Debug)]
pub(crate) struct Supervisor {
    installed: Installed,
    shared: Arc<Shared>,
    events: mpsc::Sender<CompanionEvent>,
    orders: mpsc::Receiver<Order>,
    failures: u32,
}

/// The owner wants an end; `None` when it has dropped the companion.
pub(crate) struct Interrupted(pub(crate) Option<Order>);

impl Supervisor {
    pub(crate) fn new(
        installed: Installed,
        shared: Arc<Shared>,
        events: mpsc::Sender<CompanionEvent>,
        orders: mpsc::Receiver<Order>,
    ) -> Self {
        Self { installed, shared, events, orders, failures: 0 }
    }

    pub(crate) async fn run(mut self, mut phase: Phase) {
        loop {
            phase = match phase {
                Phase::Running(process) => self.running(process).await,
                Phase::Adopted(process) => self.adopted(process).await,
                Phase::Ended { ending, oom, delay } => {
                    self.wait_for_restart(CompanionEvent::Exited { ending, oom }, delay).await
                }
                Phase::Failed { error, delay } => {
                    self.wait_for_restart(CompanionEvent::RestartFailed(error), delay).await
                }
                Phase::Starting => self.starting().await,
                Phase::Stop { process, order } => return self.stop(process, order).await,
            };
        }
    }

    async fn running(&mut self, process: Process) -> Phase {
        let since = Instant::now();
        let before = self.installed.cgroup().oom_kills();
        let ending = tokio::select! {
            ending = process.ended() => ending,
            order = self.orders.recv() => return Phase::Stop { process: Some(process), order },
        };
        if since.elapsed() >= HEALTHY {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        let oom = self.installed.cgroup().oom_kills() > before;
        // Whatever it has started is of no use without it, and would keep its ports.
        self.clear().await;
        Phase::Ended { ending: ending.unwrap_or(Ending::Unknown), oom, delay: self.back_off() }
    }

    async fn adopted(&mut self, process: Process) -> Phase {
        loop {
            let deadline = Instant::now() + self.installed.launch.spec.ready.timeout;
            let outcome = tokio::select! {
                outcome = self.installed.ask(&process, deadline) => outcome,
                order = self.orders.recv() => return Phase::Stop { process: Some(process), order },
            };
            let event = match outcome {
                Ok(ready) => CompanionEvent::Ready(ready),
                // `running` tells how.
                Err(_) if process.has_ended() => return Phase::Running(process),
                Err(error) => CompanionEvent::NotReady(error),
            };
            let ready = matches!(event, CompanionEvent::Ready(_));
            if let Err(Interrupted(order)) = self.emit(event).await {
                return Phase::Stop { process: Some(process), order };
            }
            if ready {
                return Phase::Running(process);
            }
            tokio::select! {
                () = sleep(ADOPTED_PAUSE) => {}
                _ = process.ended() => return Phase::Running(process),
                order = self.orders.recv() => return Phase::Stop { process: Some(process), order },
            }
        }
    }

    async fn wait_for_restart(&mut self, event: CompanionEvent, delay: Duration) -> Phase {
        self.shared.change(|record| record.process = None);
        let mut events = vec![event];
        if self.failures == CRASH_LOOP {
            events.push(CompanionEvent::CrashLoop { failures: self.failures });
        }
        events.push(CompanionEvent::RestartingIn(delay));
        for event in events {
            if let Err(Interrupted(order)) = self.emit(event).await {
                return Phase::Stop { process: None, order };
            }
        }
        tokio::select! {
            () = sleep(delay) => Phase::Starting,
            order = self.orders.recv() => Phase::Stop { process: None, order },
        }
    }

    async fn starting(&mut self) -> Phase {
        let outcome = tokio::select! {
            outcome = self.installed.bring_up(&self.shared) => outcome,
            order = self.orders.recv() => return Phase::Stop { process: None, order },
        };
        match outcome {
            Ok((process, ready)) => match self.emit(CompanionEvent::Ready(ready)).await {
                Ok(()) => Phase::Running(process),
                Err(Interrupted(order)) => Phase::Stop { process: Some(process), order },
            },
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                self.clear().await;
                Phase::Failed { error, delay: self.back_off() }
            }
        }
    }

    async fn stop(self, process: Option<Process>, order: Option<Order>) {
        let Self { mut installed, .. } = self;
        if order.is_none() && installed.is_leaving() {
            installed.leave();
            return;
        }
        let (grace, done) = match order {
            Some(Order::Stop { grace, done }) => (grace, Some(done)),
            None => (Duration::ZERO, None),
        };
        if let Some(process) = process.as_ref().filter(|_| !grace.is_zero()) {
            let _ = process.signal(Signal::TERM);
            let _ = timeout(grace, process.ended()).await;
        }
        let (workload, companion) = (installed.launch.workload.clone(), installed.launch.spec.name.clone());
        let outcome = installed.uninstall(process).await;
        match (done, outcome) {
            (Some(done), outcome) => {
                let _ = done.send(outcome);
            }
            (None, Err(error)) => {
                tracing::warn!(%workload, %companion, %error, "a dropped companion was not removed cleanly");
            }
            (None, Ok(())) => {}
        }
    }

    /// Empties the cgroup, so that the next start finds its ports free.
    async fn clear(&self) {
        if let Err(error) = self.installed.cgroup().kill().await {
            let (workload, companion) = (&self.installed.launch.workload, &self.installed.launch.spec.name);
            tracing::warn!(%workload, %companion, %error, "what a companion left behind could not be killed");
        }
    }

    fn back_off(&self) -> Duration {
        back_off(self.failures, RandomState::new().hash_one(0))
    }

    async fn emit(&mut self, event: CompanionEvent) -> Result<(), Interrupted> {
        tell(&self.events, &mut self.orders, event).await
    }
}

/// Waits for the reader of the events, unless the owner wants an end.
pub(crate) async fn tell(
    events: &mpsc::Sender<CompanionEvent>,
    orders: &mut mpsc::Receiver<Order>,
    event: CompanionEvent,
) -> Result<(), Interrupted> {
    tokio::select! {
        biased;
        order = orders.recv() => Err(Interrupted(order)),
        permit = events.reserve() => {
            // Without a reader the owner supervises by nothing but `stop`.
            if let Ok(permit) = permit {
                permit.send(event);
            }
            Ok(())
        }
    }
}

/// Doubles with each failure and differs by up to a quarter, so that companions that failed together do not restart
/// together for ever.
fn back_off(failures: u32, random: u64) -> Duration {
    let doubled = SHORTEST_BACK_OFF.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let base = doubled.min(LONGEST_BACK_OFF);
    let per_mille = 750 + u32::try_from(random % 501).expect("below 501");
    base * per_mille / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_grows_to_its_bound_and_varies() {
        for (failures, least, most) in [
            (0, 75, 125),
            (1, 75, 125),
            (2, 150, 250),
            (3, 300, 500),
            (9, 19_200, 32_000),
            (10, 22_500, 37_500),
            (u32::MAX, 22_500, 37_500),
        ] {
            let delays = [0, 250, 500, 501, u64::MAX].map(|random| back_off(failures, random));
            assert_eq!(delays[0], Duration::from_millis(least), "{failures}");
            assert_eq!(delays[2], Duration::from_millis(most), "{failures}");
            assert!(delays.iter().all(|delay| (delays[0]..=delays[2]).contains(delay)));
        }
    }
}
