//! The puppet's own side: carries out requests on real sockets. One thread but for echo servers; every wait ends by itself.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    net::{AddressFamily, SendFlags, SocketType, sockopt, sockopt::Timeout},
};

use super::{
    flood::{self, Audit},
    hold::{self, Keeper},
    protocol::{Domain, Exchanged, Names, Outcome, Request, Socket, Value},
};

/// Every single wait of a socket call.
const WAIT: Duration = Duration::from_secs(10);
const WAIT_SPEC: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// Of one [`Request::Receive`].
const RECEIVE: usize = 64 * 1024;
/// Of one [`Request::ReceiveAll`]; more is a test's mistake.
const RECEIVE_ALL: u64 = 16 * 1024 * 1024;
/// `MSG_FASTOPEN`, which rustix does not name.
const FASTOPEN: SendFlags = SendFlags::from_bits_retain(0x2000_0000);

/// Answers requests from stdin on stdout until the input ends.
pub fn main() -> io::Result<()> {
    let mut stage = Stage::default();
    let mut stdout = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?)?;
        let outcome = match stage.perform(request) {
            Ok(value) => Outcome::Done(value),
            Err(error) => Outcome::Failed(error.raw_os_error().unwrap_or(libc::EPROTO)),
        };
        serde_json::to_writer(&mut stdout, &outcome)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
    }
    Ok(())
}

#[derive(Default)]
struct Stage {
    sockets: BTreeMap<Socket, OwnedFd>,
    last: u32,
    audit: Option<Audit>,
    held: Vec<TcpStream>,
    keeper: Option<Keeper>,
}

impl Stage {
    fn perform(&mut self, request: Request) -> io::Result<Value> {
        match request {
            Request::Ping => {}
            Request::Socket { domain } => return Ok(self.keep(new_socket(domain)?)),
            Request::Datagrams { domain } => return Ok(self.keep(new_datagrams(domain)?)),
            Request::SendTo { socket, address, text } => {
                rustix::net::sendto(self.get(socket)?, text.as_bytes(), SendFlags::empty(), &address)?;
            }
            Request::ReceiveFrom { socket } => {
                let datagrams = UdpSocket::from(self.get(socket)?.try_clone()?);
                let mut buffer = vec![0; RECEIVE];
                let (length, from) = datagrams.recv_from(&mut buffer)?;
                return Ok(Value::Received(String::from_utf8_lossy(&buffer[..length]).into_owned(), from));
            }
            Request::Answer { address, prefix } => return answer(address, prefix),
            Request::Become { user } => {
                let user = nix::unistd::Uid::from_raw(user);
                nix::unistd::setresuid(user, user, user)?;
            }
            Request::MultipathSocket => return Ok(self.keep(multipath_socket()?)),
            Request::Bind { socket, address } => rustix::net::bind(self.get(socket)?, &address)?,
            Request::BindDevice { socket, device } => {
                nix::sys::socket::setsockopt(
                    self.get(socket)?,
                    nix::sys::socket::sockopt::BindToDevice,
                    &device.into(),
                )?;
            }
            Request::V6Only { socket, on } => sockopt::set_ipv6_v6only(self.get(socket)?, on)?,
            Request::Nonblocking { socket, on } => nonblocking(self.get(socket)?, on)?,
            Request::Connect { socket, address } => rustix::net::connect(self.get(socket)?, &address)?,
            Request::FinishConnect { socket } => {
                let socket = self.get(socket)?;
                ready(socket, PollFlags::OUT)?;
                sockopt::socket_error(socket)??;
            }
            Request::FastOpen { socket, address, text } => {
                rustix::net::sendto(self.get(socket)?, text.as_bytes(), FASTOPEN, &address)?;
            }
            Request::Listen { address } => return Ok(self.keep(TcpListener::bind(address)?.into())),
            Request::Accept { socket } => return self.accept(socket),
            Request::Echo { address } => return echo(address),
            Request::Send { socket, text } => self.stream(socket)?.write_all(text.as_bytes())?,
            Request::Receive { socket } => {
                let mut buffer = vec![0; RECEIVE];
                let length = self.stream(socket)?.read(&mut buffer)?;
                return Ok(text(&buffer[..length]));
            }
            Request::ReceiveAll { socket } => {
                let mut buffer = Vec::new();
                self.stream(socket)?.take(RECEIVE_ALL).read_to_end(&mut buffer)?;
                return Ok(text(&buffer));
            }
            Request::Shutdown { socket } => self.stream(socket)?.shutdown(Shutdown::Write)?,
            Request::Names { socket } => {
                let stream = self.stream(socket)?;
                return Ok(Value::Names(Names {
                    local: stream.local_addr()?,
                    peer: stream.peer_addr().ok(),
                }));
            }
            Request::OriginalDestination { socket, level } => {
                let socket = self.get(socket)?;
                return Ok(Value::Address(match level {
                    Domain::V4 => sockopt::ip_original_dst(socket)?.into(),
                    Domain::V6 => sockopt::ipv6_original_dst(socket)?.into(),
                }));
            }
            Request::Close { socket } => drop(self.take(socket)?),
            Request::Reset { socket } => {
                sockopt::set_socket_linger(self.take(socket)?, Some(Duration::ZERO))?;
            }
            Request::Disconnect { socket } => rustix::net::connect_unspec(self.get(socket)?)?,
            Request::Flood { connections, threads } => {
                return Ok(Value::Flooded(flood::flood(connections, threads)));
            }
            Request::Audit { address, threads, batch, stall_ms, asks } => {
                let stall = Duration::from_millis(stall_ms.into());
                let (audit, address) = Audit::start(address, threads, batch as usize, stall, asks)?;
                self.audit = Some(audit);
                return Ok(Value::Address(address));
            }
            Request::AuditSeen => {
                let audit = self.audit.as_ref().ok_or(rustix::io::Errno::NOENT)?;
                return Ok(Value::Audited(audit.seen()));
            }
            Request::AuditStop => {
                let audit = self.audit.take().ok_or(rustix::io::Errno::NOENT)?;
                return Ok(Value::Audited(audit.stop()));
            }
            Request::HoldOpen { connections } => return self.hold_open(connections),
            Request::HoldAccepted { address } => return self.hold_accepted(address),
            Request::HeldSeen => return self.held_seen(),
            Request::LetGo => return Ok(self.let_go()),
            Request::Exchange { address, connections, bytes } => {
                return Ok(Value::Exchanged(exchange(address, connections, bytes)));
            }
        }
        Ok(Value::Unit(()))
    }

