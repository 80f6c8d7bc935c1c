//! Whom a gate asks about what it holds, besides containerd.
//!
//! Owns the questions. The sources answer them. Never holds or releases anything.

use std::{error::Error, fmt, time::Duration};

use futures_util::future::BoxFuture;
use pillion_workload::{Facet, Pid, Subject, Workload, WorkloadId};

/// Why there is no answer; its own text says by whom.
pub type AskError = Box<dyn Error + Send + Sync>;

/// A container but for its instance, which the gate finds out by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The same id as the engine's source uses.
    pub id: WorkloadId,
    /// What policies select on.
    pub subject: Subject,
    /// What of that could not be found out.
    pub unknown: Vec<Facet>,
}

/// An engine that can describe a container of its own while it is being started.
pub trait Engine: fmt::Debug + Send + Sync {
    /// Describes the container with this id, which the engine gave it; `None` when it knows none such. The engine waits for the
    /// start, so nothing may be asked that waits for it in turn: of Docker the list, for example, and not `inspect`.
    /// Dropping the future gives up; the gate does so in time.
    fn describe<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Described>, AskError>>;
}

/// A unit that its hook holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundUnit {
    /// What it is.
    pub workload: Workload,
    /// How long its start may take altogether, the hold included; absent when for ever.
    pub start_limit: Option<Duration>,
}

/// The service manager.
pub trait UnitManager: fmt::Debug + Send + Sync {
    /// The unit of this name, whose hook is the process `pid`. Dropping the future gives up.
    fn find<'a>(&'a self, name: &'a str, pid: Pid) -> BoxFuture<'a, Result<FoundUnit, AskError>>;
}
