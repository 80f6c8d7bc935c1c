//! The listening sockets of a companion, and those that take datagrams: found by inode among its processes' descriptors and duplicated from there.
//!
//! A socket counts only when it listens in the workload's network namespace *and* a process of the companion's cgroup
//! holds it. Whatever the companion does meanwhile, what is handed out was checked after it was duplicated.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    path::Path,
    time::Instant,
};

use pillion_workload::{Family, Listener, Pid, Protocol};
use procfs::process::FDTarget;
use rustix::{
    net::{SocketType, getpeername, getsockname, sockopt},
    process::{PidfdGetfdFlags, pidfd_getfd},
};

use crate::{cgroup, netns::listening_sockets, process};

/// What a look has found.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// The companion's, on the ports that were asked for.
    pub(crate) listeners: Vec<Listener>,
    /// Ports on which the companion does not listen for IPv4.
    pub(crate) missing: BTreeSet<(u16, Protocol)>,
    /// Those of the missing ports on which somebody else does.
    pub(crate) foreign: BTreeSet<(u16, Protocol)>,
}

/// Looks for listeners on `ports`. Must run on a thread in the workload's network namespace; ends soon after
/// `deadline` however many descriptors the companion has opened.
pub(crate) fn look(ports: &BTreeSet<(u16, Protocol)>, cgroup: &Path, deadline: Instant) -> io::Result<Look> {
    let wanted = on(ports)?;
    let mut listeners = Vec::new();
    let mut inodes: BTreeSet<u64> = wanted.iter().map(|(inode, _)| *inode).collect();
    if !wanted.is_empty() {
        for pid in cgroup::pids_in(cgroup)? {
            if inodes.is_empty() || Instant::now() >= deadline {
                break;
            }
            // A process that has just ended holds no socket.
            let _ = take(pid, cgroup, &mut inodes, &mut listeners, deadline);
        }
    }
    // IPv6 alone is not enough: connections of both families are sent to a listener for IPv4 (v4-mapped), and one for
    // IPv6 beside it serves only sockets that cannot take that way.
    let found: BTreeSet<_> = listeners
        .iter()
        .filter(|listener: &&Listener| listener.family != Family::V6)
        .map(|listener| (listener.port, listener.protocol))
        .collect();
    let missing: BTreeSet<_> = ports.difference(&found).copied().collect();
    let of_others = |(inode, port): &(u64, (u16, Protocol))| inodes.contains(inode).then_some(*port);
    let foreign = wanted.iter().filter_map(of_others).filter(|port| missing.contains(port)).collect();
    Ok(Look { listeners, missing, foreign })
}

/// Inodes and ports of the sockets on `ports` that redirection can reach. Must run on a thread in the namespace.
pub(crate) fn on(ports: &BTreeSet<(u16, Protocol)>) -> io::Result<Vec<(u64, (u16, Protocol))>> {
    let mut found = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        if ports.iter().any(|(_, asked)| *asked == protocol) {
            let sockets = listening_sockets(protocol)?.into_iter();
            let ours = sockets.filter(|socket| {
                ports.contains(&(socket.port, protocol)) && family(socket.address, false).is_some()
            });
            found.extend(ours.map(|socket| (socket.inode, (socket.port, protocol))));
        }
    }
    Ok(found)
}

/// Duplicates those of `inodes` that the process holds and takes them off the list.
fn take(
    pid: Pid,
    cgroup: &Path,
    inodes: &mut BTreeSet<u64>,
    listeners: &mut Vec<Listener>,
    deadline: Instant,
) -> io::Result<()> {
    let Some(pidfd) = process::open(pid).map_err(io::Error::other)? else { return Ok(()) };
    let mut confirmed = false;
    for descriptor in process::descriptors(pid)? {
        if inodes.is_empty() || Instant::now() >= deadline {
            break;
        }
        let Ok(descriptor) = descriptor else { continue };
        let FDTarget::Socket(inode) = descriptor.target else { continue };
        if !inodes.contains(&inode) {
            continue;
        }
        // The pid was listed before the pidfd was opened; when it still is, both are of one process.
        if !confirmed && !cgroup::pids_in(cgroup)?.contains(&pid) {
            return Ok(());
        }
        confirmed = true;
        let socket = pidfd_getfd(&pidfd, descriptor.fd, PidfdGetfdFlags::empty())?;
        if let Some(listener) = examine(socket, inode)? {
            inodes.remove(&inode);
            listeners.push(listener);
        }
    }
    Ok(())
}

