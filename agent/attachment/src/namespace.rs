//! Looks around in a workload's network namespace: which ports are free, and which addresses are its own.
//!
//! Owns the looking; what is found is claimed by `claims`. Never enters a namespace on a thread of the async runtime.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sched::{CloneFlags, setns},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, bind, listen,
        setsockopt, socket, sockopt,
    },
};
use pillion_redirect::Sources;
use pillion_workload::{Plan, WorkloadId};

use crate::{
    claims::{Claims, Taken, inbound_ports},
    ports::{PortError, Resolved, resolve},
};

/// A thousand binds take a few milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why ports cannot be settled in a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The namespace cannot be entered.
    #[error("cannot enter the workload's network namespace")]
    Enter(#[source] io::Error),
    /// No answer in time, or no answer at all.
    #[error("looking for free ports in the workload's network namespace did not end within {DEADLINE:?}")]
    Deadline,
    /// No port is free.
    #[error(transparent)]
    Ports(#[from] PortError),
    /// Two workloads in one namespace have inbound rules for the same port.
    #[error(
        "the inbound rule for port {port} is not the only one in this network namespace: {} has one too, and the port can be redirected for one of them only",
        whose.as_deref().unwrap_or("another workload")
    )]
    InboundTaken {
        /// The port.
        port: u16,
        /// Which workload was first, as far as it can be told.
        whose: Option<String>,
    },
}

/// What was found and claimed.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) resolved: Resolved,
    pub(crate) claims: Claims,
    pub(crate) sources: Sources,
}

/// Settles the ports of `plan` within `netns`, for the workload `owner`. What `previous` has is claimed already.
pub(crate) async fn settle(
    netns: Arc<OwnedFd>,
    owner: WorkloadId,
    plan: Arc<Plan>,
    previous: Option<Resolved>,
) -> Result<Settled, NamespaceError> {
    within(netns, move || {
        let mut claims = Claims::default();
        let ours = previous.as_ref().map(|previous| inbound_ports(&previous.redirect)).unwrap_or_default();
        for port in inbound_ports(&plan.redirect).difference(&ours) {
            claims
                .claim_inbound(*port, &owner)
                .map_err(|Taken(whose)| NamespaceError::InboundTaken { port: *port, whose })?;
        }
        let resolved = resolve(&plan, previous.as_ref(), |port| claims.claim(port, is_free))?;
        Ok(Settled { resolved, claims, sources: sources() })
    })
    .await?
}

/// Claims the ports of an adopted attachment again, as far as nobody else has meanwhile: its companions listen on
/// them, so that a lost claim does no harm.
pub(crate) async fn claim_again(netns: Arc<OwnedFd>, owner: WorkloadId, resolved: &Resolved) -> Claims {
    let (allocated, inbound) = (resolved.allocated.clone(), inbound_ports(&resolved.redirect));
    let claims = within(netns, move || {
        let mut claims = Claims::default();
        for port in allocated {
            claims.claim(port, |_| true);
        }
        for port in inbound {
            // Whoever has it now has been told of it, or is this workload's own earlier agent, which is about to end.
            let _ = claims.claim_inbound(port, &owner);
        }
        claims
    });
    claims.await.unwrap_or_default()
}

/// Runs `look` on a thread of its own that has entered `netns`, because the namespace is the thread's.
async fn within<T: Send + 'static>(
    netns: Arc<OwnedFd>,
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NamespaceError> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let body = move || {
        let result = setns(&*netns, CloneFlags::CLONE_NEWNET).map(|()| look());
        // The asker has given up: nothing to tell.
        let _ = answer.send(result);
    };
    std::thread::Builder::new().name("netns".to_owned()).spawn(body).map_err(NamespaceError::Enter)?;
    match tokio::time::timeout(DEADLINE, answered).await {
        Ok(Ok(result)) => result.map_err(|errno| NamespaceError::Enter(errno.into())),
        Ok(Err(_)) | Err(_) => Err(NamespaceError::Deadline),
    }
}

