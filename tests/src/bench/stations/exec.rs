//! Processes of the host, held at their exec.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use super::{
    super::gate::Server,
    DEADLINE, Place, RECORDS, Watched, answered,
    companions::{Beside, Companion},
    v4,
};
use crate::{Agent, Machine, NetNs, ProcessGuard, first, scene::FAR, wait_until};

/// A process of the host, held at its exec.
pub(super) struct AtExec {
    watched: Watched,
    agent: Agent,
    near: NetNs,
    _far: NetNs,
    server: Server,
    companion: Companion,
    selected: PathBuf,
    other: PathBuf,
}

impl AtExec {
    pub(super) fn new(machine: &Machine, beside: Beside) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let server = Server::start(&far, &format!("{FAR}:8080"))?;
        let build = |name| first::build(machine.directory(), name, v4(server.address)?);
        let (selected, other) = (build("first-selected")?, build("bare")?);
        let mut agent = Agent::new(machine, None)?;
        let companion = Companion::new(machine, beside)?;
        let select = format!("runtimes: [process], executables: [\"{}\"]", selected.display());
        agent.policy("web.yaml", &companion.policy(&select))?;
        agent.run()?;
        wait_until("programs held at their exec", RECORDS, || {
            agent.log().is_ok_and(|log| log.contains("held at their exec"))
        })?;
        Ok(Self {
            watched: Watched::new(&agent)?,
            agent,
            near,
            _far: far,
            server,
            companion,
            selected,
            other,
        })
    }
}

impl Place for AtExec {
    fn server(&self) -> &Server {
        &self.server
    }

    /// What was started before has gone, with its companions.
    fn before(&self) -> Result<()> {
        wait_until("an agent without workloads", DEADLINE, || {
            self.agent
                .json(&["list"])
                .is_ok_and(|list| list["workloads"].as_array().is_some_and(Vec::is_empty))
        })?;
        self.companion.prepare()
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let program = if matched { &self.selected } else { &self.other };
        let done = self.near.run(|| ProcessGuard::finish(name, &mut Command::new(program), DEADLINE))?;
        answered(done)
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        self.companion.captured(&self.agent, self.server.address, expected)
    }

    fn held(&self) -> Result<Vec<f64>> {
        self.watched.held()
    }
}
