//! Work inside a network namespace: on a thread of its own that enters it and dies with it, never on a thread of the
//! async runtime, which would carry the namespace into other tasks.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::sched::{CloneFlags, setns};
use pillion_workload::Protocol;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt,
};
use tokio::sync::{mpsc, oneshot};

/// Why something could not be done in a network namespace.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} in the workload's network namespace")]
pub struct NetnsError {
    /// What was tried.
    pub operation: &'static str,
    /// Why not.
    pub source: io::Error,
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace. Sockets that it makes stay in the namespace wherever they are used.
#[derive(Debug)]
pub(crate) struct NetnsThread {
    jobs: mpsc::Sender<Job>,
}

impl NetnsThread {
    /// Starts the thread. It ends when this is dropped and its last job is done.
    pub(crate) async fn enter(namespace: BorrowedFd<'_>) -> Result<Self, NetnsError> {
        let failed = |source| NetnsError { operation: "start a thread", source };
        let namespace = namespace.try_clone_to_owned().map_err(failed)?;
        let (jobs, mut receiver) = mpsc::channel::<Job>(1);
        let (report, entered) = oneshot::channel();
        let body = move || {
            let outcome = setns(namespace, CloneFlags::CLONE_NEWNET);
            let failed = outcome.is_err();
            if report.send(outcome).is_err() || failed {
                return;
            }
            while let Some(job) = receiver.blocking_recv() {
                job();
            }
        };
        std::thread::Builder::new()
            .name("pillion-netns".into())
            .stack_size(256 * 1024)
            .spawn(body)
            .map_err(failed)?;
        match entered.await {
            Ok(Ok(())) => Ok(Self { jobs }),
            Ok(Err(error)) => Err(failed(error.into())),
            Err(_) => Err(failed(io::Error::other("the thread has died"))),
        }
    }

    /// Runs a job on the thread. When this is dropped the job still runs to its end, so that it must be bounded.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, NetnsError> {
        let lost = || NetnsError { operation, source: io::Error::other("the thread has died") };
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move || {
            let _ = reply.send(job());
        });
        self.jobs.send(job).await.map_err(|_| lost())?;
        answer.await.map_err(|_| lost())?.map_err(|source| NetnsError { operation, source })
    }
}

/// The TCP ports on which anything listens in a network namespace, on any address.
pub async fn listening_ports(namespace: BorrowedFd<'_>) -> Result<BTreeSet<u16>, NetnsError> {
    let thread = NetnsThread::enter(namespace).await?;
    let sockets = thread.run("list listening sockets", || listening_sockets(Protocol::Tcp)).await?;
    Ok(sockets.into_iter().map(|socket| socket.port).collect())
}

/// A listening TCP socket or a UDP socket without a peer, as `sock_diag(7)` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListeningSocket {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) inode: u64,
}

const NLMSG_HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
/// The answer ends with an acknowledgement, which bears the error.
pub(crate) const NLM_F_ACK: u16 = 4;
/// The answer is a list.
pub(crate) const NLM_F_DUMP: u16 = 0x300;
/// Ask `sock_diag(7)` for sockets of one family.
pub(crate) const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// All listening TCP sockets, or all UDP sockets without a peer, of the calling thread's network namespace. Unlike
/// `/proc/net/tcp` this does not walk the table of established connections, which takes milliseconds on a large machine.
pub(crate) fn listening_sockets(protocol: Protocol) -> io::Result<Vec<ListeningSocket>> {
    const TCP_CLOSE: u32 = 7;
    const TCP_LISTEN: u32 = 10;
    let state = match protocol {
        Protocol::Tcp => TCP_LISTEN,
        Protocol::Udp => TCP_CLOSE,
    };
    let socket = sock_diag()?;
    let mut found = Vec::new();
    for_each_socket(&socket, protocol, 1 << state, |message| found.extend(parse_listening(message)))?;
    Ok(found)
}

/// A socket for `sock_diag(7)` in the calling thread's network namespace.
pub(crate) fn sock_diag() -> io::Result<OwnedFd> {
    netlink_socket(Some(netlink::SOCK_DIAG))
}

