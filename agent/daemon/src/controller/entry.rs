//! One workload as the controller knows it, and the verdict on it.
//!
//! Owns the shape of what is known and how it is shown. Never acts: the controller does.

use std::{sync::Arc, time::Duration};

use pillion_attachment::{CompanionView, Handle, State, View, Wish};
use pillion_runtime::SourceName;
use pillion_workload::{FailureMode, FirstInstruction, Instance, Plan, RedirectSpec, Workload};
use tokio::{sync::oneshot, time::Instant};

use super::{
    OverrideReply,
    gates::AtGates,
    reconcile::{Have, Want},
};
use crate::api::{CompanionState, CompanionStatus, PortsInUse, Timestamp, Verdict, WorkloadSummary};

const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(300);

/// A workload.
pub(super) struct Entry {
    pub(super) workload: Workload,
    /// Who told of it; `None` while only the journal has.
    pub(super) source: Option<SourceName>,
    /// What was true when it was told of.
    pub(super) told_first: FirstInstruction,
    /// Since when it is to be attached: told of, selected by another policy, or released by hand.
    pub(super) wanted_at: Instant,
    /// False when it has ended and only the detach is missing.
    pub(super) present: bool,
    /// What the policies in force give it.
    pub(super) plan: Option<Arc<Plan>>,
    pub(super) held: bool,
    /// Who holds it before its first instruction.
    pub(super) gates: AtGates,
    pub(super) attachment: Option<Attachment>,
    pub(super) failure: Option<Failure>,
    pub(super) attach_millis: Option<u64>,
    pub(super) since: Timestamp,
    pub(super) shown: Verdict,
    pub(super) waiters: Vec<oneshot::Sender<OverrideReply>>,
}

/// An attachment under way or in force.
pub(super) struct Attachment {
    pub(super) handle: Handle,
    pub(super) serial: u64,
    pub(super) instance: Instance,
    /// The plan it was last told; `None` when it was told to end.
    pub(super) told: Option<Arc<Plan>>,
    pub(super) view: Option<View>,
}

/// An attempt that failed.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) reason: String,
    count: u32,
    /// `None` once it is time: the next attempt may begin.
    pub(super) retry_at: Option<Instant>,
}

impl Failure {
    pub(super) fn after(previous: Option<&Self>, reason: String) -> Self {
        let count = previous.map_or(0, |failure| failure.count.saturating_add(1));
        let pause = FIRST_RETRY.saturating_mul(1 << count.min(10)).min(LONGEST_RETRY);
        Self { reason, count, retry_at: Some(Instant::now() + pause) }
    }
}

impl Attachment {
    pub(super) fn wish(&mut self, plan: Option<Arc<Plan>>) {
        self.handle.wish(plan.clone().map_or(Wish::Detached, Wish::Attached));
        self.told = plan;
    }
}

impl Entry {
    pub(super) fn new(workload: Workload, source: Option<SourceName>, told_first: FirstInstruction) -> Self {
        Self {
            workload,
            source,
            told_first,
            wanted_at: Instant::now(),
            present: true,
            plan: None,
            held: false,
            gates: AtGates::default(),
            attachment: None,
            failure: None,
            attach_millis: None,
            since: Timestamp::now(),
            shown: Verdict::NotMatched,
            waiters: Vec::new(),
        }
    }

