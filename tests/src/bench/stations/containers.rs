//! Containers of containerd 1.6 with runc, by `ctr`, held by the wrapper or the hook.

use anyhow::Result;

use super::{
    super::gate::Server,
    Place, Watched, answered,
    companions::{Beside, Companion},
    source, v4,
};
use crate::{
    Agent, Containerd, Hooks, Machine, NetNs, Way,
    containerd::Container,
    hooked::FIRST,
    scene::{FAR, id},
};

/// containerd with runc, by the wrapper or the hook.
pub(super) struct InContainerd {
    watched: Watched,
    agent: Agent,
    containerd: Containerd,
    hooks: Hooks,
    way: Way,
    companion: Companion,
    near: NetNs,
    _far: NetNs,
    server: Server,
}

impl InContainerd {
    pub(super) fn new(machine: &Machine, way: Way, beside: Beside) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let server = Server::start(&far, &format!("{FAR}:8080"))?;
        let mut agent = Agent::at(machine, Some(&Containerd::socket_of(machine)))?;
        let containerd = Containerd::start_with(machine, agent.environment())?;
        let companion = Companion::new(machine, beside)?;
        agent.policy("web.yaml", &companion.policy("runtimes: [containerd], labels: { app: web }"))?;
        agent.run()?;
        agent.until_status("containerd", |status| source(status, "containerd") == "up")?;
        let hooks = Hooks::new(machine, &agent, v4(server.address)?)?;
        Ok(Self {
            watched: Watched::new(&agent)?,
            agent,
            containerd,
            hooks,
            way,
            companion,
            near,
            _far: far,
            server,
        })
    }
}

impl Place for InContainerd {
    fn server(&self) -> &Server {
        &self.server
    }

    fn before(&self) -> Result<()> {
        self.companion.prepare()
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let labels: &[(&str, &str)] = if matched { &[("app", "web")] } else { &[] };
        let container = Container { id: name, labels, netns: Some(&self.near), command: &[FIRST] };
        let way = if matched { self.way } else { Way::Bare };
        answered(self.hooks.finish(way, &self.containerd, &container)?)?;
        if matched {
            self.agent.until_forgotten(&id(name))?;
        }
        Ok(())
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        self.companion.captured(&self.agent, self.server.address, expected)
    }

    fn held(&self) -> Result<Vec<f64>> {
        self.watched.held()
    }
}
