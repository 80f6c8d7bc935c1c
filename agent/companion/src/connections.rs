//! Connections that a workload made before redirection was in force: found and destroyed, so that it makes them anew.
//!
//! Owns the judgement which they are. Acts only on sockets of the workload's own cgroup, by `sock_diag(7)` in its network
//! namespace: the companions', a neighbour's and those that are redirected already are left alone.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv6Addr},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    time::{Duration, Instant},
};

use pillion_workload::{Cgroup, CgroupId, FailureMode, Protocol, RedirectSpec, Route, is_local};
use rustix::net::AddressFamily;

use crate::netns::{
    NLM_F_ACK, NetnsError, NetnsThread, diag_request, exchange, for_each_socket, listening_sockets,
    sock_diag, u32_at,
};

const TCP_ESTABLISHED: u8 = 1;
const TCP_SYN_SENT: u8 = 2;
const TCP_SYN_RECV: u8 = 3;
const TCP_FIN_WAIT1: u8 = 4;
const TCP_FIN_WAIT2: u8 = 5;
const TCP_CLOSE_WAIT: u8 = 8;
/// Those in which data or a handshake is still to come; what only says goodbye is left to it.
const OPEN: [u8; 6] =
    [TCP_ESTABLISHED, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT];
/// `INET_DIAG_CGROUP_ID` (Linux 5.7).
const CGROUP_ID: u16 = 21;
/// A handshake under way at the attach becomes a connection; it is waited for this long.
const HALF_OPEN_PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);
/// Each pass finds what was opened during the one before, which is next to nothing.
const PASSES: u32 = 100;
const MAX_CGROUPS: usize = 65_536;

/// Why connections could not be reset.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The kernel cannot destroy sockets.
    #[error("this kernel cannot destroy sockets (it is built without CONFIG_INET_DIAG_DESTROY)")]
    Unsupported,
    /// The kernel does not tell a socket's cgroup.
    #[error("this kernel does not tell to which cgroup a socket belongs (Linux 5.7 or later does)")]
    NoCgroups,
    /// The workload's cgroup cannot be read.
    #[error("cannot read the workload's cgroup")]
    Cgroup(#[source] io::Error),
    /// It cannot be done in its network namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// Destroys the open TCP connections of `cgroup` and of those below it, but not in or below `exempt`, that `spec`, now in force, would have taken or
/// refused. Both ends see a reset (`ECONNABORTED` and `ECONNRESET`). Returns how many were destroyed.
///
/// To be called when the rules are in force, or connections made meanwhile would be missed. A connection counts as
/// outbound when nothing listens on its local port.
pub async fn reset_connections(
    netns: BorrowedFd<'_>,
    cgroup: &Cgroup,
    exempt: &BTreeSet<CgroupId>,
    spec: &RedirectSpec,
    on_failure: FailureMode,
) -> Result<usize, ResetError> {
    let thread = NetnsThread::enter(netns).await?;
    let (cgroup, exempt, spec) = (cgroup.clone(), exempt.clone(), spec.clone());
    let reset = move || Ok(reset(&cgroup, &exempt, &spec, on_failure));
    thread.run("reset open connections", reset).await?
}

fn reset(
    cgroup: &Cgroup,
    exempt: &BTreeSet<CgroupId>,
    spec: &RedirectSpec,
    on_failure: FailureMode,
) -> Result<usize, ResetError> {
    let failed = |source| ResetError::Netns(NetnsError { operation: "reset open connections", source });
    let socket = sock_diag().map_err(failed)?;
    let patience = Instant::now() + HALF_OPEN_PATIENCE;
    let mut count = 0;
    for _ in 0..PASSES {
        let listening: BTreeSet<u16> =
            listening_sockets(Protocol::Tcp).map_err(failed)?.into_iter().map(|socket| socket.port).collect();
        let mut connections = Vec::new();
        let states = OPEN.iter().fold(0, |states, state| states | 1 << state);
        let dump =
            for_each_socket(&socket, Protocol::Tcp, states, |message| connections.extend(parse(message)));
        dump.map_err(failed)?;
        // After the dump: a socket of a cgroup that is made meanwhile was redirected from its beginning.
        let own = below(cgroup, exempt).map_err(ResetError::Cgroup)?;
        let concerned: Vec<Connection> = connections
            .into_iter()
            .filter(|connection| connection.concerned(spec, on_failure, &listening))
            .collect();
        let mut half_open = false;
        let mut destroyed = 0;
        for connection in concerned {
            match connection.cgroup {
                // A request is no socket yet and has no cgroup; whose connection it becomes is seen then.
                None if connection.state == TCP_SYN_RECV => half_open = true,
                None => return Err(ResetError::NoCgroups),
                Some(id) if own.contains(&id) => destroyed += usize::from(destroy(&socket, &connection)?),
                Some(_) => {}
            }
        }
        count += destroyed;
        if destroyed == 0 {
            if !half_open || Instant::now() >= patience {
                break;
            }
            std::thread::sleep(PAUSE);
        }
    }
    Ok(count)
}

/// Whether the socket was there.
fn destroy(socket: &OwnedFd, connection: &Connection) -> Result<bool, ResetError> {
    const SOCK_DESTROY: u16 = 21;
    let request = diag_request(connection.family, Protocol::Tcp, u32::MAX, &connection.socket);
    match exchange(socket, SOCK_DESTROY, NLM_F_ACK, &request, |_| {}) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error().map(nix::errno::Errno::from_raw) {
            // Closed meanwhile.
            Some(nix::errno::Errno::ENOENT | nix::errno::Errno::ESTALE) => Ok(false),
            Some(nix::errno::Errno::EOPNOTSUPP) => Err(ResetError::Unsupported),
            _ => Err(NetnsError { operation: "destroy a connection", source: error }.into()),
        },
    }
}

