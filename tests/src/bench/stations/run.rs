//! `pillion run`: no agent is asked.

use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::Result;

use super::{super::gate::Server, DEADLINE, Place, answered, v4};
use crate::{
    Machine, NetNs, ProcessGuard, first,
    run::{self, records},
    scene::{FAR, KIND},
};

/// `pillion run`.
pub(super) struct Run {
    near: NetNs,
    _far: NetNs,
    server: Server,
    program: PathBuf,
    policy: PathBuf,
    relayed: AtomicUsize,
}

impl Run {
    pub(super) fn new(machine: &Machine) -> Result<Self> {
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
