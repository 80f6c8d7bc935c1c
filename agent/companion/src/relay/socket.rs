//! The relay's system calls on sockets: listen, dial, reset. Never keeps state.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use rustix::{
    io::{Errno, Result},
    net::{
        AddressFamily, Shutdown, SocketFlags, SocketType, bind, connect, getsockname, listen, shutdown,
        socket_with, sockopt,
    },
};

use socket2::SockRef;

use super::record::{Direction, Outcome};

/// Connections that wait in the kernel to be accepted; `net.core.somaxconn` may lower it.
const BACKLOG: i32 = 4_096;
/// What may wait in the kernel, beyond what is under way, before a socket takes no more. It costs no throughput on long ways.
const UNSENT: u32 = 64 << 10;
/// An idle peer is asked after this long whether it still lives (the system's default is two hours).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);

/// A listening socket of the relay.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    pub(super) direction: Direction,
    pub(super) address: SocketAddr,
}

impl Listener {
    /// Listens on `port` of both loopback addresses; of the IPv4 one alone where IPv6 is not available.
    ///
    /// # Errors
    /// The address that cannot be listened on, and why.
    pub(super) fn on_loopback(
        direction: Direction,
        port: u16,
    ) -> std::result::Result<Vec<Self>, (SocketAddr, Errno)> {
        let v4 = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        let mut listeners = vec![Self::on(direction, v4).map_err(|error| (v4, error))?];
        let v6 = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, listeners[0].address.port(), 0, 0));
        match Self::on(direction, v6) {
            Ok(listener) => listeners.push(listener),
            // No IPv6 in the kernel, or `disable_ipv6` in this namespace.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {}
            Err(error) => return Err((v6, error)),
        }
        Ok(listeners)
    }

    /// For tests: on whichever port is free.
    #[cfg(test)]
    pub(super) fn on_free_port() -> Vec<Self> {
        // The port that is free on 127.0.0.1 may be taken on ::1, by another test.
        let found = (0..50).find_map(|_| Self::on_loopback(Direction::Outbound, 0).ok());
        found.expect("a port that is free on both loopback addresses")
    }

    fn on(direction: Direction, address: SocketAddr) -> Result<Self> {
        let socket = stream_socket(address)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        // Accepted sockets inherit these from their listener (Linux), which saves the calls for each connection.
        prepare(&socket)?;
        bind(&socket, &address)?;
        listen(&socket, BACKLOG)?;
        let address = getsockname(&socket)?.try_into()?;
        Ok(Self { socket, direction, address })
    }

    /// Ends the listening. Closing alone would not do: the agent holds a duplicate of this socket, with which it would
    /// go on to take connections that nobody accepts.
    pub(super) fn close(self) {
        // Fails only when the socket does not listen any more, which is what is wanted.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

/// Begins to connect to `destination`, from the address `from` if that is given; the socket becomes writable when that is
/// done. The port is chosen at the connect, so that one address has a full range for each destination.
///
/// # Errors
/// What the connection's record is to say.
pub(super) fn dial(destination: SocketAddr, from: Option<IpAddr>) -> std::result::Result<OwnedFd, Outcome> {
    let socket = stream_socket(destination).map_err(outcome_of)?;
    let bound = || from.map_or(Ok(()), |from| bind_address(&socket, from));
    match prepare(&socket).and_then(|()| bound()).and_then(|()| connect(&socket, &destination)) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(error) => Err(outcome_of(error)),
    }
}

fn bind_address(socket: &OwnedFd, from: IpAddr) -> Result<()> {
    setsockopt(socket, IpBindAddressNoPort, &true).map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    bind(socket, &SocketAddr::new(from, 0))
}

/// What a dial that failed with `error` is called in its record.
pub(super) fn outcome_of(error: Errno) -> Outcome {
    match error {
        // A reset in answer to SYN is a refusal, whenever it is seen.
        Errno::CONNREFUSED | Errno::CONNRESET => Outcome::ConnectRefused,
        Errno::TIMEDOUT => Outcome::ConnectTimeout,
        Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN | Errno::HOSTDOWN => {
            Outcome::ConnectUnreachable
        }
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::ADDRNOTAVAIL | Errno::AGAIN => {
            Outcome::Limit
        }
        _ => Outcome::Error,
    }
}

/// Closes `socket` so that its peer sees a reset, not an orderly end. What it has not sent is lost.
pub(super) fn reset(socket: OwnedFd) {
    // Can fail only for a descriptor that is no socket.
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    drop(socket);
}

/// What the kernel noted of a connect that ended.
pub(super) fn connect_result(socket: BorrowedFd<'_>) -> std::result::Result<(), Outcome> {
    match sockopt::socket_error(socket) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) | Err(error) => Err(outcome_of(error)),
    }
}

/// The number of an error of the system's.
pub(super) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

fn stream_socket(address: SocketAddr) -> Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)
}

/// No delay, and keepalive so that a peer that vanished is noticed one day.
fn prepare(socket: &OwnedFd) -> Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT).map_err(|error| errno(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_dial_have_their_outcome() {
        let cases = [
            (Errno::CONNREFUSED, Outcome::ConnectRefused),
            (Errno::CONNRESET, Outcome::ConnectRefused),
            (Errno::TIMEDOUT, Outcome::ConnectTimeout),
            (Errno::NETUNREACH, Outcome::ConnectUnreachable),
            (Errno::HOSTUNREACH, Outcome::ConnectUnreachable),
            (Errno::MFILE, Outcome::Limit),
            (Errno::ADDRNOTAVAIL, Outcome::Limit),
            (Errno::PERM, Outcome::Error),
        ];
        for (error, outcome) in cases {
            assert_eq!(outcome_of(error), outcome, "{error}");
        }
    }

    #[test]
    fn a_taken_port_is_an_error_that_names_the_address() {
        let held = Listener::on_free_port();
        let taken = held[0].address;
        let (address, error) = Listener::on_loopback(Direction::Outbound, taken.port()).unwrap_err();
        assert_eq!((address, error), (taken, Errno::ADDRINUSE));
    }
}
