//! The task that loads policies: at the start, when the directory changes, on SIGHUP and when asked over the API.
//!
//! Owns the inotify watch. Never touches the policies in force: it sends what it read to the controller.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use inotify::{EventMask, Inotify, WatchMask};
use pillion_policy::PolicySet;
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    last_good::{LastGood, Read},
    readable::readable,
};

/// Editors and `kubectl` write in several steps; the files are read once it has been quiet for this long.
const QUIET: Duration = Duration::from_millis(150);
/// But not later than this after the first change.
const LATEST: Duration = Duration::from_secs(2);
/// How often a watch that could not be set is tried again. Only then is there a timer.
const WATCH_RETRY: Duration = Duration::from_secs(30);

/// What a load came to.
#[derive(Debug)]
pub(crate) struct PolicyLoad {
    /// The policies, or every fault as text.
    pub(crate) result: Result<PolicySet, String>,
    /// Those of an earlier agent, to stand in for a first load that failed.
    pub(crate) fallback: Option<PolicySet>,
    /// Who asked for it and waits until the controller has taken it.
    pub(crate) asker: Option<oneshot::Sender<()>>,
}

/// A request to load now.
#[derive(Debug, Default)]
pub(crate) struct LoadNow {
    /// Told when the controller has taken the outcome.
    pub(crate) asker: Option<oneshot::Sender<()>>,
}

/// Loads once, then whenever there is reason to, until cancelled. `deliver` hands a load to the controller.
pub(crate) async fn run<F>(
    directory: PathBuf,
    last_good: LastGood,
    mut requests: mpsc::Receiver<LoadNow>,
    deliver: impl Fn(PolicyLoad) -> F + Send + Sync,
    stop: CancellationToken,
) where
    F: Future<Output = ()> + Send,
{
    let mut watch = watch(&directory);
    let mut asker = None;
    let mut in_force = false;
    loop {
        let (path, last_good) = (directory.clone(), last_good.clone());
        let read = tokio::task::spawn_blocking(move || last_good.read(&path, !in_force)).await;
        let Read { result, fallback } = read.unwrap_or_else(|error| Read {
            result: Err(format!("loading policies failed: {error}")),
            fallback: None,
        });
        in_force |= result.is_ok() || fallback.is_some();
        deliver(PolicyLoad { result, fallback, asker: asker.take() }).await;
        tokio::select! {
            () = stop.cancelled() => return,
            request = requests.recv() => match request {
                Some(request) => asker = request.asker,
                None => return,
            },
            () = changed(&mut watch) => {}
        }
        if watch.as_ref().is_none_or(|watch| watch.lost) {
            watch = self::watch(&directory);
        }
    }
}

struct Watch {
    inotify: AsyncFd<Inotify>,
    /// The directory is not there any more, or not under that name.
    lost: bool,
}

fn watch(directory: &Path) -> Option<Watch> {
    let set_up = || -> io::Result<Watch> {
        let inotify = Inotify::init()?;
        let changes = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF;
        inotify.watches().add(directory, changes | WatchMask::ONLYDIR)?;
        Ok(Watch { inotify: readable(inotify)?, lost: false })
    };
    set_up()
        .inspect_err(
            |error| warn!(directory = %directory.display(), %error, "policy directory cannot be watched"),
        )
        .ok()
}

/// Returns after a change, once it is quiet; or when it is time to try to watch again.
async fn changed(watch: &mut Option<Watch>) {
    let Some(watch) = watch else { return sleep(WATCH_RETRY).await };
    watch.drain().await;
    // The deadline bounds a directory in which something is written all the time.
    let _ =
        timeout(LATEST, async { while !watch.lost && timeout(QUIET, watch.drain()).await.is_ok() {} }).await;
}

impl Watch {
    /// Waits for events and takes them.
    async fn drain(&mut self) {
        let Ok(mut guard) = self.inotify.readable_mut().await else {
            self.lost = true;
            return;
        };
        let mut buffer = [0; 4096];
        loop {
            match guard.get_inner_mut().read_events(&mut buffer) {
                Ok(events) => {
                    let gone = EventMask::DELETE_SELF
                        | EventMask::MOVE_SELF
                        | EventMask::IGNORED
                        | EventMask::UNMOUNT;
                    self.lost |= events.into_iter().any(|event| event.mask.intersects(gone));
                }
                Err(error) => {
                    self.lost |= error.kind() != io::ErrorKind::WouldBlock;
                    guard.clear_ready();
                    return;
                }
            }
        }
    }
}
