//! A companion from its start to its end, as its owner sees it.

use std::{fmt, time::Duration};

use pillion_workload::{CompanionName, ProcessId, ReadyCompanion, WorkloadId};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    error::CompanionError,
    host::{Host, Launch},
};

/// Starts a companion and waits until it is ready. When this fails or is dropped, nothing of it is left.
pub async fn start(host: &Host, launch: Launch) -> Result<(Companion, ReadyCompanion), CompanionError> {
    let _ = (host, launch);
    unimplemented!()
}

/// A companion under supervision: restarted when it ends, until it is stopped.
///
/// Dropping it kills it and removes its cgroup and directory, unless [`Host::leave_all`] was called.
#[derive(Debug)]
pub struct Companion {
    record: CompanionRecord,
}

impl Companion {
    /// Takes up a companion that an earlier agent started. It is never stopped for that: when it is alive, it is
    /// looked at and [`CompanionEvent::Ready`] follows; when it is dead, a restart follows at once.
    pub async fn adopt(host: &Host, launch: Launch, record: CompanionRecord) -> Result<Self, CompanionError> {
        let _ = (host, launch, record);
        unimplemented!()
    }

    /// Its name in the plan.
    pub fn name(&self) -> &CompanionName {
        &self.record.name
    }

    /// Whose companion it is.
    pub fn workload(&self) -> &WorkloadId {
        &self.record.workload
    }

    /// What must be kept so that a later agent can adopt it. Changes with every restart: take it again on
    /// [`CompanionEvent::Ready`].
    pub fn record(&self) -> CompanionRecord {
        self.record.clone()
    }

    /// The next event; pending while there is none. Cancel-safe. `None` after the supervisor has ended.
    pub async fn event(&mut self) -> Option<CompanionEvent> {
        unimplemented!()
    }

    /// The channel of events, for an owner that merges several; [`Self::event`] is pending for ever after this.
    pub fn take_events(&mut self) -> Option<mpsc::Receiver<CompanionEvent>> {
        unimplemented!()
    }

    /// SIGTERM to its main process, SIGKILL to its whole cgroup after `grace`, then its cgroup and its directory are
    /// removed. Returns after all that; takes at most `grace` and a few seconds.
    pub async fn stop(self, grace: Duration) -> Result<(), CompanionError> {
        let _ = grace;
        unimplemented!()
    }

    /// Ends the supervision and leaves the process running, to be adopted later.
    pub fn leave(self) {}
}

/// What happens to a companion after its start.
#[derive(Debug)]
pub enum CompanionEvent {
    /// It is ready, again: after a restart or an adoption.
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

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It was not our child, so that nobody told.
    Unknown,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("exit code unknown"),
        }
    }
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
