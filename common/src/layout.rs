//! Configuration, rules and per-socket state.

/// Address family of IPv4, as in `sa_family_t`.
pub const AF_INET: u16 = 2;
/// Address family of IPv6, as in `sa_family_t`.
pub const AF_INET6: u16 = 10;

/// How many listening ports of one companion the kernel side knows.
pub const PORTS_PER_COMPANION: usize = 8;

/// `IPPROTO_TCP` and `IPPROTO_UDP`.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;

/// Bits of [`WorkloadConfig::flags`] and [`InboundRule::flags`].
pub mod flags {
    /// What the workload sends is redirected. Without it the programs pass everything on.
    pub const OUTBOUND: u32 = 1 << 0;
    /// What cannot be redirected is refused instead of passed on.
    pub const FAIL_CLOSED: u32 = 1 << 1;
    /// All TCP connections take [`WorkloadConfig::route`](super::WorkloadConfig::route): there is no table to look at.
    pub const ONE_ROUTE: u32 = 1 << 2;
    /// The table has IPv4 networks.
    pub const NETWORKS4: u32 = 1 << 3;
    /// The table has IPv6 networks.
    pub const NETWORKS6: u32 = 1 << 4;
    /// The table has users that are left alone.
    pub const USERS: u32 = 1 << 5;
    /// The table has programs that are left alone.
    pub const EXECUTABLES: u32 = 1 << 6;
    /// Questions to resolvers are redirected, on loopback too.
    pub const DNS: u32 = 1 << 7;
    /// Datagrams are looked at.
    pub const DATAGRAMS: u32 = 1 << 8;
    /// Datagrams of any kind are redirected: who sends to the workload is remembered, so that its answers pass.
    pub const ANSWERS: u32 = 1 << 9;
    /// Decisions are told, as far as the workload's entry in the map of those that are traced says.
    pub const TRACED: u32 = 1 << 10;
}

/// Where the connections go that a rule matches. All zero: they pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The companion's listening port, host byte order.
    pub companion_port: u16,
    /// [`Route::REDIRECT`] and [`Route::DNS`].
    pub flags: u16,
    /// Which rule it is: an index into the policy's outbound rules, or [`Route::DNS_RULE`].
    pub rule: u32,
}

impl Route {
    /// To the companion.
    pub const REDIRECT: u16 = 1 << 0;
    /// A question to a resolver: the companion answers it whoever was asked, and need not know.
    pub const DNS: u16 = 1 << 1;
    /// `rule` of what goes to the companion's resolver.
    pub const DNS_RULE: u32 = u32::MAX;
}

/// At how many levels of the cgroup hierarchy, from its root on, exempt cgroups are looked for.
pub const EXEMPT_LEVELS: u32 = 32;

/// Value of the cgroup storage of a workload's cgroup: what the programs attached there do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// See [`flags`].
    pub flags: u32,
    /// Number of the workload.
    pub workload: u32,
    /// Number of the table of its rules: the first field of every rule's key. Other rules come in another table, so that
    /// they are put in force all at once.
    pub table: u32,
    /// With [`flags::ONE_ROUTE`]: the rule.
    pub route: Route,
    /// What getsockname shows for a redirected IPv4 socket that was not bound.
    pub source4: u32,
    /// What getsockname shows for a redirected IPv6 socket that was not bound.
    pub source6: [u32; 4],
    /// At which levels exempt cgroups are ([`ExemptKey`]), a bit each; the hierarchy's root is level 0.
    pub exempt_levels: u32,
}

/// Key of a cgroup below a workload's whose processes its programs leave alone: an inner workload, or a companion that
/// is within the workload. The value is the inner workload's number, or [`ExemptKey::COMPANION`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ExemptKey {
    /// The cgroup's id.
    pub cgroup: u64,
    /// Number of the workload whose programs leave it alone.
    pub workload: u32,
    /// Padding.
    pub pad: u32,
}

impl ExemptKey {
    /// Value for a companion's cgroup: no workload has this number.
    pub const COMPANION: u32 = 0;
}

/// Value of the cgroup storage of a companion's cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompanionConfig {
    /// Ports it listens on, host byte order; unused entries are zero. A connection accepted on another port was
    /// steered there by `sk_lookup`: its local address is its original destination.
    pub ports: [u16; PORTS_PER_COMPANION],
    /// Number of its workload.
    pub workload: u32,
}

/// A transport address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
    /// [`Redirected::REBOUND`], [`Redirected::DIALLED6`] and [`Redirected::UNASKED`].
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
    /// The companion does not ask for the destination: nothing carries it.
    pub const UNASKED: u32 = 1 << 2;
    /// A datagram socket.
    pub const DATAGRAMS: u32 = 1 << 3;
    /// Nothing was free to carry the destination: why it was not redirected, for a trace.
    pub const EXHAUSTED: u32 = 1 << 4;
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
    pub family: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u16,
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

/// Key of a destination of datagrams that has an address of its own in 127.128.0.0/10.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// Network namespace cookie (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// The destination.
    pub destination: Destination,
    /// Number of the workload.
    pub workload: u32,
}

/// Value for [`PeerKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerSlot {
    /// Number of the slot.
    pub slot: u32,
    /// Its generation then: with another one it stands for another destination by now.
    pub generation: u32,
}

/// Key of a datagram socket that is bound to an address: what came from it as from `address` is answered there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BoundKey {
    /// Network namespace cookie (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// An address of 127.128.0.0/10, network byte order.
    pub address: u32,
    /// The socket's port, host byte order.
    pub port: u32,
}

/// Key of a peer that has sent a datagram to a socket of the workload: what goes there is an answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeardKey {
    /// The socket's cookie.
    pub socket: u64,
    /// Address words.
    pub address: [u32; 4],
    /// Port, network byte order.
    pub port_be: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
    /// Padding.
    pub pad: u32,
}

