//! Answers whether a container's first instruction is still to come.
//!
//! Owns the truth about [`FirstInstruction`] for containerd. Never caches: each answer is a question to containerd.
//!
//! Between `create` and `start` a container's first process is the runtime's own (`runc init`), waiting on a FIFO. The
//! shim reads its state under a lock that it holds for all of `start`, so `created` was true at some moment after it was
//! asked for: what was in force before the question was in force before the first instruction. (The rest of the shim's
//! answer may wait for the same lock, so the answer can arrive when the container already runs.) What the process says
//! about itself (its name, its executable) is not used: a workload could say anything.

use pillion_workload::{FirstInstruction, Workload};
use tokio::sync::watch;

use super::{
    Key,
    client::Client,
    members,
    record::{Record, first_instruction},
};
use crate::instance::is_alive;

/// Asks containerd whether a workload has begun. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FirstInstructionProbe {
    client: watch::Receiver<Option<Client>>,
}

impl FirstInstructionProbe {
    pub(super) fn new(client: watch::Receiver<Option<Client>>) -> Self {
        Self { client }
    }

    /// Whether the workload has begun: `Before` when its first instruction was still to come at some moment after this
    /// was called, `After` when it had begun by the time of the answer, `Unknown` when containerd does not answer within
    /// its deadline (3 s by default), when the workload is gone, or when it is not this source's.
    ///
    /// To judge an attach ask twice, just before and just after it comes into force, and see
    /// [`FirstInstructionProbe::verdict`]. While the runtime is starting the container the answer comes only when that is
    /// done (some 10 ms), so do not let the attach itself wait for the first of the two for longer than a moment: an
    /// `After` that came with the event will do, and otherwise `Unknown` is the honest stand-in.
    pub async fn check(&self, workload: &Workload) -> FirstInstruction {
        let Some(key) = Key::of(&workload.id) else { return FirstInstruction::Unknown };
        let Some(client) = self.client.borrow().clone() else { return FirstInstruction::Unknown };
        let process = workload.instance.process;
        if let Some(answer) = self.check_pod(&client, &key, workload).await {
            return answer;
        }
        match client.task(&key.namespace, &key.container).await {
            Ok(Some(task)) if i64::from(task.pid) == i64::from(process.pid.0) => {
                // Another container of the same name could have got the same pid.
                if is_alive(process) { first_instruction(task.status()) } else { FirstInstruction::Unknown }
            }
            Ok(_) => FirstInstruction::Unknown,
            Err(error) => {
                tracing::debug!(workload = %workload.id, %error, "cannot tell whether the workload has begun");
                FirstInstruction::Unknown
            }
        }
    }

    /// The same for a pod, whose containers are what begins; `None` when the container is no sandbox of one.
    async fn check_pod(&self, client: &Client, key: &Key, workload: &Workload) -> Option<FirstInstruction> {
        let record = client.container(&key.namespace, &key.container).await.ok()??;
        let record = Record::parse(record);
        record.whole_pod()?;
        let first = members::of_pod(client, key, &record).await.unwrap_or(FirstInstruction::Unknown);
        Some(if is_alive(workload.instance.process) { first } else { FirstInstruction::Unknown })
    }

    /// What can be said of an attach, from the state just before and just after it came into force. Begun before it is
    /// `After`; not begun after it is `Before`; begun between the two, or not known, is `Unknown`.
    pub fn verdict(before_attach: FirstInstruction, after_attach: FirstInstruction) -> FirstInstruction {
        match (before_attach, after_attach) {
            (FirstInstruction::After, _) => FirstInstruction::After,
            (FirstInstruction::Before | FirstInstruction::Unknown, FirstInstruction::Before) => {
                FirstInstruction::Before
            }
            (
                FirstInstruction::Before | FirstInstruction::Unknown,
                FirstInstruction::After | FirstInstruction::Unknown,
            ) => FirstInstruction::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use FirstInstruction::{After, Before, Unknown};

    use super::*;

    #[test]
    fn never_claims_more_than_was_seen() {
        for (before, after, verdict) in [
            (Before, Before, Before),
            (Unknown, Before, Before),
            (Before, After, Unknown),
            (Before, Unknown, Unknown),
            (Unknown, After, Unknown),
            (Unknown, Unknown, Unknown),
            (After, After, After),
            (After, Unknown, After),
        ] {
            assert_eq!(FirstInstructionProbe::verdict(before, after), verdict, "{before:?} {after:?}");
        }
    }
}
