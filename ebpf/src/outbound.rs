//! connect(): sends the workload's TCP connections to its companion.
//!
//! A socket that is free to be bound gets a slot's address as its source (v4-mapped for an IPv6 socket, so that one
//! listener on 127.0.0.1 serves both families). A socket that is bound already, or takes no v4-mapped address
//! (`IPV6_V6ONLY`, an address of its own), keeps or gets a source port, and its destination is kept by that source, which
//! the companion sees. What can be redirected
//! in neither way follows the failure mode, as does everything while no listener of the companion is there.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, sockaddr},
    btf_maps::lpm_trie::Key,
    helpers::generated::{
        bpf_bind, bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_set_retval, bpf_setsockopt,
    },
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use pillion_common::{
    AF_INET, AF_INET6, Counter, Destination, Network4, Network6, PortKey, Redirected, SlotAddress,
    WorkloadConfig, flags,
};

use crate::{
    maps::{PL_NETS4, PL_NETS6, PL_PORTS, PL_REDIRECTED, PL_WORKLOADS, count},
    slots::{self, Taken},
    socket::{
        IPPROTO_MPTCP, IPPROTO_TCP, LOOPBACK4, MAPPED, ONE, SOCK_STREAM, TCP_CLOSE, TCP_SYN_SENT, cookie,
        is_local4, is_local6, is_mapped, is_multicast4, is_multicast6, listening, read, socket_of, write,
    },
};

const PASS: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EADDRNOTAVAIL: i32 = 99;
const EPROTONOSUPPORT: i32 = 93;
const SOL_SOCKET: i32 = 1;
const SO_BINDTOIFINDEX: i32 = 62;

/// Source ports for sockets that take no slot: the dynamic range of RFC 6335.
const DYNAMIC_PORTS: (u32, u32) = (49152, 16384);
const TRIES_PORT: u32 = 8;

#[repr(C)]
struct SockaddrIn {
    family: u16,
    port_be: u16,
    address: u32,
    zero: [u32; 2],
}

#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port_be: u16,
    flowinfo: u32,
    address: [u32; 4],
    scope: u32,
}

#[cgroup_sock_addr(connect4)]
pub fn pl_connect4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    if !concerns(ctx, config, AF_INET) {
        return PASS;
    }
    let address = read!((*ctx).user_ip4);
    let port_be = read!((*ctx).user_port) as u16;
    let sk = socket_of(ctx);
    if sk.is_null() {
        return PASS;
    }
    if is_local4(address) || is_multicast4(address) {
        return pass(ctx, false);
    }
    if is_excluded4(config, address, port_be) {
        count(Counter::OutboundExcluded);
        return pass(ctx, false);
    }
    let port = u16::from_be(config.outbound_port_be);
    if !listening(config.workload, port, AF_INET) {
        return fail(ctx, config, false, ECONNREFUSED);
    }
    let destination = Destination { address: [address, 0, 0, 0], port_be, family: AF_INET };
    let netns = netns_of(ctx);
    let mut state = begin(sk, destination, config.workload);
    state.bound[0] = read!((*sk).src_ip4);
    // An earlier connect has left the socket bound.
    if state.bound[0] != 0 || state.source_port != 0 {
        release_previous(ctx, netns);
    }
    if !carry(ctx, &mut state, config, netns, false) {
        return fail(ctx, config, false, EADDRNOTAVAIL);
    }
    if !commit(ctx, &state, netns, false) {
        return fail(ctx, config, false, EADDRNOTAVAIL);
    }
    write!((*ctx).user_ip4, LOOPBACK4);
    write!((*ctx).user_port, u32::from(config.outbound_port_be));
    PASS
}

