//! The system calls on UDP sockets: listen, answer, dial, receive. Never keeps state, never decides where a datagram goes.
//!
//! A flow has a socket of its own on the listener's address and port, connected to the application, because only a connected
//! socket can be asked for the original destination. Two things keep it from receiving what is not its own:
//! - The listener is bound to the loopback device, which makes it the better match for everything that no connected
//!   socket matches.
//! - For IPv4 the flow's socket is an IPv6 one with mapped addresses: the kernel looks at those after the listener, which
//!   settles it for sockets that share a port (`SO_REUSEPORT`), while it looks at a new IPv4 one first.
//!
//! So between its bind and its connect a flow's socket receives nothing (Linux 6.18). The port is shared only with sockets of
//! the same user: `SO_REUSEADDR` would let anybody in.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use rustix::{
    io::{Errno, Result},
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, connect, recvfrom, socket_with, sockopt},
};
use socket2::SockRef;

use super::super::{
    origin::plain,
    socket::{Listener, errno},
};

/// The largest datagram of either family has less (RFC 768; jumbograms are not for loopback).
pub(super) const LARGEST: usize = 64 << 10;
/// Wanted for datagrams that wait; `net.core.rmem_max` may lower it.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Where the datagrams of all flows arrive that have no socket yet.
#[derive(Debug)]
pub(in super::super) struct DatagramListener {
    pub(super) socket: OwnedFd,
    pub(in super::super) address: SocketAddr,
}

impl DatagramListener {
    /// On the addresses and ports of `listeners`.
    ///
    /// # Errors
    /// The address that is taken, and why it cannot be had.
    pub(in super::super) fn beside<'a>(
        listeners: impl IntoIterator<Item = &'a Listener>,
    ) -> std::result::Result<Vec<Self>, (SocketAddr, Errno)> {
        let on = |listener: &Listener| Self::on(listener.address).map_err(|error| (listener.address, error));
        listeners.into_iter().map(on).collect()
    }

    fn on(address: SocketAddr) -> Result<Self> {
        let socket = shared_socket(address)?;
        bind(&socket, &address)?;
        // After the bind: sockets that share a port are one group only if they were bound on the same device.
        SockRef::from(&socket).bind_device(Some(b"lo")).map_err(|error| errno(&error))?;
        sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
        Ok(Self { socket, address })
    }

    /// Lets no further datagram in; what waits can still be read. Closing would not do, because the agent may hold a duplicate.
    /// Connected to itself it hears nobody, and whoever sends is told so (`ECONNREFUSED`).
    pub(super) fn end(&self) -> Result<()> {
        connect(&self.socket, &self.address)
    }
}

/// A socket on `listener` that receives only from `source`.
pub(super) fn answering(listener: SocketAddr, source: SocketAddr) -> Result<OwnedFd> {
    let bound = |own: SocketAddr| -> Result<OwnedFd> {
        let socket = shared_socket(own)?;
        bind(&socket, &own)?;
        Ok(socket)
    };
    match bound(mapped(listener)) {
        Ok(socket) => connect(&socket, &mapped(source)).map(|()| socket),
        // A kernel without IPv6. What arrives for others before the connect is passed to them by its source.
        Err(Errno::AFNOSUPPORT) if listener.is_ipv4() => {
            bound(listener).and_then(|socket| connect(&socket, &source).map(|()| socket))
        }
        Err(error) => Err(error),
    }
}

/// Makes a flow's socket receive nothing any more; what waits can still be read.
pub(super) fn retire(answering: BorrowedFd<'_>, listener: SocketAddr) -> Result<()> {
    connect(answering, &mapped(listener)).or_else(|_| connect(answering, &listener))
}

/// A socket connected to `destination`, from the address `from` if that is given.
pub(super) fn dial(destination: SocketAddr, from: Option<IpAddr>) -> Result<OwnedFd> {
    let socket = datagram_socket(destination)?;
    if let Some(from) = from {
        setsockopt(&socket, IpBindAddressNoPort, &true)
            .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
        bind(&socket, &SocketAddr::new(from, 0))?;
    }
    sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
    connect(&socket, &destination)?;
    Ok(socket)
}

/// Takes one datagram: its length and source.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<(usize, SocketAddr)> {
    let (_, length, source) = recvfrom(socket, into, RecvFlags::empty())?;
    let source = source.and_then(|source| SocketAddr::try_from(source).ok()).ok_or(Errno::AGAIN)?;
    Ok((length, plain(source)))
}

fn shared_socket(address: SocketAddr) -> Result<OwnedFd> {
    let socket = datagram_socket(address)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, !is_mapped(address.ip()))?;
    }
    Ok(socket)
}

fn datagram_socket(address: SocketAddr) -> Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, SocketType::DGRAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn is_mapped(address: IpAddr) -> bool {
    address != address.to_canonical()
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd as _};

    use super::*;

    fn listeners() -> Vec<DatagramListener> {
        let found = (0..50).find_map(|_| DatagramListener::beside(&Listener::on_free_port()).ok());
        found.expect("a port that is free")
    }

    fn application(to: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind((to.ip(), 0)).unwrap();
        socket.connect(to).unwrap();
        socket
    }

    fn waiting(socket: &OwnedFd) -> Vec<SocketAddr> {
        let mut buffer = [0; 16];
        std::iter::from_fn(|| receive(socket.as_fd(), &mut buffer).ok()).map(|(_, source)| source).collect()
    }

    #[test]
    fn a_flows_socket_receives_its_own_and_the_listener_all_else() {
        for listener in listeners() {
            let [own, other] = [(); 2].map(|()| application(listener.address));
            let names = [&own, &other].map(|socket| socket.local_addr().unwrap());
            let send = || [&own, &other].map(|socket| socket.send(b"x").unwrap());
            // As `answering`, in steps.
            let address = mapped(listener.address);
            let socket = shared_socket(address).unwrap();
            bind(&socket, &address).unwrap();
            send();
            assert_eq!(waiting(&socket), []);
            assert_eq!(waiting(&listener.socket), names);
            connect(&socket, &mapped(names[0])).unwrap();
            send();
            assert_eq!(waiting(&socket), [names[0]]);
            assert_eq!(waiting(&listener.socket), [names[1]]);

            send();
            retire(socket.as_fd(), listener.address).unwrap();
            send();
            assert_eq!(waiting(&socket), [names[0]], "what it had before it retired");
            assert_eq!(waiting(&listener.socket), [names[1], names[0], names[1]]);
        }
    }

    #[test]
    fn a_listener_that_has_ended_keeps_what_waits_and_refuses_the_rest() {
        for listener in listeners() {
            let application = application(listener.address);
            application.send(b"x").unwrap();
            let duplicate = listener.socket.try_clone().unwrap();
            listener.end().unwrap();
            assert_eq!(waiting(&listener.socket), [application.local_addr().unwrap()]);
            application.send(b"y").unwrap();
            assert_eq!(application.send(b"z").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
            assert_eq!(waiting(&duplicate), []);
        }
    }

    #[test]
    fn a_stranger_cannot_share_the_port() {
        for listener in listeners() {
            assert!(UdpSocket::bind(listener.address).is_err());
            let socket = datagram_socket(listener.address).unwrap();
            sockopt::set_socket_reuseaddr(&socket, true).unwrap();
            assert_eq!(bind(&socket, &listener.address), Err(Errno::ADDRINUSE));
        }
    }
}
