//! A real Docker or Podman with hooks that `pillion install-hooks` has put into it, an agent, and a listener that its containers
//! reach: what the suites about engines play in.
//!
//! Owns all of it. Knows nothing of what should become of a container.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    Agent, EchoServer, Finished, Lab, Machine, NetNs, ProcessGuard, lab::DIRECTORY, programs, scene::KIND,
    wait_until,
};

const SOON: Duration = Duration::from_secs(30);
/// How long the agent holds at most; its default is too long for a test.
const HOLD: &str = "3s";

/// Docker or Podman, with an agent that does not run yet.
#[derive(Debug)]
pub struct Engine {
    // In this order they are dropped.
    /// It watches this engine alone.
    pub agent: Agent,
    /// In the engine's namespace, on every address, port 8080.
    pub echo: EchoServer,
    daemon: Option<ProcessGuard>,
    lab: Lab,
    tool: &'static str,
    gateway: &'static str,
    directory: PathBuf,
}

impl Engine {
    /// Docker of this Debian suite, with the runtime `pillion`.
    pub fn docker(machine: &Machine, version: &'static str) -> Result<Self> {
        let lab = Lab::up("docker", Some(version), &[])?;
        let socket = lab.value("DOCKER_HOST")?.trim_start_matches("unix://").to_owned();
        let directory = PathBuf::from(&socket);
        let directory = directory.parent().context("the socket is in a directory")?.to_owned();
        let flags = ["--docker-socket", &socket, "--podman-socket", "none", "--hold-limit", HOLD];
        let agent = Agent::watching(machine, &flags, None)?;
        let engine = Self::with(lab, "docker", "10.98.0.1", directory, agent)?;
        engine.install(&[])?.success()?;
        engine.reload("pillion")?;
        Ok(engine)
    }

    /// Podman, with its hooks. The agent sees Podman's files.
    pub fn podman(machine: &Machine) -> Result<Self> {
        let lab = Lab::up("podman", None, &[])?;
        let directory = PathBuf::from("/var/tmp/pillion-lab/run/podman");
        let flags = ["--docker-socket", "none", "--hold-limit", HOLD];
        let agent = Agent::watching(machine, &flags, Some(holder(&directory)?))?;
        let engine = Self::with(lab, "podman", "10.88.0.1", directory, agent)?;
        engine.install(&[])?.success()?;
        Ok(engine)
    }

    fn with(
        lab: Lab,
        tool: &'static str,
        gateway: &'static str,
        directory: PathBuf,
        agent: Agent,
    ) -> Result<Self> {
        let echo = EchoServer::start(&NetNs::of(holder(&directory)?)?, "0.0.0.0:8080")?;
        Ok(Self { agent, echo, daemon: None, lab, tool, gateway, directory })
    }

    /// `pillion install-hooks` for this engine and this agent.
    pub fn install(&self, more: &[&str]) -> Result<Finished> {
        let hook = programs::hook()?;
        let (run, state) = (self.agent.run_dir(), self.agent.state_dir());
        let (hook, run, state) = (shown(&hook), shown(&run), shown(&state));
        let arguments = [
            &[
                "install-hooks",
                "--runtime",
                self.tool,
                "--hook",
                &hook,
                "--run-dir",
                &run,
                "--state-dir",
                &state,
            ],
            more,
        ];
        let config = shown(&self.config());
        let places: &[&str] = match self.tool {
            "docker" => &["--config", &config, "--link-dir", "/usr/local/bin"],
            _ => &[],
        };
        self.pillion(&[arguments.concat().as_slice(), places].concat())
    }

    /// `pillion ARGUMENTS`, where the engine is.
    pub fn pillion(&self, arguments: &[&str]) -> Result<Finished> {
        let program = shown(&programs::pillion()?);
        self.lab.run(&[&["exec", program.as_str()], arguments].concat())
    }

    /// A shell's commands, where the engine is.
    pub fn shell(&self, script: &str) -> Result<Finished> {
        self.lab.run(&["exec", "sh", "-ec", script])
    }

    /// Docker's `daemon.json`.
    pub fn config(&self) -> PathBuf {
        self.directory.join("daemon.json")
    }

    /// The engine's own program, with these arguments, to its end.
    pub fn tool(&self, arguments: &[&str]) -> Result<Finished> {
        self.lab.run(&[&[self.tool], arguments].concat())
    }

    /// Starts a container whose first instruction connects to the listener, and which stays until it is removed.
    pub fn start(&self, name: &str, app: &str, more: &[&str]) -> Result<Finished> {
        let label = format!("app={app}");
        let named = ["run", "-d", "-i", "--name", name, "--label", &label];
        let command = ["localhost/busybox:1", "/bin/nc", self.gateway, "8080"];
        self.tool(&[&named[..], more, &command].concat())
    }

