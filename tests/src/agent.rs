//! A `pillion agent` of a test's own, with its own directories, pins and ports, driven only through the `pillion` program.
//!
//! Dropping it kills the agent and cleans up after it with `pillion cleanup`. Knows nothing of what the agent should do.

use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{Containerd, Finished, Machine, ProcessGuard, programs, wait_for, wait_until};

/// An agent that is not up, down or where it is meant to be by then is broken.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// An agent, running or not, with its directories.
#[derive(Debug)]
pub struct Agent {
    directory: PathBuf,
    pins: PathBuf,
    http: SocketAddr,
    containerd: String,
    nri: String,
    /// Flags by which it finds other runtimes.
    runtimes: Vec<String>,
    /// A process whose mount namespace it runs in.
    inside: Option<u32>,
    process: Option<ProcessGuard>,
    /// What agents before this one have logged.
    earlier: String,
}

impl Agent {
    /// Directories without policies; nothing runs yet. The agent will leave containerd alone unless there is one.
    pub fn new(machine: &Machine, containerd: Option<&Containerd>) -> Result<Self> {
        Self::at(machine, containerd.map(Containerd::address).as_deref())
    }

    /// The same, with the socket of a containerd that need not be there yet.
    pub fn at(machine: &Machine, containerd: Option<&Path>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = machine.directory().join(format!("agent.{number}"));
        let agent = Self {
            http: free_address()?,
            pins: format!("/sys/fs/bpf/pillion-test-{}-{number}", process::id()).into(),
            containerd: containerd.map_or_else(|| "none".into(), |it| it.display().to_string()),
            nri: "none".into(),
            runtimes: ["--docker-socket", "none", "--podman-socket", "none"].map(str::to_owned).to_vec(),
            inside: None,
            process: None,
            earlier: String::new(),
            directory,
        };
        for path in [agent.directory.clone(), agent.policy_dir()] {
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(agent)
    }

    /// An agent for a containerd elsewhere, with its socket and its NRI socket; `none` for what it is to leave alone.
    pub fn beside(machine: &Machine, containerd: &str, nri: &str) -> Result<Self> {
        let mut agent = Self::new(machine, None)?;
        agent.serve(containerd, nri);
        Ok(agent)
    }

    /// From its next start on it is for this containerd, as with [`Agent::beside`]: for one that had to know the agent's
    /// directories before it could be brought up.
    pub fn serve(&mut self, containerd: &str, nri: &str) {
        (self.containerd, self.nri) = (containerd.to_owned(), nri.to_owned());
    }

    /// An agent that finds its runtimes by these flags, and runs in the mount namespace of a process, if one is given.
    pub fn watching(machine: &Machine, runtimes: &[&str], inside: Option<u32>) -> Result<Self> {
        let mut agent = Self::new(machine, None)?;
        agent.runtimes = runtimes.iter().map(|&flag| flag.to_owned()).collect();
        agent.inside = inside;
        Ok(agent)
    }

    /// The same, running.
    pub fn start(machine: &Machine, containerd: Option<&Containerd>) -> Result<Self> {
        let mut agent = Self::new(machine, containerd)?;
        agent.run()?;
        Ok(agent)
    }

    /// Starts it, again perhaps, and waits until it is ready.
    pub fn run(&mut self) -> Result<()> {
        let command = self.command()?;
        self.run_command(command)
    }

    /// The same with a [`Agent::command`] that got more flags.
    pub fn run_command(&mut self, mut command: Command) -> Result<()> {
        ensure!(self.process.is_none(), "the agent is running");
        self.process = Some(ProcessGuard::spawn("pillion agent", &mut command)?);
        let up = wait_until("an agent that is ready", DEADLINE, || {
            self.process.as_mut().is_none_or(ProcessGuard::has_ended)
                || self.get("/readyz").is_ok_and(|(code, _)| code == 200)
        });
        let process = self.process.as_mut().context("it was started")?;
        if process.has_ended() {
            bail!("the agent does not start: {}", process.stderr()?);
        }
        up
    }

    /// Starts it and does not wait.
    pub fn spawn(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the agent is running");
        let mut command = self.command()?;
        self.process = Some(ProcessGuard::spawn("pillion agent", &mut command)?);
        Ok(())
    }

    /// `pillion agent` with this agent's directories.
    pub fn command(&self) -> Result<Command> {
        let mut command = match self.inside {
            Some(pid) => {
                // Becomes the agent.
                let mut command = Command::new("nsenter");
                command.args(["-m", "--wd=/", "-t", &pid.to_string(), "--"]).arg(programs::pillion()?);
                command
            }
            None => Command::new(programs::pillion()?),
        };
        command.arg("agent");
        self.add_paths(&mut command);
        command.arg("--policy-dir").arg(self.policy_dir());
        command.args(["--containerd-socket", &self.containerd, "--http-addr", &self.http.to_string()]);
        command.args(["--nri-socket", &self.nri, "--log-format", "json"]).args(&self.runtimes);
        // The machine's own units are none of a test's business.
        command.args(["--systemd", "none"]);
        // What is held is told only there while it is.
        command.env("PILLION_LOG_LEVEL", "info,pillion_runtime::nri=debug");
        Ok(command)
    }

    fn add_paths(&self, command: &mut Command) {
        command.env("RUST_BACKTRACE", "0");
        command.arg("--state-dir").arg(self.state_dir());
        command.arg("--run-dir").arg(self.run_dir());
        command.arg("--pin-root").arg(&self.pins);
    }

    /// The process, while it runs.
    pub fn process(&mut self) -> Result<&mut ProcessGuard> {
        self.process.as_mut().context("the agent does not run")
    }

    /// Ends it with `signal` and waits for its end. What it attached stays.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let mut process = self.process.take().context("the agent does not run")?;
        process.signal(signal)?;
        let status = process.exit(DEADLINE)?;
        self.earlier.push_str(&process.stderr()?);
        ensure!(
            signal == Signal::SIGKILL || status.success(),
            "the agent ended with {status}: {}",
            self.earlier
        );
        Ok(())
    }

