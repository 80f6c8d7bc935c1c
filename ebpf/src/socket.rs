//! Reading sockets and contexts: every raw access to a kernel structure that programs share.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_map_lookup_elem, bpf_sk_release},
};
use pillion_common::{AF_INET, AF_INET6, Destination, ListenerKey, UDP, kernel};

use crate::maps::{PL_LISTENERS, kernel_has};

pub const SOCK_STREAM: u32 = 1;
pub const SOCK_DGRAM: u32 = 2;
pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
pub const IPPROTO_MPTCP: u32 = 262;
/// `TCP_ESTABLISHED` (also of a UDP socket with a peer), `TCP_SYN_SENT`, `TCP_CLOSE` and `TCP_LISTEN` of net/tcp_states.h.
pub const TCP_ESTABLISHED: u32 = 1;
pub const TCP_SYN_SENT: u32 = 2;
pub const TCP_CLOSE: u32 = 7;
pub const TCP_LISTEN: u32 = 10;

/// 127.0.0.1, ::1's last word and the ::ffff:0:0/96 word, as they stand in memory.
pub const LOOPBACK4: u32 = 0x7f00_0001_u32.to_be();
pub const ONE: u32 = 1_u32.to_be();
pub const MAPPED: u32 = 0xffff_u32.to_be();

/// Reads one field by its own instruction: the verifier rejects the wider or merged context accesses that the
/// compiler would otherwise make.
macro_rules! read {
    ($place:expr) => {
        // SAFETY: the pointer is a context or a socket that the verifier tracks; it checks each access.
        unsafe { core::ptr::read_volatile(&raw const $place) }
    };
}
/// Writes one field by its own instruction.
macro_rules! write {
    ($place:expr, $value:expr) => {
        // SAFETY: as for `read!`.
        unsafe { core::ptr::write_volatile(&raw mut $place, $value) }
    };
}
pub(crate) use {read, write};

/// The socket of a `sock_addr` context.
#[inline(always)]
pub fn socket_of(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    read!((*ctx).__bindgen_anon_1.sk)
}

/// The cookie of the context's socket: unique since boot (Linux 5.7 for a `sock` context).
#[inline(always)]
pub fn cookie<T>(ctx: *mut T) -> u64 {
    // SAFETY: called with contexts of types that the helper takes.
    unsafe { bpf_get_socket_cookie(ctx.cast()) }
}

/// What stands for the network namespace of a context's socket in keys and slots: its cookie, or, where it could not be had
/// when the companion asks, the workload's number.
#[inline(always)]
pub fn netns<T>(ctx: *mut T, workload: u32) -> u64 {
    if kernel_has(kernel::NETNS_OF_OPTIONS) {
        // SAFETY: called with contexts of types that the helper takes (Linux 5.7; for getsockopt 5.15).
        unsafe { bpf_get_netns_cookie(ctx.cast()) }
    } else {
        u64::from(workload)
    }
}

/// Looks up a companion's socket and releases it again: is there one that listens, or takes datagrams?
#[inline(always)]
pub fn listening(workload: u32, port: u16, family: u16, protocol: u8) -> bool {
    let key = ListenerKey { workload, port, family: family as u8, protocol };
    // SAFETY: a lookup in a map of sockets returns a referenced socket or null; it is released below.
    let sk =
        unsafe { bpf_map_lookup_elem((&raw const PL_LISTENERS).cast_mut().cast(), (&raw const key).cast()) };
    if sk.is_null() {
        return false;
    }
    let state = read!((*sk.cast::<bpf_sock>()).state);
    // SAFETY: the reference taken above.
    unsafe { bpf_sk_release(sk) };
    protocol == UDP || state == TCP_LISTEN
}

/// 127.0.0.0/8, and 0.0.0.0, which connect() takes for this host.
#[inline(always)]
pub fn is_local4(address: u32) -> bool {
    address & 0xff00_0000_u32.to_be() == 0x7f00_0000_u32.to_be() || address == 0
}

/// `::1`, and `::`, which connect() takes for this host.
#[inline(always)]
pub fn is_local6(address: &[u32; 4]) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == 0 && (address[3] == ONE || address[3] == 0)
}

/// 224.0.0.0/4 and 255.255.255.255: connect() of a stream refuses them itself (`ENETUNREACH`).
#[inline(always)]
pub fn is_multicast4(address: u32) -> bool {
    address & 0xf000_0000_u32.to_be() == 0xe000_0000_u32.to_be() || address == u32::MAX
}

/// ff00::/8, likewise.
#[inline(always)]
pub fn is_multicast6(address: &[u32; 4]) -> bool {
    address[0] & 0xff00_0000_u32.to_be() == 0xff00_0000_u32.to_be()
}

/// `::ffff:0:0/96`.
#[inline(always)]
pub fn is_mapped(address: &[u32; 4]) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// Four address words and their family, with a v4-mapped address made IPv4.
#[inline(always)]
pub fn unmapped(address: [u32; 4]) -> ([u32; 4], u16) {
    if is_mapped(&address) { ([address[3], 0, 0, 0], AF_INET) } else { (address, AF_INET6) }
}

/// The peer's address of `sk`.
#[inline(always)]
pub fn remote(sk: *mut bpf_sock) -> ([u32; 4], u16) {
    if read!((*sk).family) == u32::from(AF_INET) {
        return ([read!((*sk).dst_ip4), 0, 0, 0], AF_INET);
    }
    unmapped([
        read!((*sk).dst_ip6[0]),
        read!((*sk).dst_ip6[1]),
        read!((*sk).dst_ip6[2]),
        read!((*sk).dst_ip6[3]),
    ])
}

/// The local address of `sk`.
#[inline(always)]
pub fn local(sk: *mut bpf_sock) -> ([u32; 4], u16) {
    if read!((*sk).family) == u32::from(AF_INET) {
        return ([read!((*sk).src_ip4), 0, 0, 0], AF_INET);
    }
    unmapped([
        read!((*sk).src_ip6[0]),
        read!((*sk).src_ip6[1]),
        read!((*sk).src_ip6[2]),
        read!((*sk).src_ip6[3]),
    ])
}

/// A destination as numbers: a function that takes numbers alone is verified once, by itself, on every kernel that is
/// supported. One that takes pointers is so from Linux 5.12 on only (`apart!`).
pub struct Packed {
    /// The first two words of the address.
    pub low: u64,
    /// The other two.
    pub high: u64,
    /// Port, network byte order, and above it the family.
    pub end: u64,
}

impl Packed {
    #[inline(always)]
    pub fn of(destination: &Destination) -> Self {
        let [first, second, third, fourth] = destination.address.map(u64::from);
        Self {
            low: first | second << 32,
            high: third | fourth << 32,
            end: u64::from(destination.port_be) | u64::from(destination.family) << 16,
        }
    }

    #[inline(always)]
    pub fn destination(&self) -> Destination {
        Destination {
            address: [self.low as u32, (self.low >> 32) as u32, self.high as u32, (self.high >> 32) as u32],
            port_be: self.end as u16,
            family: (self.end >> 16) as u16,
        }
    }
}