    fn hold_open(&mut self, connections: u32) -> io::Result<Value> {
        let (held, told) = hold::open(connections)?;
        self.held.extend(held);
        Ok(Value::Flooded(told))
    }

    fn hold_accepted(&mut self, address: SocketAddr) -> io::Result<Value> {
        let (keeper, address) = Keeper::start(address)?;
        self.keeper = Some(keeper);
        Ok(Value::Address(address))
    }

    fn held_seen(&self) -> io::Result<Value> {
        let keeper = self.keeper.as_ref().ok_or(rustix::io::Errno::NOENT)?;
        Ok(Value::Audited(keeper.seen()))
    }

    fn let_go(&mut self) -> Value {
        self.held.clear();
        Value::Audited(self.keeper.take().map(Keeper::stop).unwrap_or_default())
    }

    fn keep(&mut self, socket: OwnedFd) -> Value {
        self.last += 1;
        let name = Socket(self.last);
        self.sockets.insert(name, socket);
        Value::Socket(name)
    }

    fn get(&self, socket: Socket) -> io::Result<&OwnedFd> {
        self.sockets.get(&socket).ok_or_else(|| rustix::io::Errno::BADF.into())
    }

    fn take(&mut self, socket: Socket) -> io::Result<OwnedFd> {
        self.sockets.remove(&socket).ok_or_else(|| rustix::io::Errno::BADF.into())
    }

    fn stream(&self, socket: Socket) -> io::Result<TcpStream> {
        Ok(self.get(socket)?.try_clone()?.into())
    }

    fn accept(&mut self, socket: Socket) -> io::Result<Value> {
        let listener = self.get(socket)?;
        ready(listener, PollFlags::IN)?;
        let stream = rustix::net::accept(listener)?;
        limit(&stream)?;
        Ok(self.keep(stream))
    }
}

