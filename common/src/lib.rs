//! The kernel ABI of Pillion: keys and values of the maps that eBPF programs and agent share. With the feature `hook` also
//! what `pillion-hook` and the agent say to each other.
//!
//! Owns layouts and messages and nothing else; never does IO, and without that feature never allocates. A change to any layout raises
//! [`LAYOUT_VERSION`], so that an agent never reads another version's pinned maps.
//!
//! Conventions: `repr(C)`, explicit padding, no `bool`, no enum. Addresses are four 32-bit words as the kernel hands
//! them out (network byte order in memory); an IPv4 address stands in word 0 and words 1–3 are zero. Ports are host
//! byte order unless the field's name ends in `_be`.
#![cfg_attr(not(test), no_std)]

#[cfg(feature = "hook")]
extern crate alloc;

#[cfg(feature = "hook")]
pub mod hook;
pub mod kernel;
mod layout;
mod slot;
pub mod trace;

pub use layout::{
    AF_INET, AF_INET6, BoundKey, BySource, BySourceKey, CompanionConfig, Counter, Destination, EXEC_BEAT,
    EXEC_MISSED, EXEMPT_LEVELS, ExecEvent, ExecutableKey, ExemptKey, HeardKey, HeldProcess, InboundRule,
    ListenerKey, Network4, Network6, PATH_NAME_BYTES, PATH_NAMES, PORTS_PER_COMPANION, PROGRAM_NAME_BYTES,
    PeerKey, PeerSlot, PortKey, ProgramName, Redirected, Route, RouteKey, Share, TCP, UDP, UserKey,
    WorkloadConfig, flags,
};
pub use slot::{GENERATION_BITS, PEER_IDLE, SLOT_BITS, SLOTS, Slot, SlotAddress, tag};

/// Version of everything in this crate; part of every pin's path.
pub const LAYOUT_VERSION: u32 = 2;

/// How many workloads are counted by what they have of what all share: as many as can be attached at once.
pub const WORKLOADS: u32 = 16_384;

/// How many redirected connections may be open at once, for all workloads together.
pub const CONNECTIONS: u32 = 262_144;
