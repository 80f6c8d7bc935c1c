//! Pods, made by CRI as the kubelet makes them.

use std::{
    net::{SocketAddr, SocketAddrV4},
    path::PathBuf,
};

use anyhow::{Result, ensure};

use super::{super::gate::Server, Place, Watched, source};
use crate::{
    Agent, Lab, Machine, PodSpec, Pods, first,
    pods::{GATEWAY, PROGRAM, WRAPPED},
    scene::web,
};

/// By what pods are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// containerd's own.
    Nri,
    /// The runtime class `wrapped`, which pods without Pillion do not have.
    Wrapper,
}

/// Each start is a pod's first container, as an init container is: its first instruction connects. The time is from the pod's
/// creation, whose network and sandbox are the larger part of it.
pub(super) struct InPods {
    watched: Watched,
    agent: Agent,
    server: Server,
    pods: Pods,
    gate: Gate,
    program: PathBuf,
    _lab: Lab,
}

impl InPods {
    /// containerd of this Debian suite, with NRI.
    pub(super) fn nri(machine: &Machine, version: &'static str) -> Result<Self> {
        let lab = Lab::up("containerd", Some(version), &[])?;
        let agent = Agent::beside(machine, lab.value("CONTAINERD_ADDRESS")?, lab.value("NRI_SOCKET")?)?;
        Self::with(machine, lab, agent, Gate::Nri)
    }

    /// containerd 1.6, which has no NRI.
    pub(super) fn wrapper(machine: &Machine) -> Result<Self> {
        let mut agent = Agent::new(machine, None)?;
        let lab = Lab::wrapped_containerd(machine, "bookworm", &agent)?;
        agent.serve(lab.value("CONTAINERD_ADDRESS")?, "none");
        Self::with(machine, lab, agent, Gate::Wrapper)
    }

    fn with(machine: &Machine, lab: Lab, mut agent: Agent, gate: Gate) -> Result<Self> {
        let pods = Pods::of(&lab)?;
        let server = Server::start(&pods.netns()?, "0.0.0.0:8080")?;
        let to = SocketAddrV4::new(GATEWAY.parse()?, server.address.port());
        let program = first::build(machine.directory(), "first", to)?;
        agent.policy("web.yaml", &web("closed", ""))?;
        agent.run()?;
        let sources: &[&str] = if gate == Gate::Nri { &["nri", "containerd"] } else { &["containerd"] };
        for name in sources {
            agent.until_status(name, |status| source(status, name) == "up")?;
        }
        Ok(Self { watched: Watched::new(&agent)?, agent, server, pods, gate, program, _lab: lab })
    }
}

impl Place for InPods {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let labels: &[(&str, &str)] = if matched { &[("app", "web")] } else { &[] };
        let runtime = if matched && self.gate == Gate::Wrapper { WRAPPED } else { "" };
        let program = Some(self.program.as_path());
        let pod = self.pods.run(&PodSpec { name, labels, runtime, program, ..PodSpec::default() })?;
        let container = pod.run("init", &[PROGRAM])?;
        let code = pod.exit_code(&container)?;
        ensure!(code == first::exit::ANSWERED, "{name} ended with {code}");
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
