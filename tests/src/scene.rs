//! An agent, a real containerd, and a namespace for containers on a cable to an echo server: what the suites about containers
//! play in. And [`Load`]: connections without a pause, none of which may fail.

use std::{
    fs,
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    Agent, Containerd, EchoServer, Machine, NetNs, Puppet, cgroup,
    containerd::Container,
    image, programs,
    puppet::{Domain, Socket},
    wait_until,
};

const SOON: Duration = Duration::from_secs(30);
/// The address of containers.
pub const NEAR: &str = "10.77.0.1";
/// The address of the echo server.
pub const FAR: &str = "10.77.0.2";
/// The beginning of every policy.
pub const KIND: &str = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy";

/// containerd, an agent that does not run yet, and a namespace for containers, on a cable to an echo server.
#[derive(Debug)]
pub struct Scene {
    /// With its own directories; see [`Scene::new`].
    pub agent: Agent,
    /// With the test image.
    pub containerd: Containerd,
    /// At [`FAR`], port 8080.
    pub echo: EchoServer,
    /// Where containers are.
    pub near: NetNs,
    /// Where the echo server is.
    pub far: NetNs,
}

/// A container's id as the agent has it.
pub fn id(name: &str) -> String {
    format!("containerd/pillion-test/{name}")
}

/// Containers with the label `app=web` get a relay.
pub fn web(on_failure: &str, exclude: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: web }}\nspec:\n  \
         select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
         companions: [{{ name: relay, builtin: relay, stopGrace: 2s }}]\n  \
         redirect: {{ outbound: [{{ to: relay{exclude} }}] }}\n  onFailure: {on_failure}\n"
    )
}

