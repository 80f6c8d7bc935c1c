//! The controller: one task that owns all mutable state of the agent and handles one closed [`Event`].
//!
//! Owns the workloads, the policies in force, the state of the sources and the log of events. Whatever is slow (starting
//! companions, reading files, asking a runtime) happens in tasks of its own that send an event back. Handling the same
//! event twice does no harm. Never touches a socket, a process or eBPF itself.

mod answers;
mod entry;
mod reconcile;
mod start;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use pillion_attachment::{Happening, Job, Ledger, Node, Report, State, attach};
use pillion_policy::PolicySet;
use pillion_runtime::{FirstInstructionProbe, RuntimeEvent, SourceName, open_netns};
use pillion_workload::{FirstInstruction, Plan, RuntimeKind, Workload, WorkloadId};
use tokio::{
    sync::{broadcast, mpsc, oneshot},
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::error;

pub(crate) use start::{Beginning, Parts};

use self::{
    entry::{Attachment, Entry, Failure},
    reconcile::{Step, next_step},
};
use crate::{
    api::{
        EventKind, EventRecord, ExplainRequest, ExplainResponse, Problem, RefusedReload, SourceState,
        StatusResponse, Timestamp, Verdict, WorkloadDetail, WorkloadSummary,
    },
    event_log::{self, EventLog},
    journal::Journal,
    metrics::Metrics,
    policy_watch::PolicyLoad,
    witness::Containerd,
};

/// How long attachments may take to let go when the agent ends.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);
/// More workloads than a node can run: what comes beyond is reported and left alone.
const MAX_WORKLOADS: usize = 16_384;
/// Instances of the inbound program that are kept ready, for workloads that start at once.
const INBOUND_READY: usize = 2;
/// What needs an operator and has no workload of its own; the oldest go first.
const MAX_PROBLEMS: usize = 64;

/// Everything that can wake the controller.
#[derive(Debug)]
pub(crate) enum Event {
    /// A source told something.
    Runtime(Box<RuntimeEvent>),
    /// Policies were read.
    Policies(PolicyLoad),
    /// An attachment told something.
    Attachment(Box<Report>),
    /// What an earlier agent made for a workload that is gone has been taken back, but for what is named.
    Discarded {
        /// The workload.
        workload: WorkloadId,
        /// What is left.
        left: Vec<String>,
    },
    /// Somebody asks.
    Request(Request),
    /// A failed attach is due again.
    Retry,
    /// The agent is to end.
    Stop,
}

/// A question or an order from the admin API. The answer goes to the sender that it bears.
#[derive(Debug)]
pub(crate) enum Request {
    /// Is anybody there?
    Ping(oneshot::Sender<Pulse>),
    /// The agent as a whole.
    Status(oneshot::Sender<StatusResponse>),
    /// All workloads.
    Workloads(oneshot::Sender<Vec<WorkloadSummary>>),
    /// One workload.
    Workload(WorkloadId, oneshot::Sender<Option<WorkloadDetail>>),
    /// Events so far, and those to come.
    Events(u64, oneshot::Sender<EventStream>),
    /// A manual override; answered when it has settled.
    Override(WorkloadId, Override, oneshot::Sender<OverrideReply>),
    /// A decision.
    Explain(ExplainRequest, oneshot::Sender<Option<ExplainResponse>>),
}

/// What `/livez`, `/readyz` and `/metrics` want to know.
#[derive(Debug, Clone)]
pub(crate) struct Pulse {
    /// Whether policies were ever loaded.
    pub(crate) policies_loaded: bool,
    /// Number of workloads by verdict.
    pub(crate) workloads: BTreeMap<Verdict, usize>,
    /// Whether each source is connected.
    pub(crate) sources: Vec<(&'static str, bool)>,
}

/// Events so far, and those to come.
pub(crate) type EventStream = (Vec<Arc<EventRecord>>, broadcast::Receiver<Arc<EventRecord>>);

/// A manual override.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Override {
    /// Ends a hold, and tries again at once where an attach failed.
    Attach,
    /// Holds the workload detached.
    Detach,
}

/// The outcome of an override.
pub(crate) type OverrideReply = Result<WorkloadSummary, OverrideRefused>;

/// Why an override is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OverrideRefused {
    /// There is no such workload.
    #[error("no workload {0} is known; `pillion list` shows all")]
    Unknown(WorkloadId),
    /// No policy selects it.
    #[error("no policy selects {0}; `pillion explain {0}` says why")]
    NotMatched(WorkloadId),
    /// The override could not be kept.
    #[error("the override cannot be recorded: {0}")]
    Journal(String),
}

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
    held: BTreeSet<WorkloadId>,
    discarding: BTreeSet<WorkloadId>,
    policies: Option<PolicySet>,
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
    policies: mpsc::Receiver<PolicyLoad>,
    reports: mpsc::Receiver<Report>,
    discarded: mpsc::Receiver<(WorkloadId, Vec<String>)>,
    requests: mpsc::Receiver<Request>,
    stop: CancellationToken,
}