#[cgroup_sock_addr(connect6)]
pub fn pl_connect6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    if !concerns(ctx, config, AF_INET6) {
        return PASS;
    }
    let address = [
        read!((*ctx).user_ip6[0]),
        read!((*ctx).user_ip6[1]),
        read!((*ctx).user_ip6[2]),
        read!((*ctx).user_ip6[3]),
    ];
    let port_be = read!((*ctx).user_port) as u16;
    let sk = socket_of(ctx);
    if sk.is_null() {
        return PASS;
    }
    let mapped = is_mapped(&address);
    let (local, excluded) = if mapped {
        let local = is_local4(address[3]) || is_multicast4(address[3]);
        (local, is_excluded4(config, address[3], port_be))
    } else {
        let local = is_local6(&address) || is_multicast6(&address);
        (local, is_excluded6(config, &address, port_be))
    };
    if local {
        return pass(ctx, true);
    }
    if excluded {
        count(Counter::OutboundExcluded);
        return pass(ctx, true);
    }
    // A link-local destination means nothing without its interface, which the companion could not be told.
    if address[0] & 0xffc0_0000_u32.to_be() == 0xfe80_0000_u32.to_be() {
        return fail(ctx, config, true, ECONNREFUSED);
    }
    let destination = if mapped {
        Destination { address: [address[3], 0, 0, 0], port_be, family: AF_INET }
    } else {
        Destination { address, port_be, family: AF_INET6 }
    };
    let port = u16::from_be(config.outbound_port_be);
    let by4 = listening(config.workload, port, AF_INET);
    let bound =
        [read!((*sk).src_ip6[0]), read!((*sk).src_ip6[1]), read!((*sk).src_ip6[2]), read!((*sk).src_ip6[3])];
    let bound_any = bound[0] | bound[1] | bound[2] | bound[3] == 0;
    let has_port = read!((*sk).src_port) != 0;
    let netns = netns_of(ctx);
    if has_port || !bound_any {
        release_previous(ctx, netns);
    }
    let mut state = begin(sk, destination, config.workload);
    state.bound = if is_mapped(&bound) { [bound[3], 0, 0, 0] } else { bound };

    let mut carried =
        by4 && !has_port && (bound_any || is_mapped(&bound)) && carry(ctx, &mut state, config, netns, true);
    let mut refused = if by4 { EADDRNOTAVAIL } else { ECONNREFUSED };
    if !carried && !mapped && listening(config.workload, port, AF_INET6) {
        state.flags |= Redirected::DIALLED6;
        refused = EADDRNOTAVAIL;
        let from = if bound_any { [0, 0, 0, ONE] } else { bound };
        carried = (has_port || take_port(ctx, &mut state, from, true)) && carry_by_source(&state, netns);
        if bound_any && !has_port {
            state.flags |= Redirected::REBOUND;
        }
    } else if !carried && by4 && has_port && (bound_any || is_mapped(&bound)) {
        carried = carry_by_source(&state, netns);
    }
    if !carried || !commit(ctx, &state, netns, true) {
        return fail(ctx, config, true, refused);
    }
    write!((*ctx).user_ip6[0], 0);
    write!((*ctx).user_ip6[1], 0);
    if state.flags & Redirected::DIALLED6 == 0 {
        write!((*ctx).user_ip6[2], MAPPED);
        write!((*ctx).user_ip6[3], LOOPBACK4);
    } else {
        write!((*ctx).user_ip6[2], 0);
        write!((*ctx).user_ip6[3], ONE);
    }
    write!((*ctx).user_port, u32::from(config.outbound_port_be));
    PASS
}

/// close() of a workload's socket: gives the slot back when the connection never came about. After an established
/// connection it must stay, because the companion may not have asked yet.
#[cgroup_sock(sock_release)]
pub fn pl_release(ctx: SockContext) -> i32 {
    let sk = ctx.sock;
    let cookie = cookie(sk);
    let state = read!((*sk).state);
    if (state == TCP_SYN_SENT || state == TCP_CLOSE)
        // SAFETY: the entry stays until it is removed below.
        && let Some(redirected) = unsafe { PL_REDIRECTED.get(cookie) }
    {
        // SAFETY: a context of this program type is what the helper takes.
        let netns = unsafe { bpf_get_netns_cookie(sk.cast()) };
        slots::abandon(redirected, netns);
    }
    let _ = PL_REDIRECTED.remove(cookie);
    PASS
}

/// socket(): there is no Multipath TCP within a redirected workload, as on a kernel without it (`EPROTONOSUPPORT`, upon
/// which programs take TCP). Its subflows are the kernel's own sockets: they are never released by the application, so
/// that what is kept for them would stay, and no name could be shown for them.
#[cgroup_sock(sock_create)]
pub fn pl_socket(ctx: SockContext) -> i32 {
    if read!((*ctx.sock).protocol) != IPPROTO_MPTCP || PL_WORKLOADS.get().flags & flags::OUTBOUND == 0 {
        return PASS;
    }
    // SAFETY: sets the result of the system call (Linux 5.18).
    unsafe { bpf_set_retval(-EPROTONOSUPPORT) };
    DENY
}

