//! The real companions and the real redirection of a node, and how an attachment is begun.
//!
//! Owns nothing but what it is given. Every decision is the driver's.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use pillion_companion::{Companion, CompanionEvent, CompanionRecord, Host, Launch};
use pillion_redirect::{AttachRequest, Dataplane, RedirectGuard, RedirectRecord};
use pillion_workload::{CompanionName, FirstInstruction, Plan, ReadyCompanion, Workload};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::{
    claims::Claims,
    driver::{Driver, Kept},
    machinery::{CompanionNews, Fault, LaunchOf, Machinery, Rules},
    namespace::{self, Settled},
    ports::Resolved,
    record::{Ledger, Record, Witness},
    report::{Report, Wish},
};

/// Companions and redirection of one node.
#[derive(Debug)]
pub struct Node {
    /// How companions are run.
    pub host: Host,
    /// The loaded programs.
    pub dataplane: Arc<Dataplane>,
}

/// An attachment to make.
pub struct Job {
    /// For whom.
    pub workload: Workload,
    /// What.
    pub plan: Arc<Plan>,
    /// The workload's network namespace.
    pub netns: OwnedFd,
    /// Tells whether the workload has begun.
    pub witness: Arc<dyn Witness>,
    /// What was true when the workload was told of.
    pub told_first: FirstInstruction,
    /// Comes back with every report.
    pub serial: u64,
    /// What an earlier agent has made for this very instance: taken over.
    pub earlier: Option<Record>,
}

/// An attachment under way or in force. Dropping it leaves everything in force for the next agent, as a kill would.
#[derive(Debug)]
pub struct Handle {
    wish: watch::Sender<Wish>,
    task: JoinHandle<()>,
}

impl Handle {
    /// Changes what is wanted. Takes no time; reports tell what becomes of it.
    pub fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|current| {
            let changed = *current != wish;
            *current = wish;
            changed
        });
    }

    /// Waits until the attachment has ended.
    pub async fn ended(self) {
        let Self { wish, task } = self;
        // A panic in the driver has been printed by the runtime; there is nothing to add.
        let _ = task.await;
        drop(wish);
    }
}

/// Begins an attachment. Every step is reported.
pub fn attach(node: Arc<Node>, ledger: Arc<dyn Ledger>, job: Job, reports: mpsc::Sender<Report>) -> Handle {
    let Job { workload, plan, netns, witness, told_first, serial, earlier } = job;
    let (wish, wished) = watch::channel(Wish::Attached(plan.clone()));
    let driver = Driver {
        machinery: node,
        ledger,
        workload: Arc::new(workload),
        netns: Arc::new(netns),
        witness,
        told_first,
        serial,
        reports,
        // What is in force is the earlier agent's plan; the wish then changes it.
        plan: earlier.as_ref().map_or(plan, |record| Arc::new(record.plan.clone())),
        wish: wished,
        kept: Kept::default(),
    };
    Handle { wish, task: tokio::spawn(driver.run(earlier)) }
}

/// Takes back what an earlier agent made for a workload that is gone. Tells what could not be taken back.
pub async fn discard(node: &Node, ledger: &dyn Ledger, record: &Record) -> Vec<String> {
    let mut left = Vec::new();
    let workload = &record.workload.id;
    if let Some(guard) = &record.guard
        && let Err(error) = node.dataplane.discard(guard)
    {
        left.push(format!("redirection: {}", Fault::of(&error)));
    }
    // Not only those that are recorded: one may have been started just before the agent was killed.
    for name in record.plan.companions.iter().map(|spec| &spec.name).rev() {
        if let Err(error) = pillion_companion::discard(&node.host, workload, name).await {
            left.push(format!("companion {name}: {}", Fault::of(&error)));
        }
    }
    if left.is_empty()
        && let Err(error) = ledger.erase(workload).await
    {
        left.push(format!("journal: {error}"));
    }
    left
}

/// A companion with the channel on which it is heard.
#[derive(Debug)]
pub(crate) struct Running {
    companion: Companion,
    events: mpsc::Receiver<CompanionEvent>,
}

impl Running {
    fn new(mut companion: Companion) -> Result<Self, Fault> {
        let events = companion.take_events();
        events
            .map(|events| Self { companion, events })
            .ok_or_else(|| Fault("its events are not to be had".to_owned()))
    }
}

impl Machinery for Node {
    type Companion = Running;
    type Ready = ReadyCompanion;
    type Guard = RedirectGuard;

    async fn settle(
        &self,
        workload: &Workload,
        netns: Arc<OwnedFd>,
        plan: Arc<Plan>,
        previous: Option<Resolved>,
    ) -> Result<Settled, Fault> {
        let owner = workload.id.clone();
        namespace::settle(netns, owner, plan, previous).await.map_err(|error| Fault::of(&error))
    }

    async fn claim_again(&self, workload: &Workload, netns: Arc<OwnedFd>, resolved: &Resolved) -> Claims {
        namespace::claim_again(netns, workload.id.clone(), resolved).await
    }

    async fn start(&self, launch: LaunchOf) -> Result<(Running, ReadyCompanion), Fault> {
        let launch = prepared(launch)?;
        let started = pillion_companion::start(&self.host, launch).await;
        let (companion, ready) = started.map_err(|error| Fault::of(&error))?;
        Ok((Running::new(companion)?, ready))
    }