impl Inbox {
    async fn next(&mut self, retry_at: Option<Instant>) -> Event {
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(report) = self.reports.recv() => Event::Attachment(Box::new(report)),
            Some((workload, left)) = self.discarded.recv() => Event::Discarded { workload, left },
            Some(load) = self.policies.recv() => Event::Policies(load),
            Some(event) = self.runtime.recv() => Event::Runtime(Box::new(event)),
            Some(request) = self.requests.recv() => Event::Request(request),
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => Event::Retry,
        }
    }
}

impl Controller {
    /// Handles events until it is told to stop; then lets go of everything and leaves it in force.
    pub(crate) async fn run(mut self) {
        loop {
            let retry_at = self.workloads.values().filter_map(Entry::retry_at).min();
            match self.inbox.next(retry_at).await {
                Event::Runtime(event) => self.runtime(*event),
                Event::Policies(load) => self.policies(load),
                Event::Attachment(report) => self.attachment(*report),
                Event::Discarded { workload, left } => self.discarded(&workload, &left),
                Event::Request(request) => self.request(request),
                Event::Retry => self.retry(),
                Event::Stop => break,
            }
        }
        self.leave().await;
    }

    fn runtime(&mut self, event: RuntimeEvent) {
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
            RuntimeEvent::Started { workload, first } => {
                let source = self.source_of(workload.subject.runtime);
                self.seen(workload, source, first);
            }
            RuntimeEvent::Changed { workload } => {
                let source = self.source_of(workload.subject.runtime);
                self.seen(workload, source, FirstInstruction::Unknown);
            }
            RuntimeEvent::Stopped { id } => self.ended(&id),
        }
    }

    /// Replaces all that the source told before: what it does not mention has ended.
    fn snapshot(&mut self, source: SourceName, workloads: Vec<(Workload, FirstInstruction)>) {
        let mentioned: BTreeSet<WorkloadId> =
            workloads.iter().map(|(workload, _)| workload.id.clone()).collect();
        let kind = self.sources.get(&source).map(|source| source.kind);
        let gone: Vec<WorkloadId> = self
            .workloads
            .values()
            .filter(|entry| match entry.source {
                Some(told_by) => told_by == source,
                None => Some(entry.workload.subject.runtime) == kind,
            })
            .map(|entry| entry.workload.id.clone())
            .filter(|id| !mentioned.contains(id))
            .collect();
        for id in gone {
            self.ended(&id);
        }
        for (workload, first) in workloads {
            self.seen(workload, Some(source), first);
        }
    }

    fn seen(&mut self, workload: Workload, source: Option<SourceName>, first: FirstInstruction) {
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

    fn ended(&mut self, id: &WorkloadId) {
        let Some(entry) = self.workloads.get_mut(id) else { return };
        if entry.present {
            entry.present = false;
            self.log(id, EventKind::WorkloadStopped, "the workload has ended");
        }
        self.reconcile(id);
    }

    fn policies(&mut self, load: PolicyLoad) {
        match load.result {
            Ok(policies) => {
                self.metrics.policy_reloads.inc();
                self.refused = None;
                if self.policies.as_ref() != Some(&policies) {
                    self.generation += 1;
                    self.loaded_at = Some(Timestamp::now());
                    let count = policies.policies().len();
                    self.note(EventKind::PolicyLoaded, format!("{count} policies are in force"));
                    self.policies = Some(policies);
                    self.prepare_inbound();
                    for id in self.workloads.keys().cloned().collect::<Vec<_>>() {
                        self.decide(&id);
                        self.reconcile(&id);
                    }
                }
            }
            Err(message) => {
                self.metrics.policy_reload_failures.inc();
                let kept = if self.policies.is_some() {
                    "those of before stay in force"
                } else {
                    "none are in force"
                };
                self.note(EventKind::PolicyRefused, format!("policies were refused, {kept}:\n{message}"));
                self.refused = Some(RefusedReload { at: Timestamp::now(), message });
            }
        }
        if let Some(asker) = load.asker {
            // Who asked has gone: the outcome stands all the same.
            let _ = asker.send(());
        }
    }

    /// Loading the inbound program takes milliseconds: not when a workload waits for it.
    fn prepare_inbound(&self) {
        let mut policies = self.policies.iter().flat_map(PolicySet::policies);
        if policies.any(|policy| !policy.plan().redirect.inbound.is_empty()) {
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
            witness: Arc::new(Containerd::new(self.witness.clone(), workload.clone())),
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

    fn failed(&mut self, id: &WorkloadId, reason: String) {
        self.metrics.attach_failures.inc();
        self.log(id, EventKind::AttachFailed, format!("attach failed: {reason}"));
        if let Some(entry) = self.workloads.get_mut(id) {
            entry.failure = Some(Failure::after(entry.failure.as_ref(), reason));
        }
    }

    fn attachment(&mut self, report: Report) {
        let Report { workload: id, serial, happening, view } = report;
        let Some(entry) = self.workloads.get_mut(&id) else { return };
        let Some(attachment) = entry.attachment.as_mut().filter(|attachment| attachment.serial == serial)
        else {
            return;
        };
        let state = view.state.clone();
        let policy = view.plan.policy.clone();
        let was_degraded = is_degraded(attachment.view.as_ref().map(|view| &view.state));
        let ending = attachment.told.is_none();
        attachment.view = Some(view);
        if state.is_final() {
            entry.attachment = None;
        }
        if happening == Happening::Attached {
            let took = entry.wanted_at.elapsed();
            entry.attach_millis = Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
            entry.failure = None;
            self.metrics.attach_seconds.observe(took.as_secs_f64());
            // In place of the one that was taken.
            self.prepare_inbound();
        }
        self.tell(&id, &happening, &state, &policy, ending);
        let is_degraded = is_degraded(Some(&state));
        if is_degraded && !was_degraded {
            let reason = self.workloads.get(&id).and_then(|entry| entry.verdict().1).unwrap_or_default();
            self.log(&id, EventKind::Degraded, reason);
        } else if was_degraded && matches!(state, State::Attached { .. }) && !is_degraded {
            self.log(&id, EventKind::Recovered, "all companions are ready");
        }
        self.reconcile(&id);
    }

    /// Puts what happened into the log and the metrics.
    fn tell(
        &mut self,
        id: &WorkloadId,
        happening: &Happening,
        state: &State,
        policy: &pillion_workload::PolicyName,
        ending: bool,
    ) {
        let entry = |kind, message: String| event_log::Entry::new(kind, message).workload(id).policy(policy);
        let entry = match happening {
            Happening::Started => entry(EventKind::Attaching, format!("attaching as policy {policy} says")),
            Happening::CompanionReady { companion, restarted } => {
                self.metrics.companion_restarts.inc_by(u64::from(*restarted));
                let again = if *restarted { " again" } else { "" };
                entry(EventKind::CompanionReady, format!("the companion is ready{again}"))
                    .companion(companion)
            }
            Happening::CompanionExited { companion, how } => {
                self.metrics.companion_exits.inc();
                entry(EventKind::CompanionExited, format!("the companion has ended: {how}"))
                    .companion(companion)
            }
            Happening::CompanionFailed { companion, reason } => {
                self.metrics.companion_failures.inc();
                entry(EventKind::CompanionExited, format!("the companion is not ready: {reason}"))
                    .companion(companion)
            }
            Happening::Attached | Happening::Adopted => {
                let known = self.workloads.get(id);
                let first = known.and_then(|entry| entry.view()).and_then(|view| view.first_instruction);
                let (kind, text, millis) = if *happening == Happening::Attached {
                    (
                        EventKind::Attached,
                        "redirection is in force",
                        known.and_then(|entry| entry.attach_millis),
                    )
                } else {
                    (EventKind::Adopted, "taken over from an earlier agent", None)
                };
                entry(kind, text.into()).attached(first, millis)
            }
            Happening::Replanned => entry(EventKind::PlanChanged, format!("policy {policy} is now in force")),
            Happening::ReplanFailed { reason } => entry(
                EventKind::PlanChanged,
                format!("the changed policy could not be put in force: {reason}"),
            ),
            Happening::Detaching => entry(EventKind::Detaching, "detaching".into()),
            Happening::Detached => entry(EventKind::Detached, "nothing of Pillion is left at it".into()),
            Happening::Failed => {
                let State::Failed { reason } = state else { return };
                if !ending {
                    return self.failed(id, reason.clone());
                }
                self.problem("workload", format!("{id} {reason}"));
                entry(EventKind::DetachFailed, reason.clone())
            }
            Happening::Unrecorded { reason } => {
                self.problem("journal", format!("the attachment of {id} could not be recorded: {reason}"));
                entry(EventKind::JournalFault, format!("could not be recorded: {reason}"))
            }
        };
        self.events.add(entry);
    }

    fn discarded(&mut self, id: &WorkloadId, left: &[String]) {
        self.discarding.remove(id);
        if left.is_empty() {
            self.log(id, EventKind::Detached, "the workload had ended; nothing of Pillion is left at it");
        } else {
            let left = left.join("; ");
            self.problem("workload", format!("{id} has ended, but this is left of it: {left}"));
            self.log(id, EventKind::DetachFailed, format!("could not be taken back completely: {left}"));
        }
        self.reconcile(id);
    }

    fn retry(&mut self) {
        let now = Instant::now();
        for id in self.workloads.keys().cloned().collect::<Vec<_>>() {
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

    fn request(&mut self, request: Request) {
        // An asker that has gone needs no answer.
        match request {
            Request::Ping(reply) => drop(reply.send(self.pulse())),
            Request::Status(reply) => drop(reply.send(self.status())),
            Request::Workloads(reply) => {
                drop(reply.send(self.workloads.values().map(Entry::summary).collect()));
            }
            Request::Workload(id, reply) => drop(reply.send(self.detail(&id))),
            Request::Events(since, reply) => drop(reply.send(self.events.read(since))),
            Request::Override(id, what, reply) => self.override_by_hand(id, what, reply),
            Request::Explain(request, reply) => drop(reply.send(self.explain(request))),
        }
    }

    fn override_by_hand(&mut self, id: WorkloadId, what: Override, reply: oneshot::Sender<OverrideReply>) {
        let Some(entry) = self.workloads.get(&id).filter(|entry| entry.present) else {
            return drop(reply.send(Err(OverrideRefused::Unknown(id))));
        };
        if what == Override::Attach && entry.plan.is_none() && self.policies.is_some() {
            return drop(reply.send(Err(OverrideRefused::NotMatched(id))));
        }
        let mut held = self.held.clone();
        let changed = match what {
            Override::Attach => held.remove(&id),
            Override::Detach => held.insert(id.clone()),
        };
        // Some KiB, by hand, seldom: worth no task of its own.
        if changed && let Err(error) = self.journal.write_held(&held) {
            return drop(reply.send(Err(OverrideRefused::Journal(error.to_string()))));
        }
        self.held = held;
        if changed {
            let (kind, text) = match what {
                Override::Attach => (EventKind::Released, "no longer held detached"),
                Override::Detach => (EventKind::Held, "held detached until `pillion attach`"),
            };
            self.log(&id, kind, text);
        }
        let entry = self.workloads.get_mut(&id).expect("looked up above");
        entry.held = what == Override::Detach;
        entry.failure = None;
        entry.wanted_at = Instant::now();
        entry.waiters.retain(|waiter| !waiter.is_closed());
        entry.waiters.push(reply);
        self.reconcile(&id);
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

fn is_degraded(state: Option<&State>) -> bool {
    matches!(state, Some(State::Attached { missing }) if !missing.is_empty())
}
