//! Workloads that are held at a gate: who waits, and what each is answered.
//!
//! A hold is answered as soon as what becomes of its workload is known, and at its deadline by the policy's failure mode.
//! An answer is given once; a gate that has given up is forgotten.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use pillion_runtime::{Admission, Hold, Unheld};
use pillion_workload::{
    FailureMode, FirstInstruction, Gate, Plan, ProcessId, RuntimeKind, Subject, Workload, WorkloadId,
};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{Controller, entry::Entry};
use crate::{
    api::{EventKind, Verdict},
    event_log,
};

/// Gates that may wait for one workload at once: a pod has not as many containers.
const MAX_WAITING: usize = 1024;

/// Why a gate is answered before all is known.
const LATE: &str = "not attached within the time that the gate allows";
const ENDS: &str = "the agent ends";
const TOO_MANY: &str = "there are more workloads than an agent can attach";

/// Whether a workload is held, shared with the task that attaches it.
#[derive(Debug, Clone, Default)]
pub(crate) struct HeldState(Arc<Held>);

#[derive(Debug, Default)]
struct Held {
    /// Which gate, and whether it was told to let it run.
    value: AtomicU8,
    changed: Notify,
}

impl HeldState {
    /// Bit set once some gate was told to let it run.
    const RELEASED: u8 = 0x80;