/// An address of another family than the socket's is the kernel's to refuse.
#[inline(always)]
fn concerns(ctx: *mut bpf_sock_addr, config: &WorkloadConfig, family: u16) -> bool {
    config.flags & flags::OUTBOUND != 0
        && read!((*ctx).user_family) == u32::from(family)
        && read!((*ctx).type_) == SOCK_STREAM
        && read!((*ctx).protocol) == IPPROTO_TCP
}

#[inline(always)]
fn netns_of(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: a context of this program type is what the helper takes (Linux 5.14).
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

#[inline(always)]
fn is_excluded_port(config: &WorkloadConfig, port_be: u16) -> bool {
    let key = PortKey { workload: config.workload, port: u16::from_be(port_be), pad: 0 };
    config.flags & flags::EXCLUDES_PORTS != 0 && PL_PORTS.get_ptr(key).is_some()
}

#[inline(always)]
fn is_excluded4(config: &WorkloadConfig, address: u32, port_be: u16) -> bool {
    if is_excluded_port(config, port_be) {
        return true;
    }
    let key = Key::new(64, Network4 { workload: config.workload, address });
    config.flags & flags::EXCLUDES_NETWORKS4 != 0 && PL_NETS4.get(&key).is_some()
}

#[inline(always)]
fn is_excluded6(config: &WorkloadConfig, address: &[u32; 4], port_be: u16) -> bool {
    if is_excluded_port(config, port_be) {
        return true;
    }
    let key = Key::new(160, Network6 { workload: config.workload, address: *address });
    config.flags & flags::EXCLUDES_NETWORKS6 != 0 && PL_NETS6.get(&key).is_some()
}

/// Gives back what an earlier connect of the same socket took: it has failed, or there would not be another.
#[inline(always)]
fn release_previous(ctx: *mut bpf_sock_addr, netns: u64) {
    // SAFETY: the entry stays: this socket is locked by its connect.
    if let Some(previous) = unsafe { PL_REDIRECTED.get(cookie(ctx)) } {
        slots::abandon(previous, netns);
    }
}

#[inline(always)]
fn begin(sk: *mut bpf_sock, destination: Destination, workload: u32) -> Redirected {
    Redirected {
        destination,
        slot: Redirected::NO_SLOT,
        generation: 0,
        bound: [0; 4],
        flags: 0,
        interface: read!((*sk).bound_dev_if),
        source_port: read!((*sk).src_port),
        workload,
    }
}

/// Lets the source of the connection carry the destination: a slot's address where the socket can take it, else the
/// source that it is bound to (IPv4 only; for IPv6 sockets the caller decides).
#[inline(always)]
fn carry(
    ctx: *mut bpf_sock_addr,
    state: &mut Redirected,
    config: &WorkloadConfig,
    netns: u64,
    v6: bool,
) -> bool {
    if state.source_port != 0 {
        return !v6 && carry_by_source(state, netns);
    }
    let bound = state.bound[0];
    // Bound by the application to an address alone (`IP_BIND_ADDRESS_NO_PORT`): it stays, so that the companion can take it
    // for its own dial. Without a free port it cannot.
    if bound != 0 && SlotAddress::decode(u32::from_be(bound)).is_none() {
        let from = if v6 { [0, 0, MAPPED, bound] } else { [bound, 0, 0, 0] };
        if take_port(ctx, state, from, v6) {
            return carry_by_source(state, netns);
        }
    }
    let Some(taken) = slots::take(netns, config.workload, &state.destination) else { return false };
    let source = SlotAddress::encode(taken.slot, taken.generation).to_be();
    if bind_to(ctx, if v6 { [0, 0, MAPPED, source] } else { [source, 0, 0, 0] }, 0, v6) {
        // A socket that an earlier connect was bound for keeps what the application itself had bound: nothing.
        if SlotAddress::decode(u32::from_be(state.bound[0])).is_some() {
            state.bound = [0; 4];
        }
        state.slot = taken.slot;
        state.generation = taken.generation;
        state.flags |= Redirected::REBOUND;
        return true;
    }
    slots::give_back(Taken { ..taken });
    false
}

#[inline(always)]
fn carry_by_source(state: &Redirected, netns: u64) -> bool {
    slots::keep_by_source(&slots::key_of(state, netns), &state.destination, state.workload)
}

/// Binds a socket to `from` and a port of our choice, because only a known source can carry the destination.
#[inline(always)]
fn take_port(ctx: *mut bpf_sock_addr, state: &mut Redirected, from: [u32; 4], v6: bool) -> bool {
    for _ in 0..TRIES_PORT {
        // SAFETY: takes nothing, returns a number.
        let port = DYNAMIC_PORTS.0 + unsafe { bpf_get_prandom_u32() } % DYNAMIC_PORTS.1;
        if bind_to(ctx, from, (port as u16).to_be(), v6) {
            state.source_port = port;
            return true;
        }
    }
    false
}

#[inline(always)]
fn bind_to(ctx: *mut bpf_sock_addr, address: [u32; 4], port_be: u16, v6: bool) -> bool {
    if v6 {
        let mut to = SockaddrIn6 { family: AF_INET6, port_be, flowinfo: 0, address, scope: 0 };
        // SAFETY: address and length of a sockaddr_in6; the verifier checks the context.
        unsafe { bpf_bind(ctx, (&raw mut to).cast::<sockaddr>(), size_of::<SockaddrIn6>() as i32) == 0 }
    } else {
        let mut to = SockaddrIn { family: AF_INET, port_be, address: address[0], zero: [0; 2] };
        // SAFETY: address and length of a sockaddr_in; the verifier checks the context.
        unsafe { bpf_bind(ctx, (&raw mut to).cast::<sockaddr>(), size_of::<SockaddrIn>() as i32) == 0 }
    }
}

/// Records what the application is to see, and frees the socket from its interface: the companion is on loopback.
#[inline(always)]
fn commit(ctx: *mut bpf_sock_addr, state: &Redirected, netns: u64, v6: bool) -> bool {
    if PL_REDIRECTED.insert(cookie(ctx), state, 0).is_err() {
        count(Counter::SlotsExhausted);
        slots::abandon(state, netns);
        // Passed on, it would go out from a loopback address. What an earlier connect has left, `pass` undoes.
        if state.flags & Redirected::REBOUND != 0 {
            unbind(ctx, state.bound, v6);
        }
        return false;
    }
    if state.interface != 0 {
        bind_to_interface(ctx, 0);
    }
    count(Counter::OutboundRedirected);
    true
}

#[inline(always)]
fn bind_to_interface(ctx: *mut bpf_sock_addr, index: u32) {
    let mut index = index;
    // SAFETY: a four-byte option value; a refusal leaves the socket as it is.
    unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, SO_BINDTOIFINDEX, (&raw mut index).cast(), 4) };
}

