//! What the driver of an attachment tells its owner, and what the owner tells it.
//!
//! Every report bears the whole view, not a difference: a lost or late one does no harm.

use std::sync::Arc;

use pillion_workload::{CompanionName, FirstInstruction, Pid, Plan, RedirectSpec, WorkloadId};

use crate::state::State;

/// Something happened, and this is how things stand now.
#[derive(Debug, Clone)]
pub struct Report {
    /// Whose attachment.
    pub workload: WorkloadId,
    /// Which attachment of that workload: counts up in the agent. Reports of an earlier one are of no interest.
    pub serial: u64,
    /// What happened.
    pub happening: Happening,
    /// How things stand.
    pub view: View,
}

/// How an attachment stands.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Its state.
    pub state: State,
    /// The plan in force or in the making.
    pub plan: Arc<Plan>,
    /// Its redirection with every port filled in; absent before ports were settled.
    pub redirect: Option<RedirectSpec>,
    /// Its companions, in the order of the plan.
    pub companions: Vec<CompanionView>,
    /// Whether redirection was in force before the workload's first instruction; absent before it is in force.
    pub first_instruction: Option<FirstInstruction>,
    /// Why a changed plan is not in force; `plan` is the one of before.
    pub refused: Option<String>,
    /// Why open connections, which the plan resets, are as they were.
    pub unreset: Option<String>,
}

/// How a companion stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompanionView {
    /// Its name.
    pub name: CompanionName,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether somebody else runs it.
    pub external: bool,
    /// Whether it is waiting for its turn or its next attempt.
    pub waiting: bool,
    /// Its main process, as of its last readiness.
    pub pid: Option<Pid>,
    /// How often it became ready again.
    pub restarts: u64,
    /// Why it is not ready.
    pub error: Option<String>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// It began.
    Started,
    /// A companion is ready.
    CompanionReady {
        /// Which one.
        companion: CompanionName,
        /// Whether it was started again since the attach.
        restarted: bool,
    },
    /// A companion ended.
    CompanionExited {
        /// Which one.
        companion: CompanionName,
        /// How.
        how: String,
    },
    /// A companion is not ready, or redirection to it failed.
    CompanionFailed {
        /// Which one.
        companion: CompanionName,
        /// Why.
        reason: String,
    },
    /// Redirection is in force.
    Attached,
    /// That of an earlier agent has been taken over.
    Adopted,
    /// A changed plan is in force.
    Replanned,
    /// A changed plan could not be put in force; the one of before is.
    ReplanFailed {
        /// Why.
        reason: String,
    },
    /// Connections that were open before, and that the rules would have taken, have been reset.
    ConnectionsReset {
        /// How many.
        count: usize,
    },
    /// They could not be: some may go on unredirected.
    ConnectionsKept {
        /// Why.
        reason: String,
    },
    /// It is being taken back.
    Detaching,
    /// Nothing is left. The last report.
    Detached,
    /// Given up: `view.state` has the reason. The last report.
    Failed,
    /// The record could not be written: an agent killed now would leave something behind.
    Unrecorded {
        /// Why.
        reason: String,
    },
}

/// What an owner wants of an attachment: a level, not a queue of commands, so that only the latest counts.
#[derive(Debug, Clone, PartialEq)]
pub enum Wish {
    /// This plan in force, touching nothing that stays as it is.
    Attached(Arc<Plan>),
    /// Everything taken back.
    Detached,
    /// To end, and to leave everything in force for the next agent.
    Left,
}
