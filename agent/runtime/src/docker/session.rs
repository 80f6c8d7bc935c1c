//! One connection to an engine, from subscribing to its loss.
//!
//! Owns the order of things: subscribe, snapshot, then look where events point. Never survives an error of the engine as a
//! whole: the source begins anew.

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::{MissedTickBehavior, interval};

use super::{
    ContainerId, EngineConfig,
    client::{Client, ClientError},
    events::{Events, Signal},
    look::Look,
    source::Known,
};
use crate::{
    RuntimeEvent,
    cgroup2::{Cgroup2Error, Cgroup2Mounts},
    chain,
    inventory::Observation,
    tracker::Closed,
    work::Work,
};

/// Containers that may wait to be looked at; beyond it looking at everything is cheaper.
const WAITING_LIMIT: usize = 4096;

/// How a session ended. Sessions end only by errors.
pub(super) struct Ended {
    pub(super) error: SessionError,
    /// Whether the engine had answered with a snapshot.
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
pub(super) async fn run(config: &EngineConfig, known: &mut Known) -> Result<Ended, Closed> {
    let (client, look, mut events) = match known.during(Box::pin(open(config))).await? {
        Ok(opened) => opened,
        Err(error) => return Ok(Ended { error, was_up: false }),
    };
    let up = RuntimeEvent::Up { source: config.engine.source() };
    let work = match snapshot(&look, known, vec![up]).await? {
        Ok(work) => work,
        Err(error) => return Ok(Ended { error: error.into(), was_up: false }),
    };
    let error = follow(config, &client, &look, &mut events, work, known).await?.into();
    Ok(Ended { error, was_up: true })
}

async fn open(config: &EngineConfig) -> Result<(Client, Look, Events), SessionError> {
    let client = Client::new(config);
    let events = Events::subscribe(&client).await?;
    let look = Look::new(client.clone(), config.engine, Cgroup2Mounts::discover()?);
    Ok((client, look, events))
}

/// Looks at everything and tells it. What could not be seen is the work that is left.
async fn snapshot(
    look: &Look,
    known: &mut Known,
    opening: Vec<RuntimeEvent>,
) -> Result<Result<Work<ContainerId>, ClientError>, Closed> {
    let seen = match known.during(Box::pin(look.at_all())).await? {
        Ok(seen) => seen,
        Err(error) => return Ok(Err(error)),
    };
    let mut work = Work::default();
    for (container, seen) in &seen {
        if *seen == Observation::Unclear {
            work.done(container.clone(), false);
        }
    }
    known.snapshot(opening, seen).await?;
    Ok(Ok(work))
}

enum Done {
    Looked(ContainerId, Result<Observation, ClientError>),
    Answered(Result<String, ClientError>),
}

enum Next {
    Signal(Result<Signal, ClientError>),
    Done(Done),
    Health,
}

/// Looks where events point, until the engine stops answering.
async fn follow(
    config: &EngineConfig,
    client: &Client,
    look: &Look,
    events: &mut Events,
    mut work: Work<ContainerId>,
    known: &mut Known,
) -> Result<ClientError, Closed> {
    let mut asked: FuturesUnordered<BoxFuture<'_, Done>> = FuturesUnordered::new();
    let mut health = interval(config.health_interval);
    health.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asking_health = false;
    loop {
        while let Some(container) = work.start() {
            asked.push(Box::pin(async move {
                let seen = look.at(&container).await;
                Done::Looked(container, seen)
            }));
        }
        let next = async {
            tokio::select! {
                signal = events.next() => Next::Signal(signal),
                Some(done) = asked.next() => Next::Done(done),
                _ = health.tick() => Next::Health,
            }
        };
        match known.during(next).await? {
            Next::Signal(Ok(Signal::Look(container))) if work.waiting() < WAITING_LIMIT => {
                work.look(container);
            }
            Next::Signal(Ok(Signal::Look(_) | Signal::Resync)) => {
                // Answers to older questions must not follow the snapshot.
                asked.clear();
                asking_health = false;
                work = match snapshot(look, known, Vec::new()).await? {
                    Ok(work) => work,
                    Err(error) => return Ok(error),
                };
            }
            Next::Done(Done::Looked(container, seen)) => {
                let seen = seen.unwrap_or_else(|error| {
                    let (engine, error) = (config.engine.kind(), chain(&error));
                    tracing::warn!(%engine, %container, error, "cannot look at the container; trying again");
                    Observation::Unclear
                });
                work.done(container.clone(), seen != Observation::Unclear);
                known.observe(&container, seen).await?;
            }
            Next::Done(Done::Answered(Ok(_))) => asking_health = false,
            Next::Signal(Err(error)) | Next::Done(Done::Answered(Err(error))) => return Ok(error),
            Next::Health => {
                work.retry();
                if !asking_health {
                    asking_health = true;
                    asked.push(Box::pin(async move { Done::Answered(client.version().await) }));
                }
            }
        }
    }
}
