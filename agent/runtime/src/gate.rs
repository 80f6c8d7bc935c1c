//! Holding: how a gate asks whether a workload may run, and what it is answered.
//!
//! Owns the question, its deadline and its answer. Never decides, and knows no gate in particular: each of them holds
//! its workload by means of its own, asks here, and then lets go or refuses.

use std::{fmt, sync::Arc, time::Duration};

use pillion_workload::{FailureMode, Gate, PolicyName, Sighting, Workload, WorkloadId};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout_at},
};

/// Questions that wait for the controller. A gate beyond that waits in its own task.
const QUEUE: usize = 256;
/// What the answer's way back may take: the controller decides this much before the gate's deadline.
const MARGIN: Duration = Duration::from_millis(100);

/// A workload that is held, or about to be.
#[derive(Debug)]
pub struct Hold {
    /// Which gate holds it.
    pub gate: Gate,
    /// The workload. Its first process exists and has not executed an instruction of its own.
    pub workload: Workload,
    /// When the gate was asked to let it run.
    pub since: Instant,
    /// By when the answer is decided, by the policy's failure mode if nothing else.
    pub decide_by: Instant,
    /// Where the answer goes; absent when nobody waits yet: a pod whose sandbox is there and whose containers are to come.
    /// Closed when the gate has given up, as when what it held was killed.
    pub answer: Option<oneshot::Sender<Admission>>,
}

/// Something that a gate holds and that cannot be put to the controller as a [`Hold`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unidentified {
    /// Its id, where that is known.
    pub id: Option<WorkloadId>,
    /// What it may be: any of these.
    pub sightings: Vec<Sighting>,
    /// Why, with its name.
    pub reason: String,
}

/// Says which policy decides about what cannot be identified. It does not wait: it is asked when there is no time left.
pub trait Rule: fmt::Debug + Send + Sync {
    /// The strictest policy that may select one of these, and its failure mode.
    fn strictest(&self, id: Option<&WorkloadId>, sightings: &[Sighting])
    -> Option<(PolicyName, FailureMode)>;
}

/// What has been decided without the controller, for its log.
#[derive(Debug)]
pub struct Unheld {
    /// Which gate.
    pub gate: Gate,
    /// Its id, where that is known.
    pub id: Option<WorkloadId>,
    /// What was done with it.
    pub admission: Admission,
}

/// What is to be done with a held workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Let it run: nothing is wanted for it.
    Unmatched,
    /// Let it run: it is part of another workload, such as a container, which has been decided on by itself.
    Covered,
    /// Let it run: its companions are ready and its sockets are redirected.
    Attached,
    /// Let it run without some of it, as the policy's `onFailure: open` says.
    Open {
        /// The policy.
        policy: PolicyName,
        /// What is missing.
        reason: String,
    },
    /// Do not let it run, as the policy's `onFailure: closed` says.
    Refused {
        /// The policy.
        policy: PolicyName,
        /// What is missing.
        reason: String,
    },
}

impl Admission {
    /// Whether it may run.
    pub fn admits(&self) -> bool {
        match self {
            Self::Unmatched | Self::Covered | Self::Attached | Self::Open { .. } => true,
            Self::Refused { .. } => false,
        }
    }

    /// What its user is to read, naming Pillion and the policy; nothing when all is as wanted.
    pub fn message(&self) -> Option<String> {
        match self {
            Self::Unmatched | Self::Covered | Self::Attached => None,
            Self::Open { policy, reason } => Some(format!(
                "pillion: {reason}; policy {policy} says onFailure: open: it runs without until that is there"
            )),
            Self::Refused { policy, reason } => {
                Some(format!("pillion: {reason}; refused, as policy {policy} says onFailure: closed"))
            }
        }
    }
}

/// The agent gave no answer: it is ending, or overloaded. The gate's own rule for an absent agent applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the agent did not decide in time")]
pub struct Undecided;

/// The gates' way to the controller. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gatekeeper {
    holds: mpsc::Sender<Hold>,
    unheld: mpsc::Sender<Unheld>,
    rule: Arc<dyn Rule>,
}

/// The controller's end.
#[derive(Debug)]
pub struct Asked {
    /// Questions.
    pub holds: mpsc::Receiver<Hold>,
    /// What was decided without it.
    pub unheld: mpsc::Receiver<Unheld>,
}

impl Gatekeeper {
    /// The two ends: for the gates, and for the controller.
    pub fn new(rule: Arc<dyn Rule>) -> (Self, Asked) {
        let (holds, holds_in) = mpsc::channel(QUEUE);
        let (unheld, unheld_in) = mpsc::channel(QUEUE);
        (Self { holds, unheld, rule }, Asked { holds: holds_in, unheld: unheld_in })
    }

