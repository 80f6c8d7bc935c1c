//! The task that keeps a connection to containerd for ever.
//!
//! Owns the attempts to connect. Never gives up, and never declares a workload gone because containerd is.

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{ContainerdConfig, ContainerdResolver, FirstInstructionProbe, client::Client, session};
use crate::{
    RuntimeEvent, SourceName,
    backoff::Backoff,
    chain,
    tracker::{Closed, Tracker},
};

/// Watches one containerd.
#[derive(Debug, Clone, Copy)]
pub struct ContainerdSource;

impl ContainerdSource {
    /// Begins to watch. The task ends when `stop` is cancelled or when nobody receives events any more.
    ///
    /// When the receiver is slow the source waits for it; what happens meanwhile is told later, at worst as a snapshot.
    pub fn spawn(
        config: ContainerdConfig,
        events: mpsc::Sender<RuntimeEvent>,
        stop: CancellationToken,
    ) -> (JoinHandle<()>, FirstInstructionProbe, ContainerdResolver) {
        let (current, probe) = watch::channel(None);
        let tracker = Tracker::new(SourceName::CONTAINERD, events);
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(run(config, tracker, current)).await;
        });
        (task, FirstInstructionProbe::new(probe.clone()), ContainerdResolver::new(probe))
    }
}

async fn run(config: ContainerdConfig, mut tracker: Tracker, current: watch::Sender<Option<Client>>) {
    let mut backoff = Backoff::new(config.backoff);
    let mut told = None;
    loop {
        let error = match session::run(&config, &mut tracker, &current).await {
            Ok(session::Ended { error, was_up }) => {
                if was_up {
                    backoff.reset();
                    told = None;
                }
                chain(&error)
            }
            Err(Closed) => return,
        };
        current.send_replace(None);
        // One word for one cause, however often it is met.
        if told.as_ref() != Some(&error) {
            let down = RuntimeEvent::Down { source: SourceName::CONTAINERD, error: error.clone() };
            if tracker.send(vec![down]).await.is_err() {
                return;
            }
            told = Some(error);
        }
        if tracker.during(sleep(backoff.pause())).await.is_err() {
            return;
        }
    }
}
