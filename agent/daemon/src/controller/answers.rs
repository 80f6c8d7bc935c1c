//! The controller's answers: its state in the words of the API. Changes nothing.

use std::collections::BTreeMap;

use pillion_policy::{Decision, PolicySet, Reason};
use pillion_workload::{Gate, Subject, WorkloadId};

use super::{
    Controller, InForce, Pulse,
    entry::{Entry, ports},
};
use crate::api::{
    DataplaneStatus, ExplainRequest, ExplainResponse, FieldInfo, Health, PolicyStatus, PolicySummary,
    Problem, ReasonInfo, ReasonOutcome, SourceState, SourceStatus, StatusResponse, Verdict, WorkloadDetail,
    WorkloadSummary,
};

/// Events shown with a workload.
const EVENTS_SHOWN: usize = 20;

impl Controller {
    pub(super) fn pulse(&self) -> Pulse {
        Pulse {
            policies_loaded: self.policies.is_some(),
            workloads: self.counts_by_gate(),
            sources: self
                .sources
                .iter()
                .map(|(name, source)| (name.as_str(), source.state == SourceState::Up))
                .collect(),
        }
    }

    /// Without the counters of the data plane, which take many system calls: the server adds them.
    pub(super) fn status(&self) -> StatusResponse {
        let problems = self.all_problems();
        StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: i32::try_from(std::process::id()).unwrap_or(i32::MAX),
            started_at: self.started_at,
            health: if problems.is_empty() { Health::Ok } else { Health::Degraded },
            problems,
            policies: self.policy_status(),
            sources: self
                .sources
                .iter()
                .map(|(name, source)| SourceStatus {
                    name: name.to_string(),
                    state: source.state,
                    since: source.since,
                    error: source.error.clone(),
                    workloads: self.workloads.values().filter(|entry| entry.source == Some(*name)).count(),
                })
                .collect(),
            dataplane: DataplaneStatus { pin_root: self.pin_root.clone(), counters: BTreeMap::new() },
            workloads: self.counts(),
        }
    }

    fn all_problems(&self) -> Vec<Problem> {
        let problem = |area: &str, message: String| Problem { area: area.to_owned(), message };
        let mut problems = Vec::new();
        if let Some(refused) = &self.refused {
            let kept = self.kept();
            let first = first_fault(&refused.message);
            problems.push(problem(
                "policy",
                format!(
                    "the latest policies were refused, {kept}: {first}; see: pillion validate {}",
                    self.policy_dir.display()
                ),
            ));
        }
        for (name, source) in &self.sources {
            if source.state == SourceState::Down {
                let error = source.error.as_deref().unwrap_or("no reason given");
                problems.push(problem("source", format!("{name} does not answer: {error}")));
            }
        }
        for WorkloadSummary { id, verdict, reason, .. } in self.summaries() {
            if verdict.is_problem() {
                let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
                problems.push(problem("workload", format!("{id} is {verdict}{reason}")));
            }
        }
        problems.extend(self.problems.iter().cloned());
        problems
    }

    pub(super) fn policy_status(&self) -> PolicyStatus {
        let policies = self.policies.iter().flat_map(PolicySet::policies);
        PolicyStatus {
            directory: self.policy_dir.clone(),
            generation: self.generation,
            loaded_at: self.loaded_at,
            policies: policies
                .map(|policy| PolicySummary {
                    name: policy.name().clone(),
                    priority: policy.priority().into(),
                    workloads: self
                        .workloads
                        .values()
                        .filter(|entry| entry.plan.as_ref().is_some_and(|plan| plan.policy == *policy.name()))
                        .count(),
                })
                .collect(),
            refused: self.refused.clone(),
            of_earlier_agent: self.policies_are_copy,
        }
    }

    fn counts(&self) -> BTreeMap<Verdict, usize> {
        let mut counts: BTreeMap<Verdict, usize> =
            Verdict::ALL.into_iter().map(|verdict| (verdict, 0)).collect();
        for summary in self.summaries() {
            *counts.entry(summary.verdict).or_default() += 1;
        }
        counts
    }

    fn counts_by_gate(&self) -> BTreeMap<(Verdict, Option<Gate>), usize> {
        let mut counts = BTreeMap::new();
        for summary in self.summaries() {
            *counts.entry((summary.verdict, summary.gate)).or_default() += 1;
        }
        counts
    }

    /// All workloads, by id.
    pub(super) fn summaries(&self) -> Vec<WorkloadSummary> {
        let mut all: Vec<WorkloadSummary> = self.workloads.values().map(Entry::summary).collect();
        all.extend(self.unattachable.summaries(self.policies.as_ref()));
        all.sort_by(|one, other| one.id.cmp(&other.id));
        all
    }

    pub(super) fn detail(&self, id: &WorkloadId) -> Option<WorkloadDetail> {
        let Some(entry) = self.workloads.get(id) else { return self.detail_of_unattachable(id) };
        let view = entry.view();
        let plan = view.map(|view| &view.plan).or(entry.plan.as_ref());
        Some(WorkloadDetail {
            summary: entry.summary(),
            subject: entry.workload.subject.clone(),
            instance: Some(entry.workload.instance.clone()),
            plan: plan.map(|plan| pillion_workload::Plan::clone(plan)),
            on_failure: plan.map(|plan| plan.on_failure),
            ports: view.and_then(|view| view.redirect.as_ref()).map(ports),
            reasons: self.reasons(&entry.workload.subject).1,
            events: self.events.of(id, EVENTS_SHOWN),
            neighbours: Vec::new(),
        })
    }

    fn detail_of_unattachable(&self, id: &WorkloadId) -> Option<WorkloadDetail> {
        let known = self.unattachable.get(id)?;
        Some(WorkloadDetail {
            summary: known.summary(id, self.policies.as_ref()),
            subject: known.subject.clone(),
            instance: None,
            plan: None,
            on_failure: None,
            ports: None,
            reasons: self.reasons(&known.subject).1,
            events: self.events.of(id, EVENTS_SHOWN),
            neighbours: Vec::new(),
        })
    }

    pub(super) fn in_force(&self, id: &WorkloadId) -> Option<InForce> {
        let Some(entry) = self.workloads.get(id) else {
            let known = self.unattachable.get(id)?;
            let verdict = known.summary(id, self.policies.as_ref()).verdict;
            return Some(InForce { verdict, cgroup: None, plan: None, redirect: None });
        };
        let view = entry.view();
        Some(InForce {
            verdict: entry.verdict().0,
            cgroup: Some(entry.workload.instance.cgroup.id),
            plan: view.map(|view| &view.plan).or(entry.plan.as_ref()).cloned(),
            redirect: view.and_then(|view| view.redirect.clone()),
        })
    }

    pub(super) fn explain(&self, request: ExplainRequest) -> Option<ExplainResponse> {
        let subject = match request {
            ExplainRequest::Workload(id) => match self.workloads.get(&id) {
                Some(entry) => entry.workload.subject.clone(),
                None => self.unattachable.get(&id)?.subject.clone(),
            },
            ExplainRequest::Subject(subject) => *subject,
        };
        let (decision, reasons) = self.reasons(&subject);
        let plan =
            decision.and_then(|decision| decision.plan).map(|plan| pillion_workload::Plan::clone(&plan));
        Some(ExplainResponse { subject, plan, reasons, connections: Vec::new() })
    }

    fn reasons(&self, subject: &Subject) -> (Option<Decision>, Vec<ReasonInfo>) {
        let decision = self.policies.as_ref().map(|policies| policies.decide(subject));
        let reasons = decision.iter().flat_map(|decision| &decision.reasons).map(ReasonInfo::from).collect();
        (decision, reasons)
    }
}