    /// Decides about what cannot be identified, by the policies that may select it. The controller is told and not waited for.
    pub fn without_identity(&self, gate: Gate, what: Unidentified) -> Admission {
        let Unidentified { id, sightings, reason } = what;
        let admission = match self.rule.strictest(id.as_ref(), &sightings) {
            Some((policy, FailureMode::Closed)) => Admission::Refused { policy, reason },
            Some((policy, FailureMode::Open)) => Admission::Open { policy, reason },
            None => {
                tracing::debug!(%gate, reason, "let run: no policy can select it");
                return Admission::Unmatched;
            }
        };
        tracing::warn!(%gate, outcome = admission.message(), "a workload could not be held");
        // An agent that is ending has no log any more, and the line above is there in any case.
        let _ = self.unheld.try_send(Unheld { gate, id, admission: admission.clone() });
        admission
    }

    /// Asks whether a held workload may run, and waits for the answer until `deadline`. Dropping the future withdraws
    /// the question.
    pub async fn admit(
        &self,
        gate: Gate,
        workload: Workload,
        deadline: Instant,
    ) -> Result<Admission, Undecided> {
        let (answer, answered) = oneshot::channel();
        let since = Instant::now();
        let decide_by = deadline.checked_sub(MARGIN).unwrap_or(since);
        let hold = Hold { gate, workload, since, decide_by, answer: Some(answer) };
        let asked = async {
            self.holds.send(hold).await.map_err(|_| Undecided)?;
            answered.await.map_err(|_| Undecided)
        };
        timeout_at(deadline, asked).await.unwrap_or(Err(Undecided))
    }

    /// Tells of a workload whose start is going to be asked for by [`Gatekeeper::admit`] soon, so that its companions can
    /// start meanwhile. Waits until `deadline` for room.
    pub async fn announce(&self, gate: Gate, workload: Workload, deadline: Instant) -> Result<(), Undecided> {
        let since = Instant::now();
        let hold = Hold { gate, workload, since, decide_by: deadline, answer: None };
        let told = timeout_at(deadline, self.holds.send(hold)).await;
        told.map_err(|_| Undecided)?.map_err(|_| Undecided)
    }
}

/// For tests: one policy, which may select whatever is not known.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct MaySelect(pub(crate) Option<FailureMode>);

#[cfg(test)]
impl Rule for MaySelect {
    fn strictest(&self, _: Option<&WorkloadId>, sightings: &[Sighting]) -> Option<(PolicyName, FailureMode)> {
        assert!(!sightings.is_empty(), "something is known of everything");
        Some(("payments".parse().expect("valid"), self.0?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_pillion_and_the_policy() {
        let policy: PolicyName = "payments".parse().expect("valid");
        let reason = "companion envoy is not ready".to_owned();
        let refused = Admission::Refused { policy: policy.clone(), reason: reason.clone() };
        let open = Admission::Open { policy, reason };
        for (admission, admits, words) in [
            (Admission::Unmatched, true, None),
            (Admission::Covered, true, None),
            (Admission::Attached, true, None),
            (open, true, Some("onFailure: open")),
            (refused, false, Some("onFailure: closed")),
        ] {
            assert_eq!(admission.admits(), admits);
            let message = admission.message();
            assert_eq!(message.is_some(), words.is_some());
            for word in words.into_iter().chain(["pillion", "payments"]) {
                assert!(message.as_ref().is_none_or(|message| message.contains(word)), "{message:?}");
            }
        }
    }
    #[tokio::test]
    async fn what_cannot_be_identified_is_decided_by_the_policy_that_may_select_it() {
        for (mode, admits) in
            [(Some(FailureMode::Closed), false), (Some(FailureMode::Open), true), (None, true)]
        {
            let (gatekeeper, mut asked) = Gatekeeper::new(Arc::new(MaySelect(mode)));
            let subject = pillion_workload::Subject::new(pillion_workload::RuntimeKind::Containerd, "c1");
            let reason = "container c1 cannot be identified: silence".to_owned();
            let what = Unidentified { id: None, sightings: vec![subject.into()], reason };
            let admission = gatekeeper.without_identity(Gate::Nri, what);
            assert_eq!(admission.admits(), admits, "{mode:?}");
            if mode.is_none() {
                assert_eq!((admission, asked.unheld.try_recv().is_err()), (Admission::Unmatched, true));
                continue;
            }
            let message = admission.message().expect("it is said");
            for word in ["pillion: ", "payments", "c1 cannot be identified"] {
                assert!(message.contains(word), "{message}");
            }
            let told = asked.unheld.try_recv().expect("the controller is told");
            assert_eq!((told.gate, told.admission), (Gate::Nri, admission));
        }
    }
}
