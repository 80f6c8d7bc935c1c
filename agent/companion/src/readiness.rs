//! Whether a companion is ready: its probe passes and it listens on every port that redirection sends to it.
//!
//! Asked from within the workload's network namespace. Without a probe in the plan, listening is all that is asked:
//! the kernel completes handshakes for a listening socket, and no strange connection appears in the companion's log.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use pillion_workload::{Protocol, ReadyCompanion};
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    cgroup::CgroupGuard,
    error::CompanionError,
    listeners::{Look, look},
    outside::{self, Owner},
    probe::Prober,
    process::{Ending, Process},
};

const FIRST_DELAY: Duration = Duration::from_millis(1);
const LONGEST_DELAY: Duration = Duration::from_millis(100);
/// An attempt that hangs is given up after this time and made again.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(2);
/// Looks in a row that must find somebody else on a port, so that a socket on its way between two processes of the
/// companion is not taken for a stranger's.
const FOREIGN_LOOKS: u32 = 3;

/// A companion whose program runs, and all that is needed to ask whether it is ready.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) prober: Prober<'a>,
    pub(crate) cgroup: &'a CgroupGuard,
    pub(crate) process: &'a Process,
}

impl Candidate<'_> {
    /// Asks until it is ready, its process ends or `deadline` is reached.
    pub(crate) async fn ready(&self, deadline: Instant) -> Result<ReadyCompanion, CompanionError> {
        let oom_kills = self.cgroup.oom_kills();
        tokio::select! {
            ending = self.process.ended() => Err(self.ended_early(ending?, oom_kills).await),
            outcome = self.ask_until(deadline) => outcome,
        }
    }

    /// A port that somebody else has is the likely cause, and a better thing to say than an exit code.
    async fn ended_early(&self, status: Ending, oom_kills: Option<u64>) -> CompanionError {
        match self.look(Instant::now() + LONGEST_DELAY).await {
            Ok(Look { foreign, .. }) if !foreign.is_empty() => {
                CompanionError::PortTaken { port: foreign.first().map_or(0, |(port, _)| *port) }
            }
            Ok(_) | Err(_) => CompanionError::EndedEarly { status, oom: self.cgroup.oom_kills() > oom_kills },
        }
    }

    async fn ask_until(&self, deadline: Instant) -> Result<ReadyCompanion, CompanionError> {
        let mut delay = FIRST_DELAY;
        let mut probe_passed = self.prober.launch.spec.ready.probe.is_none();
        let mut foreign_looks = 0;
        loop {
            let last =
                if let Some(probe) = self.prober.launch.spec.ready.probe.as_ref().filter(|_| !probe_passed) {
                    let limit = deadline.min(Instant::now() + LONGEST_ATTEMPT);
                    match timeout_at(limit, self.prober.ask(probe, limit)).await {
                        Ok(Ok(())) => {
                            probe_passed = true;
                            // Straight on to the listeners.
                            continue;
                        }
                        Ok(Err(reason)) => reason,
                        Err(_) => "the probe got no answer in time".to_owned(),
                    }
                } else {
                    let look = self.look(deadline).await?;
                    foreign_looks = if look.foreign.is_empty() { 0 } else { foreign_looks + 1 };
                    match (look.missing.first(), look.foreign.first()) {
                        // A look is not one moment: sockets of a port that were made during it may be missed. A second one
                        // sees them, as the relay's for IPv6, which it makes right after that for IPv4.
                        (None, _) => {
                            let again = self.look(deadline).await?;
                            return Ok(self.token(if again.missing.is_empty() { again } else { look }));
                        }
                        (_, Some((port, _))) if foreign_looks >= FOREIGN_LOOKS => {
                            return Err(CompanionError::PortTaken { port: *port });
                        }
                        (Some(_), _) => {
                            format!(
                                "it does not listen for IPv4 on port {} of loopback or of all addresses",
                                listed(&look.missing)
                            )
                        }
                    }
                };
            if Instant::now() + delay >= deadline {
                return Err(CompanionError::NotReady {
                    timeout: self.prober.launch.spec.ready.timeout,
                    last,
                });
            }
            sleep(delay).await;
            delay = (delay * 3 / 2).min(LONGEST_DELAY);
        }
    }

    async fn look(&self, deadline: Instant) -> Result<Look, CompanionError> {
        if self.prober.launch.ports.listening.is_empty() {
            return Ok(Look::default());
        }
        let ports = self.prober.launch.ports.listening.clone();
        let cgroup = self.cgroup.cgroup().path.clone();
        let deadline = deadline.into_std();
        let job = move || look(&ports, &cgroup, deadline);
        Ok(self.prober.netns.run("look for the companion's listening sockets", job).await?)
    }

    fn token(&self, look: Look) -> ReadyCompanion {
        ReadyCompanion::probe_passed(
            self.prober.launch.spec.name.clone(),
            self.process.id(),
            self.cgroup.cgroup().clone(),
            look.listeners,
        )
    }
}