/// The first of the faults, with its place, in one line.
fn first_fault(message: &str) -> String {
    let mut lines = message.lines();
    let what = lines.next().unwrap_or_default();
    match lines.next().and_then(|line| line.trim_start().strip_prefix("--> ")) {
        Some(place) => format!("{place}: {}", what.trim_start_matches("error: ")),
        None => what.to_owned(),
    }
}

impl From<&Reason> for ReasonInfo {
    fn from(reason: &Reason) -> Self {
        let (outcome, shadowed_by) = match &reason.verdict {
            pillion_policy::Verdict::Chosen => (ReasonOutcome::Selected, None),
            pillion_policy::Verdict::Shadowed { by } => (ReasonOutcome::Shadowed, Some(by.clone())),
            pillion_policy::Verdict::NotMatched => (ReasonOutcome::NotMatched, None),
        };
        let field = |field: &pillion_policy::FieldReason| FieldInfo {
            field: field.field.to_owned(),
            matched: field.matched,
            wanted: field.wanted.clone(),
            actual: field.actual.clone(),
        };
        Self {
            policy: reason.policy.clone(),
            priority: reason.priority.into(),
            outcome,
            shadowed_by,
            fields: reason.fields.iter().map(field).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_is_told_with_its_place() {
        for (message, told) in [
            (
                "error: `x` is no kind\n  --> /p/a.yaml:1:7\n  |\n1 | kind: x\n\nerror: more",
                "/p/a.yaml:1:7: `x` is no kind",
            ),
            ("/p/a.yaml: may be written by others\n/p/b.yaml: too", "/p/a.yaml: may be written by others"),
            ("", ""),
        ] {
            assert_eq!(first_fault(message), told);
        }
    }
}
