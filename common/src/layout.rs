//! Configuration, rules and per-socket state.

/// Address family of IPv4, as in `sa_family_t`.
pub const AF_INET: u16 = 2;
/// Address family of IPv6, as in `sa_family_t`.
pub const AF_INET6: u16 = 10;

/// How many listening ports of one companion the kernel side knows.
pub const PORTS_PER_COMPANION: usize = 8;

/// Bits of [`WorkloadConfig::flags`] and [`InboundRule::flags`].
pub mod flags {
    /// Outbound connections are redirected. Without it the programs pass everything on.
    pub const OUTBOUND: u32 = 1 << 0;
    /// What cannot be redirected is refused instead of passed on.
    pub const FAIL_CLOSED: u32 = 1 << 1;
    /// The workload has entries in the map of excluded ports.
    pub const EXCLUDES_PORTS: u32 = 1 << 2;
    /// The workload has entries in the map of excluded IPv4 networks.
    pub const EXCLUDES_NETWORKS4: u32 = 1 << 3;
    /// The workload has entries in the map of excluded IPv6 networks.
    pub const EXCLUDES_NETWORKS6: u32 = 1 << 4;
}

/// Value of the cgroup storage of a workload's cgroup: what the programs attached there do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// See [`flags`].
    pub flags: u32,
    /// Number of the workload: the first field of every rule's key.
    pub workload: u32,
    /// The companion's port for outbound connections, network byte order.
    pub outbound_port_be: u16,
    /// Padding.
    pub pad: u16,
    /// What getsockname shows for a redirected IPv4 socket that was not bound.
    pub source4: u32,
    /// What getsockname shows for a redirected IPv6 socket that was not bound.
    pub source6: [u32; 4],
}

/// Value of the cgroup storage of a companion's cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompanionConfig {
    /// Ports it listens on, host byte order; unused entries are zero. A connection accepted on another port was
    /// steered there by `sk_lookup`: its local address is its original destination.
    pub ports: [u16; PORTS_PER_COMPANION],
}

/// A transport address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// Address words.
    pub address: [u32; 4],
    /// Port, network byte order.
    pub port_be: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
}

/// A workload's redirected socket, by its cookie: what the application is to see. From connect to close.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Redirected {
    /// Where the application wanted to go.
    pub destination: Destination,
    /// The slot that carries the destination, or [`Redirected::NO_SLOT`].
    pub slot: u32,
    /// Generation of that slot.
    pub generation: u32,
    /// The local address that the application had bound before Pillion bound another; all zero if none.
    pub bound: [u32; 4],
    /// [`Redirected::REBOUND`] and [`Redirected::DIALLED6`].
    pub flags: u32,
    /// The interface that the application had bound the socket to (`SO_BINDTODEVICE`); 0 if none.
    pub interface: u32,
    /// Source port by which the destination is kept in the by-source map, host byte order; 0 if by slot.
    pub source_port: u32,
    /// Number of the workload.
    pub workload: u32,
}

impl Redirected {
    /// `slot` of a socket whose destination is found by its source address.
    pub const NO_SLOT: u32 = u32::MAX;
    /// Pillion has bound the socket, which is to be undone when it passes a later connect on.
    pub const REBOUND: u32 = 1 << 0;
    /// The companion was dialled by `::1`, not by 127.0.0.1.
    pub const DIALLED6: u32 = 1 << 1;
}

/// Key of a destination that is found by the source of the connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BySourceKey {
    /// Network namespace cookie (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// Source address as the companion sees it; an IPv4 address in word 0.
    pub address: [u32; 4],
    /// Source port, host byte order.
    pub port: u32,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u32,
}

/// Value for [`BySourceKey`]: of a socket that cannot take a slot's address from its connect on, of any other from the
/// companion's question on, until the companion closes the connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BySource {
    /// The original destination.
    pub destination: Destination,
    /// Time when it was made, in units of 2^30 ns since boot; ages what nobody asks for.
    pub time: u32,
    /// Number of the workload.
    pub workload: u32,
}

/// Key of an excluded destination port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// Number of the workload.
    pub workload: u32,
    /// Port, host byte order.
    pub port: u16,
    /// Padding.
    pub pad: u16,
}

/// Value of an excluded destination port: its presence is what counts.
pub type ExcludedPort = u32;

/// Data of a longest-prefix key: an IPv4 network of one workload. The prefix counts the 32 bits of `workload` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Network4 {
    /// Number of the workload, always matched in full.
    pub workload: u32,
    /// Address, network byte order.
    pub address: u32,
}

