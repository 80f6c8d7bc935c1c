//! The token that a companion is ready: what redirection demands before it sends a socket anywhere.

use std::os::fd::OwnedFd;

use crate::{Cgroup, CompanionName, ProcessId, Protocol};

/// A companion whose readiness probe has passed, with the listening sockets that were found then.
///
/// Only the companion crate's readiness check makes one (`cargo xtask tidy` enforces it), so that redirecting to a
/// companion that never answered cannot be written.
#[derive(Debug)]
pub struct ReadyCompanion {
    name: CompanionName,
    process: ProcessId,
    cgroup: Cgroup,
    listeners: Vec<Listener>,
}

impl ReadyCompanion {
    /// To be called by the readiness check alone, after its probe has passed.
    pub fn probe_passed(
        name: CompanionName,
        process: ProcessId,
        cgroup: Cgroup,
        listeners: Vec<Listener>,
    ) -> Self {
        Self { name, process, cgroup, listeners }
    }

    /// Its name in the plan.
    pub fn name(&self) -> &CompanionName {
        &self.name
    }

    /// Its first process.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// The cgroup it runs in.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The listening sockets it had when the probe passed.
    pub fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// The socket on `port` for `protocol` and `family`: loopback or wildcard. A dual-stack `[::]` socket serves both.
    pub fn listener(&self, port: u16, protocol: Protocol, family: Family) -> Option<&Listener> {
        let serves = |it: &&Listener| it.family == family || it.family == Family::Dual;
        self.listeners.iter().filter(|it| (it.port, it.protocol) == (port, protocol)).find(serves)
    }
}

/// A listening TCP socket of a companion, or a UDP socket without a peer, duplicated from it (`pidfd_getfd`, Linux 5.6).
#[derive(Debug)]
pub struct Listener {
    /// What it takes.
    pub protocol: Protocol,
    /// Port, host byte order.
    pub port: u16,
    /// Which connections it accepts.
    pub family: Family,
    /// The socket itself. It lives in the workload's network namespace.
    pub socket: OwnedFd,
}

/// Which connections a listening socket accepts on loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// `127.0.0.1` or `0.0.0.0`.
    V4,
    /// `::1`, or `::` with `IPV6_V6ONLY`.
    V6,
    /// `::` without `IPV6_V6ONLY`.
    Dual,
}