/// The ids of a cgroup and of all below it, less the exempt ones with what is below them.
fn below(cgroup: &Cgroup, exempt: &BTreeSet<CgroupId>) -> io::Result<BTreeSet<CgroupId>> {
    let mut ids = BTreeSet::new();
    let mut waiting = vec![cgroup.path.clone()];
    while let Some(path) = waiting.pop() {
        let id = match fs::symlink_metadata(&path) {
            Ok(metadata) => CgroupId(metadata.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if ids.is_empty() && id != cgroup.id {
            // The workload has ended, and its path is another's.
            break;
        }
        if exempt.contains(&id) {
            continue;
        }
        ids.insert(id);
        if ids.len() > MAX_CGROUPS {
            return Err(io::Error::other(format!("more than {MAX_CGROUPS} cgroups are below it")));
        }
        directories(&path, &mut waiting)?;
    }
    Ok(ids)
}

fn directories(path: &Path, into: &mut Vec<std::path::PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        match entry {
            Ok(entry) if entry.file_type().is_ok_and(|kind| kind.is_dir()) => into.push(entry.path()),
            Ok(_) => {}
            // Removed while it is being listed.
            Err(_) => break,
        }
    }
    Ok(())
}

/// An open connection as `sock_diag(7)` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Connection {
    family: AddressFamily,
    state: u8,
    local: IpAddr,
    local_port: u16,
    remote: IpAddr,
    remote_port: u16,
    /// `None` for a request in `SYN_RECV`, and from a kernel that does not tell.
    cgroup: Option<CgroupId>,
    /// `struct inet_diag_sockid` with the cookie: this socket and no later one.
    socket: [u8; 48],
}

impl Connection {
    /// Whether the rules would have taken or refused it, had they been in force when it was made.
    fn concerned(&self, spec: &RedirectSpec, on_failure: FailureMode, listening: &BTreeSet<u16>) -> bool {
        if listening.contains(&self.local_port) {
            // As in `pl_steer`: not what arrives on loopback or comes from this host's own address.
            let from_outside = self.remote != self.local && !is_local(self.remote);
            return from_outside && spec.inbound.iter().any(|rule| rule.ports.contains(&self.local_port));
        }
        // As in `pl_connect6`: a link-local destination follows the failure mode. Who had opened it is not known any more:
        // excluded users and programs are not looked at.
        let link_local = matches!(self.remote, IpAddr::V6(address) if address.is_unicast_link_local());
        self.state != TCP_SYN_RECV
            && match spec.route(Protocol::Tcp, self.remote, self.remote_port) {
                Route::Pass(_) => false,
                Route::Dns(_) => true,
                Route::Rule(..) => !link_local || on_failure == FailureMode::Closed,
            }
    }
}

/// `struct inet_diag_msg` (72 bytes; see `netns`), then attributes.
fn parse(message: &[u8]) -> Option<Connection> {
    let fixed: &[u8; 72] = message.get(..72)?.try_into().ok()?;
    let family = AddressFamily::from_raw(u16::from(fixed[0]));
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = fixed[at..at + 16].try_into().ok()?;
        match family {
            AddressFamily::INET => Some(IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]])),
            AddressFamily::INET6 => Some(Ipv6Addr::from(bytes).to_canonical()),
            _ => None,
        }
    };
    Some(Connection {
        family,
        state: fixed[1],
        local: address(8)?,
        local_port: u16::from_be_bytes([fixed[4], fixed[5]]),
        remote: address(24)?,
        remote_port: u16::from_be_bytes([fixed[6], fixed[7]]),
        cgroup: attribute(&message[72..], CGROUP_ID)
            .and_then(|value| Some(CgroupId(u64::from_ne_bytes(value.try_into().ok()?)))),
        socket: fixed[4..52].try_into().ok()?,
    })
}

