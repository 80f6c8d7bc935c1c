//! The NRI gate: a plug-in of containerd's Node Resource Interface, which holds each container of a pod before its start.
//!
//! Owns the connection to the runtime's NRI socket and its recovery. Never decides, and never asks for anything but to be
//! told of pods and of starts: no container is changed by it.
//!
//! What the runtime asks, and what it is answered:
//! - `RunPodSandbox`: the pod's sandbox is there, with cgroup and network namespace. It is announced, so that companions
//!   start while the runtime pulls images, and let go at once: an error here would leak a pause process on containerd 2.1.
//! - `StartContainer`: the container exists and waits for its start. This is the hold; it ends by an answer well within the
//!   runtime's timeout, because a plug-in that is too late is disconnected, and the container runs.
//! - Everything else is none of the plug-in's business and is not subscribed to.
//!
//! containerd calls plug-ins for containers of CRI alone: what `ctr`, nerdctl or Docker start is not seen here.
//!
//! Which containers ran before the plug-in was there is told by `Synchronize`; they are the containerd source's to find,
//! with all others, and are attached late.

mod frames;
mod hold;
mod messages;
mod plugin;
mod session;

use std::{path::PathBuf, time::Duration};

use tokio::{sync::mpsc, task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use self::{hold::Holder, session::SessionError};
use crate::{ContainerdResolver, Gatekeeper, RuntimeEvent, SourceName, backoff::Backoff, chain};

pub use session::read_all;

/// Where the runtime's NRI socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NriConfig {
    /// The socket; it may appear later.
    pub socket: PathBuf,
    /// For connecting, and for being registered, configured and synchronized.
    pub deadline: Duration,
    /// The first and the longest pause between attempts to connect. Short, because nothing is held meanwhile.
    pub backoff: (Duration, Duration),
}

impl NriConfig {
    /// The defaults for a runtime that listens at `socket`.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            // The runtime's own default for registration.
            deadline: Duration::from_secs(5),
            backoff: (Duration::from_millis(50), Duration::from_secs(1)),
        }
    }
}

/// Holds containers of pods.
#[derive(Debug, Clone, Copy)]
pub struct NriGate;

impl NriGate {
    /// Connects and holds for ever, until `stop` is cancelled or nobody receives events any more; then it waits a moment for
    /// the answers to what it holds. Of events it tells only
    /// whether it is connected, as [`SourceName::NRI`]: a gate has no workloads of its own. A socket that has never been
    /// there is no failure: this runtime may be without NRI.
    pub fn spawn(
        config: NriConfig,
        gatekeeper: Gatekeeper,
        resolver: ContainerdResolver,
        events: mpsc::Sender<RuntimeEvent>,
        stop: CancellationToken,
    ) -> JoinHandle<()> {
        let holder = Holder::new(gatekeeper, resolver);
        tokio::spawn(run(config, holder, events, stop))
    }
}

async fn run(config: NriConfig, holder: Holder, events: mpsc::Sender<RuntimeEvent>, stop: CancellationToken) {
    let mut backoff = Backoff::new(config.backoff);
    let (mut told, mut seen) = (None, false);
    loop {
        seen |= config.socket.exists();
        if seen {
            let (ended, was_up) = session::run(&config, &holder, &events, &stop).await;
            if matches!(ended, SessionError::NobodyListens) {
                return;
            }
            if was_up {
                backoff.reset();
                told = None;
            }
            let error = chain(&ended);
            // One word for one cause, however often it is met.
            if told.as_ref() != Some(&error) {
                let down = RuntimeEvent::Down { source: SourceName::NRI, error: error.clone() };
                if events.send(down).await.is_err() {
                    return;
                }
                told = Some(error);
            }
        }
        if stop.run_until_cancelled(sleep(backoff.pause())).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
