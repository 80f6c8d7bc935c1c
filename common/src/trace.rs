//! What the programs tell of their decisions about a workload that is traced.

use crate::Destination;

/// Who decided: [`TraceEvent::program`].
pub mod program {
    /// `connect()` to an IPv4 address.
    pub const CONNECT4: u8 = 1;
    /// `connect()` to an IPv6 address.
    pub const CONNECT6: u8 = 2;
    /// `sendmsg()` of a socket without a peer, to an IPv4 address.
    pub const SEND4: u8 = 3;
    /// `sendmsg()` of a socket without a peer, to an IPv6 address.
    pub const SEND6: u8 = 4;
    /// An arriving connection.
    pub const STEER: u8 = 5;
}

/// What became of it: [`TraceEvent::verdict`].
pub mod verdict {
    /// It goes to the companion.
    pub const REDIRECTED: u8 = 1;
    /// It passes, as the rules say.
    pub const PASSED: u8 = 2;
    /// It should have been redirected, could not be, and passes.
    pub const FAILED_OPEN: u8 = 3;
    /// It should have been redirected, could not be, and is refused.
    pub const REFUSED: u8 = 4;
}

/// Why it was not redirected: [`TraceEvent::why`].
pub mod why {
    /// It was.
    pub const NOTHING: u8 = 0;
    /// Excluded, or no rule matches: the table has nothing for it.
    pub const NO_RULE: u8 = 1;
    /// For this host itself.
    pub const LOCAL: u8 = 2;
    /// Multicast or broadcast.
    pub const MULTICAST: u8 = 3;
    /// Sent by a user that is left alone.
    pub const USER: u8 = 4;
    /// Sent by a program that is left alone.
    pub const EXECUTABLE: u8 = 5;
    /// The companion does not listen there.
    pub const NO_LISTENER: u8 = 6;
    /// All slots wait for their companions, or the maps are full.
    pub const EXHAUSTED: u8 = 7;
    /// The socket cannot be bound so that its source carries the destination.
    pub const UNBINDABLE: u8 = 8;
    /// A link-local destination, or a socket for one interface.
    pub const INTERFACE: u8 = 9;
    /// The datagram answers one that has come to this socket.
    pub const ANSWER: u8 = 10;
    /// The datagram socket has another destination already.
    pub const OTHER_DESTINATION: u8 = 11;
    /// It comes from this host itself.
    pub const OWN: u8 = 12;
    /// Sent from a cgroup within that is left alone: an inner workload's, whose own policy decides, or a companion's.
    pub const CGROUP: u8 = 13;
}

/// How many bytes of a process's name are told.
pub const COMMAND_BYTES: usize = 16;

/// One decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceEvent {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// [`Traced::session`]: who asked.
    pub session: u32,
    /// Number of the workload.
    pub workload: u32,
    /// Number of the table that decided; 0 for arriving connections.
    pub table: u32,
    /// Index of the rule, [`Route::DNS_RULE`](crate::Route::DNS_RULE) or [`TraceEvent::NO_RULE`].
    pub rule: u32,
    /// The process, in the machine's PID namespace; 0 where none is known.
    pub pid: u32,
    /// Its real user.
    pub user: u32,
    /// Where it comes from, as far as the socket is bound: zeroes for what the kernel has still to choose.
    pub source: Destination,
    /// Where it was to go.
    pub original: Destination,
    /// Where it goes.
    pub effective: Destination,
    /// What the application is told, with [`verdict::REFUSED`].
    pub errno: u16,
    /// See [`program`].
    pub program: u8,
    /// [`TCP`](crate::TCP) or [`UDP`](crate::UDP).
    pub protocol: u8,
    /// See [`verdict`].
    pub verdict: u8,
    /// See [`why`].
    pub why: u8,
    /// Padding.
    pub pad: u16,
    /// The process's name, with a zero at its end.
    pub command: [u8; COMMAND_BYTES],
    /// Padding.
    pub pad2: u32,
}

impl TraceEvent {
    /// `rule` of what no outbound rule has decided.
    pub const NO_RULE: u32 = u32::MAX - 1;
}

/// How a workload is traced; the key is its number. What the agent writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// Nothing is told from then on, in nanoseconds of `CLOCK_MONOTONIC`. An agent that lives moves it on.
    pub until_ns: u64,
    /// Time for which one told decision counts.
    pub interval_ns: u64,
    /// How much of that may be used up at once.
    pub burst_ns: u64,
    /// Comes back in every event.
    pub session: u32,
    /// Of so many decisions one is told.
    pub sample: u32,
}

/// What the programs keep for a workload that is traced; the key is its number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceState {
    /// The time that told decisions have used up, in nanoseconds of `CLOCK_MONOTONIC`.
    pub used_ns: u64,
    /// How many decisions there were.
    pub seen: u64,
    /// How many of them were told.
    pub told: u64,
}

const _: () = {
    assert!(size_of::<TraceEvent>() == 120 && align_of::<TraceEvent>() == 8);
    assert!(size_of::<Traced>() == 32);
    assert!(size_of::<TraceState>() == 24);
};