/// Lets the connect go where the application wants, and undoes what an earlier one left on the socket.
#[inline(always)]
fn pass(ctx: *mut bpf_sock_addr, v6: bool) -> i32 {
    let cookie = cookie(ctx);
    // SAFETY: the entry stays until it is removed below.
    if let Some(previous) = unsafe { PL_REDIRECTED.get(cookie) } {
        slots::abandon(previous, netns_of(ctx));
        let (flags, bound, interface) = (previous.flags, previous.bound, previous.interface);
        let _ = PL_REDIRECTED.remove(cookie);
        if flags & Redirected::REBOUND != 0 {
            unbind(ctx, bound, v6);
        }
        if interface != 0 {
            bind_to_interface(ctx, interface);
        }
    }
    PASS
}

/// Binds the socket to what the application had bound it to.
#[inline(always)]
fn unbind(ctx: *mut bpf_sock_addr, bound: [u32; 4], v6: bool) {
    let bound4 = bound[1] | bound[2] | bound[3] == 0 && bound[0] != 0;
    bind_to(ctx, if v6 && bound4 { [0, 0, MAPPED, bound[0]] } else { bound }, 0, v6);
}

/// The failure mode: passes on, or refuses with `errno`.
#[inline(always)]
fn fail(ctx: *mut bpf_sock_addr, config: &WorkloadConfig, v6: bool, errno: i32) -> i32 {
    if config.flags & flags::FAIL_CLOSED == 0 {
        count(Counter::OutboundFailedOpen);
        return pass(ctx, v6);
    }
    count(Counter::OutboundFailedClosed);
    // SAFETY: sets the result of the system call (Linux 5.18).
    unsafe { bpf_set_retval(-errno) };
    DENY
}
