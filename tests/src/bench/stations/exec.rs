//! Processes of the host, held at their exec.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use super::{super::gate::Server, DEADLINE, Place, RECORDS, Watched, answered, v4};
use crate::{
    Agent, Machine, NetNs, ProcessGuard, first,
    scene::{FAR, KIND},
    wait_until,
};

/// A process of the host, held at its exec.
pub(super) struct AtExec {
    watched: Watched,
    agent: Agent,
    near: NetNs,
    _far: NetNs,
    server: Server,
    selected: PathBuf,
    other: PathBuf,
}

impl AtExec {
    pub(super) fn new(machine: &Machine) -> Result<Self> {
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
