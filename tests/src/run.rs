//! `pillion run` as a user calls it, and what it has on the machine meanwhile: its cgroups, companions and records.

use std::{
    fs::{self, File},
    io::Read as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use procfs::process::Process;
use serde::Deserialize;

use crate::{
    EchoServer, Machine, NetNs, Puppet, cgroup, programs,
    puppet::{Answer, Domain},
    wait_for, wait_until,
};
use pillion_redirect::{Counters, Dataplane, LoadOptions};

/// Companions start and stop well within this.
const SOON: Duration = Duration::from_secs(20);

/// `pillion run OPTIONS --policy POLICY -- `, to be completed with the command.
pub fn command(policy: &Path, options: &[&str]) -> Result<Command> {
    let mut command = Command::new(programs::pillion()?);
    command.arg("run").args(options).arg("--policy").arg(policy).arg("--");
    Ok(command)
}

/// A running `pillion run` whose command is a puppet. Dropping it ends both in an orderly way.
#[derive(Debug)]
pub struct PillionRun {
    /// The application.
    pub app: Puppet,
    stderr: File,
}

/// Which way a connection has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The server saw another socket than the application's.
    Relayed,
    /// The server saw the application's own socket.
    Direct,
}

/// A connection as the relay tells it. Unknown fields and values are errors.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "documented where the relay writes them")]
pub struct Record {
    pub ts: String,
    pub workload: String,
    pub direction: String,
    pub protocol: String,
    pub source: SocketAddr,
    pub destination: Option<SocketAddr>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub connect_ms: Option<f64>,
    pub duration_ms: f64,
    pub outcome: String,
}

impl PillionRun {
    /// Runs a puppet by `pillion run` within `netns`.
    pub fn start(netns: &NetNs, policy: &Path) -> Result<Self> {
        Self::start_with(netns, policy, &[], &[])
    }

    /// The same, with options of `pillion run` and with words before the puppet's program, such as a shell that starts it.
    pub fn start_with(netns: &NetNs, policy: &Path, options: &[&str], before: &[&str]) -> Result<Self> {
        let mut command = command(policy, options)?;
        command.args(before).arg(programs::puppet()?);
        let stderr = tempfile::tempfile()?;
        command.stderr(stderr.try_clone()?);
        match netns.run(|| Puppet::under(&mut command)) {
            Ok(app) => Ok(Self { app, stderr }),
            Err(error) => Err(error.context(format!("pillion run said: {}", read(&stderr)?))),
        }
    }

    /// The pid of `pillion run` itself.
    pub fn pid(&self) -> u32 {
        self.app.pid()
    }

    /// Sends a signal to `pillion run`.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid().try_into()?), signal)?)
    }

    /// All it has written to stderr: its own words, the puppet's, and companions' as JSON lines.
    pub fn stderr(&self) -> Result<String> {
        read(&self.stderr)
    }

    /// Records of the relay so far.
    pub fn records(&self) -> Result<Vec<Record>> {
        records(&self.stderr()?)
    }

    /// Waits until there are `count` records, and that nothing is told twice.
    pub fn wait_for_records(&self, count: usize) -> Result<Vec<Record>> {
        let mut found = 0;
        let waited = wait_until(&format!("{count} records"), SOON, || {
            found = self.stderr().map_or(0, |text| record_lines(&text).count());
            found >= count
        });
        waited.with_context(|| format!("{found} records instead"))?;
        let records = self.records()?;
        if records.len() != count {
            bail!("{} records instead of {count}: {records:#?}", records.len());
        }
        Ok(records)
    }

    /// The first process of a companion, once it is there.
    pub fn companion(&self, name: &str) -> Result<u32> {
        companion(self.pid(), name)
    }

    /// A cgroup2 directory of this run: `workload`, or `companion-NAME`.
    pub fn cgroup(&self, part: &str) -> Result<PathBuf> {
        Ok(cgroup::cgroup2_mount()?.join(group(self.pid())?).join(part))
    }

    /// What the kernel side has counted for this run.
    pub fn counters(&self) -> Result<Counters> {
        let started = Process::new(self.pid().try_into()?)?.stat()?.starttime;
        let pins = format!("/sys/fs/bpf/pillion/run-{}-{started}", self.pid());
        ensure!(Path::new(&pins).is_dir(), "no pins in {pins}");
        // Opens the maps that are pinned there; its programs are attached to nothing.
        Ok(Dataplane::load(&LoadOptions::new(pins))?.counters()?)
    }

    /// The limit of a cgroup: the contents of `v1` in the hierarchy of `controller` where that is mounted by itself, else
    /// of `v2`.
    pub fn limit(&self, part: &str, controller: &str, v1: &str, v2: &str) -> Result<String> {
        let alone = Path::new("/sys/fs/cgroup").join(controller);
        let file = if alone.is_dir() {
            alone.join(group(self.pid())?).join(part).join(v1)
        } else {
            self.cgroup(part)?.join(v2)
        };
        let text = fs::read_to_string(&file).with_context(|| format!("no {}", file.display()))?;
        Ok(text.trim().to_owned())
    }

    /// Ends the puppet's input, upon which it and then `pillion run` end; returns how, and all of stderr.
    pub fn finish(self) -> Result<(ExitStatus, String)> {
        let status = self.app.dismiss(SOON)?;
        Ok((status, read(&self.stderr)?))
    }
}

