//! The source `process`: workloads that were held at their exec, until they end.

use std::{collections::BTreeMap, sync::Arc};

use pillion_workload::{FirstInstruction, Workload, WorkloadId};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    ExecConfig, ExecNews,
    cgroup::OwnCgroup,
    hold::{Outcome, back, hold},
    judge::recall,
};
use crate::{
    RuntimeEvent, SourceName,
    exits::Exits,
    inventory::{Inventory, Observation},
};

const SOURCE: SourceName = SourceName::PROCESS;

/// Watches processes of the host.
pub struct ExecSource {
    config: Arc<ExecConfig>,
    inventory: Inventory,
    cgroups: BTreeMap<WorkloadId, (Workload, OwnCgroup)>,
    exits: Exits,
    holds: JoinSet<Outcome>,
    events: mpsc::Sender<RuntimeEvent>,
}

impl ExecSource {
    /// Runs until it is told to stop. First it takes up what an earlier agent has held.
    pub fn spawn(
        config: ExecConfig,
        news: mpsc::Receiver<ExecNews>,
        events: mpsc::Sender<RuntimeEvent>,
        stop: CancellationToken,
    ) -> tokio::task::JoinHandle<()> {
        let source = Self {
            config: Arc::new(config),
            inventory: Inventory::default(),
            cgroups: BTreeMap::new(),
            exits: Exits::default(),
            holds: JoinSet::new(),
            events,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                // The controller has ended, and so will this.
                _ = source.run(news) => {}
            }
        })
    }

    async fn run(mut self, mut news: mpsc::Receiver<ExecNews>) -> Option<()> {
        self.take_up().await;
        let mut told_up = true;
        tell(&self.events, RuntimeEvent::Up { source: SOURCE }).await?;
        tell(&self.events, self.inventory.snapshot(SOURCE)).await?;
        loop {
            tokio::select! {
                heard = news.recv() => match heard? {
                    ExecNews::Up => {
                        if !told_up {
                            tell(&self.events, RuntimeEvent::Up { source: SOURCE }).await?;
                            tell(&self.events, self.inventory.snapshot(SOURCE)).await?;
                        }
                        told_up = true;
                    }
                    ExecNews::Down(error) => {
                        tell(&self.events, RuntimeEvent::Down { source: SOURCE, error }).await?;
                        told_up = false;
                    }
                    ExecNews::Executed { process, held } => {
                        self.holds.spawn(hold(self.config.clone(), process, held));
                    }
                },
                Some(done) = self.holds.join_next() => {
                    // A task that was ended by a panic has let go by its drop.
                    if let Ok(outcome) = done { self.came_to(outcome).await?; }
                }
                (id, process) = self.exits.next() => {
                    if let Some(stopped) = self.inventory.exited(&id, process) {
                        tell(&self.events, stopped).await?;
                    }
                    self.give_back(&id).await;
                }
            }
        }
    }

    async fn came_to(&mut self, outcome: Outcome) -> Option<()> {
        match outcome {
            Outcome::Nothing => Some(()),
            Outcome::Unattachable(id, subject, reason) => {
                tell(&self.events, RuntimeEvent::Unattachable { source: SOURCE, id, subject, reason }).await
            }
            Outcome::Workload(workload, own, first) => {
                let (id, process) = (workload.id.clone(), workload.instance.process);
                match self.exits.watch(id.clone(), process) {
                    Ok(true) => {}
                    Ok(false) => {
                        back(&self.config, own, &workload).await;
                        // The controller, which was asked, watches its end as well.
                        return Some(());
                    }
                    Err(error) => warn!(workload = %id, %error, "the end of the process cannot be watched"),
                }
                self.cgroups.insert(id.clone(), ((*workload).clone(), own));
                for event in self.inventory.observe(&id, Observation::Present(workload, first)) {
                    tell(&self.events, event).await?;
                }
                Some(())
            }
        }
    }

    /// Those of an earlier agent: what has ended is given back, the others are known again.
    async fn take_up(&mut self) {
        let owner = self.config.owner.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let all = OwnCgroup::all_of(&owner)?;
            Ok::<_, super::OwnCgroupError>(all.into_iter().map(|own| (recall(&own), own)).collect::<Vec<_>>())
        });
        let found = match looked.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                warn!(%error, "cgroups of an earlier agent cannot be looked for");
                return;
            }
            Err(_) => return,
        };
        for (workload, own) in found {
            let watched = workload.filter(|workload| {
                let watched = self.exits.watch(workload.id.clone(), workload.instance.process);
                watched.unwrap_or(false)
            });
            if let Some(workload) = watched {
                self.config.stopper.exempt(workload.instance.cgroup.id);
                let present = Observation::Present(Box::new(workload.clone()), FirstInstruction::After);
                self.inventory.observe(&workload.id, present);
                self.cgroups.insert(workload.id.clone(), (workload, own));
            } else if let Err(error) = own.give_back() {
                warn!(cgroup = %own.path().display(), %error, "a cgroup of an earlier agent cannot be given back");
            }
        }
    }

    async fn give_back(&mut self, id: &WorkloadId) {
        if let Some((workload, own)) = self.cgroups.remove(id) {
            back(&self.config, own, &workload).await;
        }
    }
}

async fn tell(events: &mpsc::Sender<RuntimeEvent>, event: RuntimeEvent) -> Option<()> {
    events.send(event).await.ok()
}
