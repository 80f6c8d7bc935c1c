//! Identifies a process on this node: its cgroup, its network namespace and when it started.
//!
//! Owns all reading of `/proc/PID`. Never keeps a pid without its start time, never enters a namespace.
//!
//! Everything is read through one descriptor of `/proc/PID`. The kernel ties that directory to the process and not to
//! the number: once the process is gone reads fail with ESRCH, even when the pid is in use again (`pidfd_open(2)` says
//! the same of pidfds). So two processes cannot be mixed into one [`Instance`].

use std::{
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use pillion_workload::{Cgroup, Instance, NetnsId, Pid, ProcessId, StartTime};
use procfs::{ProcError, process::Process};

use crate::cgroup2::{Cgroup2Error, Cgroup2Mounts, path_in_hierarchy};

/// `/proc/PID/cgroup` has one line for each hierarchy, each at most a path long.
const CGROUP_LIMIT: u64 = 1 << 20;
/// The link to its network namespace, within `/proc/PID`.
const NETNS: &str = "ns/net";
/// A runtime moves the first process into its cgroup once; more moves than this while we look are not a workload.
const ATTEMPTS: u32 = 4;
/// Deeper cgroups and more processes of one workload are not looked through.
const DEEPEST: u32 = 16;
const MEMBERS_LIMIT: usize = 4096;

/// Why a process cannot be identified.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// It has ended, is a zombie, or another process has its pid now.
    #[error("process {pid} is gone")]
    Gone {
        /// The pid.
        pid: Pid,
    },
    /// A file in `/proc/PID` is not readable.
    #[error("cannot read {what} of process {pid}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Whose.
        pid: Pid,
        /// Why.
        source: ProcError,
    },
    /// The process is in no cgroup2 cgroup.
    #[error("process {pid} is in no cgroup2 cgroup")]
    NoCgroup2 {
        /// The pid.
        pid: Pid,
    },
    /// Its cgroup2 directory cannot be found.
    #[error("cannot find the cgroup of process {pid}")]
    Cgroup {
        /// The pid.
        pid: Pid,
        /// Why.
        source: Cgroup2Error,
    },
    /// Its cgroup changed each time that it was read.
    #[error("process {pid} moves between cgroups")]
    Restless {
        /// The pid.
        pid: Pid,
    },
    /// It is in another network namespace than its instance says.
    #[error("process {pid} is in network namespace {found}, not in {wanted}")]
    OtherNetns {
        /// The pid.
        pid: Pid,
        /// What the instance says.
        wanted: NetnsId,
        /// What was found.
        found: NetnsId,
    },
}

impl InstanceError {
    /// Whether the process itself is gone, which is an ordinary thing to happen.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
}

/// Identifies a living process.
pub fn instance_of(pid: Pid) -> Result<Instance, InstanceError> {
    let mounts = Cgroup2Mounts::discover().map_err(|source| InstanceError::Cgroup { pid, source })?;
    instance_in(&mounts, pid)
}

/// Like [`instance_of`], with the cgroup2 mounts found before.
pub(crate) fn instance_in(mounts: &Cgroup2Mounts, pid: Pid) -> Result<Instance, InstanceError> {
    let process = Handle::open(pid)?;
    let started = process.start_time()?;
    let netns = netns_id(&process.open_netns()?, pid)?;
    let cgroup = process.cgroup(mounts)?;
    // It was alive all the time, or the descriptor would have said so; a zombie has lost its namespaces.
    process.start_time()?;
    Ok(Instance { cgroup, netns, process: ProcessId { pid, started } })
}

/// When a living process started.
pub fn start_time(pid: Pid) -> Result<StartTime, InstanceError> {
    Handle::open(pid)?.start_time()
}

/// Whether this very process is still there and not a zombie. An unreadable `/proc` counts as alive.
pub(crate) fn is_alive(process: ProcessId) -> bool {
    match start_time(process.pid) {
        Ok(started) => started == process.started,
        Err(error) => !error.is_gone(),
    }
}

