//! A companion from its start to its end, as its owner sees it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pillion_workload::{CompanionKind, CompanionName, ProcessId, ReadyCompanion, WorkloadId};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    cgroup::CgroupPath,
    directory::CompanionDirectory,
    error::CompanionError,
    external::External,
    host::{Host, Launch},
    process::{Ending, Process},
    supervise::{Installed, Order, Phase, Supervisor},
    tree,
};

/// Events that an owner may leave unread; then supervision waits for it.
const EVENTS: usize = 16;
/// A stop takes at most its grace and this.
const STOP_MARGIN: Duration = Duration::from_secs(15);

/// Starts a companion and waits until it is ready. When this fails or is dropped, nothing of it is left.
///
/// The program must stay in the foreground: when its first process ends, the companion has ended.
pub async fn start(host: &Host, launch: Launch) -> Result<(Companion, ReadyCompanion), CompanionError> {
    let installed = Installed::install(host, launch).await?;
    let shared = Shared::new(&installed, None);
    installed.share(&shared);
    match installed.bring_up(&shared).await {
        Ok((process, ready)) => {
            Ok((Companion::supervised(installed, shared, Phase::Running(process)), ready))
        }
        Err(error) => {
            // Here rather than in drop, so that its last words are read and nothing blocks.
            installed.uninstall(None).await?;
            Err(error)
        }
    }
}

/// Removes what an earlier agent has left of a companion that nobody will adopt: processes, cgroup and directory.
pub async fn discard(
    host: &Host,
    workload: &WorkloadId,
    companion: &CompanionName,
) -> Result<(), CompanionError> {
    if let Some(cgroup) = host.config().cgroups.open(&CgroupPath::companion(workload, companion)).await? {
        cgroup.remove().await?;
    }
    let path = CompanionDirectory::path_of(&host.config().state_dir, workload, companion);
    let removal = tokio::task::spawn_blocking(move || {
        match tree::remove(&path) {
            Ok(()) => {
                // The workload's directory goes with its last companion; so does the one that holds all.
                for parent in path.ancestors().skip(1).take(2) {
                    if std::fs::remove_dir(parent).is_err() {
                        break;
                    }
                }
                Ok(())
            }
            Err(source) => Err(CompanionError::Directory { operation: "remove", path, source }),
        }
    });
    removal.await.unwrap_or(Err(CompanionError::Abandoned))
}

/// A companion under supervision: restarted when it ends, until it is stopped.
///
/// Dropping it kills it and removes its cgroup and directory, unless [`Host::leave_all`] was called.
#[derive(Debug)]
pub struct Companion {
    workload: WorkloadId,
    name: CompanionName,
    shared: Arc<Shared>,
    orders: mpsc::Sender<Order>,
    events: Option<mpsc::Receiver<CompanionEvent>>,
}

/// What the owner and the supervisor share.
#[derive(Debug)]
pub(crate) struct Shared {
    record: Mutex<CompanionRecord>,
    leaving: AtomicBool,
}

impl Shared {
    fn new(installed: &Installed, record: Option<CompanionRecord>) -> Arc<Self> {
        let record = record.unwrap_or_else(|| CompanionRecord {
            workload: installed.launch().workload.clone(),
            name: installed.launch().spec.name.clone(),
            process: None,
            starts: 0,
        });
        Arc::new(Self { record: Mutex::new(record), leaving: AtomicBool::new(false) })
    }

    /// Changes the record. No code runs under the lock that could panic and leave it half changed.
    pub(crate) fn change(&self, change: impl FnOnce(&mut CompanionRecord)) {
        change(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }
}

impl Companion {
    /// Takes up a companion that an earlier agent started. It is never stopped for that: when it is alive, it is
    /// looked at and [`CompanionEvent::Ready`] follows; when it is dead, [`CompanionEvent::Exited`] follows and a
    /// restart at once. After an error call [`discard`].
    ///
    /// One that somebody else runs is always taken up, with [`CompanionRecord::external`] the first time.
    pub async fn adopt(host: &Host, launch: Launch, record: CompanionRecord) -> Result<Self, CompanionError> {
        if matches!(launch.spec.kind, CompanionKind::External(_)) {
            return Ok(Self::watched(host, launch, record));
        }
        let process = match record.process {
            Some(id) => Process::open(id)?,
            None => None,
        };
        let (installed, process) = Installed::take_up(host, launch, process).await?;
        let shared = Shared::new(&installed, Some(record));
        installed.share(&shared);
        let phase = match process {
            Some(process) => Phase::Adopted(process),
            None => Phase::Ended { ending: Ending::Unknown, oom: false, delay: Duration::ZERO },
        };
        Ok(Self::supervised(installed, shared, phase))
    }

