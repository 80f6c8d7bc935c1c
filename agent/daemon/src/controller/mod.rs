//! The controller: one task that owns all mutable state of the agent and handles one closed [`Event`].
//!
//! Owns the workloads, the policies in force, the state of the sources and the log of events. Whatever is slow (starting
//! companions, reading files, asking a runtime) happens in tasks of its own that send an event back. Handling the same
//! event twice does no harm. Never touches a socket, a process or eBPF itself.

mod answers;
mod entry;
mod event;
mod gates;
mod reconcile;
mod reports;
mod requests;
mod sources;
mod start;
mod unattachable;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use pillion_attachment::{Job, Ledger, Node, Report, attach};
use pillion_policy::PolicySet;
use pillion_runtime::{Exits, FirstInstructionProbe, Hold, RuntimeEvent, SourceName, Unheld, open_netns};
use pillion_workload::{Plan, RuntimeKind, Workload, WorkloadId};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::error;

pub(crate) use event::{Event, InForce, Override, OverrideRefused, OverrideReply, Pulse, Request};
pub(crate) use gates::HeldState;
pub(crate) use start::{Beginning, Parts};

use self::{
    entry::{Attachment, Entry},
    reconcile::{Step, next_step},
    unattachable::Unattachables,
};
use crate::{
    api::{EventKind, Problem, RefusedReload, SourceState, Timestamp},
    event_log::{self, EventLog},
    journal::Journal,
    metrics::Metrics,
    policy_watch::PolicyLoad,
    witness::Attached,
};

/// How long attachments may take to let go when the agent ends.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);
/// Instances of the inbound program that are kept ready, for workloads that start at once.
const INBOUND_READY: usize = 2;
/// Processes that are kept ready to become companions. Each has 0.5 MB of its own.
const COMPANIONS_READY: usize = 2;
/// What needs an operator and has no workload of its own; the oldest go first.
const MAX_PROBLEMS: usize = 64;

/// The one owner of all state.
pub(crate) struct Controller {
    node: Arc<Node>,
    journal: Journal,
    witness: Option<FirstInstructionProbe>,
    metrics: Arc<Metrics>,
    policy_dir: PathBuf,
    pin_root: PathBuf,
    started_at: Timestamp,

    workloads: BTreeMap<WorkloadId, Entry>,
    unattachable: Unattachables,
    held: BTreeSet<WorkloadId>,
    discarding: BTreeSet<WorkloadId>,
    policies: Option<PolicySet>,
    /// They are an earlier agent's: what there is now cannot be used.
    policies_are_copy: bool,
    generation: u64,
    loaded_at: Option<Timestamp>,
    refused: Option<RefusedReload>,
    sources: BTreeMap<SourceName, Source>,
    problems: VecDeque<Problem>,
    events: EventLog,
    next_serial: u64,
    full: bool,

    inbox: Inbox,
    reports: mpsc::Sender<Report>,
    discarded: mpsc::Sender<(WorkloadId, Vec<String>)>,
}

struct Source {
    kind: RuntimeKind,
    state: SourceState,
    since: Timestamp,
    error: Option<String>,
}

/// All that can wake the controller, as channels. Bounded: who sends waits.
struct Inbox {
    runtime: mpsc::Receiver<RuntimeEvent>,
    holds: mpsc::Receiver<Hold>,
    unheld: mpsc::Receiver<Unheld>,
    /// Of workloads that only a gate has told of so far.
    exits: Exits,
    policies: mpsc::Receiver<PolicyLoad>,
    reports: mpsc::Receiver<Report>,
    discarded: mpsc::Receiver<(WorkloadId, Vec<String>)>,
    requests: mpsc::Receiver<Request>,
    stop: CancellationToken,
}

impl Inbox {
    async fn next(&mut self, due: Option<Instant>) -> Event {
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(report) = self.reports.recv() => Event::Attachment(Box::new(report)),
            Some((workload, left)) = self.discarded.recv() => Event::Discarded { workload, left },
            Some(load) = self.policies.recv() => Event::Policies(load),
            Some(hold) = self.holds.recv() => Event::Held(Box::new(hold)),
            Some(unheld) = self.unheld.recv() => Event::Unheld(Box::new(unheld)),
            (workload, process) = self.exits.next() => Event::Exited { workload, process },
            Some(event) = self.runtime.recv() => Event::Runtime(Box::new(event)),
            Some(request) = self.requests.recv() => Event::Request(request),
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Event::Due,
        }
    }
}