/// Opens the network namespace of an instance: the very one, or an error. Does not enter it.
///
/// The process of a systemd unit is its manager, which may be in another namespace than the unit: then a process of the
/// instance's cgroup, or of one below, is taken that is in the right one.
pub fn open_netns(instance: &Instance) -> Result<OwnedFd, InstanceError> {
    let pid = instance.process.pid;
    let process = Handle::open(pid)?;
    if process.start_time()? != instance.process.started {
        return Err(InstanceError::Gone { pid });
    }
    let file = process.open_netns()?;
    let found = netns_id(&file, pid)?;
    if found == instance.netns {
        return Ok(file.into());
    }
    let members = members(&instance.cgroup.path);
    let right = members.into_iter().find_map(|pid| {
        let file = Handle::open(pid).ok()?.open_netns().ok()?;
        (netns_id(&file, pid).ok()? == instance.netns).then_some(file)
    });
    right.map(OwnedFd::from).ok_or(InstanceError::OtherNetns { pid, wanted: instance.netns, found })
}

/// The network namespace of a living process.
pub(crate) fn netns_of(pid: Pid) -> Result<NetnsId, InstanceError> {
    netns_id(&Handle::open(pid)?.open_netns()?, pid)
}

/// Path of the cgroup2 cgroup of a living process within the hierarchy, as `/proc/PID/cgroup` has it.
pub(crate) fn cgroup_path_of(pid: Pid) -> Result<PathBuf, InstanceError> {
    Handle::open(pid)?.cgroup_path()
}

/// The program that a process runs: device and inode, and its path in its own mount namespace.
pub(crate) fn program_of(pid: Pid) -> Result<((u64, u64), PathBuf), InstanceError> {
    let link = PathBuf::from(format!("/proc/{pid}/exe"));
    let read = |source| InstanceError::Read { what: "exe", pid, source: ProcError::Io(source, None) };
    let metadata = std::fs::metadata(&link).map_err(read)?;
    Ok(((metadata.dev(), metadata.ino()), std::fs::read_link(&link).map_err(read)?))
}

/// The processes of a cgroup and of those below it. What cannot be read has none.
pub(crate) fn members(cgroup: &Path) -> Vec<Pid> {
    let mut found = Vec::new();
    let mut directories = vec![(cgroup.to_owned(), 0)];
    while let Some((directory, depth)) = directories.pop() {
        let processes = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        found.extend(processes.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid));
        if depth < DEEPEST && found.len() < MEMBERS_LIMIT {
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            directories.extend(below.map(|entry| (entry.path(), depth + 1)));
        }
    }
    found
}

/// The program that a process runs now, as its own mount namespace names it. Before a container's first instruction
/// that is its runtime.
pub fn executable_of(process: ProcessId) -> Result<PathBuf, InstanceError> {
    let pid = process.pid;
    let handle = Handle::open(pid)?;
    if handle.start_time()? != process.started {
        return Err(InstanceError::Gone { pid });
    }
    handle.0.exe().map_err(|source| handle.error("exe", source))
}

fn netns_id(file: &std::fs::File, pid: Pid) -> Result<NetnsId, InstanceError> {
    let metadata = file.metadata().map_err(|source| InstanceError::Read {
        what: NETNS,
        pid,
        source: ProcError::Io(source, None),
    })?;
    Ok(NetnsId { device: metadata.dev(), inode: metadata.ino() })
}

/// One descriptor of `/proc/PID`.
struct Handle(Process);

impl Handle {
    fn open(pid: Pid) -> Result<Self, InstanceError> {
        if pid.0 <= 0 {
            return Err(InstanceError::Gone { pid });
        }
        match Process::new(pid.0) {
            Ok(process) => Ok(Self(process)),
            Err(ProcError::NotFound(_)) => Err(InstanceError::Gone { pid }),
            Err(source) => Err(InstanceError::Read { what: "directory", pid, source }),
        }
    }

    fn pid(&self) -> Pid {
        Pid(self.0.pid())
    }

    fn start_time(&self) -> Result<StartTime, InstanceError> {
        let stat = self.0.stat().map_err(|source| self.error("stat", source))?;
        match stat.state {
            'Z' | 'X' | 'x' => Err(InstanceError::Gone { pid: self.pid() }),
            _ => Ok(StartTime(stat.starttime)),
        }
    }