/// A conversation of `app` with `server` at `address`, and the way it took.
pub fn dial(app: &mut Puppet, server: &EchoServer, address: SocketAddr) -> Result<Answer<Way>> {
    let socket = app.socket(Domain::of(address))??;
    let seen = match app.connect(socket, address)? {
        Ok(()) => {
            let names = app.names(socket)??;
            ensure!(names.peer == Some(address), "{address} is shown as {names:?}");
            app.send(socket, "hello")??;
            app.shutdown(socket)??;
            let heard = app.receive_all(socket)?;
            ensure!(heard == Ok("hello".to_owned()), "{address} answers {heard:?}");
            let port = server.peers().last().map(SocketAddr::port);
            Ok(if port == Some(names.local.port()) { Way::Direct } else { Way::Relayed })
        }
        Err(errno) => Err(errno),
    };
    app.close(socket)??;
    Ok(seen)
}

/// The documented example `packaging/companions/NAME`, whose policy is returned. Its files are used as they are, but for where
/// the template and the program are.
pub fn example(machine: &Machine, name: &str, template: &str, program: (&str, &Path)) -> Result<PathBuf> {
    let directory = programs::checkout().join("packaging/companions").join(name);
    let read = |file: &str| {
        let path = directory.join(file);
        fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))
    };
    let template = machine.file(template, &read(template)?)?;
    let mut policy = read("policy.yaml")?;
    let installed = Path::new("/etc/pillion").join(template.file_name().context("a file")?);
    for (from, to) in [(installed.as_path(), template.as_path()), (Path::new(program.0), program.1)] {
        let (from, to) = (from.display().to_string(), to.display().to_string());
        ensure!(policy.matches(&from).count() == 1, "{from} is not once in the policy of {name}");
        policy = policy.replace(&from, &to);
    }
    machine.file("policy.yaml", &policy)
}

/// The first process of the companion `name` of the `pillion run` with that pid, once it is there.
pub fn companion(run: u32, name: &str) -> Result<u32> {
    wait_for(&format!("a process of companion {name}"), SOON, || {
        let directory = cgroup::cgroup2_mount().ok()?.join(group(run).ok()?);
        let pids = fs::read_to_string(directory.join(format!("companion-{name}/cgroup.procs"))).ok()?;
        pids.lines().next()?.parse().ok()
    })
}

/// The records in what a `pillion run` has written to stderr.
pub fn records(stderr: &str) -> Result<Vec<Record>> {
    let parse = |line| serde_json::from_str(line).with_context(|| format!("not a record: {line}"));
    record_lines(stderr).map(parse).collect()
}

/// Whole lines only: the last one may still be being written.
fn record_lines(stderr: &str) -> impl Iterator<Item = &str> {
    stderr.split_inclusive('\n').filter(|line| line.starts_with("{\"ts\":") && line.ends_with('\n'))
}

/// Where the cgroups of the `pillion run` with that pid are, below every hierarchy.
fn group(run: u32) -> Result<String> {
    let started = Process::new(run.try_into()?)?.stat()?.starttime;
    Ok(format!("pillion.slice/process+{run}-{started}"))
}

fn read(file: &File) -> Result<String> {
    use std::os::fd::AsRawFd as _;
    // A description of its own: the writers share the position of this one.
    let mut own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let mut bytes = Vec::new();
    own.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
