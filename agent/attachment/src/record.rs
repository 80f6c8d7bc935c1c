//! What must be kept of an attachment, so that a later agent can adopt it or take it back.
//!
//! Owns the shape of a record and the traits through which it is kept and judged. Never writes a file: the journal does.

use std::{future::Future, io, pin::Pin};

use pillion_companion::CompanionRecord;
use pillion_redirect::RedirectRecord;
use pillion_workload::{FirstInstruction, Gate, Plan, RedirectSpec, Workload, WorkloadId};
use serde::{Deserialize, Serialize};

use crate::ports::Resolved;

/// An attachment as it is kept. Written before anything is done, and again with every step that makes something which
/// would outlive the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// Whose, and which instance.
    pub workload: Workload,
    /// The plan in force or in the making.
    pub plan: Plan,
    /// Its redirection with every port filled in; absent before ports were settled.
    pub redirect: Option<RedirectSpec>,
    /// Companions that were started, in the order of the plan.
    pub companions: Vec<CompanionRecord>,
    /// Links and map entries; absent before redirection is in force.
    pub guard: Option<RedirectRecord>,
    /// Whether redirection was in force before the first instruction; absent before it is in force.
    pub first_instruction: Option<FirstInstruction>,
    /// Which gate has held the workload; absent when none has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    /// Whether open connections are still to be reset. Absent in records of earlier agents.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reset_due: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a function of a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

impl Record {
    /// The settled ports, as they were.
    pub(crate) fn resolved(&self) -> Option<Resolved> {
        self.redirect.as_ref().map(|redirect| Resolved::recall(&self.plan, redirect))
    }
}

/// A future that is sent between tasks.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Where records are kept.
pub trait Ledger: Send + Sync + 'static {
    /// Keeps the record in place of the workload's earlier one. When it returns, a killed agent will find it.
    fn save(&self, record: Record) -> BoxFuture<'_, io::Result<()>>;

    /// Forgets the workload. Forgetting an unknown one is not an error.
    fn erase(&self, workload: &WorkloadId) -> BoxFuture<'_, io::Result<()>>;
}

/// Tells whether a workload has begun.
pub trait Witness: Send + Sync + 'static {
    /// Whether it has begun by now.
    fn look(&self) -> BoxFuture<'_, FirstInstruction>;

    /// What follows for an attach from a look just before and one just after it.
    fn judge(&self, before: FirstInstruction, after: FirstInstruction) -> FirstInstruction;

    /// Which gate holds it, or has held it.
    fn gate(&self) -> Option<Gate> {
        None
    }
}