    pub(super) fn want(&self, policies_known: bool) -> Want<'_> {
        match &self.plan {
            _ if !self.present || self.held => Want::Nothing,
            _ if !policies_known => Want::Unknown(&self.workload.instance),
            Some(plan) => Want::Plan(plan, &self.workload.instance),
            None => Want::Nothing,
        }
    }

    /// Whether this very instance is known and has not ended.
    pub(super) fn is_instance(&self, instance: &Instance) -> bool {
        self.present && self.workload.instance == *instance
    }

    /// When something must be done for it: a failed attach tried again, or a gate answered.
    pub(super) fn due(&self) -> Option<Instant> {
        self.retry_at().into_iter().chain(self.gates.due()).min()
    }

    /// When a failed attach is to be tried again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.failure.as_ref()?.retry_at
    }

    pub(super) fn have(&self, in_the_way: bool) -> Have<'_> {
        match &self.attachment {
            Some(attachment) => {
                Have::Attachment { instance: &attachment.instance, told: attachment.told.as_ref() }
            }
            None if in_the_way || self.retry_at().is_some() => Have::Later,
            None => Have::Nothing,
        }
    }

    /// What has become of it, and why where the verdict does not say it all.
    pub(super) fn verdict(&self) -> (Verdict, Option<String>) {
        match &self.gates.refused {
            Some(reason) if !self.is_complete() => (Verdict::Refused, Some(reason.clone())),
            _ => self.outcome(),
        }
    }

    /// Whether all that is wanted is in force. A companion that somebody else runs may be within what is held, and come only
    /// when that may run: one that was looked for and not found is not waited for.
    pub(super) fn is_complete(&self) -> bool {
        let wanted = self.attachment.as_ref().filter(|attachment| attachment.told.is_some());
        let Some(view) = wanted.and_then(|attachment| attachment.view.as_ref()) else { return false };
        matches!(view.state, State::Attached { .. })
            && view.companions.iter().all(|it| it.ready || (it.external && it.error.is_some()))
    }

    /// What has become of the attachment, whatever a gate has been told.
    pub(super) fn outcome(&self) -> (Verdict, Option<String>) {
        if let Some(attachment) = &self.attachment {
            if attachment.told.is_none() {
                return (Verdict::Detaching, None);
            }
            return match attachment.view.as_ref().map(|view| (&view.state, view)) {
                Some((State::Attached { .. }, view)) if is_awaited(view) => {
                    (Verdict::Attaching, starting(&view.companions))
                }
                Some((State::Attached { missing }, view)) => match (&view.refused, missing.is_empty()) {
                    (_, false) => (Verdict::Degraded, Some(degraded(view))),
                    (Some(reason), true) => {
                        (Verdict::Degraded, Some(format!("the changed policy is not in force: {reason}")))
                    }
                    (None, true) => {
                        let kept = |reason: &String| format!("open connections could not be reset: {reason}");
                        (Verdict::Attached, view.unreset.as_ref().map(kept))
                    }
                },
                Some((State::Detaching | State::Detached, _)) => (Verdict::Detaching, None),
                Some((State::Failed { reason }, _)) => (Verdict::Failed, Some(reason.clone())),
                Some((State::Planned | State::Starting | State::Redirecting { .. }, view)) => {
                    (Verdict::Attaching, starting(&view.companions))
                }
                None => (Verdict::Attaching, None),
            };
        }
        match (&self.failure, &self.plan) {
            (failure, _) if self.held => {
                (Verdict::Held, failure.as_ref().map(|failure| failure.reason.clone()))
            }
            (Some(failure), _) => (Verdict::Failed, Some(failure.reason.clone())),
            (None, Some(_)) => (Verdict::Attaching, None),
            (None, None) => (Verdict::NotMatched, Some("no policy selects it".to_owned())),
        }
    }

    /// Whether nothing is under way: what `attach` and `detach` wait for.
    pub(super) fn is_settled(&self) -> bool {
        match self.verdict().0 {
            Verdict::Attaching | Verdict::Detaching => false,
            Verdict::Attached
            | Verdict::Degraded
            | Verdict::Failed
            | Verdict::Held
            | Verdict::Refused
            | Verdict::CannotAttach
            | Verdict::NotMatched => true,
        }
    }

    /// Notes when the verdict changes.
    pub(super) fn touch(&mut self) {
        let (verdict, _) = self.verdict();
        if verdict != self.shown {
            (self.shown, self.since) = (verdict, Timestamp::now());
        }
    }

    pub(super) fn view(&self) -> Option<&View> {
        self.attachment.as_ref()?.view.as_ref()
    }

    pub(super) fn summary(&self) -> WorkloadSummary {
        let (verdict, reason) = self.verdict();
        let view = self.view();
        WorkloadSummary {
            id: self.workload.id.clone(),
            runtime: self.workload.subject.runtime,
            name: self.workload.subject.name.clone(),
            namespace: self.workload.subject.namespace.clone(),
            pid: self.workload.instance.process.pid.0,
            verdict,
            since: self.since,
            reason,
            policy: self.plan.as_ref().map(|plan| plan.policy.clone()),
            companions: view.map(|view| view.companions.iter().map(companion).collect()).unwrap_or_default(),
            first_instruction: view.and_then(|view| view.first_instruction),
            gate: self.gates.state.gate(),
            attach_millis: view.and(self.attach_millis),
        }
    }
}

fn companion(view: &CompanionView) -> CompanionStatus {
    CompanionStatus {
        name: view.name.clone(),
        state: match (view.ready, view.waiting) {
            (true, _) => CompanionState::Ready,
            (false, true) if view.error.is_some() => CompanionState::Down,
            (false, _) => CompanionState::Starting,
        },
        pid: view.pid.map(|pid| pid.0),
        external: view.external,
        restarts: view.restarts,
        error: view.error.clone(),
    }
}

pub(super) fn ports(redirect: &RedirectSpec) -> PortsInUse {
    PortsInUse {
        outbound: {
            let ports: Vec<u16> = redirect.outbound.iter().filter_map(|rule| rule.to.port).collect();
            let first = |at: &usize| !ports[..*at].contains(&ports[*at]);
            (0..ports.len()).filter(first).map(|at| ports[at]).collect()
        },
        dns: redirect.dns.as_ref().and_then(|target| target.port),
        inbound: redirect
            .inbound
            .iter()
            .filter_map(|rule| rule.to.port.map(|to| rule.ports.iter().map(move |port| (*port, to))))
            .flatten()
            .collect(),
    }
}

/// Whether nothing is missing but companions that somebody else runs and that are still looked for.
pub(super) fn is_awaited(view: &View) -> bool {
    let mut missing = view.companions.iter().filter(|companion| !companion.ready).peekable();
    missing.peek().is_some() && missing.all(|companion| companion.external && companion.error.is_none())
}

fn degraded(view: &View) -> String {
    let missing: Vec<String> = view
        .companions
        .iter()
        .filter(|companion| !companion.ready)
        .map(|companion| match &companion.error {
            Some(error) => format!("companion {} is not ready: {error}", companion.name),
            None => format!("companion {} is not ready", companion.name),
        })
        .collect();
    let meanwhile = match view.plan.on_failure {
        FailureMode::Open => "connections pass unredirected (onFailure: open)",
        FailureMode::Closed => "connections are refused (onFailure: closed)",
    };
    format!("{}; until then {meanwhile}", missing.join("; "))
}

fn starting(companions: &[CompanionView]) -> Option<String> {
    let waited: Vec<&str> = companions
        .iter()
        .filter(|companion| !companion.ready)
        .map(|companion| companion.name.as_str())
        .collect();
    (!waited.is_empty()).then(|| format!("waiting for {}", waited.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_retried_ever_more_rarely() {
        let mut failure = Failure::after(None, "x".into());
        let mut last = Duration::ZERO;
        for _ in 0..20 {
            let pause = failure.retry_at.unwrap() - Instant::now();
            assert!(pause + Duration::from_millis(50) >= last && pause <= LONGEST_RETRY);
            last = pause;
            failure = Failure::after(Some(&failure), "x".into());
        }
        assert!(last > LONGEST_RETRY / 2);
    }
}
