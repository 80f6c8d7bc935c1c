//! One connection to containerd, from subscribing to its loss.
//!
//! Owns the order of things on a connection: subscribe, snapshot, then look where events point. Never survives an
//! error of containerd as a whole: the source begins anew.

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::{
    ContainerdConfig, Key,
    client::{Client, ClientError},
    events::{Events, Signal},
    look::{Look, Looked},
};
use crate::{
    RuntimeEvent, SourceName,
    cgroup2::{Cgroup2Error, Cgroup2Mounts},
    inventory::Observation,
    tracker::{Closed, Tracker},
    work::Work,
};

/// Containers that may wait to be looked at; beyond it looking at everything is cheaper.
const WAITING_LIMIT: usize = 4096;
/// Questions to containerd in flight at once, glimpses at new containers included.
const ASKED_LIMIT: usize = 32;

/// How a session ended. Sessions end only by errors.
pub(super) struct Ended {
    pub(super) error: SessionError,
    /// Whether containerd had answered with a snapshot.
    pub(super) was_up: bool,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot find cgroups")]
    Cgroups(#[from] Cgroup2Error),
}

/// Runs one session to its end.
pub(super) async fn run(
    config: &ContainerdConfig,
    tracker: &mut Tracker,
    current: &watch::Sender<Option<Client>>,
) -> Result<Ended, Closed> {
    let opened = tracker.during(Box::pin(open(config))).await?;
    let (client, look, mut events) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Ended { error, was_up: false }),
    };
    let up = RuntimeEvent::Up { source: SourceName::CONTAINERD };
    let work = match snapshot(&look, tracker, vec![up]).await? {
        Ok(work) => work,
        Err(error) => return Ok(Ended { error: error.into(), was_up: false }),
    };
    current.send_replace(Some(client.clone()));
    let error = follow(config, &client, &look, &mut events, work, tracker).await?.into();
    Ok(Ended { error, was_up: true })
}

async fn open(config: &ContainerdConfig) -> Result<(Client, Look, Events), SessionError> {
    let client = Client::connect(config).await?;
    let look = Look::new(client.clone(), Cgroup2Mounts::discover()?);
    let events = Events::subscribe(&client).await?;
    Ok((client, look, events))
}

/// Looks at everything and tells it. What could not be seen is the work that is left.
async fn snapshot(
    look: &Look,
    tracker: &mut Tracker,
    opening: Vec<RuntimeEvent>,
) -> Result<Result<Work<Key>, ClientError>, Closed> {
    let known = tracker.ids();
    let seen = match tracker.during(Box::pin(look.at_all(known))).await? {
        Ok(seen) => seen,
        Err(error) => return Ok(Err(error)),
    };
    let mut work = Work::default();
    for (id, seen) in &seen {
        if let (Observation::Unclear, Some(key)) = (seen, Key::of(id)) {
            work.done(key, false);
        }
    }
    tracker.snapshot(opening, seen).await?;
    Ok(Ok(work))
}

enum Done {
    Glimpsed(Key, Result<Option<Observation>, ClientError>),
    Looked(Key, Result<Looked, ClientError>),
    Answered(Result<String, ClientError>),
}

/// Looks where events point, until containerd stops answering.
async fn follow(
    config: &ContainerdConfig,
    client: &Client,
    look: &Look,
    events: &mut Events,
    mut work: Work<Key>,
    tracker: &mut Tracker,
) -> Result<ClientError, Closed> {
    let mut asked: FuturesUnordered<BoxFuture<'_, Done>> = FuturesUnordered::new();
    let mut health = interval(config.health_interval);
    health.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asking_health = false;
    loop {
        while let Some(key) = work.start() {
            asked.push(Box::pin(async move {
                let seen = look.at(&key).await;
                Done::Looked(key, seen)
            }));
        }
        let next = async {
            tokio::select! {
                signal = events.next() => Next::Signal(signal),
                Some(done) = asked.next() => Next::Done(done),
                _ = health.tick() => Next::Health,
            }
        };
        match tracker.during(next).await? {
            Next::Signal(Ok(Signal::Look(key))) if work.waiting() < WAITING_LIMIT => work.look(key),
            Next::Signal(Ok(Signal::Created(key, pid))) if work.waiting() < WAITING_LIMIT => {
                work.look(key.clone());
                if asked.len() < ASKED_LIMIT {
                    asked.push(Box::pin(async move {
                        let seen = look.glimpse(&key, pid).await;
                        Done::Glimpsed(key, seen)
                    }));
                }
            }
            Next::Signal(Ok(Signal::Look(_) | Signal::Created(..) | Signal::Resync)) => {
                // Answers to older questions must not follow the snapshot.
                asked.clear();
                asking_health = false;
                work = match snapshot(look, tracker, Vec::new()).await? {
                    Ok(work) => work,
                    Err(error) => return Ok(error),
                };
            }
            // Without a glimpse the look, which follows in any case, tells.
            Next::Done(Done::Glimpsed(key, Ok(Some(seen)))) => {
                if let Ok(id) = key.workload_id() {
                    tracker.discover(&id, seen).await?;
                }
            }
            Next::Done(Done::Glimpsed(_, Ok(None) | Err(_))) => {}
            Next::Done(Done::Looked(key, seen)) => {
                if seen.is_err() && !asking_health {
                    // A shim that hangs, or containerd itself? Ask at once; the look is tried again at the next tick.
                    asking_health = true;
                    asked.push(Box::pin(answers(client)));
                }
                take(&key, seen, &mut work, tracker).await?;
            }
            Next::Done(Done::Answered(Ok(_))) => asking_health = false,
            Next::Signal(Err(error)) | Next::Done(Done::Answered(Err(error))) => return Ok(error),
            Next::Health if asking_health => work.retry(),
            Next::Health => {
                work.retry();
                asking_health = true;
                asked.push(Box::pin(answers(client)));
            }
        }
    }
}

enum Next {
    Signal(Result<Signal, ClientError>),
    Done(Done),
    Health,
}

async fn answers(client: &Client) -> Done {
    Done::Answered(client.version().await)
}

async fn take(
    key: &Key,
    looked: Result<Looked, ClientError>,
    work: &mut Work<Key>,
    tracker: &mut Tracker,
) -> Result<(), Closed> {
    let seen = match looked {
        Ok(Looked::Seen(seen)) => seen,
        Ok(Looked::PartOf(sandbox)) => {
            work.done(key.clone(), true);
            work.look(sandbox);
            return Ok(());
        }
        Err(error) => {
            tracing::warn!(workload = %key, %error, "cannot look at the workload; trying again");
            Observation::Unclear
        }
    };
    work.done(key.clone(), seen != Observation::Unclear);
    match key.workload_id() {
        Ok(id) => tracker.observe(&id, seen).await,
        // The look has said so.
        Err(_) => Ok(()),
    }
}
