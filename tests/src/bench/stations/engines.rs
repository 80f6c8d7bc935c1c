//! Containers of Docker and Podman, with the hooks that `pillion install-hooks` has put into them.

use std::{
    net::{SocketAddr, SocketAddrV4},
    path::PathBuf,
};

use anyhow::Result;

use super::{super::gate::Server, Place, Watched, answered};
use crate::{Engine, Machine, engines, first};

/// Docker or Podman, with the hooks that `pillion install-hooks` has put into it.
pub(super) struct InEngine {
    watched: Watched,
    engine: Engine,
    server: Server,
    program: PathBuf,
    /// By which a container comes to the gate. Without them it does not, but Podman asks its hooks about every container.
    gated: &'static [&'static str],
}

impl InEngine {
    pub(super) fn docker(machine: &Machine, version: &'static str) -> Result<Self> {
        Self::with(machine, Engine::docker(machine, version)?, "docker", &["--runtime", "pillion"])
    }

    pub(super) fn podman(machine: &Machine) -> Result<Self> {
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