/// The addresses that the kernel would choose towards the default route, else the first that is there: an internal network
/// has no default route. Connecting a datagram socket sends nothing.
fn sources() -> Sources {
    let towards = |own: SocketAddr, far: SocketAddr| {
        let socket = UdpSocket::bind(own).ok()?;
        socket.connect(far).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    let mut sources = Sources::default();
    // Addresses for documentation (RFC 5737, RFC 3849): nobody has a route of their own to them.
    let v4 = (Ipv4Addr::UNSPECIFIED, 0).into();
    if let Some(IpAddr::V4(address)) = towards(v4, (Ipv4Addr::new(192, 0, 2, 1), 9).into()) {
        sources.v4 = address;
    }
    let v6 = (Ipv6Addr::UNSPECIFIED, 0).into();
    let far = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    if let Some(IpAddr::V6(address)) = towards(v6, (far, 9).into()) {
        sources.v6 = address;
    }
    let interfaces =
        getifaddrs().into_iter().flatten().filter(|it| it.flags.contains(InterfaceFlags::IFF_UP));
    for address in interfaces.filter_map(|interface| interface.address) {
        if let Some(address) = address.as_sockaddr_in().map(SockaddrIn::ip)
            && sources.v4.is_loopback()
            && !address.is_loopback()
        {
            sources.v4 = address;
        }
        if let Some(address) = address.as_sockaddr_in6().map(SockaddrIn6::ip)
            && sources.v6.is_loopback()
            && !address.is_loopback()
            && !address.is_unicast_link_local()
        {
            sources.v6 = address;
        }
    }
    sources
}

/// Whether nobody listens on the port on any address, nor takes datagrams. Connections in `TIME_WAIT` are not in the way.
fn is_free(port: u16) -> bool {
    let v4 = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    let v6 = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
    [SockType::Stream, SockType::Datagram]
        .into_iter()
        .all(|kind| can_bind(AddressFamily::Inet, kind, &v4) && can_bind(AddressFamily::Inet6, kind, &v6))
}

fn can_bind(family: AddressFamily, kind: SockType, address: &dyn SockaddrLike) -> bool {
    let attempt = || {
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        if kind == SockType::Stream {
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        }
        if family == AddressFamily::Inet6 {
            setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        }
        bind(socket.as_raw_fd(), address)?;
        if kind == SockType::Stream { listen(&socket, Backlog::new(1)?) } else { Ok(()) }
    };
    match attempt() {
        // A namespace without IPv6 has no IPv6 listeners.
        Ok(()) | Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => true,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use pillion_workload::Target;

    use super::*;
    use crate::testing::{outbound, plan};

    fn owner() -> WorkloadId {
        "process/a".parse().unwrap()
    }

    #[test]
    fn a_listener_is_in_the_way_whatever_its_family() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            assert!(!is_free(port), "{address}");
            drop(listener);
            assert!(is_free(port), "{address}");
        }
    }

    /// Entering even one's own namespace takes `CAP_SYS_ADMIN`: without it the error must say so.
    #[tokio::test]
    async fn two_workloads_of_a_namespace_get_different_ports() {
        let netns: Arc<OwnedFd> = Arc::new(std::fs::File::open("/proc/self/ns/net").unwrap().into());
        let mut plan = plan(&["a"]);
        plan.redirect.outbound = vec![outbound(Target { companion: "a".parse().unwrap(), port: None })];
        let plan = Arc::new(plan);
        let first = settle(netns.clone(), owner(), plan.clone(), None).await;
        if !nix::unistd::geteuid().is_root() {
            assert!(matches!(first, Err(NamespaceError::Enter(_))));
            return;
        }
        let first = first.unwrap();
        let second = settle(netns.clone(), owner(), plan.clone(), None).await.unwrap();
        assert_ne!(first.resolved.allocated, second.resolved.allocated);
        drop(first.claims);
        let third = settle(netns, owner(), plan, None).await.unwrap();
        assert_eq!(first.resolved.allocated, third.resolved.allocated);
    }
}