    fn supervised(installed: Installed, shared: Arc<Shared>, phase: Phase) -> Self {
        let (orders, order_receiver) = mpsc::channel(1);
        let (event_sender, events) = mpsc::channel(EVENTS);
        let (workload, name) = (installed.launch().workload.clone(), installed.launch().spec.name.clone());
        let supervisor = Supervisor::new(installed, shared.clone(), event_sender, order_receiver);
        tokio::spawn(supervisor.run(phase));
        Self { workload, name, shared, orders, events: Some(events) }
    }

    fn watched(host: &Host, launch: Launch, record: CompanionRecord) -> Self {
        let (orders, order_receiver) = mpsc::channel(1);
        let (event_sender, events) = mpsc::channel(EVENTS);
        let (workload, name) = (launch.workload.clone(), launch.spec.name.clone());
        let shared = Arc::new(Shared { record: Mutex::new(record), leaving: AtomicBool::new(false) });
        let watch = External::new(host, launch, shared.clone(), event_sender, order_receiver);
        tokio::spawn(watch.run());
        Self { workload, name, shared, orders, events: Some(events) }
    }

    /// Its name in the plan.
    pub fn name(&self) -> &CompanionName {
        &self.name
    }

    /// Whose companion it is.
    pub fn workload(&self) -> &WorkloadId {
        &self.workload
    }

    /// What must be kept so that a later agent can adopt it. Changes with every restart: take it again on
    /// [`CompanionEvent::Ready`].
    pub fn record(&self) -> CompanionRecord {
        self.shared.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its main process; `None` between an end and the next start.
    pub fn process(&self) -> Option<ProcessId> {
        self.record().process
    }

    /// The next event; pending while there is none. Cancel-safe. `None` after the supervisor has ended.
    pub async fn event(&mut self) -> Option<CompanionEvent> {
        match &mut self.events {
            Some(events) => events.recv().await,
            None => std::future::pending().await,
        }
    }

    /// The channel of events, for an owner that merges several; [`Self::event`] is pending for ever after this.
    /// It must be read: supervision waits for its reader.
    pub fn take_events(&mut self) -> Option<mpsc::Receiver<CompanionEvent>> {
        self.events.take()
    }

    /// SIGTERM to its main process, SIGKILL to its whole cgroup after `grace`, then its cgroup and its directory are
    /// removed. Returns after all that; takes at most `grace` and 15 s.
    pub async fn stop(self, grace: Duration) -> Result<(), CompanionError> {
        let limit = grace.saturating_add(STOP_MARGIN);
        let (done, answer) = oneshot::channel();
        let work = async {
            self.orders.send(Order::Stop { grace, done }).await.map_err(|_| CompanionError::Abandoned)?;
            answer.await.map_err(|_| CompanionError::Abandoned)?
        };
        timeout(limit, work).await.unwrap_or(Err(CompanionError::StopTimeout { timeout: limit }))
    }

    /// Ends the supervision and leaves the process running, to be adopted later.
    pub fn leave(self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
    }
}

/// What happens to a companion after its start.
#[derive(Debug)]
pub enum CompanionEvent {
    /// It is ready, again: after a restart or an adoption.
    ///
    /// Let go of the listeners' descriptors soon: while they are open, the port of a companion that has died still
    /// takes connections which nobody serves, and its next incarnation cannot listen.
    Ready(ReadyCompanion),
    /// Its main process has ended; what remained in its cgroup was killed.
    Exited {
        /// How.
        ending: Ending,
        /// Whether the kernel killed it for memory.
        oom: bool,
    },
    /// It will be started again after this time.
    RestartingIn(Duration),
    /// It could not be started again, or did not become ready; another attempt follows.
    RestartFailed(CompanionError),
    /// It has failed this many times in a row. Attempts go on, with the longest back-off.
    CrashLoop {
        /// Failures in a row.
        failures: u32,
    },
    /// An adopted companion runs but does not become ready. It is left running and looked at again.
    NotReady(CompanionError),
}

/// What must be kept of a companion so that a later agent can adopt it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompanionRecord {
    /// Whose companion it is.
    pub workload: WorkloadId,
    /// Its name in the plan.
    pub name: CompanionName,
    /// Its main process; absent between an end and the next start.
    pub process: Option<ProcessId>,
    /// Starts so far, the first included.
    pub starts: u32,
}

impl CompanionRecord {
    /// Of a companion that somebody else runs: there is nothing to keep.
    pub fn external(workload: WorkloadId, name: CompanionName) -> Self {
        Self { workload, name, process: None, starts: 0 }
    }
}
