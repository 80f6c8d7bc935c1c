//! Where a redirected connection wanted to go. Never dials, never decides what to do without an answer.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
};

use socket2::SockRef;

use super::record::Direction;

/// How the original destination of an accepted connection is found.
#[derive(Debug, Clone, Copy)]
pub(super) enum OriginalDestination {
    /// Ask the kernel: the redirection answers.
    Kernel,
    /// Tests run without redirection.
    #[cfg(test)]
    Fixed(SocketAddr),
}

impl OriginalDestination {
    /// The original destination of `socket`, accepted on `listener`; `None` when it was dialled directly.
    ///
    /// Outbound it is what `SO_ORIGINAL_DST` answers. An IPv4 socket may have an IPv6 destination, because the
    /// redirection dials an IPv4 listener for IPv6 applications too; therefore a buffer is passed that holds either,
    /// and the other level is asked when the first has no answer. Inbound it is the local address, because `sk_lookup`
    /// steers connections without rewriting them.
    pub(super) fn of(
        self,
        direction: Direction,
        socket: BorrowedFd<'_>,
        listener: SocketAddr,
    ) -> Option<SocketAddr> {
        match self {
            Self::Kernel => {}
            #[cfg(test)]
            Self::Fixed(address) => return Some(address),
        }
        let socket = SockRef::from(&socket);
        let address = match (direction, listener) {
            (Direction::Inbound, _) => socket.local_addr(),
            (Direction::Outbound, SocketAddr::V4(_)) => {
                socket.original_dst_v4().or_else(|_| socket.original_dst_v6())
            }
            (Direction::Outbound, SocketAddr::V6(_)) => {
                socket.original_dst_v6().or_else(|_| socket.original_dst_v4())
            }
        };
        let address = plain(address.ok()?.as_socket()?);
        let steered = direction == Direction::Outbound || address != listener;
        (steered && address.port() != 0 && !address.ip().is_unspecified()).then_some(address)
    }
}

/// `::ffff:a.b.c.d` is IPv4 in disguise; dialled as such it would need an IPv6 socket for nothing.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4() {
        for (given, wanted) in [
            ("[::ffff:1.2.3.4]:5", "1.2.3.4:5"),
            ("[2001:db8::1]:5", "[2001:db8::1]:5"),
            ("1.2.3.4:5", "1.2.3.4:5"),
        ] {
            assert_eq!(plain(given.parse().unwrap()), wanted.parse().unwrap());
        }
    }

    #[test]
    fn an_inbound_connection_goes_to_its_local_address_unless_that_is_the_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _client = TcpStream::connect(address).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let of = |listener| OriginalDestination::Kernel.of(Direction::Inbound, socket.as_fd(), listener);
        assert_eq!(of(address), None);
        assert_eq!(of("127.0.0.1:1".parse().unwrap()), Some(address));
    }
}
