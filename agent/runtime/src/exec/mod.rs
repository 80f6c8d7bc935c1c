//! Processes that no runtime tells of, held at their exec: the source and the gate `exec`.
//!
//! Owns what becomes of a process that was stopped: whether a policy wants it, a cgroup of its own, the question to the
//! controller, and letting go. Never stops one itself: who does is given, and is told what runs again ([`Stopper`]).
//!
//! A process is held from its exec, before its first instruction, until its plan is in force, at most [`ExecConfig::longest`]. It is
//! then in a cgroup below the one it was in, so that limits and service managers reach it as before; its descendants are
//! too. When it ends, or at a cleanup, what is left there goes back.

mod cgroup;
mod hold;
mod judge;
mod source;

use std::{path::PathBuf, sync::Arc, time::Duration};

use pillion_workload::{Cgroup, CgroupId, ProcessId, Subject};

use crate::Gatekeeper;

pub use cgroup::{OwnCgroup, OwnCgroupError};
pub use source::ExecSource;

/// Who stops processes.
pub trait Stopper: Send + Sync + 'static {
    /// The process runs again, or has ended.
    fn forget(&self, process: ProcessId);
    /// Nothing in this cgroup or below it is to be stopped.
    fn exempt(&self, cgroup: CgroupId);
    /// It may be again.
    fn no_longer_exempt(&self, cgroup: CgroupId);
}

/// What is told of executions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecNews {
    /// Programs that policies select are stopped from now on, or there are none.
    Up,
    /// They cannot be.
    Down(String),
    /// A program was executed whose name a policy selects.
    Executed {
        /// The process.
        process: ProcessId,
        /// Whether it is stopped.
        held: bool,
    },
}

/// What the source needs to know.
pub struct ExecConfig {
    /// Whose cgroups these are: the state directory of this agent.
    pub owner: PathBuf,
    /// A process is let go after this, whatever is missing then.
    pub longest: Duration,
    /// See [`Stopper`].
    pub stopper: Arc<dyn Stopper>,
    /// Whether a policy in force selects processes of the host by program, and this one is the one that it gets.
    pub wants: Arc<dyn Fn(&Subject) -> bool + Send + Sync>,
    /// Whether a cgroup is redirected already, as a part of another workload.
    pub is_taken: Arc<dyn Fn(&Cgroup) -> bool + Send + Sync>,
    /// Who decides.
    pub gatekeeper: Gatekeeper,
}
