//! A process that does with sockets what the test tells it, one call at a time: the application in a workload.
//!
//! The program is `pillion-puppet` (`src/bin/pillion-puppet.rs`); it runs anywhere: in a namespace and a cgroup of the test's
//! ([`Puppet::start`]) or under any command that passes stdin and stdout through, such as `pillion run -- pillion-puppet`
//! ([`Puppet::under`]). Requests and replies are lines of JSON, one reply to each request; see [`protocol`].

pub mod flood;
mod hold;
pub mod protocol;
pub mod stage;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use crate::{CgroupGuard, NetNs, process::MARK, programs, wait_until};
pub use protocol::{Audited, Domain, Exchanged, Flooded, Names, Outcome, Request, Socket, Value};

/// A reply takes at most this long: the puppet's own waits are shorter, but for [`Request::Exchange`].
const REPLY: Duration = Duration::from_secs(120);

/// Where a puppet is to live; what is absent is the test's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place<'a> {
    /// Its network namespace.
    pub netns: Option<&'a NetNs>,
    /// Its cgroup.
    pub cgroup: Option<&'a CgroupGuard>,
}

/// The remote control of a puppet. Dropping it ends the process.
#[derive(Debug)]
pub struct Puppet {
    child: Child,
    requests: Option<ChildStdin>,
    replies: Receiver<String>,
}

/// What a socket call answers: a value, or the error number that the kernel gave.
pub type Answer<T> = std::result::Result<T, Errno>;

impl Puppet {
    /// Starts one in `place`.
    pub fn start(place: Place<'_>) -> Result<Self> {
        let program = programs::puppet()?;
        let mut command = match place.cgroup {
            Some(cgroup) => cgroup.command(&program),
            None => Command::new(&program),
        };
        match place.netns {
            Some(netns) => netns.run(|| Self::under(&mut command)),
            None => Self::under(&mut command),
        }
    }

    /// Starts `command`, which must run a puppet on its own stdin and stdout. Waits until the puppet answers.
    pub fn under(command: &mut Command) -> Result<Self> {
        command.env(MARK, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start a puppet: {command:?}"))?;
        let requests = child.stdin.take();
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let (sender, replies) = sync_channel(16);
        // Ends at the end of the pipe, or when this Puppet is gone.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut puppet = Self { child, requests, replies };
        puppet.ask(&Request::Ping)?.context("ping")?;
        Ok(puppet)
    }

    /// The pid of what [`Puppet::under`] started, which may be a parent of the puppet.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One request, one reply. The outer error means that the puppet is not there any more; the inner one is the kernel's.
    pub fn ask(&mut self, request: &Request) -> Result<Answer<Value>> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        let requests = self.requests.as_mut().context("the puppet was dismissed")?;
        requests.write_all(line.as_bytes()).with_context(|| format!("the puppet is gone at {request:?}"))?;
        let reply = match self.replies.recv_timeout(REPLY) {
            Ok(reply) => reply,
            Err(RecvTimeoutError::Timeout) => bail!("the puppet gave no reply to {request:?} in {REPLY:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the puppet ended at {request:?}"),
        };
        let outcome = serde_json::from_str(&reply)
            .with_context(|| format!("not a puppet's reply to {request:?}: {reply}"))?;
        Ok(match outcome {
            Outcome::Done(value) => Ok(value),
            Outcome::Failed(errno) => Err(Errno::from_raw(errno)),
        })
    }