/// Data of a longest-prefix key: an IPv6 network of one workload. The prefix counts the 32 bits of `workload` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Network6 {
    /// Number of the workload, always matched in full.
    pub workload: u32,
    /// Address, network byte order.
    pub address: [u32; 4],
}

/// Key of a companion's listening socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Number of the workload.
    pub workload: u32,
    /// Port, host byte order.
    pub port: u16,
    /// [`AF_INET`] or [`AF_INET6`]: which connections it accepts.
    pub family: u16,
}

/// What happens to inbound connections to a port; the key is a [`PortKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboundRule {
    /// The companion's listening port, host byte order.
    pub companion_port: u16,
    /// Padding.
    pub pad: u16,
    /// [`flags::FAIL_CLOSED`] or 0.
    pub flags: u32,
}

/// What the kernel side counts, for all workloads together.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Outbound connections sent to a companion.
    OutboundRedirected = 0,
    /// Outbound connections passed on by an exclusion.
    OutboundExcluded = 1,
    /// Outbound connections passed on because the companion was not there (`onFailure: open`).
    OutboundFailedOpen = 2,
    /// Outbound connections refused because the companion was not there (`onFailure: closed`).
    OutboundFailedClosed = 3,
    /// Outbound connections for which no slot was free.
    SlotsExhausted = 4,
    /// Slots taken back from a connection whose companion never asked.
    SlotsExpired = 5,
    /// Original destinations given to a companion.
    DestinationsAnswered = 6,
    /// Questions about a slot that had been given to another connection since: answered with an error.
    DestinationsStale = 7,
    /// Inbound connections steered to a companion.
    InboundRedirected = 8,
    /// Inbound connections left to the application because the companion was not there.
    InboundFailedOpen = 9,
    /// Inbound connections refused because the companion was not there.
    InboundFailedClosed = 10,
}

impl Counter {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::OutboundRedirected,
        Self::OutboundExcluded,
        Self::OutboundFailedOpen,
        Self::OutboundFailedClosed,
        Self::SlotsExhausted,
        Self::SlotsExpired,
        Self::DestinationsAnswered,
        Self::DestinationsStale,
        Self::InboundRedirected,
        Self::InboundFailedOpen,
        Self::InboundFailedClosed,
    ];
}

/// How many bytes of a program's file name are compared.
pub const PROGRAM_NAME_BYTES: usize = 32;

/// Key of the names that are stopped at exec: what is longer is cut, what is shorter ends with zeroes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProgramName {
    /// The bytes.
    pub bytes: [u8; PROGRAM_NAME_BYTES],
}

/// A process that is stopped at its exec; its key is its pid.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldProcess {
    /// When it started, in nanoseconds of `CLOCK_BOOTTIME`: with the pid, its identity.
    pub started_ns: u64,
    /// When it was stopped, in nanoseconds of `CLOCK_MONOTONIC`.
    pub held_ns: u64,
}

/// A program whose name matches was executed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExecEvent {
    /// The process.
    pub pid: u32,
    /// [`ExecEvent::HELD`] or nothing.
    pub flags: u32,
    /// See [`HeldProcess::started_ns`].
    pub started_ns: u64,
}

impl ExecEvent {
    /// It is stopped.
    pub const HELD: u32 = 1;
}

/// Where the agent says that it is alive, in nanoseconds of `CLOCK_MONOTONIC`.
pub const EXEC_BEAT: u32 = 0;
/// How many programs could not be told of.
pub const EXEC_MISSED: u32 = 1;

const _: () = {
    assert!(size_of::<HeldProcess>() == 16);
    assert!(size_of::<ExecEvent>() == 16);
    assert!(size_of::<WorkloadConfig>() == 32);
    assert!(size_of::<CompanionConfig>() == 16);
    assert!(size_of::<Destination>() == 20);
    assert!(size_of::<Redirected>() == 60);
    assert!(size_of::<BySourceKey>() == 32);
    assert!(size_of::<BySource>() == 28);
    assert!(size_of::<PortKey>() == 8);
    assert!(size_of::<Network4>() == 8);
    assert!(size_of::<Network6>() == 20);
    assert!(size_of::<ListenerKey>() == 8);
    assert!(size_of::<InboundRule>() == 8);
};

#[cfg(feature = "user")]
mod pod {
    #![expect(unsafe_code, reason = "aya's marker for plain old data is an unsafe trait")]
    // SAFETY: all of them are `repr(C)`, `Copy`, without padding bytes (checked above) or pointers.
    unsafe impl aya::Pod for super::WorkloadConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::CompanionConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Redirected {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BySourceKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BySource {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PortKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Network4 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Network6 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ListenerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::InboundRule {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ProgramName {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::HeldProcess {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ExecEvent {}
}