    /// A gate holds it. Does nothing once it was released: what has run has run.
    pub(super) fn hold(&self, gate: Gate) {
        let number = Gate::ALL.iter().position(|known| *known == gate).unwrap_or(0);
        let number = u8::try_from(number + 1).unwrap_or(0);
        let _ = self.0.value.compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire);
        self.0.changed.notify_waiters();
    }

    /// It may run, or has run before any gate held it.
    fn release(&self) {
        self.0.value.fetch_or(Self::RELEASED, Ordering::AcqRel);
    }

    /// Whether a gate holds it now, so that it has not begun.
    pub(crate) fn is_held(&self) -> bool {
        let value = self.0.value.load(Ordering::Acquire);
        value != 0 && value & Self::RELEASED == 0
    }

    /// Returns when a gate holds it; perhaps never.
    pub(crate) async fn until_held(&self) {
        loop {
            let mut changed = pin!(self.0.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            if self.is_held() {
                return;
            }
            changed.await;
        }
    }

    /// Which gate holds it or was the first to.
    pub(crate) fn gate(&self) -> Option<Gate> {
        let number = self.0.value.load(Ordering::Acquire) & !Self::RELEASED;
        Gate::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// What an earlier agent knew.
    pub(super) fn recall(gate: Option<Gate>) -> Self {
        let state = Self::default();
        if let Some(gate) = gate {
            state.hold(gate);
            state.release();
        }
        state
    }
}

/// What the controller knows of the gates at one workload.
#[derive(Debug, Default)]
pub(super) struct AtGates {
    pub(super) state: HeldState,
    waiting: Vec<Waiting>,
    /// Why it was refused; it is about to end.
    pub(super) refused: Option<String>,
    /// The process whose end tells that of the workload while its runtime has not confirmed it.
    unconfirmed: Option<ProcessId>,
}

#[derive(Debug)]
struct Waiting {
    gate: Gate,
    since: Instant,
    decide_by: Instant,
    answer: oneshot::Sender<Admission>,
}

impl AtGates {
    pub(super) fn recall(gate: Option<Gate>) -> Self {
        Self { state: HeldState::recall(gate), ..Self::default() }
    }

    /// Its runtime's source has told of it, and will tell of its end.
    pub(super) fn confirm(&mut self) {
        self.unconfirmed = None;
    }

    pub(super) fn is_confirmed(&self) -> bool {
        self.unconfirmed.is_none()
    }

    /// When the next hold must be decided.
    pub(super) fn due(&self) -> Option<Instant> {
        self.waiting.iter().map(|waiting| waiting.decide_by).min()
    }
}

impl Controller {
    /// A gate holds a workload, or is going to.
    pub(super) fn held_at_gate(&mut self, hold: Hold) {
        let Hold { gate, workload, since, decide_by, answer } = hold;
        let (id, process) = (workload.id.clone(), workload.instance.process);
        let (runtime, subject) = (workload.subject.runtime, workload.subject.clone());
        if gate == Gate::Exec && self.is_in_a_container(&workload) {
            self.metrics.gate(gate, &Admission::Covered, since.elapsed());
            return drop(answer.map(|answer| answer.send(Admission::Covered)));
        }
        let known = self.workloads.get(&id).is_some_and(|entry| entry.is_instance(&workload.instance));
        if !known {
            let source = self.source_of(runtime);
            self.seen(workload, source, FirstInstruction::Before);
            if runtime != RuntimeKind::Systemd {
                self.watch(&id, process);
            } else if let Some(entry) = self.workloads.get_mut(&id) {
                // The process of a unit is its manager, which outlives it. systemd's source tells of each unit that is held,
                // and then of its end; what it has told of the unit's start before this one may still be on its way.
                entry.gates.unconfirmed = Some(process);
            }
        }
        let Some(entry) = self.workloads.get_mut(&id) else {
            return self.one_too_many(&id, gate, &subject, answer);
        };
        if entry.told_first != FirstInstruction::After {
            entry.gates.state.hold(gate);
        }
        if let Some(answer) = answer {
            if entry.gates.waiting.len() >= MAX_WAITING {
                // Its asker sees that nobody decides, and applies its own rule for that.
                return;
            }
            entry.gates.waiting.push(Waiting { gate, since, decide_by, answer });
        }
        self.reconcile(&id);
    }

    /// There are too many workloads, which has been reported: this one cannot be attached.
    fn one_too_many(
        &mut self,
        id: &WorkloadId,
        gate: Gate,
        subject: &Subject,
        answer: Option<oneshot::Sender<Admission>>,
    ) {
        let Some(answer) = answer else { return };
        let plan = self.policies.as_ref().and_then(|policies| policies.plan_for(subject));
        let plan = plan.filter(|_| !self.held.contains(id));
        let admission = plan.map_or(Admission::Unmatched, |plan| by_mode(plan, TOO_MANY.to_owned()));
        // One that has given up needs no answer.
        let _ = answer.send(admission.clone());
        self.unheld(Unheld { gate, id: Some(id.clone()), admission });
    }

    /// A gate has decided by itself about what it could not hold.
    pub(super) fn unheld(&mut self, unheld: Unheld) {
        let Unheld { gate, id, admission } = unheld;
        let (kind, policy, text) = match &admission {
            Admission::Unmatched | Admission::Covered | Admission::Attached => return,
            Admission::Open { policy, reason } => {
                let text =
                    format!("not held by the {gate} gate, and let run as onFailure: open says: {reason}");
                (EventKind::AdmittedOpen, policy, text)
            }
            Admission::Refused { policy, reason } => {
                let text = format!("refused by the {gate} gate as onFailure: closed says: {reason}");
                (EventKind::Refused, policy, text)
            }
        };
        self.metrics.gate(gate, &admission, Duration::ZERO);
        let mut entry = event_log::Entry::new(kind, text).policy(policy).at_gate(gate, 0);
        if let Some(id) = &id {
            entry = entry.workload(id);
        }
        self.events.add(entry);
    }

    /// Whether its cgroup is within that of a container: the program is that container's, for which its own gate or source
    /// speaks, be it selected or not.
    fn is_in_a_container(&self, workload: &Workload) -> bool {
        let cgroup = &workload.instance.cgroup.path;
        self.workloads.values().any(|entry| {
            let by_engine = match entry.workload.subject.runtime {
                RuntimeKind::Containerd | RuntimeKind::Docker | RuntimeKind::Podman | RuntimeKind::Crio => {
                    true
                }
                // A container of runc alone, which only its gate has told of.
                RuntimeKind::Process => entry.gates.state.gate().is_some_and(|gate| gate != Gate::Exec),
                RuntimeKind::Systemd => false,
            };
            by_engine && entry.present && cgroup.starts_with(&entry.workload.instance.cgroup.path)
        })
    }

    /// Watches the end of a workload that only a gate has told of: its runtime may never do so, as when it is refused.
    pub(super) fn watch(&mut self, id: &WorkloadId, process: ProcessId) {
        match self.inbox.exits.watch(id.clone(), process) {
            Ok(true) => {
                if let Some(entry) = self.workloads.get_mut(id) {
                    entry.gates.unconfirmed = Some(process);
                }
            }
            Ok(false) => self.ended(id),
            Err(error) => self.problem("workload", format!("the end of {id} cannot be watched: {error}")),
        }
    }

    /// The first process of a workload that a gate told of has ended.
    pub(super) fn exited(&mut self, id: &WorkloadId, process: ProcessId) {
        if self.workloads.get(id).is_some_and(|entry| entry.workload.instance.process == process) {
            if let Some(entry) = self.workloads.get_mut(id) {
                entry.gates.confirm();
            }
            self.ended(id);
        }
    }

    /// Answers every gate at which the workload waits, as far as that can be decided.
    pub(super) fn answer_gates(&mut self, id: &WorkloadId) {
        self.answer_gates_as(id, None);
    }

    /// The agent ends: whoever waits is answered by the failure mode, and not left to what a gate does without an agent. But a
    /// hook is not answered: it can wait for the next agent, and finds the failure mode by itself when none comes.
    pub(super) fn answer_all_gates(&mut self) {
        for id in self.workloads.keys().cloned().collect::<Vec<_>>() {
            self.answer_gates_as(&id, Some(ENDS));
        }
        // Those that were not looked at yet.
        self.inbox.holds.close();
        while let Ok(Hold { gate, workload, answer, .. }) = self.inbox.holds.try_recv() {
            if can_ask_again(gate) {
                continue;
            }
            let plan = self.policies.as_ref().and_then(|policies| policies.plan_for(&workload.subject));
            let admission = plan.map_or(Admission::Unmatched, |plan| by_mode(plan, ENDS.to_owned()));
            // One that has given up needs no answer.
            drop(answer.map(|answer| answer.send(admission)));
        }
    }

    fn answer_gates_as(&mut self, id: &WorkloadId, ending: Option<&str>) {
        let policies_known = self.policies.is_some();
        let Some(entry) = self.workloads.get_mut(id) else { return };
        if entry.gates.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut told = Vec::new();
        for waiting in std::mem::take(&mut entry.gates.waiting) {
            if waiting.answer.is_closed() || (ending.is_some() && can_ask_again(waiting.gate)) {
                continue;
            }
            let late = (waiting.decide_by <= now).then_some(LATE);
            match decision(entry, policies_known, ending.or(late)) {
                Some(admission) => told.push((waiting, admission)),
                None => entry.gates.waiting.push(waiting),
            }
        }
        for (waiting, admission) in told {
            self.answer(id, waiting, admission);
        }
    }

    fn answer(&mut self, id: &WorkloadId, waiting: Waiting, admission: Admission) {
        let Some(entry) = self.workloads.get_mut(id) else { return };
        let Waiting { gate, since, answer, .. } = waiting;
        let took = since.elapsed();
        let (kind, text) = match &admission {
            Admission::Unmatched | Admission::Covered => (None, String::new()),
            Admission::Attached => (Some(EventKind::Admitted), format!("let run by the {gate} gate")),
            Admission::Open { reason, .. } => (
                Some(EventKind::AdmittedOpen),
                format!("let run by the {gate} gate as onFailure: open says: {reason}"),
            ),
            Admission::Refused { reason, .. } => (
                Some(EventKind::Refused),
                format!("refused by the {gate} gate as onFailure: closed says: {reason}"),
            ),
        };
        if let Admission::Refused { reason, .. } = &admission {
            entry.gates.refused = Some(reason.clone());
        } else {
            entry.gates.refused = None;
            // Before the answer: from here on it may run.
            entry.gates.state.release();
        }
        let refused_unit = !admission.admits() && entry.workload.subject.runtime == RuntimeKind::Systemd;
        self.metrics.gate(gate, &admission, took);
        let event = kind.map(|kind| {
            let entry = event_log::Entry::new(kind, text).workload(id).at_gate(gate, micros(took));
            match self.workloads.get(id).and_then(|entry| entry.plan.as_ref()) {
                Some(plan) => entry.policy(&plan.policy),
                None => entry,
            }
        });
        // A gate that has given up meanwhile has refused or let go by itself.
        let _ = answer.send(admission);
        if let Some(event) = event {
            self.events.add(event);
        }
        if refused_unit {
            // No process of it ever was, so no end of one would tell.
            self.ended(id);
        }
    }
}

/// Whether who waits at this gate outlives the agent.
fn can_ask_again(gate: Gate) -> bool {
    match gate {
        Gate::Hook | Gate::Wrapper | Gate::Systemd => true,
        Gate::Run | Gate::Nri | Gate::Exec => false,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// What a waiting gate is answered; nothing while that is not known and not `due`, for a reason.
fn decision(entry: &Entry, policies_known: bool, due: Option<&str>) -> Option<Admission> {
    if entry.held {
        return Some(Admission::Unmatched);
    }
    let Some(plan) = &entry.plan else {
        return (policies_known || due.is_some()).then_some(Admission::Unmatched);
    };
    if entry.is_complete() {
        return Some(Admission::Attached);
    }
    let (verdict, reason) = entry.outcome();
    match verdict {
        Verdict::Degraded | Verdict::Failed => {
            Some(by_mode(plan, reason.unwrap_or_else(|| verdict.to_string())))
        }
        Verdict::Attached
        | Verdict::Attaching
        | Verdict::Detaching
        | Verdict::Held
        | Verdict::Refused
        | Verdict::CannotAttach
        | Verdict::NotMatched => due.map(|due| {
            let waited = reason.unwrap_or_else(|| "its companions are not there yet".to_owned());
            by_mode(plan, format!("{due}: {waited}"))
        }),
    }
}

fn by_mode(plan: &Plan, reason: String) -> Admission {
    let policy = plan.policy.clone();
    match plan.on_failure {
        FailureMode::Open => Admission::Open { policy, reason },
        FailureMode::Closed => Admission::Refused { policy, reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A look that waits for the runtime must hear of the hold: the runtime answers only when that is over.
    #[tokio::test]
    async fn who_waits_hears_of_the_hold() {
        let state = HeldState::default();
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { state.until_held().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        state.hold(Gate::Wrapper);
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
        tokio::time::timeout(Duration::from_secs(20), state.until_held()).await.unwrap();
    }

    #[test]
    fn what_was_released_is_not_held_again() {
        let state = HeldState::default();
        assert_eq!((state.is_held(), state.gate()), (false, None));
        state.hold(Gate::Nri);
        assert_eq!((state.is_held(), state.gate()), (true, Some(Gate::Nri)));
        state.hold(Gate::Hook);
        assert_eq!(state.gate(), Some(Gate::Nri), "the first one counts");
        state.release();
        assert_eq!((state.is_held(), state.gate()), (false, Some(Gate::Nri)));
        state.hold(Gate::Nri);
        assert!(!state.is_held());
        for gate in Gate::ALL {
            let recalled = HeldState::recall(Some(gate));
            assert_eq!((recalled.is_held(), recalled.gate()), (false, Some(gate)));
        }
        let never = HeldState::recall(None);
        never.release();
        assert_eq!((never.is_held(), never.gate()), (false, None));
    }
}
