//! Whether a workload had begun when redirection came into force: the honest half of the verdict.
//!
//! Joins the runtimes' probes with the attachments, which know nothing of runtimes. Never guesses.

use pillion_attachment::{BoxFuture, Witness};
use pillion_runtime::FirstInstructionProbe;
use pillion_workload::{FirstInstruction, Workload};

/// Asks containerd about one workload.
pub(crate) struct Containerd {
    probe: Option<FirstInstructionProbe>,
    workload: Workload,
}

impl Containerd {
    /// Without a probe nothing is known.
    pub(crate) fn new(probe: Option<FirstInstructionProbe>, workload: Workload) -> Self {
        Self { probe, workload }
    }
}

impl Witness for Containerd {
    fn look(&self) -> BoxFuture<'_, FirstInstruction> {
        Box::pin(async {
            match &self.probe {
                Some(probe) => probe.check(&self.workload).await,
                None => FirstInstruction::Unknown,
            }
        })
    }

    fn judge(&self, before: FirstInstruction, after: FirstInstruction) -> FirstInstruction {
        FirstInstructionProbe::verdict(before, after)
    }
}

/// A command that `pillion run` holds at its gate.
pub(crate) struct HeldAtGate;

impl Witness for HeldAtGate {
    fn look(&self) -> BoxFuture<'_, FirstInstruction> {
        Box::pin(std::future::ready(FirstInstruction::Before))
    }

    fn judge(&self, _before: FirstInstruction, after: FirstInstruction) -> FirstInstruction {
        after
    }
}
