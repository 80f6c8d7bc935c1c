//! One process by pidfd: whether it runs, how it ended, signals. Never a bare pid, which may be another's by then.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::OnceLock,
};

use pillion_workload::{Pid, ProcessId, StartTime};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use tokio::io::unix::AsyncFd;

use crate::watch;

/// Why a process could not be asked or signalled.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} process {pid}")]
pub struct ProcessError {
    /// What was tried.
    pub operation: &'static str,
    /// On which process.
    pub pid: Pid,
    /// Why not.
    pub source: io::Error,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It was not our child, so that nobody told.
    Unknown,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("exit code unknown"),
        }
    }
}

/// A process, by pidfd (Linux 5.3). One of our children is reaped by [`Self::ended`]. Dropping it does not end it.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    child: bool,
    ending: OnceLock<Ending>,
}

impl Process {
    /// A child of this process that nobody has waited for, so that its pid is certainly its own.
    pub(crate) fn child(pid: Pid) -> Result<Self, ProcessError> {
        let pidfd = open(pid)?.ok_or_else(|| error("open", pid)(io::ErrorKind::NotFound.into()))?;
        let started = start_time(pid).map_err(error("inspect", pid))?;
        Self::new(ProcessId { pid, started }, pidfd, true)
    }

    /// A process that was started earlier, by whomever; `None` when it has ended, also when another has its pid now.
    /// Must be called within a tokio runtime.
    pub fn open(id: ProcessId) -> Result<Option<Self>, ProcessError> {
        let Some(pidfd) = open(id.pid)? else { return Ok(None) };
        // Read after the pidfd was opened: when the time matches now, the pidfd is of that process.
        match start_time(id.pid) {
            Ok(started) if started == id.started => Ok(Some(Self::new(id, pidfd, false)?)),
            Ok(_) => Ok(None),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(error("inspect", id.pid)(source)),
        }
    }

    fn new(id: ProcessId, pidfd: OwnedFd, child: bool) -> Result<Self, ProcessError> {
        let pidfd = watch::readable(pidfd).map_err(error("watch", id.pid))?;
        Ok(Self { id, pidfd, child, ending: OnceLock::new() })
    }

    /// Pid and start time.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits until it has ended, reaps it when it is our child, and tells how it ended. Cancel-safe; may be called
    /// again.
    pub async fn ended(&self) -> Result<Ending, ProcessError> {
        if let Some(ending) = self.ending.get() {
            return Ok(*ending);
        }
        // A pidfd is readable from the end of the process on, for ever.
        let _ready = self.pidfd.readable().await.map_err(error("watch", self.id.pid))?;
        let ending = if self.child { self.reap()? } else { Ending::Unknown };
        Ok(*self.ending.get_or_init(|| ending))
    }

    /// Whether it has ended; never waits.
    pub fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut pidfd = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        self.ending.get().is_some()
            || poll(&mut pidfd, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Sends a signal; one to a process that has ended does nothing.
    pub fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        match pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(source) => Err(error("signal", self.id.pid)(source.into())),
        }
    }

    fn reap(&self) -> Result<Ending, ProcessError> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
            Ok(Some(status)) => Ok(status
                .exit_status()
                .map(Ending::Code)
                .or_else(|| status.terminating_signal().map(Ending::Signal))
                .unwrap_or(Ending::Unknown)),
            // Where SIGCHLD is ignored the kernel reaps by itself.
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(Ending::Unknown),
            Err(source) => Err(error("reap", self.id.pid)(source.into())),
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.get_ref().as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // No zombie of a child that was killed on the way out.
        if self.child && self.ending.get().is_none() {
            let _ = self.reap();
        }
    }
}

/// A process that is killed and reaped when this is dropped.
#[derive(Debug)]
pub(crate) struct Doomed {
    process: Option<Process>,
}

impl Doomed {
    pub(crate) fn new(process: Process) -> Self {
        Self { process: Some(process) }
    }

    pub(crate) fn get(&self) -> &Process {
        self.process.as_ref().expect("only `spare` takes it, with the whole of self")
    }

    pub(crate) fn spare(mut self) -> Process {
        self.process.take().expect("only `spare` takes it, with the whole of self")
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        let Some(process) = self.process.take() else { return };
        if process.has_ended() {
            return;
        }
        let _ = process.signal(Signal::KILL);
        // It dies in a moment and is reaped then; without a runtime, at the very end, by init.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { process.ended().await });
        }
    }
}

/// Field 22 of `/proc/PID/stat`.
pub(crate) fn start_time(pid: Pid) -> io::Result<StartTime> {
    let stat =
        procfs::process::Process::new(pid.0).and_then(|process| process.stat()).map_err(from_procfs)?;
    Ok(StartTime(stat.starttime))
}

/// `/proc/PID/fd`. The pid may become another's while it is read.
pub(crate) fn descriptors(pid: Pid) -> io::Result<procfs::process::FDsIter> {
    procfs::process::Process::new(pid.0).and_then(|process| process.fd()).map_err(from_procfs)
}

fn from_procfs(error: procfs::ProcError) -> io::Error {
    use procfs::ProcError::{Incomplete, InternalError, Io, NotFound, Other, PermissionDenied};
    match error {
        NotFound(_) => io::ErrorKind::NotFound.into(),
        PermissionDenied(_) => io::ErrorKind::PermissionDenied.into(),
        // A process that ends while its files are read.
        Io(error, _) if error.raw_os_error() == Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
        Io(error, _) => error,
        Incomplete(_) | Other(_) | InternalError(_) => io::Error::other(error),
    }
}

pub(crate) fn open(pid: Pid) -> Result<Option<OwnedFd>, ProcessError> {
    // `from_raw` takes negative numbers for a fault of the program; ours may come from a file.
    let raw = rustix::process::Pid::from_raw(pid.0.max(0))
        .ok_or_else(|| error("open", pid)(io::ErrorKind::InvalidInput.into()))?;
    match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(source) => Err(error("open", pid)(source.into())),
    }
}

fn error(operation: &'static str, pid: Pid) -> impl FnOnce(io::Error) -> ProcessError {
    move |source| ProcessError { operation, pid, source }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_child_is_reaped_and_tells_how_it_ended() {
        for (script, want) in
            [("exit 0", Ending::Code(0)), ("exit 7", Ending::Code(7)), ("kill -9 $$", Ending::Signal(9))]
        {
            #[expect(clippy::zombie_processes, reason = "reaping it is what is tested")]
            let child = Command::new("/bin/sh").args(["-c", script]).spawn().expect("a shell");
            let process = Process::child(Pid(i32::try_from(child.id()).expect("a pid"))).expect("ours");
            assert_eq!(process.ended().await.expect("waited"), want, "{script}");
            assert_eq!(process.ended().await.expect("waited"), want, "again: {script}");
            assert!(process.has_ended());
            process.signal(Signal::TERM).expect("nobody is hit");
            assert!(Process::open(process.id()).expect("asked").is_none());
        }
    }

    #[tokio::test]
    async fn another_process_with_the_same_pid_is_not_taken() {
        let pid = Pid(i32::try_from(std::process::id()).expect("a pid"));
        let started = start_time(pid).expect("we run");
        assert!(Process::open(ProcessId { pid, started }).expect("asked").is_some());
        let other = StartTime(started.0 + 1);
        assert!(Process::open(ProcessId { pid, started: other }).expect("asked").is_none());
        assert!(Process::open(ProcessId { pid: Pid(-1), started }).is_err());
    }
}