/// What the duplicate itself says: the descriptor may have become another's between the look and the duplication.
pub(crate) fn examine(socket: OwnedFd, inode: u64) -> io::Result<Option<Listener>> {
    if rustix::fs::fstat(&socket)?.st_ino != inode {
        return Ok(None);
    }
    let protocol = match sockopt::socket_type(&socket)? {
        SocketType::STREAM if sockopt::socket_acceptconn(&socket)? => Protocol::Tcp,
        SocketType::DGRAM if getpeername(&socket).is_err() => Protocol::Udp,
        _ => return Ok(None),
    };
    let Ok(address) = SocketAddr::try_from(getsockname(&socket)?) else { return Ok(None) };
    let only_v6 = address.is_ipv6() && sockopt::ipv6_v6only(&socket)?;
    Ok(family(address.ip(), only_v6).map(|family| Listener {
        protocol,
        port: address.port(),
        family,
        socket,
    }))
}

/// What a listener on this address accepts on loopback; `None` when redirection cannot reach it.
fn family(address: IpAddr, only_v6: bool) -> Option<Family> {
    match address {
        IpAddr::V4(Ipv4Addr::LOCALHOST | Ipv4Addr::UNSPECIFIED) => Some(Family::V4),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(Family::V6),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Some(if only_v6 { Family::V6 } else { Family::Dual }),
        IpAddr::V6(address) => address.to_ipv4_mapped().and_then(|mapped| family(mapped.into(), false)),
        IpAddr::V4(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn families_by_address() {
        let cases = [
            ("127.0.0.1", false, Some(Family::V4)),
            ("0.0.0.0", false, Some(Family::V4)),
            ("127.0.0.2", false, None),
            ("10.0.0.1", false, None),
            ("::1", false, Some(Family::V6)),
            ("::", true, Some(Family::V6)),
            ("::", false, Some(Family::Dual)),
            ("::ffff:127.0.0.1", false, Some(Family::V4)),
            ("::ffff:0.0.0.0", false, Some(Family::V4)),
            ("::ffff:10.0.0.1", false, None),
            ("fe80::1", true, None),
        ];
        for (address, only_v6, want) in cases {
            assert_eq!(family(address.parse().expect("valid"), only_v6), want, "{address} {only_v6}");
        }
    }

    #[test]
    fn a_duplicate_is_examined() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let port = listener.local_addr().expect("bound").port();
        let inode = rustix::fs::fstat(&listener).expect("open").st_ino;
        let duplicate = || OwnedFd::from(listener.try_clone().expect("descriptor"));
        let found = examine(duplicate(), inode).expect("a socket").expect("a listener");
        assert_eq!((found.port, found.protocol, found.family), (port, Protocol::Tcp, Family::V4));
        assert!(examine(duplicate(), inode + 1).expect("a socket").is_none(), "another inode");
        let connected =
            std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let inode = rustix::fs::fstat(&connected).expect("open").st_ino;
        assert!(examine(connected.into(), inode).expect("a socket").is_none(), "not listening");
        let datagrams = std::net::UdpSocket::bind("[::]:0").expect("any");
        let inode = rustix::fs::fstat(&datagrams).expect("open").st_ino;
        let duplicate = || OwnedFd::from(datagrams.try_clone().expect("descriptor"));
        let found = examine(duplicate(), inode).expect("a socket").expect("without a peer");
        assert_eq!((found.protocol, found.family), (Protocol::Udp, Family::Dual));
        datagrams.connect("[::1]:9").expect("loopback");
        assert!(examine(duplicate(), inode).expect("a socket").is_none(), "it has a peer");
    }
}
