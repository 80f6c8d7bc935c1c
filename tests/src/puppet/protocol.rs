//! What a puppet can be asked, and what it answers.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use super::flood::{Audited, Flooded};

/// A number that the puppet gave to one of its sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Socket(pub u32);

/// An address family, and the level of its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Domain {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`.
    V6,
}

impl Domain {
    /// The family of an address.
    pub fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// One call. The methods of [`super::Puppet`] say what each does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "documented at the methods of Puppet")]
pub enum Request {
    Ping,
    Socket { domain: Domain },
    Datagrams { domain: Domain },
    SendTo { socket: Socket, address: SocketAddr, text: String },
    ReceiveFrom { socket: Socket },
    Answer { address: SocketAddr, prefix: String },
    Become { user: u32 },
    MultipathSocket,
    Bind { socket: Socket, address: SocketAddr },
    BindDevice { socket: Socket, device: String },
    V6Only { socket: Socket, on: bool },
    Nonblocking { socket: Socket, on: bool },
    Connect { socket: Socket, address: SocketAddr },
    FinishConnect { socket: Socket },
    FastOpen { socket: Socket, address: SocketAddr, text: String },
    Listen { address: SocketAddr },
    Accept { socket: Socket },
    Echo { address: SocketAddr },
    Send { socket: Socket, text: String },
    Receive { socket: Socket },
    ReceiveAll { socket: Socket },
    Shutdown { socket: Socket },
    Names { socket: Socket },
    OriginalDestination { socket: Socket, level: Domain },
    Close { socket: Socket },
    Reset { socket: Socket },
    Exchange { address: SocketAddr, connections: u32, bytes: u32 },
    Disconnect { socket: Socket },
    Flood { connections: u32, threads: u32 },
    Audit { address: SocketAddr, threads: u32, batch: u32, stall_ms: u32, asks: bool },
    AuditSeen,
    AuditStop,
    HoldOpen { connections: u32 },
    HoldAccepted { address: SocketAddr },
    HeldSeen,
    LetGo,
}

/// The reply to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was done.
    Done(Value),
    /// The kernel's error number.
    Failed(i32),
}

/// What a request results in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each bears what its name says")]
pub enum Value {
    Unit(()),
    Socket(Socket),
    Address(SocketAddr),
    Text(String),
    Names(Names),
    Received(String, SocketAddr),
    Exchanged(Exchanged),
    Flooded(Flooded),
    Audited(Audited),
}

/// Both ends of a connection, as the application is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// `getsockname`.
    pub local: SocketAddr,
    /// `getpeername`; absent when not connected.
    pub peer: Option<SocketAddr>,
}

/// The sum of many conversations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchanged {
    /// How many came back byte for byte.
    pub exact: u32,
    /// Bytes sent in those.
    pub bytes: u64,
    /// What went wrong in the others; at most 10 are told.
    pub faults: Vec<String>,
}
