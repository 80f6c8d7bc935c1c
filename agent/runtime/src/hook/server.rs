//! The gate's socket: takes questions of `pillion-hook`, and answers each when the controller has.
//!
//! Owns the socket file, its connections and their number. Who asks must be root, by the peer's credentials and by the socket's mode.
//! A hook that goes away withdraws its question; a container whose first process ends while it is held is let go, because its
//! runtime says best what is wrong with it.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use pillion_common::hook::{
    Answer, Container, FrameError, HEADER, Point, Question, Request, Unit, body_length, decode, encode,
};
use pillion_workload::{Gate, Pid, ProcessId, StartTime};
use rustix::fs::Mode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, UCred},
    },
    sync::Semaphore,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::resolve::Engines;
use crate::{
    chain,
    containerd::Resolved,
    gate::{Admission, Gatekeeper},
    instance::start_time,
    pidfd::Pidfd,
};

/// More hooks at once wait to be accepted. Each costs two descriptors and its request.
const MAX_HOOKS: usize = 512;
/// A hook sends its request at once.
const READ_LIMIT: Duration = Duration::from_secs(2);
/// It takes its answer at once.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// What the answer needs to arrive before the hook stops waiting.
const MARGIN: Duration = Duration::from_millis(100);
/// When the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Hooks that are answered when the agent ends.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The gate of containers and units that call `pillion-hook`.
#[derive(Debug)]
pub struct HookGate {
    listener: UnixListener,
    gatekeeper: Gatekeeper,
    engines: Engines,
}

