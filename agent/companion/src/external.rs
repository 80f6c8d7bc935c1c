//! The watch over one companion that somebody else runs: a task that finds it, sees it go, and finds it again.
//!
//! Owns the looking, and what a probe's command needs. The companion itself is not touched: it is never started, signalled,
//! moved or limited. When its process ends or its listener goes, the kernel lets the failure mode act by itself; this task
//! tells of it.

use std::{collections::BTreeSet, io, os::fd::AsFd as _, sync::Arc, time::Duration};

use pillion_workload::{CompanionKind, ExternalSpec, Probe};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use crate::{
    cgroup::{CgroupGuard, CgroupPath},
    companion::{CompanionEvent, Shared},
    error::CompanionError,
    exec::{self, Prepared},
    host::{Host, Launch},
    netns::NetnsThread,
    outside::{self, Owner},
    probe::Prober,
    process::{Ending, Process},
    readiness::{Found, Outsider},
    supervise::{Interrupted, Order, tell},
};

/// Between two looks at whether its listeners are still there.
const LOOK: Duration = Duration::from_secs(1);
/// One that is not there by then is told of as not ready: a gate waits for that, and may hold the companion itself.
const FIRST: Duration = Duration::from_millis(500);
/// Its listeners have changed: so long it is looked for before it counts as gone.
const CHANGED: Duration = Duration::from_millis(500);
/// After an answer that will not be another at once, such as a stranger on its port.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Asking for the names of containers.
const ASKING: Duration = Duration::from_secs(5);

/// Owns the watch.
#[derive(Debug)]
pub(crate) struct External {
    seeker: Seeker,
    shared: Arc<Shared>,
    events: mpsc::Sender<CompanionEvent>,
    orders: mpsc::Receiver<Order>,
}

/// What looking takes.
#[derive(Debug)]
struct Seeker {
    host: Host,
    launch: Launch,
    /// Where a probe's command runs; made when it is needed.
    place: Option<(Prepared, CgroupGuard)>,
}

/// How a companion is lost.
enum Loss {
    Ended(Ending),
    Changed,
    Unseen(CompanionError),
}

impl External {
    pub(crate) fn new(
        host: &Host,
        launch: Launch,
        shared: Arc<Shared>,
        events: mpsc::Sender<CompanionEvent>,
        orders: mpsc::Receiver<Order>,
    ) -> Self {
        Self { seeker: Seeker { host: host.clone(), launch, place: None }, shared, events, orders }
    }

    pub(crate) async fn run(mut self) {
        let Interrupted(order) = self.watch().await;
        let leaving = self.seeker.host.is_leaving() || self.shared.is_leaving();
        let outcome = self.seeker.end(order.is_none() && leaving).await;
        let launch = &self.seeker.launch;
        match (order, outcome) {
            (Some(Order::Stop { done, .. }), outcome) => {
                let _ = done.send(outcome);
            }
            (None, Err(error)) => {
                let (workload, companion) = (&launch.workload, &launch.spec.name);
                tracing::warn!(%workload, %companion, %error, "what a probe had was not removed cleanly");
            }
            (None, Ok(())) => {}
        }
    }

    async fn watch(&mut self) -> Interrupted {
        let mut limit = self.seeker.launch.spec.ready.timeout.min(FIRST);
        let (mut pause, mut told) = (SHORTEST_PAUSE, None);
        loop {
            let sought = tokio::select! {
                order = self.orders.recv() => return Interrupted(order),
                sought = self.seeker.seek(limit) => sought,
            };
            limit = self.seeker.launch.spec.ready.timeout;
            let event = match sought {
                Ok(Found { ready, process, inodes }) => {
                    (pause, told) = (SHORTEST_PAUSE, None);
                    if let Err(interrupted) = self.tell(CompanionEvent::Ready(ready)).await {
                        return interrupted;
                    }
                    let loss = tokio::select! {
                        order = self.orders.recv() => return Interrupted(order),
                        loss = self.seeker.loss(&process, &inodes) => loss,
                    };
                    match loss {
                        Loss::Ended(ending) => CompanionEvent::Exited { ending, oom: false },
                        Loss::Unseen(error) => CompanionEvent::NotReady(error),
                        // Perhaps it has only opened them anew.
                        Loss::Changed => {
                            limit = CHANGED;
                            continue;
                        }
                    }
                }
                Err(error) => {
                    // Looking until the time is over has been pause enough.
                    let wait =
                        if matches!(error, CompanionError::NotReady { .. }) { Duration::ZERO } else { pause };
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    let text = chain(&error);
                    if told.as_ref() != Some(&text) {
                        told = Some(text);
                        if let Err(interrupted) = self.tell(CompanionEvent::NotReady(error)).await {
                            return interrupted;
                        }
                    }
                    tokio::select! {
                        order = self.orders.recv() => return Interrupted(order),
                        () = sleep(wait) => continue,
                    }
                }
            };
            if let Err(interrupted) = self.tell(event).await {
                return interrupted;
            }
        }
    }

