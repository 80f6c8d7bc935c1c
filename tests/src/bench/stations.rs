//! How a workload whose first instruction connects is started at each gate, with Pillion and without.

use std::{
    net::{SocketAddr, SocketAddrV4},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::gate::Server;
use crate::{
    Agent, Containerd, Finished, Lab, Machine, NetNs, PodSpec, Pods, ProcessGuard,
    engines::{self, Engine},
    first,
    hooked::{FIRST, Hooks, Way},
    pods::GATEWAY,
    run::{self, records},
    scene::{FAR, KIND, id, web},
    wait_until,
};

/// What one start may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// A relay writes its record when the connection has ended.
const RECORDS: Duration = Duration::from_secs(20);

/// A gate.
pub(super) struct Station {
    pub(super) name: &'static str,
    /// How many starts are enough.
    pub(super) starts: u32,
    pub(super) prepare: fn(&Machine) -> Result<Box<dyn Place>>,
}

/// Where workloads are started.
pub(super) trait Place {
    /// What they dial.
    fn server(&self) -> &Server;

    /// Runs one to its end; an error unless it was answered.
    fn start(&self, name: &str, matched: bool) -> Result<()>;

    /// How many of the connections went through a relay, of `expected`.
    fn captured(&self, expected: usize) -> Result<usize>;

    /// What the agent let the gate wait, in milliseconds, for each that it held.
    fn held(&self) -> Result<Vec<f64>>;
}

pub(super) const STATIONS: &[Station] = &[
    Station { name: "run", starts: 2000, prepare: |machine| Ok(Box::new(Run::new(machine)?)) },
    Station {
        name: "wrapper containerd 1.6",
        starts: 500,
        prepare: |machine| Ok(Box::new(InContainerd::new(machine, Way::Wrapper)?)),
    },
    Station {
        name: "hook containerd 1.6",
        starts: 500,
        prepare: |machine| Ok(Box::new(InContainerd::new(machine, Way::Hook)?)),
    },
    Station {
        name: "wrapper docker 20.10",
        starts: 500,
        prepare: |machine| Ok(Box::new(InEngine::docker(machine, "bookworm")?)),
    },
    Station {
        name: "wrapper docker 28",
        starts: 500,
        prepare: |machine| Ok(Box::new(InEngine::docker(machine, "sid")?)),
    },
    Station {
        name: "hook podman 4.3",
        starts: 500,
        prepare: |machine| Ok(Box::new(InEngine::podman(machine)?)),
    },
    Station { name: "exec", starts: 500, prepare: |machine| Ok(Box::new(AtExec::new(machine)?)) },
    Station {
        name: "nri containerd 1.7",
        starts: 500,
        prepare: |machine| Ok(Box::new(InPods::new(machine, "trixie")?)),
    },
    Station {
        name: "nri containerd 2",
        starts: 500,
        prepare: |machine| Ok(Box::new(InPods::new(machine, "sid")?)),
    },
];

fn source<'a>(status: &'a serde_json::Value, name: &str) -> &'a str {
    let sources = status["sources"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = sources.iter().find(|source| source["name"] == name);
    found.and_then(|source| source["state"].as_str()).unwrap_or("absent")
}

fn v4(address: SocketAddr) -> Result<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(_) => bail!("the server is at an IPv4 address"),
    }
}

fn answered(done: Finished) -> Result<()> {
    done.code(first::exit::ANSWERED).map(drop)
}

/// `pillion run`.
struct Run {
    near: NetNs,
    _far: NetNs,
    server: Server,
    program: PathBuf,
    policy: PathBuf,
    relayed: AtomicUsize,
}

impl Run {
    fn new(machine: &Machine) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let server = Server::start(&far, &format!("{FAR}:8080"))?;
        let program = first::build(machine.directory(), "first", v4(server.address)?)?;
        let policy = format!(
            "{KIND}\nmetadata: {{ name: all }}\nspec:\n  select: {{ runtimes: [process] }}\n  \
             companions: [{{ name: relay, builtin: relay }}]\n  redirect: {{ outbound: [{{ to: relay }}] }}\n  \
             onFailure: closed\n"
        );
        let policy = machine.file("policy.yaml", &policy)?;
        Ok(Self { near, _far: far, server, program, policy, relayed: AtomicUsize::new(0) })
    }
}