    /// Everything logged so far, by earlier agents also.
    pub fn log(&self) -> Result<String> {
        let now = self.process.as_ref().map_or(Ok(String::new()), ProcessGuard::stderr)?;
        Ok(format!("{}{now}", self.earlier))
    }

    /// The relay's records in the log, whose fields are those of the record.
    pub fn records(&self) -> Result<Vec<Value>> {
        let lines = self.log()?;
        let message = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let text = line.pointer("/fields/message").or_else(|| line.get("message"))?.as_str()?.to_owned();
            serde_json::from_str::<Value>(&text).ok().filter(|record| record.get("outcome").is_some())
        };
        Ok(lines.lines().filter_map(message).collect())
    }

    /// Waits for a record of a connection from a workload to a destination, and returns it.
    pub fn record(&self, workload: &str, destination: SocketAddr) -> Result<Value> {
        let destination = destination.to_string();
        let what = format!("a record of {workload} to {destination}");
        wait_for(&what, DEADLINE, || {
            let records = self.records().unwrap_or_default();
            records
                .into_iter()
                .find(|record| record["workload"] == workload && record["destination"] == *destination)
        })
    }

    /// `pillion ARGUMENTS`, towards this agent, to its end. For commands that talk to the agent.
    pub fn cli<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Finished> {
        ProcessGuard::finish("pillion", &mut self.cli_command(arguments)?, DEADLINE * 2)
    }

    /// The same, to be run otherwise.
    pub fn cli_command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Command> {
        let mut command = Command::new(programs::pillion()?);
        command.env("RUST_BACKTRACE", "0").args(arguments).arg("--run-dir").arg(self.run_dir());
        Ok(command)
    }

    /// `pillion cleanup ARGUMENTS` of this agent's things.
    pub fn cleanup(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(programs::pillion()?);
        command.arg("cleanup").args(arguments);
        self.add_paths(&mut command);
        ProcessGuard::finish("pillion cleanup", &mut command, DEADLINE * 2)
    }

    /// What a command prints with `-o json`. It may end with 0 or 5.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let done = self.cli(&[arguments, &["-o", "json"]].concat())?;
        let code = done.status.code();
        ensure!(matches!(code, Some(0 | 5)), "pillion {arguments:?}: {}", done.stderr);
        serde_json::from_str(&done.stdout).with_context(|| format!("not JSON: {}", done.stdout))
    }

    /// `pillion status`.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// Waits for a status that `fits`.
    pub fn until_status(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let found = wait_for(&format!("a status with {what}"), DEADLINE, || {
            last = self.status().ok()?;
            fits(&last).then(|| last.clone())
        });
        found.with_context(|| format!("the last status is {last}"))
    }

    /// One workload; `None` when the agent does not know it.
    pub fn workload(&self, id: &str) -> Result<Option<Value>> {
        let done = self.cli(&["describe", id, "-o", "json"])?;
        match done.status.code() {
            Some(0) => Ok(Some(serde_json::from_str(&done.stdout)?)),
            Some(1) => Ok(None),
            _ => bail!("pillion describe {id}: {}", done.stderr),
        }
    }

    /// Waits for a workload that `fits`.
    pub fn until(&self, id: &str, what: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = None;
        let found = wait_for(&format!("{id}: {what}"), DEADLINE, || {
            last = self.workload(id).ok()?;
            last.clone().filter(&fits)
        });
        found.with_context(|| format!("the last look showed {last:?}"))
    }

    /// Waits for this verdict on a workload.
    pub fn until_verdict(&self, id: &str, verdict: &str) -> Result<Value> {
        self.until(id, verdict, |workload| workload["verdict"] == verdict)
    }

    /// Waits until the agent does not know a workload any more.
    pub fn until_forgotten(&self, id: &str) -> Result<()> {
        wait_until(&format!("an agent that has forgotten {id}"), DEADLINE, || {
            matches!(self.workload(id), Ok(None))
        })
    }

    /// A counter of the data plane.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        let value = status["dataplane"]["counters"][name].as_u64();
        value.with_context(|| format!("no counter {name} in {}", status["dataplane"]))
    }

    /// Puts a policy file in place, in one step.
    pub fn policy(&self, name: &str, text: &str) -> Result<PathBuf> {
        let (path, hidden) = (self.policy_dir().join(name), self.policy_dir().join(format!(".{name}")));
        fs::write(&hidden, text)?;
        fs::set_permissions(&hidden, fs::Permissions::from_mode(0o644))?;
        fs::rename(&hidden, &path)?;
        Ok(path)
    }

    /// `GET` over the health address: status and body.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&self.http, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.http).as_bytes(),
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer has a head")?;
        let code = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
        let body = if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            dechunk(body)?
        } else {
            body.to_owned()
        };
        Ok((code.with_context(|| format!("no status: {head}"))?, body))
    }

    /// Where policies are.
    pub fn policy_dir(&self) -> PathBuf {
        self.directory.join("policy.d")
    }

    /// Where the journal and companions' files are.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Where lock and socket are.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// By what `pillion-hook` finds this agent and not the machine's.
    pub fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![("PILLION_RUN_DIR", self.run_dir()), ("PILLION_STATE_DIR", self.state_dir())]
    }

    /// Where links and maps are pinned.
    pub fn pin_root(&self) -> &Path {
        &self.pins
    }

    /// Ends the agent in order, removes what it left with `pillion cleanup`, and demands that nothing remains.
    pub fn end(mut self) -> Result<()> {
        if self.process.is_some() {
            self.stop(Signal::SIGTERM)?;
        }
        self.cleanup(&["--yes"])?.success()?;
        for path in [self.state_dir(), self.run_dir(), self.pins.clone()] {
            ensure!(!path.exists(), "cleanup left {}", path.display());
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process = None;
        if self.state_dir().exists() || self.run_dir().exists() || self.pins.exists() {
            // What stays shows in the inventory.
            let _ = self.cleanup(&["--yes"]);
        }
    }
}

fn dechunk(mut body: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("a chunk has a size")?;
        let size = usize::from_str_radix(size, 16).with_context(|| format!("a chunk of {size:?} bytes"))?;
        if size == 0 {
            return Ok(whole);
        }
        whole.push_str(rest.get(..size).context("a chunk is whole")?);
        body = rest.get(size + 2..).context("a chunk ends with a line break")?;
    }
}

/// Nobody else binds ports on the machine while a test has it.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
