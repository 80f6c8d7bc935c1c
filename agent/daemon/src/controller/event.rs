//! What can wake the controller: its events, and what others may ask of it.
//!
//! Only the vocabulary; the controller handles it.

use std::{collections::BTreeMap, sync::Arc};

use pillion_attachment::Report;
use pillion_runtime::{Hold, RuntimeEvent, Unheld};
use pillion_workload::{CgroupId, Gate, Plan, ProcessId, RedirectSpec, WorkloadId};
use tokio::sync::{broadcast, oneshot};

use crate::{
    api::{
        EventRecord, ExplainRequest, ExplainResponse, StatusResponse, Verdict, WorkloadDetail,
        WorkloadSummary,
    },
    policy_watch::PolicyLoad,
};

/// Everything that can wake the controller.
#[derive(Debug)]
pub(crate) enum Event {
    /// A source told something.
    Runtime(Box<RuntimeEvent>),
    /// A gate holds a workload.
    Held(Box<Hold>),
    /// A gate could not hold one, and has decided by itself.
    Unheld(Box<Unheld>),
    /// The first process of a workload that a gate told of has ended.
    Exited {
        /// The workload.
        workload: WorkloadId,
        /// The process.
        process: ProcessId,
    },
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
    /// A failed attach is to be tried again, or a gate must be answered.
    Due,
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
    /// What is in force for one workload.
    InForce(WorkloadId, oneshot::Sender<Option<InForce>>),
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
    /// Number of workloads by verdict, and by the gate that has held them.
    pub(crate) workloads: BTreeMap<(Verdict, Option<Gate>), usize>,
    /// Whether each source is connected.
    pub(crate) sources: Vec<(&'static str, bool)>,
}

/// What is in force for a workload, or is to be.
#[derive(Debug)]
pub(crate) struct InForce {
    /// What has become of it.
    pub(crate) verdict: Verdict,
    /// Its cgroup; absent where it cannot be attached.
    pub(crate) cgroup: Option<CgroupId>,
    /// Its plan; absent where no policy selects it.
    pub(crate) plan: Option<Arc<Plan>>,
    /// The plan's redirection with every port filled in; absent before ports are settled.
    pub(crate) redirect: Option<RedirectSpec>,
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