impl Place for Run {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let mut command = if matched {
            let mut command = run::command(&self.policy, &[])?;
            command.arg(&self.program);
            command
        } else {
            Command::new(&self.program)
        };
        let done = self.near.run(|| ProcessGuard::finish(name, &mut command, DEADLINE))?;
        if matched {
            self.relayed.fetch_add(records(&done.stderr)?.len(), Ordering::Relaxed);
        }
        answered(done)
    }

    fn captured(&self, _expected: usize) -> Result<usize> {
        Ok(self.relayed.load(Ordering::Relaxed))
    }

    fn held(&self) -> Result<Vec<f64>> {
        // No agent is asked.
        Ok(Vec::new())
    }
}

/// What an agent tells: its records, and how long its gates waited.
struct Watched {
    events: ProcessGuard,
}

impl Watched {
    fn new(agent: &Agent) -> Result<Self> {
        let mut command = agent.cli_command(&["events", "--follow", "--output", "json"])?;
        let events = ProcessGuard::spawn("pillion events", &mut command)?;
        Ok(Self { events })
    }

    fn captured(agent: &Agent, server: SocketAddr, expected: usize) -> Result<usize> {
        let relayed = || -> Result<usize> {
            let to = server.to_string();
            Ok(agent.records()?.iter().filter(|record| record["destination"] == to.as_str()).count())
        };
        // What is missing after that has been missed.
        let _ = wait_until("the relays' records", RECORDS, || relayed().is_ok_and(|count| count >= expected));
        relayed()
    }

    fn held(&self) -> Result<Vec<f64>> {
        let mut held = Vec::new();
        for line in self.events.stdout()?.lines().filter(|line| line.contains("heldMicros")) {
            let event: serde_json::Value = serde_json::from_str(line).context("an event is JSON")?;
            if event["kind"] == "admitted" {
                held.push(event["heldMicros"].as_f64().context("a number")? / 1000.0);
            }
        }
        Ok(held)
    }
}

/// containerd with runc, by the wrapper or the hook.
struct InContainerd {
    watched: Watched,
    agent: Agent,
    containerd: Containerd,
    hooks: Hooks,
    way: Way,
    near: NetNs,
    _far: NetNs,
    server: Server,
}

impl InContainerd {
    fn new(machine: &Machine, way: Way) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let server = Server::start(&far, &format!("{FAR}:8080"))?;
        let mut agent = Agent::at(machine, Some(&Containerd::socket_of(machine)))?;
        let containerd = Containerd::start_with(machine, agent.environment())?;
        agent.policy("web.yaml", &web("closed", ""))?;
        agent.run()?;
        agent.until_status("containerd", |status| source(status, "containerd") == "up")?;
        let hooks = Hooks::new(machine, &agent, v4(server.address)?)?;
        Ok(Self { watched: Watched::new(&agent)?, agent, containerd, hooks, way, near, _far: far, server })
    }
}

impl Place for InContainerd {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let labels: &[(&str, &str)] = if matched { &[("app", "web")] } else { &[] };
        let container =
            crate::containerd::Container { id: name, labels, netns: Some(&self.near), command: &[FIRST] };
        let way = if matched { self.way } else { Way::Bare };
        answered(self.hooks.finish(way, &self.containerd, &container)?)?;
        if matched {
            self.agent.until_forgotten(&id(name))?;
        }
        Ok(())
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        Watched::captured(&self.agent, self.server.address, expected)
    }

    fn held(&self) -> Result<Vec<f64>> {
        self.watched.held()
    }
}

/// Pods by CRI, held by NRI. Each start is a pod's first container, whose program connects; the time is from the pod's
/// creation, whose network and sandbox are the larger part of it.
struct InPods {
    watched: Watched,
    agent: Agent,
    server: Server,
    pods: Pods,
    _lab: Lab,
}

impl InPods {
    fn new(machine: &Machine, version: &'static str) -> Result<Self> {
        let lab = Lab::up("containerd", Some(version), &[])?;
        let pods = Pods::of(&lab)?;
        let server = Server::start(&pods.netns()?, "0.0.0.0:8080")?;
        let mut agent = Agent::beside(machine, lab.value("CONTAINERD_ADDRESS")?, lab.value("NRI_SOCKET")?)?;
        agent.policy("web.yaml", &web("closed", ""))?;
        agent.run()?;
        for name in ["nri", "containerd"] {
            agent.until_status(name, |status| source(status, name) == "up")?;
        }
        Ok(Self { watched: Watched::new(&agent)?, agent, server, pods, _lab: lab })
    }
}

