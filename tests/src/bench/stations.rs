//! How a workload whose first instruction connects is started at each gate, with Pillion and without.
//!
//! Owns the table of gates. Each kind of place has a file in `stations`.

mod companions;
mod containers;
mod engines;
mod exec;
mod pods;
mod run;
mod units;
mod vm;

use std::{
    net::{SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use companions::Beside;

use super::gate::Server;
use crate::{Agent, Finished, Machine, ProcessGuard, first, hooked, wait_until};

/// What one start may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// A relay writes its record when the connection has ended.
const RECORDS: Duration = Duration::from_secs(20);

/// A gate.
pub(super) struct Station {
    pub(super) name: &'static str,
    /// How many starts are enough.
    pub(super) starts: u32,
    pub(super) way: Way,
}

/// By which way it is measured.
pub(super) enum Way {
    /// One start after the other, with Pillion and without taking turns.
    Here(fn(&Machine) -> Result<Box<dyn Place>>),
    /// So many starts elsewhere, at several gates.
    Elsewhere(fn(&Machine, u32) -> Result<Vec<Told>>),
}

/// What is told of a gate elsewhere.
pub(super) struct Told {
    pub(super) gate: &'static str,
    pub(super) starts: u32,
    /// How many of the connections went through a companion.
    pub(super) captured: usize,
    /// As [`Place::held`].
    pub(super) held: Vec<f64>,
}

/// Where workloads are started.
pub(super) trait Place {
    /// What they dial.
    fn server(&self) -> &Server;

    /// What has to be so before a start, and is no part of it.
    fn before(&self) -> Result<()> {
        Ok(())
    }

    /// Runs one to its end; an error unless it was answered.
    fn start(&self, name: &str, matched: bool) -> Result<()>;

    /// How many of the connections went through a companion, of `expected`.
    fn captured(&self, expected: usize) -> Result<usize>;

    /// What the agent let the gate wait, in milliseconds, for each that it held.
    fn held(&self) -> Result<Vec<f64>>;

    /// Takes away what dropping it would not.
    fn end(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

pub(super) const STATIONS: &[Station] = &[
    Station { name: "run", starts: 2000, way: Way::Here(|machine| Ok(Box::new(run::Run::new(machine)?))) },
    Station {
        name: "wrapper containerd 1.6",
        starts: 500,
        way: Way::Here(|machine| {
            Ok(Box::new(containers::InContainerd::new(machine, hooked::Way::Wrapper, Beside::Relay)?))
        }),
    },
    Station {
        name: "hook containerd 1.6",
        starts: 500,
        way: Way::Here(|machine| {
            Ok(Box::new(containers::InContainerd::new(machine, hooked::Way::Hook, Beside::Relay)?))
        }),
    },
    Station {
        name: "wrapper CRI containerd 1.6",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(pods::InPods::wrapper(machine)?))),
    },
    Station {
        name: "wrapper docker 20.10",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(engines::InEngine::docker(machine, "bookworm")?))),
    },
    Station {
        name: "wrapper docker 28",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(engines::InEngine::docker(machine, "sid")?))),
    },
    Station {
        name: "hook podman 4.3",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(engines::InEngine::podman(machine)?))),
    },
    Station {
        name: "exec",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(exec::AtExec::new(machine, Beside::Relay)?))),
    },
    Station {
        name: "nri containerd 1.7",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(pods::InPods::nri(machine, "trixie")?))),
    },
    Station {
        name: "nri containerd 2",
        starts: 500,
        way: Way::Here(|machine| Ok(Box::new(pods::InPods::nri(machine, "sid")?))),
    },
    Station {
        name: "systemd unit",
        starts: 50,
        way: Way::Here(|machine| Ok(Box::new(units::Units::new(machine)?))),
    },
    Station { name: "vm", starts: 50, way: Way::Elsewhere(vm::measure) },
    // Other companions than the relay.
    Station {
        name: "exec, warm HAProxy",
        starts: 100,
        way: Way::Here(|machine| Ok(Box::new(exec::AtExec::new(machine, Beside::WarmHaproxy)?))),
    },
    Station {
        name: "exec, cold Envoy",
        starts: 30,
        way: Way::Here(|machine| Ok(Box::new(exec::AtExec::new(machine, Beside::ColdEnvoy)?))),
    },
    Station {
        name: "wrapper containerd 1.6, warm HAProxy",
        starts: 100,
        way: Way::Here(|machine| {
            Ok(Box::new(containers::InContainerd::new(machine, hooked::Way::Wrapper, Beside::WarmHaproxy)?))
        }),
    },
    Station {
        name: "wrapper containerd 1.6, cold Envoy",
        starts: 30,
        way: Way::Here(|machine| {
            Ok(Box::new(containers::InContainerd::new(machine, hooked::Way::Wrapper, Beside::ColdEnvoy)?))
        }),
    },
];

/// The state of an agent's source, by its status.
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
        held(&self.events.stdout()?, |_| true)
    }
}

/// What the gates waited, in milliseconds, by what `pillion events --output json` has printed of events that `fit`.
fn held(events: &str, fits: impl Fn(&serde_json::Value) -> bool) -> Result<Vec<f64>> {
    let mut held = Vec::new();
    for line in events.lines().filter(|line| line.contains("heldMicros")) {
        let event: serde_json::Value = serde_json::from_str(line).context("an event is JSON")?;
        if event["kind"] == "admitted" && fits(&event) {
            held.push(event["heldMicros"].as_f64().context("a number")? / 1000.0);
        }
    }
    Ok(held)
}