/// Key of a port of a workload.
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

/// Data of a longest-prefix key: an IPv4 network of one table. The prefix counts the 32 bits of `table` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Network4 {
    /// Number of the table, always matched in full.
    pub table: u32,
    /// Address, network byte order.
    pub address: u32,
}

/// Data of a longest-prefix key: an IPv6 network of one table. The prefix counts the 32 bits of `table` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Network6 {
    /// Number of the table, always matched in full.
    pub table: u32,
    /// Address, network byte order.
    pub address: [u32; 4],
}

/// Data of a longest-prefix key: ports of a class of destinations. The prefix counts [`RouteKey::FIXED_BITS`] too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RouteKey {
    /// Number of the table, always matched in full.
    pub table: u32,
    /// Destinations for which the same rules hold: what the longest network has as value, 0 without one.
    pub class: u32,
    /// [`TCP`] or [`UDP`].
    pub protocol: u16,
    /// Destination port, network byte order.
    pub port_be: u16,
}

impl RouteKey {
    /// Bits before those of the port.
    pub const FIXED_BITS: u32 = 80;
    /// Bits of a whole key.
    pub const BITS: u32 = 96;
}

/// Key of a user that is left alone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct UserKey {
    /// Number of the table.
    pub table: u32,
    /// User id in the initial user namespace.
    pub user: u32,
}

/// How many names the path of a program that is left alone may have.
pub const PATH_NAMES: usize = 16;
/// How many bytes a name of it may have, with a zero at its end.
pub const PATH_NAME_BYTES: usize = 48;

/// Key of one name in the paths of programs that are left alone: a step from the program's file towards the root.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecutableKey {
    /// Number of the table.
    pub table: u32,
    /// Where the names before it, from the file on, have led to; at the file, the number of the table.
    pub node: u32,
    /// The name, then zeroes.
    pub name: [u8; PATH_NAME_BYTES],
}

impl ExecutableKey {
    /// Bit of the value, which is the next node: a path is complete with this name.
    pub const END: u32 = 1 << 31;
    /// Bit of all nodes but those at files.
    pub const INNER: u32 = 1 << 30;
}

/// Key of a companion's listening socket, or of its datagram socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Number of the workload.
    pub workload: u32,
    /// Port, host byte order.
    pub port: u16,
    /// [`AF_INET`] or [`AF_INET6`]: which connections it accepts.
    pub family: u8,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
}

/// What happens to inbound connections to a port; the key is a [`PortKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboundRule {
    /// The companion's listening port, host byte order.
    pub companion_port: u16,
    /// Padding.
    pub pad: u16,
    /// [`flags::FAIL_CLOSED`] and [`flags::TRACED`].
    pub flags: u32,
}

/// What one workload has of what all of them share; the index is its number modulo [`WORKLOADS`](crate::WORKLOADS).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Number of the workload; 0 if it is nobody's.
    pub owner: u64,
    /// By [`Share::SLOTS`] and the others.
    pub taken: [u64; 4],
}

impl Share {
    /// Slots whose question is awaited.
    pub const SLOTS: usize = 0;
    /// Redirected sockets that are open.
    pub const CONNECTIONS: usize = 1;
    /// Destinations kept by source.
    pub const BY_SOURCE: usize = 2;
    /// Destinations of datagrams.
    pub const PEERS: usize = 3;
}

/// What the kernel side counts, for all workloads together.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Outbound connections sent to a companion.
    OutboundRedirected = 0,
    /// Outbound connections and datagrams passed on because they are excluded, or no rule matches.
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
    /// Datagrams of sockets without a peer, sent to a companion.
    DatagramsRedirected = 11,
    /// Connections and destinations for which a workload had no share left of what all of them share.
    ShareExhausted = 12,
}

impl Counter {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 13] = [
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
        Self::DatagramsRedirected,
        Self::ShareExhausted,
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
    assert!(size_of::<WorkloadConfig>() == 44);
    assert!(size_of::<Route>() == 8);
    assert!(size_of::<RouteKey>() == 12);
    assert!(size_of::<PeerKey>() == 32);
    assert!(size_of::<BoundKey>() == 16);
    assert!(size_of::<HeardKey>() == 32);
    assert!(size_of::<UserKey>() == 8);
    assert!(size_of::<ExecutableKey>() == 56);
    assert!(size_of::<ExemptKey>() == 16);
    assert!(size_of::<CompanionConfig>() == 20);
    assert!(size_of::<Destination>() == 20);
    assert!(size_of::<Redirected>() == 60);
    assert!(size_of::<BySourceKey>() == 32);
    assert!(size_of::<BySource>() == 28);
    assert!(size_of::<PortKey>() == 8);
    assert!(size_of::<Network4>() == 8);
    assert!(size_of::<Network6>() == 20);
    assert!(size_of::<ListenerKey>() == 8);
    assert!(size_of::<InboundRule>() == 8);
    assert!(size_of::<Share>() == 40);
};

#[cfg(feature = "user")]
mod pod {
    #![expect(unsafe_code, reason = "aya's marker for plain old data is an unsafe trait")]
    // SAFETY: all of them are `repr(C)`, `Copy`, without padding bytes (checked above) or pointers.
    unsafe impl aya::Pod for super::WorkloadConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ExemptKey {}
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
    unsafe impl aya::Pod for super::RouteKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PeerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PeerSlot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Route {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::UserKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ExecutableKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ListenerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::InboundRule {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Share {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ProgramName {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::HeldProcess {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ExecEvent {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::trace::Traced {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::trace::TraceState {}
}
