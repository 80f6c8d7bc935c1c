//! What an attachment tells: its record for the journal, and reports for its owner.

use pillion_workload::{Plan, Workload};
use tracing::warn;

use crate::{
    driver::Driver,
    machinery::Machinery,
    record::Record,
    report::{Happening, Report, View},
    slot::{Slot, Stage},
};

impl<M: Machinery> Driver<M> {
    pub(crate) fn record(&self) -> Record {
        let companion = |slot: &Slot<M>| match &slot.stage {
            Stage::Up(companion) => Some(self.machinery.companion_record(companion)),
            Stage::Idle | Stage::Starting(_) | Stage::Waiting(_) => None,
        };
        Record {
            workload: Workload::clone(&self.workload),
            plan: Plan::clone(&self.plan),
            redirect: self.kept.resolved.as_ref().map(|resolved| resolved.redirect.clone()),
            companions: self.kept.slots.iter().filter_map(companion).collect(),
            guard: self.kept.guard.as_ref().map(|guard| self.machinery.redirect_record(guard)),
            first_instruction: self.kept.first_instruction,
            gate: self.witness.gate(),
            reset_due: self.kept.reset_due,
        }
    }

    pub(crate) async fn save(&self) {
        if let Err(error) = self.ledger.save(self.record()).await {
            warn!(workload = %self.workload.id, %error, "attachment could not be recorded");
            self.report(Happening::Unrecorded { reason: error.to_string() }).await;
        }
    }

    pub(crate) async fn report(&self, happening: Happening) {
        let view = View {
            state: self.kept.state.clone(),
            plan: self.plan.clone(),
            redirect: self.kept.resolved.as_ref().map(|resolved| resolved.redirect.clone()),
            companions: self.kept.slots.iter().map(Slot::view).collect(),
            first_instruction: self.kept.first_instruction,
            refused: self.kept.refused.as_ref().map(|refused| refused.reason.clone()),
            unreset: self.kept.unreset.clone(),
        };
        let report = Report { workload: self.workload.id.clone(), serial: self.serial, happening, view };
        // Nobody listens any more: the owner is ending, and what is in force stays.
        let _ = self.reports.send(report).await;
    }
}