impl Controller {
    /// Handles events until it is told to stop; then lets go of everything and leaves it in force.
    pub(crate) async fn run(mut self) {
        loop {
            let due = self.workloads.values().filter_map(Entry::due).min();
            match self.inbox.next(due).await {
                Event::Runtime(event) => self.runtime(*event),
                Event::Policies(load) => self.policies(load),
                Event::Held(hold) => self.held_at_gate(*hold),
                Event::Unheld(unheld) => self.unheld(*unheld),
                Event::Exited { workload, process } => self.exited(&workload, process),
                Event::Attachment(report) => self.attachment(*report),
                Event::Discarded { workload, left } => self.discarded(&workload, &left),
                Event::Request(request) => self.request(request),
                Event::Due => self.due(),
                Event::Stop => break,
            }
        }
        self.leave().await;
    }

    fn policies(&mut self, load: PolicyLoad) {
        match load.result {
            Ok(policies) => {
                self.metrics.policy_reloads.inc();
                self.refused = None;
                self.policies_are_copy = false;
                self.put_in_force(policies);
            }
            Err(message) => {
                self.metrics.policy_reload_failures.inc();
                if self.policies.is_none()
                    && let Some(policies) = load.fallback
                {
                    self.policies_are_copy = true;
                    self.put_in_force(policies);
                }
                let kept = self.kept();
                self.note(EventKind::PolicyRefused, format!("policies were refused, {kept}:\n{message}"));
                self.refused = Some(RefusedReload { at: Timestamp::now(), message });
            }
        }
        if let Some(asker) = load.asker {
            // Who asked has gone: the outcome stands all the same.
            let _ = asker.send(());
        }
    }

    fn put_in_force(&mut self, policies: PolicySet) {
        if self.policies.as_ref() == Some(&policies) {
            return;
        }
        self.generation += 1;
        self.loaded_at = Some(Timestamp::now());
        let message = match policies.policies().len() {
            1 => "1 policy is in force".to_owned(),
            count => format!("{count} policies are in force"),
        };
        self.note(EventKind::PolicyLoaded, message);
        self.policies = Some(policies);
        self.prepare();
        for id in self.workloads.keys().cloned().collect::<Vec<_>>() {
            self.decide(&id);
            self.reconcile(&id);
        }
    }

