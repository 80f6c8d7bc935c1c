//! One cgroup in all its hierarchies: who is in it, and how it ends.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pillion_workload::{Cgroup, Pid};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{CgroupError, KILL_TIMEOUT, SLICE};

/// Between two looks at something that the kernel does not announce.
const RETRY: Duration = Duration::from_millis(1);
/// `Drop` may block a thread of the runtime; it gives up early and leaves the rest to `pillion cleanup`.
const DROP_TIMEOUT: Duration = Duration::from_millis(200);
/// How often the tree below a cgroup is read for its processes; deeper trees are not ours.
const DEEPEST: usize = 16;

/// Owns a cgroup: [`Self::remove`] kills what is in it and removes it, and so does dropping it, with less patience.
#[derive(Debug)]
pub struct CgroupGuard {
    cgroup: Cgroup,
    others: Vec<PathBuf>,
    memory_v1: Option<PathBuf>,
    depth: usize,
    armed: bool,
}

impl CgroupGuard {
    pub(super) fn new(
        cgroup: Cgroup,
        others: Vec<PathBuf>,
        memory_v1: Option<PathBuf>,
        depth: usize,
    ) -> Self {
        Self { cgroup, others, memory_v1, depth, armed: true }
    }

    /// The cgroup2 directory.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The files to which a process writes `0` to join, one in each hierarchy.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        self.directories().map(|directory| directory.join("cgroup.procs")).collect()
    }

    /// The processes in it and below it, as pids of the agent's PID namespace.
    pub fn pids(&self) -> io::Result<Vec<Pid>> {
        pids_in(&self.cgroup.path)
    }

    /// How many of its processes the kernel has killed for memory; `None` where no memory controller tells.
    pub fn oom_kills(&self) -> Option<u64> {
        let v1 = self.memory_v1.as_ref().map(|directory| directory.join("memory.oom_control"));
        let text = fs::read_to_string(self.cgroup.path.join("memory.events"))
            .or_else(|error| v1.map_or(Err(error), fs::read_to_string))
            .ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    }

    /// Kills everything in it and returns once it is empty. It stays usable.
    pub async fn kill(&self) -> Result<(), CgroupError> {
        // A guard of its own for the blocking thread: it must not remove anything.
        let alias = Self {
            cgroup: self.cgroup.clone(),
            others: Vec::new(),
            memory_v1: None,
            depth: self.depth,
            armed: false,
        };
        tokio::task::spawn_blocking(move || alias.kill_now(KILL_TIMEOUT))
            .await
            .unwrap_or_else(|_| Err(CgroupError::Abandoned { path: self.cgroup.path.clone() }))
    }

    /// Kills everything in it and removes it, and then those of its parents up to [`SLICE`] that hold nothing else.
    pub async fn remove(self) -> Result<(), CgroupError> {
        let path = self.cgroup.path.clone();
        tokio::task::spawn_blocking(move || {
            self.kill_now(KILL_TIMEOUT)?;
            self.remove_now()
        })
        .await
        .unwrap_or(Err(CgroupError::Abandoned { path }))
    }

    /// Gives up ownership: the cgroup stays.
    pub fn leave(mut self) {
        self.armed = false;
    }

    /// Whether dropping it removes it.
    pub(crate) fn set_armed(&mut self, armed: bool) {
        self.armed = armed;
    }

    /// Whether a process is in it or below it.
    pub(crate) fn holds(&self, pid: Pid) -> bool {
        self.pids().is_ok_and(|pids| pids.contains(&pid))
    }

    fn directories(&self) -> impl Iterator<Item = &Path> {
        let unified = (self.cgroup.id.0 != 0).then_some(self.cgroup.path.as_path());
        unified.into_iter().chain(self.others.iter().map(PathBuf::as_path))
    }

    pub(super) fn kill_now(&self, timeout: Duration) -> Result<(), CgroupError> {
        let path = &self.cgroup.path;
        let deadline = Instant::now() + timeout;
        let mut events = match File::open(path.join("cgroup.events")) {
            Ok(events) => events,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(source) => return Err(CgroupError::io("open", &path.join("cgroup.events"))(source)),
        };
        while is_populated(&mut events).map_err(CgroupError::io("read", path))? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::StillPopulated { path: path.clone(), timeout });
            }
            let one_shot = match fs::write(path.join("cgroup.kill"), "1") {
                Ok(()) => true,
                // Before Linux 5.14.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.kill_one_by_one().map_err(CgroupError::io("kill the processes of", path))?;
                    false
                }
                Err(source) => return Err(CgroupError::io("kill", path)(source)),
            };
            // The kernel announces that it has become empty by POLLPRI on cgroup.events.
            let wait = if one_shot { left } else { left.min(RETRY) };
            let wait =
                Timespec { tv_sec: 0, tv_nsec: wait.min(Duration::from_millis(100)).subsec_nanos().into() };
            let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&wait));
        }
        Ok(())
    }

    fn kill_one_by_one(&self) -> io::Result<()> {
        // Frozen processes cannot fork away from us; SIGKILL works on them nevertheless.
        let frozen = fs::write(self.cgroup.path.join("cgroup.freeze"), "1").is_ok();
        let listed = self.pids()?;
        let handles: Vec<_> = listed
            .into_iter()
            .filter_map(|pid| {
                let raw = rustix::process::Pid::from_raw(pid.0)?;
                Some((pid, pidfd_open(raw, PidfdFlags::empty()).ok()?))
            })
            .collect();
        // Only who is still listed after its pidfd was opened is certainly the one that was listed before.
        let still = self.pids()?;
        for (_, pidfd) in handles.iter().filter(|(pid, _)| still.contains(pid)) {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        if frozen {
            fs::write(self.cgroup.path.join("cgroup.freeze"), "0")?;
        }
        Ok(())
    }

    pub(super) fn remove_now(mut self) -> Result<(), CgroupError> {
        self.armed = false;
        self.remove_directories(KILL_TIMEOUT)
    }

    fn remove_directories(&self, timeout: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + timeout;
        for directory in self.directories() {
            loop {
                match remove_tree(directory) {
                    Ok(()) => break,
                    // The last process has left the list but not yet the cgroup.
                    Err(error) if is_busy(&error) && Instant::now() < deadline => std::thread::sleep(RETRY),
                    Err(source) => return Err(CgroupError::io("remove", directory)(source)),
                }
            }
            for parent in directory.ancestors().skip(1).take(self.depth - 1) {
                // Not empty: it holds another's, whose end will remove it.
                if !parent.iter().any(|name| name == SLICE) || fs::remove_dir(parent).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }
}

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let outcome = self.kill_now(DROP_TIMEOUT).and_then(|()| self.remove_directories(DROP_TIMEOUT));
        if let Err(error) = outcome {
            tracing::warn!(cgroup = %self.cgroup.path.display(), %error, "a dropped cgroup could not be removed");
        }
    }
}

