//! Child processes that end when dropped, with their output kept in files.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _},
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{NetNs, wait_for, wait_until};

/// Environment variable by which the inventory knows children of tests. The value does not matter.
pub const MARK: &str = "PILLION_TEST";
/// Bytes of each output that are shown for a failed test.
const SHOWN: usize = 8 * 1024;

/// Set by [`keep_quiet`].
static QUIET: AtomicBool = AtomicBool::new(false);

/// From now on, nothing is shown when a [`ProcessGuard`] is dropped: for programs, whose stderr libtest does not keep.
pub fn keep_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// A child process; killed and reaped when dropped. What it printed is then shown, if its test fails.
#[derive(Debug)]
pub struct ProcessGuard {
    name: String,
    child: Child,
    stdout: File,
    stderr: File,
    /// Once reaped: the pid may belong to another by now.
    status: Option<ExitStatus>,
}

/// A process that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// All it printed.
    pub stdout: String,
    /// All it printed as errors.
    pub stderr: String,
}

impl ProcessGuard {
    /// Starts `command`, with empty input unless `command` says otherwise. `name` is for messages.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null());
        Self::spawn_keeping_input(name, command)
    }

    /// Starts `command` inside `netns`.
    pub fn spawn_in(netns: &NetNs, name: &str, command: &mut Command) -> Result<Self> {
        netns.run(|| Self::spawn(name, command))
    }

    fn spawn_keeping_input(name: &str, command: &mut Command) -> Result<Self> {
        let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        command.env(MARK, "1").stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let child = command.spawn().with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, stdout, stderr, status: None })
    }

    /// Runs `command` to its end.
    pub fn finish(name: &str, command: &mut Command, deadline: Duration) -> Result<Finished> {
        let mut process = Self::spawn(name, command)?;
        let status = process.exit(deadline)?;
        Ok(Finished { status, stdout: process.stdout()?, stderr: process.stderr()? })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> Result<String> {
        read(&self.stdout)
    }

    /// What it has printed as errors so far.
    pub fn stderr(&self) -> Result<String> {
        read(&self.stderr)
    }

    /// Waits for a line on stdout that `matches` and returns it. Fails early when the process has ended.
    pub fn stdout_line(&mut self, deadline: Duration, matches: impl Fn(&str) -> bool) -> Result<String> {
        self.line(deadline, Self::stdout, matches)
    }

    /// The same on stderr.
    pub fn stderr_line(&mut self, deadline: Duration, matches: impl Fn(&str) -> bool) -> Result<String> {
        self.line(deadline, Self::stderr, matches)
    }

    fn line(
        &mut self,
        deadline: Duration,
        text: impl Fn(&Self) -> Result<String>,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let what = format!("the awaited line from {}", self.name);
        let found = wait_for(&what, deadline, || {
            // Asked before reading, so that the last lines of an ended process are still seen.
            let ended = self.has_ended();
            let text = text(self).unwrap_or_default();
            match text.lines().find(|line| matches(line)) {
                Some(line) => Some(Some(line.to_owned())),
                None => ended.then_some(None),
            }
        })?;
        found.with_context(|| format!("{} ended without {what}", self.name))
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.is_some()
    }

    /// Waits for its end.
    pub fn exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {} (pid {})", self.name, self.pid());
        wait_until(&what, deadline, || self.has_ended())?;
        self.status.context("it has ended")
    }

    /// Sends a signal. An error when it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.has_ended() {
            bail!("{} has ended", self.name);
        }
        let pid = Pid::from_raw(self.pid().try_into().context("a pid fits")?);
        kill(pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// SIGTERM, then waits; SIGKILL and an error when it does not end within `grace`.
    pub fn stop(mut self, grace: Duration) -> Result<Finished> {
        if !self.has_ended() {
            self.signal(Signal::SIGTERM)?;
        }
        let status = self.exit(grace)?;
        Ok(Finished { status, stdout: self.stdout()?, stderr: self.stderr()? })
    }
}

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        if !self.has_ended() {
            // Fails only when it ended this moment; the wait tells.
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
        for (stream, text) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
            let text = text.unwrap_or_default();
            if !text.is_empty() && !QUIET.load(Ordering::Relaxed) {
                show(&format!("--- {stream} of {} ({}) ---\n{}", self.name, self.child.id(), tail(&text)));
            }
        }
    }
}

impl Finished {
    /// Itself, when it ended well; else an error with its output.
    pub fn success(self) -> Result<Self> {
        self.code(0)
    }

    /// Itself, when it ended with that exit code; else an error with its output.
    pub fn code(self, wanted: i32) -> Result<Self> {
        if self.status.code() == Some(wanted) {
            return Ok(self);
        }
        let ended = match self.status.signal() {
            Some(signal) => format!("signal {signal}"),
            None => format!("exit code {:?}", self.status.code()),
        };
        bail!("expected exit code {wanted}, got {ended}\nstdout: {}\nstderr: {}", self.stdout, self.stderr)
    }
}

/// Reads a file that another process is appending to, without moving its position: it is shared with the writer.
fn read(file: &File) -> Result<String> {
    use std::os::fd::AsRawFd as _;
    let mut own =
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).context("cannot reopen the output")?;
    let mut bytes = Vec::new();
    own.rewind()?;
    own.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[expect(clippy::print_stderr, reason = "libtest keeps it and shows it with a failing test")]
fn show(text: &str) {
    eprintln!("{text}");
}

/// The end of a long text.
fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(SHOWN);
    // The cut may be within a character, which is at most 4 bytes long.
    (from..from + 4).find_map(|from| text.get(from..)).unwrap_or(text)
}

/// The children of a process, and theirs, as /proc shows them now.
pub fn descendants(roots: impl IntoIterator<Item = i32>) -> Vec<i32> {
    let parents: Vec<(i32, i32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| Some((pid, procfs::process::Process::new(pid).ok()?.stat().ok()?.ppid)))
        .collect();
    let mut found: Vec<i32> = roots.into_iter().collect();
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}