/// A companion that somebody else runs, and all that is needed to find it and ask whether it is ready.
#[derive(Debug)]
pub(crate) struct Outsider<'a> {
    pub(crate) prober: Prober<'a>,
    pub(crate) owner: Arc<Owner>,
}

/// An outsider that is ready.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) ready: ReadyCompanion,
    pub(crate) process: Process,
    /// Of its listening sockets.
    pub(crate) inodes: BTreeSet<u64>,
}

impl Outsider<'_> {
    /// Looks for it until it is ready or `deadline` is reached.
    pub(crate) async fn ready(&self, deadline: Instant) -> Result<Found, CompanionError> {
        let launch = self.prober.launch;
        let mut delay = FIRST_DELAY;
        let mut probe_passed = launch.spec.ready.probe.is_none();
        let mut foreign_looks = 0;
        loop {
            let seen = self.look(deadline, foreign_looks + 1 >= FOREIGN_LOOKS).await?;
            foreign_looks = if seen.look.foreign.is_empty() { 0 } else { foreign_looks + 1 };
            let last = match (seen.outsider, launch.spec.ready.probe.as_ref().filter(|_| !probe_passed)) {
                (Some(_), Some(probe)) => {
                    let limit = deadline.min(Instant::now() + LONGEST_ATTEMPT);
                    match timeout_at(limit, self.prober.ask(probe, limit)).await {
                        Ok(Ok(())) => {
                            probe_passed = true;
                            // It is looked at again: what listened before need not be what has answered.
                            continue;
                        }
                        Ok(Err(reason)) => reason,
                        Err(_) => "the probe got no answer in time".to_owned(),
                    }
                }
                (Some(outsider), None) => {
                    self.suits(&outsider)?;
                    if let Some(process) = Process::open(outsider.process)? {
                        let ready = ReadyCompanion::probe_passed(
                            launch.spec.name.clone(),
                            outsider.process,
                            outsider.cgroup,
                            seen.look.listeners,
                        );
                        return Ok(Found { ready, process, inodes: seen.inodes });
                    }
                    "its process has just ended".to_owned()
                }
                (None, _) => match (seen.look.foreign.first(), seen.stranger) {
                    (Some((port, _)), Some(who)) if foreign_looks >= FOREIGN_LOOKS => {
                        return Err(CompanionError::Stranger { port: *port, who });
                    }
                    _ => {
                        format!(
                            "nothing that it is listens for IPv4 on port {} of loopback or of all addresses",
                            listed(&seen.look.missing)
                        )
                    }
                },
            };
            if Instant::now() + delay >= deadline {
                return Err(CompanionError::NotReady { timeout: launch.spec.ready.timeout, last });
            }
            sleep(delay).await;
            delay = (delay * 3 / 2).min(LONGEST_DELAY);
        }
    }

    /// Whether connections can be sent to it where it is.
    fn suits(&self, outsider: &outside::Outsider) -> Result<(), CompanionError> {
        let launch = self.prober.launch;
        if outsider.cgroup.path == self.prober.host.config().cgroups.unified() {
            return Err(CompanionError::InRootCgroup { pid: outsider.process.pid });
        }
        // Its own connections would come back to it. Accepting alone is no loop.
        if outsider.cgroup.id == launch.workload_cgroup
            && launch.ports.outbound.or(launch.ports.dns).is_some()
        {
            return Err(CompanionError::InWorkloadCgroup { pid: outsider.process.pid });
        }
        Ok(())
    }

    async fn look(&self, deadline: Instant, name_strangers: bool) -> Result<outside::Seen, CompanionError> {
        let ports = self.prober.launch.ports.listening.clone();
        let (owner, deadline) = (self.owner.clone(), deadline.into_std());
        let job = move || outside::look(&ports, &owner, name_strangers, deadline);
        Ok(self.prober.netns.run("look for the companion's listening sockets", job).await?)
    }
}

fn listed(ports: &BTreeSet<(u16, Protocol)>) -> String {
    let ports: Vec<_> =
        ports.iter().map(|(port, protocol)| format!("{port} ({})", protocol.as_str())).collect();
    ports.join(", ")
}