impl Place for InPods {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let labels: &[(&str, &str)] = if matched { &[("app", "web")] } else { &[] };
        let pod = self.pods.run(&PodSpec { name, labels, ..PodSpec::default() })?;
        // busybox: some instructions of its own come before it connects.
        let container = pod.run("app", &["/bin/nc", GATEWAY, "8080", "-w5"])?;
        let code = pod.exit_code(&container)?;
        ensure!(code == 0, "{name} ended with {code}");
        pod.delete()
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        let to = SocketAddr::new(GATEWAY.parse()?, self.server.address.port());
        Watched::captured(&self.agent, to, expected)
    }

    fn held(&self) -> Result<Vec<f64>> {
        self.watched.held()
    }
}

/// Docker or Podman, with the hooks that `pillion install-hooks` has put into it.
struct InEngine {
    watched: Watched,
    engine: Engine,
    server: Server,
    program: PathBuf,
    /// By which a container comes to the gate. Without them it does not, but Podman asks its hooks about every container.
    gated: &'static [&'static str],
}

impl InEngine {
    fn docker(machine: &Machine, version: &'static str) -> Result<Self> {
        Self::with(machine, Engine::docker(machine, version)?, "docker", &["--runtime", "pillion"])
    }

    fn podman(machine: &Machine) -> Result<Self> {
        Self::with(machine, Engine::podman(machine)?, "podman", &[])
    }

    fn with(
        machine: &Machine,
        mut engine: Engine,
        name: &str,
        gated: &'static [&'static str],
    ) -> Result<Self> {
        let server = Server::start(&engine.netns()?, "0.0.0.0:8081")?;
        let to = SocketAddrV4::new(engine.gateway().parse()?, server.address.port());
        let program = first::build(machine.directory(), "first", to)?;
        let relay = "{ name: r, builtin: relay, stopGrace: 1s }";
        engine.agent.policy("web.yaml", &engines::policy(name, "web", relay, "", "closed"))?;
        engine.agent.run()?;
        engine.until_watched()?;
        let watched = Watched::new(&engine.agent)?;
        Ok(Self { watched, engine, server, program, gated })
    }
}

impl Place for InEngine {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let (label, flags) = if matched { ("app=web", self.gated) } else { ("app=none", &[][..]) };
        let mount = format!("{}:/first:ro", self.program.display());
        let run = ["run", "--rm", "--name", name, "--label", label, "-v", &mount];
        answered(self.engine.tool(&[&run[..], flags, &["localhost/busybox:1", "/first"]].concat())?)
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        let to = SocketAddr::new(self.engine.gateway().parse()?, self.server.address.port());
        Watched::captured(&self.engine.agent, to, expected)
    }

    fn held(&self) -> Result<Vec<f64>> {
        self.watched.held()
    }
}

/// A process of the host, held at its exec.
struct AtExec {
    watched: Watched,
    agent: Agent,
    near: NetNs,
    _far: NetNs,
    server: Server,
    selected: PathBuf,
    other: PathBuf,
}

impl AtExec {
    fn new(machine: &Machine) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let server = Server::start(&far, &format!("{FAR}:8080"))?;
        let build = |name| first::build(machine.directory(), name, v4(server.address)?);
        let (selected, other) = (build("first-selected")?, build("bare")?);
        let mut agent = Agent::new(machine, None)?;
        let policy = format!(
            "{KIND}\nmetadata: {{ name: web }}\nspec:\n  \
             select: {{ runtimes: [process], executables: [\"{}\"] }}\n  \
             companions: [{{ name: relay, builtin: relay, stopGrace: 1s }}]\n  \
             redirect: {{ outbound: [{{ to: relay }}] }}\n  onFailure: closed\n",
            selected.display()
        );
        agent.policy("web.yaml", &policy)?;
        agent.run()?;
        wait_until("programs held at their exec", RECORDS, || {
            agent.log().is_ok_and(|log| log.contains("held at their exec"))
        })?;
        Ok(Self { watched: Watched::new(&agent)?, agent, near, _far: far, server, selected, other })
    }
}

impl Place for AtExec {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let program = if matched { &self.selected } else { &self.other };
        let done = self.near.run(|| ProcessGuard::finish(name, &mut Command::new(program), DEADLINE))?;
        answered(done)
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        Watched::captured(&self.agent, self.server.address, expected)
    }

    fn held(&self) -> Result<Vec<f64>> {
        self.watched.held()
    }
}
