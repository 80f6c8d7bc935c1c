//! Pods, made by CRI as the kubelet makes them.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::{super::gate::Server, Place, Watched, source};
use crate::{Agent, Lab, Machine, PodSpec, Pods, pods::GATEWAY, scene::web};

/// Pods by CRI, held by NRI. Each start is a pod's first container, whose program connects; the time is from the pod's
/// creation, whose network and sandbox are the larger part of it.
pub(super) struct InPods {
    watched: Watched,
    agent: Agent,
    server: Server,
    pods: Pods,
    _lab: Lab,
}

impl InPods {
    pub(super) fn new(machine: &Machine, version: &'static str) -> Result<Self> {
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
