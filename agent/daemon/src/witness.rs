//! Whether a workload had begun when redirection came into force: the honest half of the verdict.
//!
//! Joins gates and runtimes' probes with the attachments, which know nothing of either. Never guesses.

use pillion_attachment::{BoxFuture, Witness};
use pillion_runtime::FirstInstructionProbe;
use pillion_workload::{FirstInstruction, Gate, Workload};

use crate::controller::HeldState;

/// A workload of the agent: held at a gate, or else its runtime is asked.
pub(crate) struct Attached {
    held: HeldState,
    probe: Option<FirstInstructionProbe>,
    workload: Workload,
}

impl Attached {
    /// Without a gate and a probe nothing is known.
    pub(crate) fn new(held: HeldState, probe: Option<FirstInstructionProbe>, workload: Workload) -> Self {
        Self { held, probe, workload }
    }
}

impl Witness for Attached {
    fn look(&self) -> BoxFuture<'_, FirstInstruction> {
        Box::pin(async {
            let asked = async {
                match &self.probe {
                    Some(probe) => probe.check(&self.workload).await,
                    None => FirstInstruction::Unknown,
                }
            };
            // A runtime whose container is held, or comes to be while it is asked, answers only when that is let go.
            tokio::select! {
                biased;
                () = self.held.until_held() => FirstInstruction::Before,
                answer = asked => answer,
            }
        })
    }

    fn judge(&self, before: FirstInstruction, after: FirstInstruction) -> FirstInstruction {
        FirstInstructionProbe::verdict(before, after)
    }

    fn gate(&self) -> Option<Gate> {
        self.held.gate()
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

    fn gate(&self) -> Option<Gate> {
        Some(Gate::Run)
    }
}