    fn open_netns(&self) -> Result<std::fs::File, InstanceError> {
        self.0.open_relative(NETNS).map_err(|source| self.error(NETNS, source))
    }

    /// Reads until the same path comes twice: the inode then belongs to the cgroup that the process is in.
    fn cgroup(&self, mounts: &Cgroup2Mounts) -> Result<Cgroup, InstanceError> {
        let pid = self.pid();
        let mut path = self.cgroup_path()?;
        for _ in 0..ATTEMPTS {
            let found = mounts.resolve(&path);
            let again = self.cgroup_path()?;
            if again == path {
                return found.map_err(|source| InstanceError::Cgroup { pid, source });
            }
            path = again;
        }
        Err(InstanceError::Restless { pid })
    }

    fn cgroup_path(&self) -> Result<PathBuf, InstanceError> {
        let mut text = Vec::new();
        self.0
            .open_relative("cgroup")
            .and_then(|file| Ok(file.take(CGROUP_LIMIT).read_to_end(&mut text)?))
            .map_err(|source| self.error("cgroup", source))?;
        path_in_hierarchy(&text).ok_or(InstanceError::NoCgroup2 { pid: self.pid() })
    }

    /// ESRCH is how `/proc/PID` says that the process is gone. A zombie answers other errors (its namespaces are
    /// gone, for example), so ask for its state. On its way there it has lost its namespaces already.
    fn error(&self, what: &'static str, source: ProcError) -> InstanceError {
        let pid = self.pid();
        let gone = |error: &ProcError| match error {
            ProcError::NotFound(_) => true,
            ProcError::Io(error, _) => {
                error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
                    || error.kind() == io::ErrorKind::NotFound
            }
            _ => false,
        };
        let dead = match self.0.stat() {
            Ok(_) if what == NETNS && gone(&source) => true,
            Ok(stat) => matches!(stat.state, 'Z' | 'X' | 'x'),
            Err(error) => gone(&error),
        };
        if dead { InstanceError::Gone { pid } } else { InstanceError::Read { what, pid, source } }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn own_pid() -> Pid {
        Pid(std::process::id().try_into().expect("a pid fits an i32"))
    }

    #[test]
    fn identifies_itself() {
        let instance = instance_of(own_pid()).expect("this process is alive");
        let again = instance_of(own_pid()).expect("this process is alive");
        assert_eq!(instance, again);
        let netns = std::fs::read_link("/proc/self/ns/net").expect("readable");
        assert_eq!(instance.netns.to_string(), netns.to_str().expect("ASCII"));
        assert_eq!(instance.cgroup.id.0, std::fs::metadata(&instance.cgroup.path).expect("exists").ino());
        assert!(is_alive(instance.process));

        open_netns(&instance).expect("same namespace");
        let mut other = instance.clone();
        other.netns.inode += 1;
        assert!(matches!(open_netns(&other), Err(InstanceError::OtherNetns { .. })));
        let mut reused = instance.clone();
        reused.process.started.0 += 1;
        assert!(open_netns(&reused).is_err_and(|e| e.is_gone()));
        assert!(executable_of(reused.process).is_err_and(|e| e.is_gone()));
        assert!(!is_alive(reused.process));
        assert_eq!(
            executable_of(instance.process).expect("readable"),
            std::env::current_exe().expect("readable")
        );
    }

    #[test]
    fn the_dead_are_gone_as_zombies_and_when_reaped() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat is everywhere");
        let pid = Pid(child.id().try_into().expect("a pid fits an i32"));
        let living = instance_of(pid).expect("waits for its input");
        drop(child.stdin.take());
        // Waits for the exit without reaping.
        let raw = rustix::process::Pid::from_raw(pid.0).expect("not zero");
        let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(raw), options).expect("it exits");
        for _ in 0..2 {
            assert!(instance_of(pid).is_err_and(|e| e.is_gone()));
            assert!(open_netns(&living).is_err_and(|e| e.is_gone()));
            assert!(!is_alive(living.process));
            child.wait().expect("is our child");
        }
    }

    #[test]
    fn pids_that_cannot_be() {
        for pid in [0, -1, i32::MIN, i32::MAX] {
            assert!(instance_of(Pid(pid)).is_err_and(|e| e.is_gone()), "{pid}");
        }
    }
}
