//! Connections that were open before redirection was in force: `existingConnections: reset`.
//!
//! Owns when they are reset: once the rules act as they are meant to, so that what is made anew goes to the companion. With
//! `onFailure: open` that is when every companion is ready, since before that the workload would only have connected
//! directly again; with `closed` at once, because nothing may pass, unless a companion has to be found first. Never judges which connections they are.

use pillion_workload::{CompanionSpec, ExistingConnections, FailureMode, FirstInstruction, Plan};
use tracing::{info, warn};

use crate::{
    driver::Driver,
    machinery::{Machinery, Rules},
    report::Happening,
    state::State,
};

impl<M: Machinery> Driver<M> {
    /// Redirection has come into force. A workload that was held has no connection yet.
    pub(crate) fn owe_reset_at_attach(&mut self, first: FirstInstruction) {
        self.kept.reset_due = wants_reset(&self.plan)
            && match first {
                FirstInstruction::Before => false,
                FirstInstruction::After | FirstInstruction::Unknown => true,
            };
    }

    /// Another plan has come into force in place of `before`. One that redirects nothing else than before and had reset
    /// already leaves connections alone: some may be direct because a companion was not there.
    pub(crate) fn owe_reset_at_replan(&mut self, before: &Plan) {
        let news = !wants_reset(before) || before.redirect != self.plan.redirect;
        self.kept.reset_due = wants_reset(&self.plan) && (news || self.kept.reset_due);
        self.kept.unreset = None;
    }

    /// Resets what is due when it is time.
    pub(crate) async fn reset_what_is_due(&mut self) {
        let complete = matches!(&self.kept.state, State::Attached { missing } if missing.is_empty());
        // What somebody else's companion within the workload has open is not the workload's, which is known once it is found.
        let known = !self.plan.companions.iter().any(CompanionSpec::is_external);
        let acts = match self.plan.on_failure {
            FailureMode::Closed => known || complete,
            FailureMode::Open => complete,
        };
        if !self.kept.reset_due || !acts || self.kept.guard.is_none() {
            return;
        }
        let Some(resolved) = &self.kept.resolved else { return };
        let rules =
            Rules { spec: &resolved.redirect, mode: self.plan.on_failure, sources: self.kept.sources };
        let happening = match self.machinery.reset(&self.workload, &self.netns, rules).await {
            Ok(count) => {
                info!(workload = %self.workload.id, policy = %self.plan.policy, count, "open connections reset");
                Happening::ConnectionsReset { count }
            }
            Err(fault) => {
                warn!(workload = %self.workload.id, error = %fault, "open connections could not be reset");
                self.kept.unreset = Some(fault.0.clone());
                Happening::ConnectionsKept { reason: fault.0 }
            }
        };
        self.kept.reset_due = false;
        self.save().await;
        self.report(happening).await;
    }
}

fn wants_reset(plan: &Plan) -> bool {
    match plan.existing_connections {
        ExistingConnections::Keep => false,
        ExistingConnections::Reset => true,
    }
}