    async fn tell(&mut self, event: CompanionEvent) -> Result<(), Interrupted> {
        tell(&self.events, &mut self.orders, event).await
    }
}

impl Seeker {
    async fn seek(&mut self, limit: Duration) -> Result<Found, CompanionError> {
        let deadline = Instant::now() + limit;
        let owner = Arc::new(self.owner().await?);
        if matches!(self.launch.spec.ready.probe, Some(Probe::Exec { .. })) && self.place.is_none() {
            let prepared = exec::prepare(self.host.config(), &self.launch, false)?;
            let path = CgroupPath::companion(&self.launch.workload, &self.launch.spec.name);
            let cgroup = self.host.config().cgroups.create(&path, &self.launch.spec.resources).await?;
            self.place = Some((prepared, cgroup));
        }
        let netns = NetnsThread::enter(self.launch.netns.as_fd()).await?;
        let place = self.place.as_ref().map(|(prepared, cgroup)| (prepared, cgroup));
        let prober = Prober { host: &self.host, launch: &self.launch, netns: &netns, place };
        Outsider { prober, owner }.ready(deadline).await
    }

    /// Asked anew each time: a container that was started again has another id.
    async fn owner(&self) -> Result<Owner, CompanionError> {
        let CompanionKind::External(spec) = &self.launch.spec.kind else {
            return Err(CompanionError::NotOurs);
        };
        let containers = match &spec.container {
            Some(name) => self.containers(name).await?,
            None => Vec::new(),
        };
        let (spec, unified) = (ExternalSpec::clone(spec), self.host.config().cgroups.unified().to_owned());
        let owner = tokio::task::spawn_blocking(move || Owner::new(&spec, containers, &unified));
        Ok(owner.await.map_err(|_| CompanionError::Abandoned)??)
    }

    async fn containers(&self, name: &str) -> Result<Vec<String>, CompanionError> {
        let unknown = |reason: String| CompanionError::Containers { name: name.to_owned(), reason };
        let Some(names) = self.host.container_names() else {
            return Err(unknown("only an agent that watches containerd knows".to_owned()));
        };
        match timeout(ASKING, names.ids_of(name)).await {
            Ok(Ok(ids)) => Ok(ids),
            Ok(Err(error)) => Err(unknown(chain(&error))),
            Err(_) => Err(unknown(format!("no answer within {ASKING:?}"))),
        }
    }

    /// Returns when the process has ended, or its listeners are others.
    async fn loss(&self, process: &Process, inodes: &BTreeSet<u64>) -> Loss {
        loop {
            tokio::select! {
                ending = process.ended() => return Loss::Ended(ending.unwrap_or(Ending::Unknown)),
                () = sleep(LOOK) => {}
            }
            match self.unchanged(inodes).await {
                Ok(true) => {}
                Ok(false) => return Loss::Changed,
                Err(error) => return Loss::Unseen(error),
            }
        }
    }

    async fn unchanged(&self, inodes: &BTreeSet<u64>) -> Result<bool, CompanionError> {
        let netns = NetnsThread::enter(self.launch.netns.as_fd()).await?;
        let (ports, inodes) = (self.launch.ports.listening.clone(), inodes.clone());
        let look = move || -> io::Result<bool> { outside::unchanged(&ports, &inodes) };
        Ok(netns.run("look for the companion's listening sockets", look).await?)
    }

    /// Removes what a probe's command had, or leaves it for the next agent, which removes it.
    async fn end(&mut self, leaving: bool) -> Result<(), CompanionError> {
        let Some((prepared, cgroup)) = self.place.take() else { return Ok(()) };
        if leaving {
            cgroup.leave();
            prepared.directory.leave();
            return Ok(());
        }
        let removed = cgroup.remove().await.map_err(CompanionError::from);
        let directory = tokio::task::spawn_blocking(move || prepared.directory.remove());
        removed.and(directory.await.unwrap_or(Err(CompanionError::Abandoned)))
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