    async fn adopt(&self, launch: LaunchOf, record: CompanionRecord) -> Result<Running, Fault> {
        let launch = prepared(launch)?;
        let (workload, name) = (record.workload.clone(), record.name.clone());
        match Companion::adopt(&self.host, launch, record).await {
            Ok(companion) => Running::new(companion),
            Err(error) => {
                let fault = Fault::of(&error);
                // What cannot be adopted must not be in the way of the start that follows.
                let removed = pillion_companion::discard(&self.host, &workload, &name).await;
                Err(match removed {
                    Ok(()) => fault,
                    Err(error) => Fault(format!("{fault}; and it cannot be removed: {}", Fault::of(&error))),
                })
            }
        }
    }

    fn poll_event(
        &self,
        running: &mut Running,
        context: &mut Context<'_>,
    ) -> Poll<Option<CompanionNews<ReadyCompanion>>> {
        loop {
            let Some(event) = ready!(running.events.poll_recv(context)) else { return Poll::Ready(None) };
            let news = match event {
                CompanionEvent::Ready(ready) => CompanionNews::Ready { pid: ready.process().pid, ready },
                CompanionEvent::Exited { ending, oom } => {
                    let note = if oom { ", killed by the kernel: out of memory" } else { "" };
                    CompanionNews::Exited { how: format!("{ending}{note}") }
                }
                CompanionEvent::RestartFailed(error) | CompanionEvent::NotReady(error) => {
                    CompanionNews::NotReady { reason: Fault::of(&error).0 }
                }
                CompanionEvent::CrashLoop { failures } => {
                    CompanionNews::NotReady { reason: format!("it has failed {failures} times in a row") }
                }
                // The failure itself has been told; this only says when it goes on.
                CompanionEvent::RestartingIn(_) => continue,
            };
            return Poll::Ready(Some(news));
        }
    }

    fn companion_record(&self, running: &Running) -> CompanionRecord {
        running.companion.record()
    }

    async fn stop(&self, running: Running, grace: Duration) -> Result<(), Fault> {
        running.companion.stop(grace).await.map_err(|error| Fault::of(&error))
    }

    fn leave(&self, running: Running) {
        running.companion.leave();
    }

    fn redirect(
        &self,
        workload: &Workload,
        netns: &OwnedFd,
        rules: Rules<'_>,
        ready: Vec<ReadyCompanion>,
    ) -> Result<RedirectGuard, Fault> {
        let request = AttachRequest {
            cgroup: &workload.instance.cgroup,
            netns: netns.as_fd(),
            spec: rules.spec,
            on_failure: rules.mode,
            sources: rules.sources,
            companions: ready,
        };
        self.dataplane.attach(request).map_err(|error| Fault::of(&error))
    }

    fn adopt_redirect(&self, record: &RedirectRecord, netns: &OwnedFd) -> Result<RedirectGuard, Fault> {
        self.dataplane.adopt(record, netns.as_fd()).map_err(|error| {
            let fault = Fault::of(&error);
            // It is attached anew: beside what is left of it, each connection would be redirected twice.
            match self.dataplane.discard(record) {
                Ok(()) => fault,
                Err(error) => Fault(format!("{fault}; and it cannot be removed: {}", Fault::of(&error))),
            }
        })
    }

    fn redirect_record(&self, guard: &RedirectGuard) -> RedirectRecord {
        guard.record()
    }

    fn companion_ready(&self, guard: &mut RedirectGuard, ready: ReadyCompanion) -> Result<(), Fault> {
        guard.companion_ready(ready).map_err(|error| Fault::of(&error))
    }

    fn companion_gone(&self, guard: &mut RedirectGuard, name: &CompanionName) -> Result<(), Fault> {
        guard.companion_gone(name).map_err(|error| Fault::of(&error))
    }

    fn update(&self, guard: &mut RedirectGuard, netns: &OwnedFd, rules: Rules<'_>) -> Result<(), Fault> {
        guard.update(netns.as_fd(), rules.spec, rules.mode, rules.sources).map_err(|error| Fault::of(&error))
    }

    async fn reset(&self, workload: &Workload, netns: &OwnedFd, rules: Rules<'_>) -> Result<usize, Fault> {
        let cgroup = &workload.instance.cgroup;
        let exempt = self.dataplane.exempt_within(cgroup.id).into_iter().collect();
        let netns = netns.as_fd();
        let reset = pillion_companion::reset_connections(netns, cgroup, &exempt, rules.spec, rules.mode);
        reset.await.map_err(|error| Fault::of(&error))
    }

    fn drain(&self, guard: &mut RedirectGuard) -> Result<usize, Fault> {
        guard.drain().map_err(|error| Fault::of(&error))
    }

    fn detach(&self, guard: RedirectGuard) -> Result<(), Fault> {
        guard.detach().map_err(|error| Fault::of(&error))
    }

    fn leave_redirect(&self, guard: RedirectGuard) {
        guard.leave();
    }
}

fn prepared(launch: LaunchOf) -> Result<Launch, Fault> {
    let netns = launch
        .netns
        .try_clone()
        .map_err(|error| Fault(format!("cannot keep the workload's network namespace open: {error}")))?;
    Ok(Launch {
        spec: launch.spec,
        workload: launch.workload.id.clone(),
        workload_name: launch.workload.subject.name.clone(),
        workload_namespace: launch.workload.subject.namespace.clone(),
        workload_cgroup: launch.workload.instance.cgroup.id,
        netns,
        ports: launch.ports,
    })
}