fn new_socket(domain: Domain) -> io::Result<OwnedFd> {
    of_type(domain, SocketType::STREAM)
}

fn new_datagrams(domain: Domain) -> io::Result<OwnedFd> {
    of_type(domain, SocketType::DGRAM)
}

fn of_type(domain: Domain, kind: SocketType) -> io::Result<OwnedFd> {
    let family = match domain {
        Domain::V4 => AddressFamily::INET,
        Domain::V6 => AddressFamily::INET6,
    };
    let socket = rustix::net::socket(family, kind, None)?;
    limit(&socket)?;
    Ok(socket)
}

/// `IPPROTO_MPTCP`.
const MULTIPATH: u32 = 262;

fn multipath_socket() -> io::Result<OwnedFd> {
    let protocol = rustix::net::Protocol::from_raw(MULTIPATH.try_into().expect("not zero"));
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, Some(protocol))?;
    limit(&socket)?;
    Ok(socket)
}

fn limit(socket: &OwnedFd) -> io::Result<()> {
    sockopt::set_socket_timeout(socket, Timeout::Recv, Some(WAIT))?;
    sockopt::set_socket_timeout(socket, Timeout::Send, Some(WAIT))?;
    Ok(())
}

fn nonblocking(socket: &OwnedFd, on: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(socket)?;
    flags.set(OFlags::NONBLOCK, on);
    fcntl_setfl(socket, flags)?;
    Ok(())
}

fn ready(socket: &OwnedFd, events: PollFlags) -> io::Result<()> {
    let count = poll(&mut [PollFd::from_borrowed_fd(socket.as_fd(), events)], Some(&WAIT_SPEC))?;
    if count == 0 { Err(rustix::io::Errno::TIMEDOUT.into()) } else { Ok(()) }
}

fn text(bytes: &[u8]) -> Value {
    Value::Text(String::from_utf8_lossy(bytes).into_owned())
}

fn echo(address: SocketAddr) -> io::Result<Value> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    // Lives as long as the puppet.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || crate::echo::serve(stream));
        }
    });
    Ok(Value::Address(address))
}

/// Answers each datagram with the prefix and what was in it.
fn answer(address: SocketAddr, prefix: String) -> io::Result<Value> {
    let datagrams = UdpSocket::bind(address)?;
    let address = datagrams.local_addr()?;
    // Lives as long as the puppet.
    thread::spawn(move || {
        let mut buffer = vec![0; RECEIVE];
        while let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(&[prefix.as_bytes(), &buffer[..length]].concat(), from);
        }
    });
    Ok(Value::Address(address))
}

fn exchange(address: SocketAddr, connections: u32, bytes: u32) -> Exchanged {
    let mut random = Random(u64::from(std::process::id()) << 20 | 1);
    let mut sum = Exchanged::default();
    for _ in 0..connections {
        let size = usize::try_from(random.next() % (u64::from(bytes) + 1)).unwrap_or(0);
        let sent: Vec<u8> = (0..size).map(|_| random.next().to_le_bytes()[3]).collect();
        match converse(address, &sent) {
            Ok(received) if received == sent => {
                sum.exact += 1;
                sum.bytes += sent.len() as u64;
            }
            Ok(received) => sum.fault(format!("sent {size} bytes, received {} others", received.len())),
            Err(error) => sum.fault(format!("at {size} bytes: {error}")),
        }
    }
    sum
}

impl Exchanged {
    fn fault(&mut self, fault: String) {
        if self.faults.len() < 10 {
            self.faults.push(fault);
        }
    }
}

/// Sends on a thread and receives here, so that neither direction waits for the other.
fn converse(address: SocketAddr, sent: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    let mut out = stream.try_clone()?;
    thread::scope(|scope| {
        let sender = scope.spawn(move || out.write_all(sent).and_then(|()| out.shutdown(Shutdown::Write)));
        let mut received = Vec::with_capacity(sent.len());
        (&mut stream).take(sent.len() as u64 + 1).read_to_end(&mut received)?;
        sender.join().map_err(|_| io::Error::other("the sender panicked"))??;
        Ok(received)
    })
}

/// xorshift64: sizes and contents need to vary, not to be secret.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