/// The processes in a cgroup2 directory and below it.
pub(crate) fn pids_in(cgroup: &Path) -> io::Result<Vec<Pid>> {
    let mut pids = Vec::new();
    let mut pending = vec![(cgroup.to_owned(), 0)];
    while let Some((directory, depth)) = pending.pop() {
        match fs::read_to_string(directory.join("cgroup.procs")) {
            // 0 stands for a process of another PID namespace.
            Ok(text) => {
                pids.extend(
                    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid),
                );
            }
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        }
        if depth < DEEPEST {
            for entry in fs::read_dir(&directory)?.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    pending.push((entry.path(), depth + 1));
                }
            }
        }
    }
    Ok(pids)
}

/// Removes a cgroup and what its processes may have made below it.
fn remove_tree(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if is_busy(&error) => {}
        Err(error) if is_gone(&error) => return Ok(()),
        outcome => return outcome,
    }
    // Bounded: the kernel allows no deeper paths than PATH_MAX.
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

fn is_populated(events: &mut File) -> io::Result<bool> {
    let mut text = String::new();
    events.rewind()?;
    match events.read_to_string(&mut text) {
        Ok(_) => Ok(text.lines().any(|line| line == "populated 1")),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A cgroup's files give `ENODEV` after the cgroup was removed.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty)
}