    /// Removes a container.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.tool(&["rm", "-f", "-t", "0", name]).and_then(|done| {
            // Docker 20.10 has no such flag.
            if done.status.success() { Ok(()) } else { self.tool(&["rm", "-f", name])?.success().map(drop) }
        })
    }

    /// The agent's id of a container.
    pub fn id(&self, name: &str) -> String {
        format!("{}/{name}", self.tool)
    }

    /// Starts such a container and demands that its first connection was captured, through this gate.
    pub fn captures(&self, name: &str, gate: &str, more: &[&str]) -> Result<Value> {
        let (redirected, peers) = (self.agent.counter("outboundRedirected")?, self.echo.peers().len());
        self.start(name, "web", more)?.success()?;
        wait_until("its first connection", SOON, || self.echo.peers().len() > peers)?;
        ensure!(
            self.agent.counter("outboundRedirected")? == redirected + 1,
            "{name}: its first connection was not redirected"
        );
        let known = self.agent.until_verdict(&self.id(name), "attached")?;
        ensure!(known["firstInstruction"] == "before" && known["gate"] == gate, "{known}");
        ensure!(known["subject"]["labels"]["app"] == "web", "{known}");
        ensure!(known["subject"]["image"] == "localhost/busybox:1", "{known}");
        ensure!(known["subject"]["executable"] == "/bin/nc", "{known}");
        Ok(known)
    }

    /// Demands that a container starts and connects, and that nothing redirects it.
    pub fn passes(&self, name: &str, app: &str, more: &[&str]) -> Result<()> {
        let peers = self.echo.peers().len();
        self.start(name, app, more)?.success()?;
        wait_until("its connection", SOON, || self.echo.peers().len() > peers)
    }

    /// Demands that a container is not started, and that the engine's error names Pillion and the policy.
    pub fn refuses(&self, name: &str, app: &str, more: &[&str]) -> Result<()> {
        let peers = self.echo.peers().len();
        let done = self.start(name, app, more)?;
        ensure!(!done.status.success(), "{name} was started");
        ensure!(done.stderr.contains("pillion") && done.stderr.contains(app), "{name}: {}", done.stderr);
        ensure!(self.echo.peers().len() == peers, "{name} has connected");
        self.remove(name)
    }

    /// The network namespace of the engine, in which containers reach every address of it at the gateway's.
    pub fn netns(&self) -> Result<NetNs> {
        NetNs::of(holder(&self.directory)?)
    }

    /// The gateway's address, as containers know it.
    pub fn gateway(&self) -> &'static str {
        self.gateway
    }

    /// Waits until the agent has its source.
    pub fn until_watched(&self) -> Result<()> {
        let is_up = |status: &Value| {
            let sources = status["sources"].as_array().map(Vec::as_slice).unwrap_or_default();
            sources.iter().any(|source| source["name"] == self.tool && source["state"] == "up")
        };
        self.agent.until_status("its source", is_up).map(drop)
    }

    /// Has Docker read its settings again, and waits until it says `word` of its runtimes.
    pub fn reload(&self, word: &str) -> Result<()> {
        kill(Pid::from_raw(self.daemon_pid()?), Signal::SIGHUP)?;
        wait_until(&format!("a Docker with {word}"), SOON, || {
            let info = self.tool(&["info", "--format", "{{.DefaultRuntime}} {{json .Runtimes}}"]);
            info.is_ok_and(|info| info.stdout.contains(word))
        })
    }

    fn daemon_pid(&self) -> Result<i32> {
        match &self.daemon {
            Some(daemon) => Ok(i32::try_from(daemon.pid())?),
            None => Ok(self.lab.value("DOCKERD_PID")?.parse()?),
        }
    }

    /// Kills dockerd beneath its containers and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        let pid = self.daemon_pid()?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        // It closes its socket long before it has stopped its containers. A zombie has ended.
        let status = format!("/proc/{pid}/status");
        wait_until("the end of dockerd", SOON, || {
            fs::read_to_string(&status).map_or(true, |status| status.contains("State:\tZ"))
        })?;
        self.daemon = None;
        let mut command = std::process::Command::new("bash");
        command.arg(self.directory.join("cmd-dockerd"));
        self.daemon = Some(ProcessGuard::spawn("dockerd", &mut command)?);
        wait_until("dockerd", SOON, || self.tool(&["version"]).is_ok_and(|done| done.status.success()))
    }

    /// Loads the image again, for an engine that keeps its images elsewhere now.
    pub fn load_image(&self) -> Result<()> {
        let archive = format!("{DIRECTORY}/images/busybox_1.tar");
        self.tool(&["load", "-q", "-i", &archive])?.success().map(drop)
    }

    /// Ends all of it; the agent must leave nothing.
    pub fn end(self) -> Result<()> {
        let Self { agent, echo, daemon, lab, .. } = self;
        agent.end()?;
        drop((echo, daemon));
        lab.down()
    }
}

/// Keeps the namespaces of the engine's system.
fn holder(directory: &std::path::Path) -> Result<u32> {
    Ok(fs::read_to_string(directory.join("holder.pid"))?.trim().parse()?)
}

fn shown(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A policy for containers with this label of an engine.
pub fn policy(engine: &str, app: &str, companion: &str, port: &str, on_failure: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: {app} }}\nspec:\n  select: {{ runtimes: [{engine}], labels: {{ app: {app} }} }}\n  \
         companions: [{companion}]\n  redirect: {{ outbound: [{{ to: \"r{port}\" }}] }}\n  onFailure: {on_failure}\n"
    )
}

/// A relay, and companions that fail or hang, under both failure modes.
pub fn policies(engine: &str) -> Vec<(&'static str, String)> {
    let ready = "ready: { tcp: { port: 15001 }, timeout: 60s }";
    let failing = format!("{{ name: r, exec: {{ command: [/bin/false] }}, {ready} }}");
    let hanging = format!("{{ name: r, exec: {{ command: [/bin/sleep, \"1000\"] }}, {ready} }}");
    vec![
        ("web.yaml", policy(engine, "web", "{ name: r, builtin: relay, stopGrace: 1s }", "", "open")),
        ("a.yaml", policy(engine, "failing-open", &failing, ":15001", "open")),
        ("b.yaml", policy(engine, "failing-closed", &failing, ":15001", "closed")),
        ("c.yaml", policy(engine, "hanging-open", &hanging, ":15001", "open")),
        ("d.yaml", policy(engine, "hanging-closed", &hanging, ":15001", "closed")),
    ]
}
