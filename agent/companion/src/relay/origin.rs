//! Where a redirected connection comes from and wanted to go. Never dials, never decides what to do without an answer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
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
    /// By the source.
    #[cfg(test)]
    BySource(fn(SocketAddr) -> Option<SocketAddr>),
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
            #[cfg(test)]
            Self::BySource(of) => return of(plain(SockRef::from(&socket).peer_addr().ok()?.as_socket()?)),
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

/// Where a connection to `destination` comes from, as the workload sees it: `peer`, unless the redirection has put a
/// loopback address in its place, from where nobody reaches a destination that is not loopback. Then it is the address
/// that the kernel has chosen for the way there, which `upstream` shows, with the peer's port: what the application's own
/// `getsockname` says. Unspecified when none was chosen, because nothing was dialled or there is no route.
pub(super) fn source(
    peer: SocketAddr,
    destination: Option<SocketAddr>,
    upstream: Option<BorrowedFd<'_>>,
) -> SocketAddr {
    let Some(destination) = destination.filter(|_| peer.ip().is_loopback()) else { return peer };
    let chosen = upstream.and_then(|socket| SockRef::from(&socket).local_addr().ok()?.as_socket());
    let address = match (chosen, destination) {
        (Some(chosen), _) => plain(chosen).ip(),
        (None, SocketAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        (None, SocketAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(address, peer.port())
}

/// The address that the application had bound its connection to, which `peer` shows then: its companion dials from there,
/// too. None when the application left the choice to the kernel.
pub(super) fn own_address(direction: Direction, peer: SocketAddr, destination: SocketAddr) -> Option<IpAddr> {
    let chosen = direction == Direction::Outbound
        && !peer.ip().is_loopback()
        && peer.is_ipv4() == destination.is_ipv4();
    chosen.then(|| peer.ip())
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
    fn a_loopback_peer_is_shown_with_the_address_that_was_chosen_for_it() {
        let listener = TcpListener::bind("127.0.0.2:0").unwrap();
        let upstream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let chosen = upstream.local_addr().unwrap().ip();
        let (v4, v6) = ("192.0.2.1:80".parse().unwrap(), "[2001:db8::1]:80".parse().unwrap());
        let dialled = Some(upstream.as_fd());
        for marked in ["127.64.0.9:40000", "[::1]:40000"] {
            let marked = marked.parse().unwrap();
            assert_eq!(source(marked, Some(v4), dialled), SocketAddr::new(chosen, 40_000));
            assert_eq!(source(marked, Some(v4), None), "0.0.0.0:40000".parse().unwrap());
            assert_eq!(source(marked, Some(v6), None), "[::]:40000".parse().unwrap());
            assert_eq!(source(marked, None, None), marked);
        }
        for peer in ["10.77.0.1:1", "[fd77::1]:1"] {
            let peer = peer.parse().unwrap();
            assert_eq!(source(peer, Some(v4), dialled), peer);
        }
    }

    #[test]
    fn only_an_address_that_the_application_chose_is_dialled_from() {
        let of = |direction, peer: &str, destination: &str| {
            own_address(direction, peer.parse().unwrap(), destination.parse().unwrap())
        };
        for (peer, destination) in
            [("10.77.0.5:40000", "192.0.2.1:80"), ("[fd77::5]:40000", "[2001:db8::1]:80")]
        {
            let own = peer.parse::<SocketAddr>().unwrap().ip();
            assert_eq!(of(Direction::Outbound, peer, destination), Some(own));
            assert_eq!(of(Direction::Inbound, peer, destination), None);
        }
        assert_eq!(of(Direction::Outbound, "127.64.0.9:40000", "192.0.2.1:80"), None);
        assert_eq!(of(Direction::Outbound, "[::1]:40000", "[2001:db8::1]:80"), None);
        assert_eq!(of(Direction::Outbound, "10.77.0.5:40000", "[2001:db8::1]:80"), None);
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