impl Scene {
    /// Everything but the agent runs.
    pub fn new(machine: &Machine) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let echo = EchoServer::start(&far, &format!("{FAR}:8080"))?;
        let agent = Agent::at(machine, Some(&Containerd::socket_of(machine)))?;
        let containerd = Containerd::start_with(machine, agent.environment())?;
        Ok(Self { agent, containerd, echo, near, far })
    }

    /// The same with a running agent that has the policy `web`, failing closed.
    pub fn with_agent(machine: &Machine) -> Result<Self> {
        let mut scene = Self::new(machine)?;
        scene.agent.policy("web.yaml", &web("closed", ""))?;
        scene.agent.run()?;
        scene.agent.until_status("containerd", source_is("up"))?;
        Ok(scene)
    }

    /// A container that is a puppet.
    pub fn puppet(&self, name: &str, labels: &[(&str, &str)]) -> Result<Puppet> {
        self.puppet_in(name, labels, &self.near)
    }

    /// A container that is a puppet, in another namespace.
    pub fn puppet_in(&self, name: &str, labels: &[(&str, &str)], netns: &NetNs) -> Result<Puppet> {
        Puppet::under(&mut self.containerd.run_attached(&Container {
            id: name,
            labels,
            netns: Some(netns),
            command: &[image::PUPPET],
        })?)
    }

    /// A container with the label `app=web`, attached.
    pub fn web(&self, name: &str) -> Result<Puppet> {
        let puppet = self.puppet(name, &[("app", "web")])?;
        self.agent.until_verdict(&id(name), "attached")?;
        Ok(puppet)
    }

    /// Another process in a running container.
    pub fn another(&self, name: &str) -> Result<Puppet> {
        let mut command = self.containerd.ctr_command()?;
        Puppet::under(command.args(["task", "exec", "--exec-id", "another", name, image::PUPPET]))
    }

    /// A process of the test's in a container's cgroup and namespace, which containerd knows nothing of.
    pub fn insider(&self, name: &str) -> Result<Puppet> {
        let pid = self.containerd.pid(name)?;
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("a cgroup2 path")?;
        let procs = cgroup::cgroup2_mount()?.join(path).join("cgroup.procs");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo $$ >$0 && exec $1"]).arg(procs).arg(programs::puppet()?);
        self.near.run(|| Puppet::under(&mut command))
    }

    /// Says something to the echo server and demands that it went through the relay, and not otherwise.
    pub fn says_through_relay(&self, puppet: &mut Puppet) -> Result<()> {
        let before = self.redirected()?;
        let said = puppet.converse(self.echo.address(), "through")?;
        let status = || self.agent.status().map(|status| status.to_string());
        ensure!(said == Ok("through".to_owned()), "{said:?} instead of an answer: {}", status()?);
        assert_eq!(self.redirected()?, before + 1, "a connection that was not redirected");
        Ok(())
    }

    /// Says something to the echo server and demands that it was not redirected.
    pub fn says_directly(&self, puppet: &mut Puppet) -> Result<()> {
        let before = self.redirected()?;
        assert_eq!(puppet.converse(self.echo.address(), "directly")?, Ok("directly".to_owned()));
        assert_eq!(self.redirected()?, before, "a connection that was redirected");
        Ok(())
    }

    /// How many connections the kernel has redirected.
    pub fn redirected(&self) -> Result<u64> {
        self.agent.counter("outboundRedirected")
    }

    /// The latest events of a container, by kind, oldest first.
    pub fn kinds_of_events(&self, name: &str) -> Result<Vec<String>> {
        let detail = self.agent.workload(&id(name))?.context("the workload is known")?;
        let events = detail["events"].as_array().context("events")?;
        Ok(events.iter().map(|event| event["kind"].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// Ends all of it; the agent must leave nothing.
    pub fn end(self) -> Result<()> {
        let Self { agent, containerd, .. } = self;
        agent.end()?;
        drop(containerd);
        Ok(())
    }
}

/// Whether a status has its source in this state.
pub fn source_is(state: &str) -> impl Fn(&Value) -> bool {
    move |status| status["sources"][0]["state"] == state
}

/// The pid of a workload's first companion.
pub fn companion_pid(workload: &Value) -> Result<i64> {
    workload["companions"][0]["pid"].as_i64().with_context(|| format!("no companion in {workload}"))
}

/// A new connection.
pub fn connected(puppet: &mut Puppet, to: SocketAddr) -> Result<Socket> {
    let socket = puppet.socket(Domain::of(to))??;
    puppet.connect(socket, to)??;
    Ok(socket)
}

/// Sends and receives over a connection that was made earlier.
pub fn still_answers(puppet: &mut Puppet, socket: Socket, text: &str) -> Result<()> {
    puppet.send(socket, text)?.with_context(|| format!("sending {text:?}"))?;
    assert_eq!(puppet.receive(socket)?, Ok(text.to_owned()), "an open connection");
    Ok(())
}

/// Connections of a puppet, one after the other without a pause, until it is ended.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU32>,
    worker: JoinHandle<Result<Vec<String>>>,
}

impl Load {
    const BATCH: u32 = 20;

    /// Begins.
    pub fn start(mut puppet: Puppet, to: SocketAddr) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let worker = thread::spawn({
            let (stop, made) = (stop.clone(), made.clone());
            move || {
                let mut faults = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let done = puppet.exchange(to, Self::BATCH, 2_000)??;
                    made.fetch_add(Self::BATCH, Ordering::Relaxed);
                    faults.extend(done.faults);
                }
                Ok(faults)
            }
        });
        Self { stop, made, worker }
    }

    /// Returns when so many more connections have been made.
    pub fn goes_on(&self) -> Result<()> {
        let before = self.made.load(Ordering::Relaxed);
        wait_until("connections of the load", SOON, || {
            self.worker.is_finished() || self.made.load(Ordering::Relaxed) >= before + 5 * Self::BATCH
        })
    }

    /// Demands that none has failed; returns how many there were.
    pub fn end(self) -> Result<u32> {
        self.stop.store(true, Ordering::Relaxed);
        let faults = self.worker.join().expect("the worker does not panic")?;
        ensure!(faults.is_empty(), "connections failed: {faults:?}");
        Ok(self.made.load(Ordering::Relaxed))
    }
}
