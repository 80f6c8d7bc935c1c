//! What runtime sources tell: which workloads there are.

use std::collections::BTreeSet;

use pillion_runtime::{RuntimeEvent, SourceName};
use pillion_workload::{FirstInstruction, Gate, RuntimeKind, Subject, Workload, WorkloadId};
use tokio::time::Instant;

use super::{Controller, entry::Entry, gates::AtGates};
use crate::{
    api::{EventKind, SourceState},
    event_log,
};

/// More workloads than a node can run: what comes beyond is reported and left alone.
const MAX_WORKLOADS: usize = 16_384;

impl Controller {
    pub(super) fn runtime(&mut self, event: RuntimeEvent) {
        match event {
            RuntimeEvent::Up { source } => {
                self.source(source, SourceState::Up, None);
                self.note(EventKind::SourceUp, format!("{source} answers"));
            }
            RuntimeEvent::Down { source, error } => {
                self.note(EventKind::SourceDown, format!("{source} does not answer: {error}"));
                self.source(source, SourceState::Down, Some(error));
            }
            RuntimeEvent::Snapshot { source, workloads } => self.snapshot(source, workloads),
            RuntimeEvent::Unattachable { source, id, subject, reason } => {
                self.cannot_attach(source, &id, *subject, &reason);
            }
            RuntimeEvent::Started { workload, first } => {
                let source = self.source_of(workload.subject.runtime);
                self.told(workload, source, first);
            }
            RuntimeEvent::Changed { workload } => {
                let source = self.source_of(workload.subject.runtime);
                self.told(workload, source, FirstInstruction::Unknown);
            }
            // One that only a gate has told of is another instance than the one that has ended.
            RuntimeEvent::Stopped { id } => {
                self.unattachable.remove(&id);
                if self.workloads.get(&id).is_none_or(|entry| entry.gates.is_confirmed()) {
                    self.ended(&id);
                }
            }
        }
    }

    /// Replaces all that the source told before: what it does not mention has ended.
    fn snapshot(&mut self, source: SourceName, workloads: Vec<(Workload, FirstInstruction)>) {
        let mentioned: BTreeSet<WorkloadId> =
            workloads.iter().map(|(workload, _)| workload.id.clone()).collect();
        self.unattachable.forget(source);
        let kind = self.sources.get(&source).map(|source| source.kind);
        let gone: Vec<WorkloadId> = self
            .workloads
            .values()
            .filter(|entry| match entry.source {
                Some(told_by) => told_by == source,
                None => Some(entry.workload.subject.runtime) == kind,
            })
            // The snapshot may be older than what a gate has told since.
            .filter(|entry| entry.gates.is_confirmed())
            .map(|entry| entry.workload.id.clone())
            .filter(|id| !mentioned.contains(id))
            .collect();
        for id in gone {
            self.ended(&id);
        }
        for (workload, first) in workloads {
            self.told(workload, Some(source), first);
        }
    }

    /// A source tells of a workload. What it says of an instance before the one that a gate holds is late.
    fn told(&mut self, workload: Workload, source: Option<SourceName>, first: FirstInstruction) {
        let id = workload.id.clone();
        if let Some(entry) = self.workloads.get(&id)
            && !entry.gates.is_confirmed()
            && entry.present
            && !entry.is_instance(&workload.instance)
        {
            return;
        }
        self.seen(workload, source, first);
        if let Some(entry) = self.workloads.get_mut(&id) {
            entry.gates.confirm();
        }
    }

    fn cannot_attach(&mut self, source: SourceName, id: &WorkloadId, subject: Subject, reason: &str) {
        let policies = self.policies.as_ref();
        let policy =
            policies.and_then(|policies| policies.plan_for(&subject)).map(|plan| plan.policy.clone());
        if self.unattachable.add(source, id.clone(), subject, reason.to_owned())
            && let Some(policy) = policy
        {
            let entry =
                event_log::Entry::new(EventKind::CannotAttach, format!("cannot be attached: {reason}"));
            self.events.add(entry.workload(id).policy(&policy));
        }
    }

    pub(super) fn seen(&mut self, workload: Workload, source: Option<SourceName>, first: FirstInstruction) {
        let id = workload.id.clone();
        if !self.workloads.contains_key(&id) && self.workloads.len() >= MAX_WORKLOADS {
            if !self.full {
                self.full = true;
                self.problem(
                    "workload",
                    format!("more than {MAX_WORKLOADS} workloads: {id} and others are left alone"),
                );
            }
            return;
        }
        let known = self.workloads.contains_key(&id);
        let entry =
            self.workloads.entry(id.clone()).or_insert_with(|| Entry::new(workload.clone(), source, first));
        let recreated = entry.workload.instance != workload.instance || !entry.present;
        if recreated {
            (entry.told_first, entry.wanted_at, entry.failure) = (first, Instant::now(), None);
            entry.gates = AtGates::default();
        }
        // systemd's source says so of a unit of which the hook is asking right now; its question may be behind this.
        if first == FirstInstruction::Before
            && (!known || recreated)
            && workload.subject.runtime == RuntimeKind::Systemd
        {
            entry.gates.state.hold(Gate::Systemd);
        }
        (entry.workload, entry.source, entry.present) = (workload, source, true);
        entry.held = self.held.contains(&id);
        self.decide(&id);
        let entry = &self.workloads[&id];
        if (!known || recreated) && entry.plan.is_none() && self.policies.is_some() {
            self.log(&id, EventKind::NotMatched, "no policy selects it");
        }
        self.reconcile(&id);
    }

    pub(super) fn ended(&mut self, id: &WorkloadId) {
        let Some(entry) = self.workloads.get_mut(id) else { return };
        if entry.present {
            entry.present = false;
            self.log(id, EventKind::WorkloadStopped, "the workload has ended");
        }
        self.reconcile(id);
    }
}
