//! What stands beside the workloads of a station: the relay, or an unmodified proxy by the documented example for it.
//!
//! Owns their policies, and whether a program is in memory before a start.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Advice, fadvise};

use super::Watched;
use crate::{Agent, Machine, ProcessGuard, programs, run, scene::KIND, wait_until};

/// Processes of the workload before have the program mapped, which keeps it in memory.
const COLD: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_secs(10);

/// The kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    /// Of the agent's own program.
    Relay,
    /// HAProxy, whose program every start finds in memory.
    WarmHaproxy,
    /// Envoy, whose program every start has to read from the disk.
    ColdEnvoy,
}

/// One of them, in place.
#[derive(Debug)]
pub(super) struct Companion {
    /// What follows `select` in the policy.
    rest: String,
    beside: Beside,
    /// Of a cold one.
    program: Option<PathBuf>,
}

impl Companion {
    pub(super) fn new(machine: &Machine, beside: Beside) -> Result<Self> {
        let example = |name, template, installed, program: &_| -> Result<String> {
            let policy = fs::read_to_string(run::example(machine, name, template, (installed, program))?)?;
            let from = policy.find("  companions:").with_context(|| format!("the policy of {name}"))?;
            Ok(policy[from..].to_owned())
        };
        let (rest, program) = match beside {
            Beside::Relay => {
                let rest = "  companions: [{ name: relay, builtin: relay, stopGrace: 1s }]\n  \
                            redirect: { outbound: [{ to: relay }] }\n  onFailure: closed\n";
                (rest.to_owned(), None)
            }
            Beside::WarmHaproxy => {
                let program = programs::system("haproxy")?;
                (example("haproxy", "haproxy.cfg", "/usr/sbin/haproxy", &program)?, None)
            }
            Beside::ColdEnvoy => {
                // A copy: what others have open or mapped stays in memory.
                let program = machine.directory().join("envoy");
                fs::copy(programs::envoy()?, &program).context("cannot copy Envoy")?;
                // Only what is on the disk can be dropped from memory.
                File::open(&program)?.sync_all()?;
                (example("envoy", "envoy.yaml", "/usr/bin/envoy", &program)?, Some(program))
            }
        };
        Ok(Self { rest, beside, program })
    }

    /// The policy by which what `select` selects gets it. It fails closed.
    pub(super) fn policy(&self, select: &str) -> String {
        format!("{KIND}\nmetadata: {{ name: web }}\nspec:\n  select: {{ {select} }}\n{}", self.rest)
    }

    /// Brings the program into the state in which a start is to find it. Nothing of it may be running.
    pub(super) fn prepare(&self) -> Result<()> {
        let Some(program) = &self.program else { return Ok(()) };
        let file = File::open(program)?;
        let mut resident = 0;
        let cold = wait_until("a program that is not in memory", COLD, || {
            fadvise(&file, 0, None, Advice::DontNeed).is_ok()
                && self.resident().is_ok_and(|bytes| {
                    resident = bytes;
                    bytes == 0
                })
        });
        cold.with_context(|| format!("{resident} bytes of {} are", program.display()))
    }

    /// How much of the program is in memory.
    fn resident(&self) -> Result<u64> {
        let program = self.program.as_ref().context("it is a cold one")?;
        let mut command = Command::new(programs::system("fincore")?);
        command.args(["--bytes", "--noheadings", "--output", "RES"]).arg(program);
        let done = ProcessGuard::finish("fincore", &mut command, LOOK)?.success()?;
        done.stdout.trim().parse().with_context(|| format!("fincore printed {}", done.stdout))
    }

    /// How many connections to `server` went through it, of `expected`.
    pub(super) fn captured(&self, agent: &Agent, server: SocketAddr, expected: usize) -> Result<usize> {
        if self.beside == Beside::Relay {
            return Watched::captured(agent, server, expected);
        }
        // It keeps no record of each. The kernel counts what it sends to a companion, and a closed policy lets nothing else
        // pass; each was answered by the server.
        let redirected = usize::try_from(agent.counter("outboundRedirected")?)?;
        ensure!(redirected <= expected, "{redirected} connections were redirected, of {expected}");
        Ok(redirected)
    }
}
