//! What the driver needs of companions and redirection, as a trait: the walk and its roll-back are tested without a
//! kernel.
//!
//! Owns no resource. The real thing is in `node`.

use std::{
    future::Future,
    os::fd::OwnedFd,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use pillion_companion::{CompanionRecord, ResolvedPorts};
use pillion_workload::{CompanionName, CompanionSpec, FailureMode, Pid, Plan, RedirectSpec, Workload};

use pillion_redirect::{RedirectRecord, Sources};

use crate::{chain, claims::Claims, namespace::Settled, ports::Resolved};

/// Companions and redirection of one node.
pub(crate) trait Machinery: Send + Sync + 'static {
    /// A companion under supervision.
    type Companion: Send + 'static;
    /// Proof that one is ready, with its listeners. Holding it keeps the listeners alive: drop it soon.
    type Ready: Send + 'static;
    /// Redirection in force.
    type Guard: Send + 'static;

    /// Settles ports and addresses in the workload's namespace.
    fn settle(
        &self,
        workload: &Workload,
        netns: Arc<OwnedFd>,
        plan: Arc<Plan>,
        previous: Option<Resolved>,
    ) -> impl Future<Output = Result<Settled, Fault>> + Send;

    /// Claims the ports of an adopted attachment again.
    fn claim_again(
        &self,
        workload: &Workload,
        netns: Arc<OwnedFd>,
        resolved: &Resolved,
    ) -> impl Future<Output = Claims> + Send;

    /// Starts a companion and waits until it is ready. Dropped or failed, nothing of it is left.
    fn start(
        &self,
        launch: LaunchOf,
    ) -> impl Future<Output = Result<(Self::Companion, Self::Ready), Fault>> + Send;

    /// Takes up a companion of an earlier agent; its readiness follows as an event.
    fn adopt(
        &self,
        launch: LaunchOf,
        record: CompanionRecord,
    ) -> impl Future<Output = Result<Self::Companion, Fault>> + Send;

    /// The companion's next event.
    fn poll_event(
        &self,
        companion: &mut Self::Companion,
        context: &mut Context<'_>,
    ) -> Poll<Option<CompanionNews<Self::Ready>>>;

    /// What must be kept to adopt it later.
    fn companion_record(&self, companion: &Self::Companion) -> CompanionRecord;

    /// Stops it and removes what was its.
    fn stop(
        &self,
        companion: Self::Companion,
        grace: Duration,
    ) -> impl Future<Output = Result<(), Fault>> + Send;

    /// Leaves it running for the next agent.
    fn leave(&self, companion: Self::Companion);

    /// Puts redirection in force, to those that are ready.
    fn redirect(
        &self,
        workload: &Workload,
        netns: &OwnedFd,
        rules: Rules<'_>,
        ready: Vec<Self::Ready>,
    ) -> Result<Self::Guard, Fault>;

    /// Takes up redirection of an earlier agent.
    fn adopt_redirect(&self, record: &RedirectRecord, netns: &OwnedFd) -> Result<Self::Guard, Fault>;

    /// What must be kept to adopt it later.
    fn redirect_record(&self, guard: &Self::Guard) -> RedirectRecord;

    /// A companion is ready: its listeners take connections from now on.
    fn companion_ready(&self, guard: &mut Self::Guard, ready: Self::Ready) -> Result<(), Fault>;

    /// A companion is gone: the failure mode acts.
    fn companion_gone(&self, guard: &mut Self::Guard, name: &CompanionName) -> Result<(), Fault>;

    /// Changes rules and failure mode in place.
    fn update(&self, guard: &mut Self::Guard, netns: &OwnedFd, rules: Rules<'_>) -> Result<(), Fault>;

    /// Resets the workload's open connections that `rules`, now in force, would have taken. Tells how many.
    fn reset(
        &self,
        workload: &Workload,
        netns: &OwnedFd,
        rules: Rules<'_>,
    ) -> impl Future<Output = Result<usize, Fault>> + Send;

    /// Redirects no new connection from now on. Tells how many of those before companions have still to ask for.
    fn drain(&self, guard: &mut Self::Guard) -> Result<usize, Fault>;

    /// Takes redirection back.
    fn detach(&self, guard: Self::Guard) -> Result<(), Fault>;

    /// Leaves it in force for the next agent.
    fn leave_redirect(&self, guard: Self::Guard);
}

/// What redirection is to do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a> {
    /// Every target has a port.
    pub(crate) spec: &'a RedirectSpec,
    /// What happens while a companion is not there.
    pub(crate) mode: FailureMode,
    /// What applications see as their own addresses.
    pub(crate) sources: Sources,
}

/// A companion to start.
#[derive(Debug, Clone)]
pub(crate) struct LaunchOf {
    /// What the plan says.
    pub(crate) spec: CompanionSpec,
    /// For whom.
    pub(crate) workload: Arc<Workload>,
    /// In which network namespace.
    pub(crate) netns: Arc<OwnedFd>,
    /// On which ports.
    pub(crate) ports: ResolvedPorts,
}

/// What is told of a companion.
#[derive(Debug)]
pub(crate) enum CompanionNews<R> {
    /// It is ready (again).
    Ready {
        /// The proof.
        ready: R,
        /// Its main process.
        pid: Pid,
    },
    /// It has ended; it is going to be started again.
    Exited {
        /// How.
        how: String,
    },
    /// It is not ready, and this is why; it is tried again.
    NotReady {
        /// Why.
        reason: String,
    },
}

/// Why a step failed: the error with all its causes, as text for status and events.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Fault(pub(crate) String);

impl Fault {
    pub(crate) fn of(error: &dyn std::error::Error) -> Self {
        Self(chain(error))
    }
}
