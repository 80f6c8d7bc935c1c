//! One connection to systemd, from subscribing to its loss.
//!
//! Owns the order of things on a connection: subscribe, snapshot, then look where signals point; and beside it the keeping of
//! drop-ins. Never survives an error of systemd as a whole: the source begins anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    StreamExt,
    stream::{self, FuturesUnordered},
};
use tokio::{
    sync::{Notify, watch},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    SystemdConfig, UnitSelection,
    bus::{Bus, BusError},
    install::Installer,
    look::{Look, LookError, Seen},
    signals::Signals,
    source::{Closed, Since, Tracker},
    unit::UnitName,
};
use crate::{RuntimeEvent, SourceName, inventory::Observation};

/// Units that are looked at at once: systemd answers one question after the other.
const AT_ONCE: usize = 4;

/// Runs one session to its end: why, and whether systemd had answered with a snapshot.
pub(super) async fn run(
    config: &SystemdConfig,
    tracker: &mut Tracker,
    selection: watch::Receiver<Option<Arc<dyn UnitSelection>>>,
    current: &watch::Sender<Option<Look>>,
) -> Result<(LookError, bool), Closed> {
    let opened = tracker.during(open(config)).await?;
    let (look, signals) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok((error, false)),
    };
    current.send_replace(Some(look.clone()));
    let up = RuntimeEvent::Up { source: SourceName::SYSTEMD };
    let unclear = match snapshot(&look, tracker, vec![up]).await? {
        Ok(unclear) => unclear,
        Err(error) => return Ok((error.into(), false)),
    };
    let files = Notify::new();
    let installer = Installer::new(look.bus().clone(), config.drop_ins.clone(), selection);
    let follow = Follow { config, look: &look, signals, files: &files, waiting: unclear };
    // Beside each other: a reload of systemd, which the installer waits for, sends signals.
    tokio::select! {
        error = follow.run(tracker) => Ok((error?.into(), true)),
        () = installer.run(&files) => Ok((BusError::Lost.into(), true)),
    }
}

async fn open(config: &SystemdConfig) -> Result<(Look, Signals), LookError> {
    let bus = Bus::connect(&config.bus, config.deadline).await?;
    let signals = Signals::receive(bus.signals().await?);
    Ok((Look::new(bus).await?, signals))
}

/// Looks at everything and tells it; returns what could not be seen.
async fn snapshot(
    look: &Look,
    tracker: &mut Tracker,
    opening: Vec<RuntimeEvent>,
) -> Result<Result<BTreeSet<UnitName>, BusError>, Closed> {
    let since = tracker.now();
    let known: Vec<UnitName> = tracker.ids().iter().filter_map(UnitName::of).collect();
    let looking = async {
        let active =
            look.bus().loaded().await?.into_iter().filter_map(|(name, active)| active.then_some(name));
        let names: BTreeSet<UnitName> = active.chain(known).collect();
        let mut looks = stream::iter(names)
            .map(|name| async move { look.at(&name).await.map(|seen| (name, seen)) })
            .buffer_unordered(AT_ONCE);
        let mut seen = BTreeMap::new();
        while let Some(looked) = looks.next().await {
            let (name, one) = looked?;
            seen.insert(name, one);
        }
        Ok::<_, BusError>(seen)
    };
    let seen = match tracker.during(looking).await? {
        Ok(seen) => seen,
        Err(error) => return Ok(Err(error)),
    };
    let unclear = seen.iter().filter(|(_, seen)| seen.observation == Observation::Unclear);
    let unclear = unclear.map(|(name, _)| name.clone()).collect();
    let seen = seen.into_iter().map(|(name, seen)| (name.id(), seen)).collect();
    tracker.snapshot(opening, seen, since).await?;
    Ok(Ok(unclear))
}

struct Follow<'a> {
    config: &'a SystemdConfig,
    look: &'a Look,
    signals: Signals,
    /// Told when unit files may have changed.
    files: &'a Notify,
    /// Units to look at.
    waiting: BTreeSet<UnitName>,
}