    /// Which policies are in force when the latest were refused.
    fn kept(&self) -> &'static str {
        match (&self.policies, self.policies_are_copy) {
            (Some(_), false) => "those of before stay in force",
            (Some(_), true) => "those that an earlier agent had last are in force",
            (None, _) => "none are in force",
        }
    }

    /// Loading the inbound program and starting a process take milliseconds: not when a workload waits for them.
    fn prepare(&self) {
        let any = |of: fn(&Plan) -> bool| {
            self.policies.iter().flat_map(PolicySet::policies).any(|policy| of(policy.plan()))
        };
        let companions = any(|plan| !plan.companions.is_empty());
        self.node.host.keep_ready(if companions { COMPANIONS_READY } else { 0 });
        if any(|plan| !plan.redirect.inbound.is_empty()) {
            let dataplane = self.node.dataplane.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = dataplane.prepare_inbound(INBOUND_READY) {
                    error!(%error, "the inbound program cannot be prepared");
                }
            });
        }
    }

    fn decide(&mut self, id: &WorkloadId) {
        let (Some(policies), Some(entry)) = (&self.policies, self.workloads.get_mut(id)) else { return };
        let plan = policies.plan_for(&entry.workload.subject).cloned();
        if plan != entry.plan {
            // Another plan deserves another attempt.
            entry.failure = None;
            entry.wanted_at = Instant::now();
            entry.plan = plan;
        }
    }

    /// Does the next thing for a workload, if there is one.
    fn reconcile(&mut self, id: &WorkloadId) {
        let Some(entry) = self.workloads.get(id) else { return };
        let in_the_way = self.discarding.contains(id);
        match next_step(&entry.want(self.policies.is_some()), &entry.have(in_the_way)) {
            Step::Rest => {}
            Step::Begin => self.begin(id),
            Step::Change => {
                let entry = self.workloads.get_mut(id).expect("looked up above");
                let plan = entry.plan.clone();
                if let Some(attachment) = &mut entry.attachment {
                    attachment.wish(plan);
                }
            }
            Step::End => {
                let entry = self.workloads.get_mut(id).expect("looked up above");
                if let Some(attachment) = &mut entry.attachment {
                    attachment.wish(None);
                }
            }
        }
        self.settle(id);
    }

    /// Updates what is shown, answers who waits, and forgets a workload of which nothing is left.
    fn settle(&mut self, id: &WorkloadId) {
        self.answer_gates(id);
        let Some(entry) = self.workloads.get_mut(id) else { return };
        entry.touch();
        let gone = !entry.present && entry.attachment.is_none();
        if entry.is_settled() || gone {
            let summary = entry.summary();
            for waiter in entry.waiters.drain(..) {
                let _ = waiter.send(Ok(summary.clone()));
            }
        }
        if gone {
            self.workloads.remove(id);
            self.full = false;
        }
    }

    fn begin(&mut self, id: &WorkloadId) {
        let Some(entry) = self.workloads.get(id) else { return };
        let (Some(plan), workload) = (entry.plan.clone(), entry.workload.clone()) else { return };
        match open_netns(&workload.instance) {
            Ok(netns) => self.spawn(workload, plan, netns, None),
            Err(error) => self.failed(id, pillion_attachment::chain(&error)),
        }
    }

    fn spawn(
        &mut self,
        workload: Workload,
        plan: Arc<Plan>,
        netns: std::os::fd::OwnedFd,
        earlier: Option<pillion_attachment::Record>,
    ) {
        let id = workload.id.clone();
        let Some(entry) = self.workloads.get_mut(&id) else { return };
        let serial = self.next_serial;
        self.next_serial += 1;
        let instance = workload.instance.clone();
        let job = Job {
            witness: Arc::new(Attached::new(
                entry.gates.state.clone(),
                self.witness.clone(),
                workload.clone(),
            )),
            workload,
            plan: plan.clone(),
            netns,
            told_first: entry.told_first,
            serial,
            earlier,
        };
        let ledger: Arc<dyn Ledger> = Arc::new(self.journal.clone());
        let handle = attach(self.node.clone(), ledger, job, self.reports.clone());
        entry.attachment = Some(Attachment { handle, serial, instance, told: Some(plan), view: None });
    }

    /// A failed attach is due again, or a gate must be answered.
    fn due(&mut self) {
        let now = Instant::now();
        for id in self.workloads.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = self.workloads.get_mut(&id) else { continue };
            if entry.gates.due().is_some_and(|at| at <= now) {
                self.answer_gates(&id);
                self.reconcile(&id);
            }
            let Some(entry) = self.workloads.get_mut(&id) else { continue };
            // The failure itself is kept until an attach succeeds: it counts.
            if let Some(failure) = &mut entry.failure
                && failure.retry_at.is_some_and(|at| at <= now)
            {
                failure.retry_at = None;
                self.reconcile(&id);
            }
        }
    }

    fn source(&mut self, name: SourceName, state: SourceState, error: Option<String>) {
        if let Some(source) = self.sources.get_mut(&name) {
            if source.state != state {
                source.since = Timestamp::now();
            }
            (source.state, source.error) = (state, error);
        }
    }

    fn source_of(&self, kind: RuntimeKind) -> Option<SourceName> {
        self.sources.iter().find(|(_, source)| source.kind == kind).map(|(name, _)| *name)
    }

    fn note(&mut self, kind: EventKind, message: impl Into<String>) {
        self.events.add(event_log::Entry::new(kind, message));
    }

    fn log(&mut self, id: &WorkloadId, kind: EventKind, message: impl Into<String>) {
        let mut entry = event_log::Entry::new(kind, message).workload(id);
        if let Some(plan) = self.workloads.get(id).and_then(|entry| entry.plan.as_ref()) {
            entry = entry.policy(&plan.policy);
        }
        self.events.add(entry);
    }

    fn problem(&mut self, area: &str, message: String) {
        if self.problems.len() == MAX_PROBLEMS {
            self.problems.pop_front();
        }
        self.problems.push_back(Problem { area: area.to_owned(), message });
    }

    /// The agent ends; what is in force stays in force.
    async fn leave(mut self) {
        self.note(EventKind::AgentStopping, "the agent ends; attachments stay in force");
        self.answer_all_gates();
        self.node.host.leave_all();
        // Those that wait to be heard must not wait for ever.
        self.inbox.reports.close();
        let handles: Vec<_> = self
            .workloads
            .into_values()
            .filter_map(|entry| entry.attachment)
            .map(|attachment| attachment.handle)
            .collect();
        for handle in &handles {
            handle.wish(pillion_attachment::Wish::Left);
        }
        let deadline = Instant::now() + LEAVE_LIMIT;
        for handle in handles {
            // Whoever does not let go in time is left as by a kill.
            let _ = timeout_at(deadline, handle.ended()).await;
        }
    }
}
