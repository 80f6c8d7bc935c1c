//! The controller's beginning: what it is made of, and what it takes over from an earlier agent.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    sync::Arc,
};

use pillion_attachment::{Ledger, Node, Record, discard};
use pillion_runtime::{Asked, Exits, FirstInstructionProbe, RuntimeEvent, SourceName, open_netns};
use pillion_workload::{FirstInstruction, RuntimeKind};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Controller, Inbox, Request, Source, entry::Entry, gates::AtGates, unattachable::Unattachables};
use crate::{
    api::{EventKind, SourceState, Timestamp},
    event_log::EventLog,
    journal::{Journal, Loaded},
    metrics::Metrics,
    policy_watch::PolicyLoad,
};

/// Reports of all attachments share this queue: an attachment that is ahead of the controller waits.
const REPORTS: usize = 256;

/// What a controller is made of.
pub(crate) struct Parts {
    pub(crate) node: Arc<Node>,
    pub(crate) journal: Journal,
    /// Asks containerd whether a workload has begun; absent when containerd is left alone.
    pub(crate) witness: Option<FirstInstructionProbe>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) policy_dir: PathBuf,
    pub(crate) pin_root: PathBuf,
}

/// The channels on which it is woken.
pub(crate) struct Beginning {
    /// Sources that are going to speak, and for which kind of workload.
    pub(crate) sources: Vec<(SourceName, RuntimeKind)>,
    pub(crate) runtime: mpsc::Receiver<RuntimeEvent>,
    /// Of the gates.
    pub(crate) asked: Asked,
    pub(crate) policies: mpsc::Receiver<PolicyLoad>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) stop: CancellationToken,
}

impl Controller {
    /// Takes over what the journal has, before any source or policy is heard.
    pub(crate) fn begin_with(parts: Parts, beginning: Beginning, loaded: Loaded) -> Self {
        let (reports, reports_in) = mpsc::channel(REPORTS);
        let (discarded, discarded_in) = mpsc::channel(REPORTS);
        let now = Timestamp::now();
        let source = |kind| Source { kind, state: SourceState::Connecting, since: now, error: None };
        let mut controller = Self {
            node: parts.node,
            journal: parts.journal,
            witness: parts.witness,
            metrics: parts.metrics,
            policy_dir: parts.policy_dir,
            pin_root: parts.pin_root,
            started_at: now,
            workloads: BTreeMap::new(),
            unattachable: Unattachables::default(),
            held: loaded.held,
            discarding: BTreeSet::new(),
            policies: None,
            policies_are_copy: false,
            generation: 0,
            loaded_at: None,
            refused: None,
            sources: beginning.sources.into_iter().map(|(name, kind)| (name, source(kind))).collect(),
            problems: VecDeque::new(),
            events: EventLog::new(),
            next_serial: 1,
            full: false,
            inbox: Inbox {
                runtime: beginning.runtime,
                holds: beginning.asked.holds,
                unheld: beginning.asked.unheld,
                exits: Exits::default(),
                policies: beginning.policies,
                reports: reports_in,
                discarded: discarded_in,
                requests: beginning.requests,
                stop: beginning.stop,
            },
            reports,
            discarded,
        };
        controller.note(EventKind::AgentStarted, format!("pillion {} is up", env!("CARGO_PKG_VERSION")));
        for fault in loaded.faults {
            controller.note(EventKind::JournalFault, fault.to_string());
            controller.problem("journal", fault.to_string());
        }
        for record in loaded.outlived {
            controller.discard(record);
        }
        for record in loaded.records {
            controller.take_over(record);
        }
        controller
    }

    /// A workload that is still there is adopted with the plan it had, whatever the policies are going to say; what is
    /// left of one that is gone is taken back.
    fn take_over(&mut self, record: Record) {
        let id = record.workload.id.clone();
        // Nobody would ever tell of its end.
        let unspoken_for = self.source_of(record.workload.subject.runtime).is_none();
        match open_netns(&record.workload.instance) {
            Ok(netns) => {
                let mut entry = Entry::new(record.workload.clone(), None, FirstInstruction::Unknown);
                entry.held = self.held.contains(&id);
                entry.gates = AtGates::recall(record.gate);
                let plan = Arc::new(record.plan.clone());
                entry.plan = Some(plan.clone());
                self.workloads.insert(id.clone(), entry);
                let workload = record.workload.clone();
                self.spawn(workload.clone(), plan, netns, Some(record));
                // No source remembers those that only a gate has told of: their own end is what tells.
                let by_gate = matches!(workload.subject.runtime, RuntimeKind::Process | RuntimeKind::Crio);
                if by_gate {
                    self.watch(&id, workload.instance.process);
                    self.reconcile(&id);
                } else if unspoken_for {
                    self.ended(&id);
                } else {
                    self.reconcile(&id);
                }
            }
            Err(_) => self.discard(record),
        }
    }

    fn discard(&mut self, record: Record) {
        let id = record.workload.id.clone();
        self.discarding.insert(id.clone());
        let (node, journal, done) = (self.node.clone(), self.journal.clone(), self.discarded.clone());
        tokio::spawn(async move {
            let ledger: &dyn Ledger = &journal;
            let left = discard(&node, ledger, &record).await;
            // The controller has ended: the next agent does it again if anything is left.
            let _ = done.send((id, left)).await;
        });
    }
}