/// The value of one netlink attribute: length with its header (2 bytes), kind (2), value, padding to 4.
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while rest.len() >= 4 {
        let header = u32_at(rest, 0).to_ne_bytes();
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = rest.get(4..length)?;
        if u16::from_ne_bytes([header[2], header[3]]) == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use pillion_workload::{Exclusions, InboundRule, OutboundRule, Target};

    use super::*;

    fn connection(local: &str, remote: &str) -> Connection {
        let (local, remote): (std::net::SocketAddr, std::net::SocketAddr) =
            (local.parse().expect("an address"), remote.parse().expect("an address"));
        Connection {
            family: AddressFamily::INET,
            state: TCP_ESTABLISHED,
            local: local.ip(),
            local_port: local.port(),
            remote: remote.ip(),
            remote_port: remote.port(),
            cgroup: Some(CgroupId(1)),
            socket: [0; 48],
        }
    }

    #[test]
    fn what_the_rules_would_have_taken() {
        let to = || Target { companion: "a".parse().expect("valid"), port: Some(15001) };
        let exclude = Exclusions { ports: [22].into(), cidrs: vec!["10.9.0.0/16".parse().expect("valid")] };
        let spec = RedirectSpec {
            outbound: vec![OutboundRule { exclude, ..OutboundRule::all_tcp(to()) }],
            inbound: vec![InboundRule { ports: [8080].into(), to: to() }],
            ..RedirectSpec::default()
        };
        let listening = BTreeSet::from([8080, 9090]);
        for (local, remote, open, closed) in [
            ("10.0.0.1:40000", "10.0.0.2:80", true, true),
            ("10.0.0.1:40000", "10.0.0.2:22", false, false),
            ("10.0.0.1:40000", "10.9.0.2:80", false, false),
            ("127.0.0.1:40000", "127.0.0.1:80", false, false),
            ("[::1]:40000", "[::1]:80", false, false),
            ("[fd00::1]:40000", "[fd00::2]:80", true, true),
            ("[fe80::1]:40000", "[fe80::2]:80", false, true),
            // Its own address, but not loopback: redirected as any other.
            ("10.0.0.1:40000", "10.0.0.1:80", true, true),
            // Accepted: on a port with a rule, on one without.
            ("10.0.0.1:8080", "10.0.0.2:40000", true, true),
            ("10.0.0.1:9090", "10.0.0.2:40000", false, false),
            ("10.0.0.1:8080", "10.0.0.1:40000", false, false),
            ("127.0.0.1:8080", "127.0.0.1:40000", false, false),
        ] {
            let connection = connection(local, remote);
            for (mode, expected) in [(FailureMode::Open, open), (FailureMode::Closed, closed)] {
                let concerned = connection.concerned(&spec, mode, &listening);
                assert_eq!(concerned, expected, "{local} {remote} {mode:?}");
                let none = RedirectSpec::default();
                assert!(!connection.concerned(&none, mode, &listening), "{local} {remote}");
            }
        }
    }

    #[test]
    fn own_connections_are_parsed_with_their_cgroup() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).expect("loopback");
            let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
            let mut found = Vec::new();
            let socket = sock_diag().expect("sock_diag");
            for_each_socket(&socket, Protocol::Tcp, 1 << TCP_ESTABLISHED, |message| {
                found.extend(parse(message));
            })
            .expect("a dump");
            let local = client.local_addr().expect("connected");
            let own = found.iter().find(|it| it.local == local.ip() && it.local_port == local.port());
            let own = own.expect("it is listed");
            assert_eq!(own.remote_port, listener.local_addr().expect("bound").port());
            assert!(own.cgroup.is_some_and(|id| id.0 > 0), "{own:?}");
        }
    }

    #[test]
    fn nonsense_is_no_connection() {
        for length in 0..72 {
            assert_eq!(parse(&vec![2; length]), None);
        }
        assert_eq!(parse(&[99; 80]), None);
        let mut message = [0; 72];
        message[0] = 2;
        for attributes in [&[0, 0, 21, 0][..], &[255, 255, 21, 0], &[12, 0, 21, 0, 1], &[3, 0, 0, 0], &[8, 0]]
        {
            let message = [&message[..], attributes].concat();
            assert_eq!(parse(&message).expect("the fixed part is whole").cgroup, None, "{attributes:?}");
        }
    }
}