impl HookGate {
    /// Listens at `path`, for root alone. One that is there belongs to an agent that is dead: the caller has the agent's lock.
    pub fn bind(path: &Path, gatekeeper: Gatekeeper, engines: Engines) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // The socket gets its mode from the umask at once: there is no instant at which others could connect.
        let umask = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let listener = UnixListener::bind(path);
        rustix::process::umask(umask);
        Ok(Self { listener: listener?, gatekeeper, engines })
    }

    /// Answers until told to stop; then tells those who wait that nobody decides, and that another agent may. The socket file stays for the caller to
    /// remove.
    pub async fn run(self, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(MAX_HOOKS));
        let asked = Arc::new(Asked { gatekeeper: self.gatekeeper, engines: self.engines });
        loop {
            let accepted = async {
                let place = places.clone().acquire_owned().await;
                self.listener.accept().await.map(|(stream, _)| (stream, place))
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = accepted => accepted,
            };
            match accepted {
                Ok((stream, place)) => {
                    let (asked, stop) = (asked.clone(), stop.clone());
                    tokio::spawn(async move {
                        asked.serve(stream, &stop).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a hook's connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // From now on a hook finds nobody, and all places free again means that every one has its answer.
        drop(self.listener);
        let all = u32::try_from(MAX_HOOKS).unwrap_or(u32::MAX);
        let _ = timeout(DRAIN_LIMIT, places.acquire_many(all)).await;
    }
}

/// What answers are made from.
#[derive(Debug)]
struct Asked {
    gatekeeper: Gatekeeper,
    engines: Engines,
}

/// Why a request cannot be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the hook's connection failed")]
    Io(#[from] io::Error),
    #[error("the hook's request cannot be understood")]
    Frame(#[from] FrameError),
    #[error("the hook said nothing for {READ_LIMIT:?}")]
    Silent,
}

impl Asked {
    async fn serve(&self, stream: UnixStream, stop: &CancellationToken) {
        let since = Instant::now();
        let peer = match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 => peer,
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), "a hook of somebody who is not root was sent away");
                return;
            }
            Err(error) => return tracing::warn!(%error, "a hook that cannot be identified was sent away"),
        };
        let (mut from, mut to) = stream.into_split();
        let answer = match timeout(READ_LIMIT, read(&mut from)).await.unwrap_or(Err(ReadError::Silent)) {
            Ok(request) => {
                let patience = Duration::from_millis(request.patience_ms.into());
                let deadline = since + patience.saturating_sub(MARGIN);
                tokio::select! {
                    answer = self.answer(request.question, peer, deadline) => answer,
                    () = hung_up(&mut from) => return,
                    () = stop.cancelled() => undecided("the agent is ending"),
                }
            }
            Err(error) => {
                let message = chain(&error);
                tracing::warn!(error = message, "a hook's request was not taken");
                undecided(message)
            }
        };
        let answer = match answer {
            // The next agent can be asked.
            Answer::Undecided { message, .. } if stop.is_cancelled() => {
                Answer::Undecided { message, leaving: true }
            }
            answer => answer,
        };
        let written = async { to.write_all(&encode(&answer).map_err(io::Error::other)?).await };
        match timeout(WRITE_LIMIT, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a hook did not take its answer"),
            Err(_) => tracing::debug!("a hook did not take its answer in time"),
        }
    }

    async fn answer(&self, question: Question, peer: UCred, deadline: Instant) -> Answer {
        match question {
            Question::Container(container) => self.container(&container, deadline).await,
            Question::Unit(unit) => self.unit(&unit, peer, deadline).await,
            Question::Stopped(stopped) => {
                // Exits are seen by pidfd and by the sources; this comes later than either.
                tracing::debug!(container = stopped.id.id, "a hook tells of a container's end");
                Answer::Admit { message: None }
            }
        }
    }

    async fn container(&self, container: &Container, deadline: Instant) -> Answer {
        let gone = || {
            tracing::debug!(container = container.id.id, "a container ended while it was held");
            Answer::Admit { message: None }
        };
        // The runtime says best what is wrong with one that is dead; but it may be that the agent cannot see it.
        let invisible = || {
            let reason = format!("the agent sees no process {} of it", container.pid);
            self.unresolved(gate(container.point), container, &reason)
        };
        let Some(process) = process(container) else { return invisible() };
        let ended = match Pidfd::open(process) {
            Ok(Some(ended)) => ended,
            Ok(None) => return invisible(),
            Err(error) => return undecided(format!("the container's process cannot be watched: {error}")),
        };
        tokio::select! {
            answer = self.living(container, deadline) => answer,
            result = ended.ended() => match result {
                Ok(()) => gone(),
                Err(error) => undecided(format!("the container's process cannot be watched: {error}")),
            },
        }
    }

    async fn living(&self, container: &Container, deadline: Instant) -> Answer {
        let gate = gate(container.point);
        let id = container.id.id.as_str();
        let (workload, partly) = match timeout_at(deadline, self.engines.resolve(container)).await {
            Ok(Ok(Resolved::Container(workload) | Resolved::Member(workload))) => (workload, None),
            Ok(Ok(Resolved::Partly(workload, what))) => (workload, Some(what)),
            Ok(Ok(Resolved::Sandbox(pod))) => {
                // It runs `pause`, and nothing of the pod is there yet: its companions can start meanwhile.
                let workload = pod.id.clone();
                if let Err(error) = self.gatekeeper.announce(gate, *pod, deadline).await {
                    tracing::warn!(%workload, %error, "a pod could not be announced");
                }
                return Answer::Admit { message: None };
            }
            Ok(Ok(Resolved::Unreachable(what))) => {
                return told(&self.gatekeeper.without_identity(gate, *what));
            }
            Ok(Ok(Resolved::Nothing(reason))) => {
                tracing::debug!(container = id, reason, "no workload");
                return Answer::Admit { message: None };
            }
            Ok(Err(error)) => return self.unresolved(gate, container, &chain(&error)),
            Err(_) => return self.unresolved(gate, container, "its engine does not answer in time"),
        };
        match (self.gatekeeper.admit(gate, *workload, deadline).await, partly) {
            // What is known selects it for no policy; what is not known may.
            (Ok(Admission::Unmatched), Some(what)) => told(&self.gatekeeper.without_identity(gate, *what)),
            (Ok(admission), _) => told(&admission),
            (Err(error), _) => undecided(error.to_string()),
        }
    }

    fn unresolved(&self, gate: Gate, container: &Container, reason: &str) -> Answer {
        let what = self.engines.unresolved(container, reason);
        told(&self.gatekeeper.without_identity(gate, what))
    }

    async fn unit(&self, unit: &Unit, peer: UCred, deadline: Instant) -> Answer {
        let name = unit.name.as_str();
        let Some(units) = &self.engines.units else {
            return undecided(format!("this agent leaves systemd alone, and so {name}"));
        };
        let Some(pid) = peer.pid().map(Pid).filter(|pid| pid.0 > 0) else {
            return undecided("the hook is in a PID namespace that the agent does not see");
        };
        let since = Instant::now();
        let found = match timeout_at(deadline, units.find(name, pid)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                let message = chain(&*error);
                tracing::warn!(unit = name, error = message, "it cannot be told what a hook holds");
                return undecided(message);
            }
            Err(_) => return undecided(format!("systemd does not say in time what {name} is")),
        };
        // Half of it is left to the unit itself.
        let limit = found.start_limit.map(|limit| since + limit / 2);
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        match self.gatekeeper.admit(Gate::Systemd, found.workload, deadline).await {
            Ok(admission) => told(&admission),
            Err(error) => undecided(error.to_string()),
        }
    }
}

fn gate(point: Point) -> Gate {
    match point {
        Point::CreateRuntime | Point::Prestart => Gate::Hook,
        Point::Start => Gate::Wrapper,
    }
}

/// The container's first process; `None` when it has ended and perhaps another one has its pid.
fn process(container: &Container) -> Option<ProcessId> {
    let pid = Pid(container.pid);
    let started = start_time(pid).ok()?;
    let same = container.started.is_none_or(|told| StartTime(told) == started);
    same.then_some(ProcessId { pid, started })
}

fn told(admission: &Admission) -> Answer {
    let message = admission.message();
    if admission.admits() {
        Answer::Admit { message }
    } else {
        Answer::Refuse { message: message.unwrap_or_else(|| "pillion: refused".to_owned()) }
    }
}

fn undecided(message: impl Into<String>) -> Answer {
    Answer::Undecided { message: message.into(), leaving: false }
}

async fn read(from: &mut OwnedReadHalf) -> Result<Request, ReadError> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header).await?;
    let mut body = vec![0; body_length::<Request>(&header)?];
    from.read_exact(&mut body).await?;
    Ok(decode(&body)?)
}

/// Returns when the hook closes its end, or breaks the protocol by saying more.
async fn hung_up(from: &mut OwnedReadHalf) {
    let _ = from.read(&mut [0]).await;
}

#[cfg(test)]
mod tests;