    /// Ends its input, upon which it exits with 0; returns how the started command ended.
    pub fn dismiss(mut self, deadline: Duration) -> Result<ExitStatus> {
        self.requests = None;
        let mut status = None;
        wait_until("the end of a puppet", deadline, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        status.context("it has ended")
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // A wrapper such as `pillion run` must have the chance to clean up: end the input, and kill only what stays.
        self.requests = None;
        let child = &mut self.child;
        if wait_until("the end of a puppet", Duration::from_secs(10), || {
            !matches!(child.try_wait(), Ok(None))
        })
        .is_err()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A method for each request, with the reply that belongs to it.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $value:ident($result:ty) = $request:expr;)*) => {
        impl Puppet {
            $(
                $(#[$doc])*
                pub fn $name(&mut self $(, $argument: $type)*) -> Result<Answer<$result>> {
                    Ok(match self.ask(&$request)? {
                        Ok(Value::$value(value)) => Ok(value),
                        Ok(other) => bail!("{}: unexpected reply {other:?}", stringify!($name)),
                        Err(errno) => Err(errno),
                    })
                }
            )*
        }
    };
}

calls! {
    /// A new TCP socket, blocking, with time limits of 10 s on connect, send and receive.
    socket(domain: Domain) -> Socket(Socket) = Request::Socket { domain };
    /// A new UDP socket, blocking, with time limits of 10 s on send and receive.
    datagrams(domain: Domain) -> Socket(Socket) = Request::Datagrams { domain };
    /// `sendto`. On a v6 socket a v4 address must be given as mapped.
    send_to(socket: Socket, address: SocketAddr, text: &str) -> Unit(()) =
        Request::SendTo { socket, address, text: text.into() };
    /// Answers each datagram to `address` with `prefix` and what was in it, from then on; answers the address.
    answer(address: SocketAddr, prefix: &str) -> Address(SocketAddr) =
        Request::Answer { address, prefix: prefix.into() };
    /// `setresuid`: there is no way back.
    become_user(user: u32) -> Unit(()) = Request::Become { user };
    /// A new socket of Multipath TCP over IPv4.
    multipath_socket() -> Socket(Socket) = Request::MultipathSocket;
    /// `bind`. On a v6 socket a v4 address must be given as mapped.
    bind(socket: Socket, address: SocketAddr) -> Unit(()) = Request::Bind { socket, address };
    /// `SO_BINDTODEVICE`.
    bind_device(socket: Socket, device: &str) -> Unit(()) = Request::BindDevice { socket, device: device.into() };
    /// `IPV6_V6ONLY`.
    v6_only(socket: Socket, on: bool) -> Unit(()) = Request::V6Only { socket, on };
    /// `O_NONBLOCK`.
    nonblocking(socket: Socket, on: bool) -> Unit(()) = Request::Nonblocking { socket, on };
    /// `connect`. On a v6 socket a v4 address must be given as mapped.
    connect(socket: Socket, address: SocketAddr) -> Unit(()) = Request::Connect { socket, address };
    /// Waits until a connect without blocking is over; answers its `SO_ERROR`.
    finish_connect(socket: Socket) -> Unit(()) = Request::FinishConnect { socket };
    /// `sendto` with `MSG_FASTOPEN`: connects and sends in one.
    fast_open(socket: Socket, address: SocketAddr, text: &str) -> Unit(()) =
        Request::FastOpen { socket, address, text: text.into() };
    /// A new socket that listens on `address`; answers it.
    listen(address: SocketAddr) -> Socket(Socket) = Request::Listen { address };
    /// The next connection, within 10 s; after that `ETIMEDOUT`.
    accept(socket: Socket) -> Socket(Socket) = Request::Accept { socket };
    /// Listens on `address` and echoes every connection from then on; answers the address.
    echo(address: SocketAddr) -> Address(SocketAddr) = Request::Echo { address };
    /// Sends all of `text`.
    send(socket: Socket, text: &str) -> Unit(()) = Request::Send { socket, text: text.into() };
    /// Receives once, at most 64 KiB; empty at the end of the stream.
    receive(socket: Socket) -> Text(String) = Request::Receive { socket };
    /// Receives up to the end of the stream.
    receive_all(socket: Socket) -> Text(String) = Request::ReceiveAll { socket };
    /// `shutdown(SHUT_WR)`.
    shutdown(socket: Socket) -> Unit(()) = Request::Shutdown { socket };
    /// `getsockname` and `getpeername`.
    names(socket: Socket) -> Names(Names) = Request::Names { socket };
    /// `SO_ORIGINAL_DST` at `SOL_IP` or `SOL_IPV6`.
    original_destination(socket: Socket, level: Domain) -> Address(SocketAddr) =
        Request::OriginalDestination { socket, level };
    /// `close`.
    close(socket: Socket) -> Unit(()) = Request::Close { socket };
    /// `close` with `SO_LINGER` 0, which sends a reset.
    reset(socket: Socket) -> Unit(()) = Request::Reset { socket };
    /// Byte-exact conversations with an echo server at `address`, one after the other, each of a random size up to `bytes`
    /// in both directions and ended by half-close.
    exchange(address: SocketAddr, connections: u32, bytes: u32) -> Exchanged(Exchanged) =
        Request::Exchange { address, connections, bytes };
    /// `connect` with `AF_UNSPEC`, which dissolves the connection.
    disconnect(socket: Socket) -> Unit(()) = Request::Disconnect { socket };
    /// So many connections, each to another destination, written to and closed at once.
    flood(connections: u32, threads: u32) -> Flooded(Flooded) = Request::Flood { connections, threads };
    /// Begins to accept on `address` in the background and to compare original destinations; see [`flood`].
    audit(address: SocketAddr, threads: u32, batch: u32, stall_ms: u32, asks: bool) -> Address(SocketAddr) =
        Request::Audit { address, threads, batch, stall_ms, asks };
    /// What the audit has seen so far.
    audit_seen() -> Audited(Audited) = Request::AuditSeen;
    /// Ends the audit, and its listener.
    audit_stop() -> Audited(Audited) = Request::AuditStop;
    /// So many connections, each to another destination, that stay open until [`Puppet::let_go`].
    hold_open(connections: u32) -> Flooded(Flooded) = Request::HoldOpen { connections };
    /// Begins to accept on `address` in the background, to compare original destinations and to keep the connections.
    hold_accepted(address: SocketAddr) -> Address(SocketAddr) = Request::HoldAccepted { address };
    /// What that has seen so far.
    held_seen() -> Audited(Audited) = Request::HeldSeen;
    /// Closes all that is held open, and its listener; answers what was seen of what was accepted.
    let_go() -> Audited(Audited) = Request::LetGo;
}

impl Puppet {
    /// `recvfrom`: what was in the next datagram, and whom it is shown to be from.
    pub fn receive_from(&mut self, socket: Socket) -> Result<Answer<(String, SocketAddr)>> {
        Ok(match self.ask(&Request::ReceiveFrom { socket })? {
            Ok(Value::Received(text, from)) => Ok((text, from)),
            Ok(other) => bail!("receive_from: unexpected reply {other:?}"),
            Err(errno) => Err(errno),
        })
    }

    /// Sends `text` on a new UDP socket without a peer and returns the answer.
    pub fn ask_datagram(&mut self, address: SocketAddr, text: &str) -> Result<Answer<(String, SocketAddr)>> {
        let socket = self.datagrams(Domain::of(address))?.context("a socket")?;
        let heard = match self.send_to(socket, address, text)? {
            Ok(()) => self.receive_from(socket)?,
            Err(errno) => Err(errno),
        };
        self.close(socket)?.context("close")?;
        Ok(heard)
    }

    /// Connects a new socket of the address's family, sends `text`, ends the stream and returns all that comes back.
    pub fn converse(&mut self, address: SocketAddr, text: &str) -> Result<Answer<String>> {
        let socket = match self.socket(Domain::of(address))? {
            Ok(socket) => socket,
            Err(errno) => return Ok(Err(errno)),
        };
        let mut said = self.connect(socket, address)?;
        if said.is_ok() {
            said = self.send(socket, text)?;
        }
        if said.is_ok() {
            said = self.shutdown(socket)?;
        }
        let heard = match said {
            Ok(()) => self.receive_all(socket)?,
            Err(errno) => Err(errno),
        };
        self.close(socket)?.context("close")?;
        Ok(heard)
    }
}
