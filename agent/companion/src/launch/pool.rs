//! Launchers ahead of need. A held workload waits for its companions, and the start of a process is the larger part of a
//! relay's: it is done before, so that what is left begins with a message.
//!
//! Owns those that wait, and starts others in the place of those that were taken, a little later. They wait in the
//! agent's cgroups, with nothing but their end of a socket, and end with the agent.

use std::{
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::sleep;

use super::{
    COMPANION,
    parent::{LaunchError, Launching, Request, Waiting},
};

/// A taken launcher is replaced after this: until then what it became, and who waits for that, has the processors.
const PAUSE: Duration = Duration::from_millis(5);

/// Starts companions' processes. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Launchers {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    launcher: PathBuf,
    wanted: AtomicUsize,
    waiting: Mutex<Vec<Waiting>>,
    filling: AtomicBool,
}

impl Launchers {
    /// None wait until [`Self::keep`] is called.
    pub(crate) fn new(launcher: PathBuf) -> Self {
        let shared = Shared {
            launcher,
            wanted: AtomicUsize::new(0),
            waiting: Mutex::new(Vec::new()),
            filling: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// From now on this many wait. Must be called within a tokio runtime.
    pub(crate) fn keep(&self, count: usize) {
        self.shared.wanted.store(count, Ordering::Relaxed);
        // Dropped, they are killed.
        let surplus = {
            let mut waiting = self.shared.waiting();
            let from = count.min(waiting.len());
            waiting.split_off(from)
        };
        drop(surplus);
        self.fill_after(Duration::ZERO);
    }

    /// Launches by one that waits, or by a new one. Dropping the result kills it.
    pub(crate) async fn spawn(&self, request: &Request) -> Result<Launching, LaunchError> {
        let taken = self.shared.take();
        self.fill_after(PAUSE);
        if let Some(waiting) = taken {
            match waiting.launch(request) {
                Ok(launching) => return Ok(launching),
                // Somebody has killed it just now.
                Err(error) => tracing::debug!(%error, "a launcher that waited is of no use"),
            }
        }
        Waiting::start(&self.shared.launcher, COMPANION, Stdio::null).await?.launch(request)
    }

    fn fill_after(&self, pause: Duration) {
        if !self.shared.lacks() || self.shared.filling.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = self.shared.clone();
        tokio::spawn(async move {
            sleep(pause).await;
            shared.fill().await;
        });
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lacks(&self) -> bool {
        self.waiting().len() < self.wanted.load(Ordering::Relaxed)
    }

    fn take(&self) -> Option<Waiting> {
        let mut waiting = self.waiting();
        // The oldest: the youngest may not have come to where it waits.
        while !waiting.is_empty() {
            let first = waiting.remove(0);
            if !first.has_ended() {
                return Some(first);
            }
        }
        None
    }

    async fn fill(&self) {
        loop {
            while self.lacks() {
                match Waiting::start(&self.launcher, COMPANION, Stdio::null).await {
                    Ok(started) => self.waiting().push(started),
                    Err(error) => {
                        // The next launch has the same trouble, tells of it, and has this tried again.
                        tracing::debug!(%error, "no launcher waits");
                        self.filling.store(false, Ordering::Release);
                        return;
                    }
                }
            }
            self.filling.store(false, Ordering::Release);
            // One may have been taken since, by who saw that this was at work.
            if !self.lacks() || self.filling.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    }
}