/// Units that could not be seen, as while their first process enters its namespaces: looked at again soon, and after some
/// attempts at the pace of the health check.
#[derive(Default)]
struct Unclear(BTreeMap<UnitName, u32>);

impl Unclear {
    const SOON: Duration = Duration::from_millis(100);
    const ATTEMPTS: u32 = 10;

    fn add(&mut self, name: UnitName) {
        let attempts = self.0.entry(name).or_default();
        *attempts = attempts.saturating_add(1);
    }

    fn has_soon(&self) -> bool {
        self.0.values().any(|attempts| *attempts < Self::ATTEMPTS)
    }

    fn soon(&self) -> impl Iterator<Item = UnitName> {
        self.0.iter().filter(|(_, attempts)| **attempts < Self::ATTEMPTS).map(|(name, _)| name.clone())
    }
}

enum Next {
    Pointed(super::signals::Pointed),
    Looked(UnitName, Since, Result<Seen, BusError>),
    Health(Result<(), BusError>),
    Tick,
    Soon,
}

impl Follow<'_> {
    /// Looks where signals point, until systemd stops answering. Each unit is looked at by one question at a time, so
    /// that an older answer never follows a newer one.
    async fn run(mut self, tracker: &mut Tracker) -> Result<BusError, Closed> {
        let mut looks = FuturesUnordered::new();
        let mut running = BTreeSet::new();
        let mut unclear = Unclear::default();
        for name in std::mem::take(&mut self.waiting) {
            unclear.add(name);
        }
        let mut ticks = interval(self.config.health_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut health = FuturesUnordered::new();
        let look = self.look;
        loop {
            while looks.len() < AT_ONCE
                && let Some(name) = self.waiting.iter().find(|name| !running.contains(*name)).cloned()
            {
                self.waiting.remove(&name);
                running.insert(name.clone());
                let since = tracker.now();
                looks.push(async move {
                    let seen = look.at(&name).await;
                    (name, since, seen)
                });
            }
            let next = async {
                tokio::select! {
                    pointed = self.signals.next() => Next::Pointed(pointed),
                    Some((name, since, seen)) = looks.next() => Next::Looked(name, since, seen),
                    Some(answer) = health.next() => Next::Health(answer),
                    _ = ticks.tick() => Next::Tick,
                    () = sleep(Unclear::SOON), if unclear.has_soon() => Next::Soon,
                }
            };
            match tracker.during(next).await? {
                Next::Pointed(pointed) => {
                    if let Some(error) = pointed.ended {
                        return Ok(error);
                    }
                    self.waiting.extend(pointed.units);
                    if pointed.files {
                        self.files.notify_one();
                    }
                    if pointed.everything {
                        // Answers to older questions must not follow the snapshot.
                        looks.clear();
                        self.waiting.append(&mut running);
                        match snapshot(look, tracker, Vec::new()).await? {
                            Ok(more) => more.into_iter().for_each(|name| unclear.add(name)),
                            Err(error) => return Ok(error),
                        }
                    }
                }
                Next::Looked(name, since, Ok(seen)) => {
                    running.remove(&name);
                    if seen.observation == Observation::Unclear {
                        unclear.add(name.clone());
                    } else {
                        unclear.0.remove(&name);
                    }
                    if !tracker.observe(&name.id(), seen, since).await? {
                        self.waiting.insert(name);
                    }
                }
                Next::Looked(_, _, Err(error)) | Next::Health(Err(error)) => return Ok(error),
                Next::Health(Ok(())) => {}
                Next::Soon => self.waiting.extend(unclear.soon()),
                Next::Tick => {
                    self.waiting.extend(unclear.0.keys().cloned());
                    if health.is_empty() {
                        health.push(look.bus().ping());
                    }
                }
            }
        }
    }
}
