//! A companion's listening sockets, fetched from its process as the agent does: for tests that drive the data plane
//! itself, without an agent.

use std::{fs, net::SocketAddr, os::fd::OwnedFd};

use anyhow::{Context as _, Result};
use pillion_workload::{
    Cgroup, CgroupId, CompanionName, Family, Listener, Pid, ProcessId, Protocol, ReadyCompanion, StartTime,
};
use rustix::{
    net::{AddressFamily, SocketType, sockopt},
    process::{Pid as RawPid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use crate::CgroupGuard;

/// The process `pid`, in `cgroup`, as a ready companion with all its listeners.
pub fn ready(name: CompanionName, pid: u32, cgroup: &CgroupGuard) -> Result<ReadyCompanion> {
    let raw = i32::try_from(pid)?;
    let pidfd = pidfd_open(RawPid::from_raw(raw).context("a pid")?, PidfdFlags::empty())?;
    let mut listeners = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let number = entry?.file_name().to_string_lossy().parse()?;
        let socket: OwnedFd = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?;
        let protocol = match sockopt::socket_type(&socket) {
            Ok(SocketType::STREAM) if sockopt::socket_acceptconn(&socket)? => Protocol::Tcp,
            Ok(SocketType::DGRAM) if sockopt::socket_domain(&socket)? != AddressFamily::UNIX => Protocol::Udp,
            Ok(_) | Err(_) => continue,
        };
        let local: SocketAddr = rustix::net::getsockname(&socket)?.try_into()?;
        let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
        listeners.push(Listener { protocol, port: local.port(), family, socket });
    }
    let process = ProcessId { pid: Pid(raw), started: StartTime(0) };
    Ok(ReadyCompanion::probe_passed(name, process, identity(cgroup)?, listeners))
}

/// A cgroup as the agent names it.
pub fn identity(cgroup: &CgroupGuard) -> Result<Cgroup> {
    Ok(Cgroup { id: CgroupId(cgroup.id()?), path: cgroup.path().to_owned() })
}