/// Hands every socket of a protocol in one of `states` (bits by state number), IPv4 and IPv6, to `each` as a
/// `struct inet_diag_msg` with its attributes.
pub(crate) fn for_each_socket(
    socket: &OwnedFd,
    protocol: Protocol,
    states: u32,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        // 48 bytes of zeros stand for any address.
        exchange(
            socket,
            SOCK_DIAG_BY_FAMILY,
            NLM_F_DUMP,
            &diag_request(family, protocol, states, &[0; 48]),
            &mut each,
        )?;
    }
    Ok(())
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, padding, states, then which socket: `struct inet_diag_sockid`.
pub(crate) fn diag_request(
    family: AddressFamily,
    protocol: Protocol,
    states: u32,
    which: &[u8; 48],
) -> Vec<u8> {
    let family = u8::try_from(family.as_raw()).expect("AF_INET and AF_INET6 are small");
    let mut request = vec![family, protocol.number(), 0, 0];
    request.extend(states.to_ne_bytes());
    request.extend(which);
    request
}

/// Brings up `lo` of the calling thread's network namespace (`RTM_NEWLINK`, rtnetlink(7)). It is always index 1.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const IFF_UP: u32 = 1;
    let socket = netlink_socket(None)?;
    // struct ifinfomsg: family, padding, type, index, flags, mask of the flags to change.
    let mut request = vec![0; 4];
    request.extend(1_i32.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes());
    exchange(&socket, RTM_NEWLINK, NLM_F_ACK, &request, |_| {})
}

/// Protocol 0, which rustix writes as none, is `NETLINK_ROUTE`.
fn netlink_socket(protocol: Option<rustix::net::Protocol>) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
    // The kernel answers within the call; a deadline all the same.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(std::time::Duration::from_secs(2)))?;
    Ok(socket)
}

/// Sends one request and hands every answer's payload to `each`, until the acknowledgement or the end of the dump.
pub(crate) fn exchange(
    socket: &OwnedFd,
    kind: u16,
    flags: u16,
    payload: &[u8],
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    let length = u32::try_from(NLMSG_HEADER + payload.len()).expect("requests are small");
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(payload);
    send(socket, &request, SendFlags::empty())?;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let (received, _) = recv(socket, &mut buffer, RecvFlags::empty())?;
        let mut rest = &buffer[..received];
        while rest.len() >= NLMSG_HEADER {
            let length = usize::try_from(u32_at(rest, 0)).unwrap_or(usize::MAX);
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            let Some(payload) = rest.get(NLMSG_HEADER..length) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a netlink message of impossible length",
                ));
            };
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR if payload.len() >= 4 => {
                    let code = i32::from_ne_bytes([payload[0], payload[1], payload[2], payload[3]]);
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => each(payload),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// `struct inet_diag_msg`: family, state, timer, retransmits, source port, destination port, source address (16
/// bytes), destination address (16), interface, cookie (8), expires, read queue, write queue, uid, inode.
fn parse_listening(message: &[u8]) -> Option<ListeningSocket> {
    let fixed: &[u8; 72] = message.get(..72)?.try_into().ok()?;
    let port = u16::from_be_bytes([fixed[4], fixed[5]]);
    let source: [u8; 16] = fixed[8..24].try_into().ok()?;
    let address = match AddressFamily::from_raw(u16::from(fixed[0])) {
        AddressFamily::INET => IpAddr::from([source[0], source[1], source[2], source[3]]),
        AddressFamily::INET6 => IpAddr::from(source),
        _ => return None,
    };
    Some(ListeningSocket { address, port, inode: u32_at(fixed, 68).into() })
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        os::{fd::AsRawFd, linux::fs::MetadataExt},
    };

    use super::*;

    #[test]
    fn own_listeners_are_listed_with_their_inodes() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let listener = TcpListener::bind(address).expect("loopback");
            let local = listener.local_addr().expect("bound");
            let inode =
                std::fs::metadata(format!("/proc/self/fd/{}", listener.as_raw_fd())).expect("open").st_ino();
            let want = ListeningSocket { address: local.ip(), port: local.port(), inode };
            assert!(listening_sockets(Protocol::Tcp).expect("sock_diag").contains(&want), "{want:?}");
            let datagrams = std::net::UdpSocket::bind(local).expect("loopback");
            let inode =
                std::fs::metadata(format!("/proc/self/fd/{}", datagrams.as_raw_fd())).expect("open").st_ino();
            let want = ListeningSocket { inode, ..want };
            assert!(listening_sockets(Protocol::Udp).expect("sock_diag").contains(&want), "{want:?}");
        }
    }

    #[test]
    fn short_messages_are_not_sockets() {
        assert_eq!(parse_listening(&[]), None);
        assert_eq!(parse_listening(&[2; 71]), None);
        assert_eq!(parse_listening(&[99; 72]), None);
    }
}
