//! connect(): sends the workload's TCP connections to its companion.
//!
//! A socket that is free to be bound gets a slot's address as its source (v4-mapped for an IPv6 socket, so that one
//! listener on 127.0.0.1 serves both families). A socket that is bound already, or takes no v4-mapped address
//! (`IPV6_V6ONLY`, an address of its own), keeps or gets a source port, and its destination is kept by that source, which
//! the companion sees. What can be redirected
//! in neither way follows the failure mode, as does everything while no listener of the companion is there.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, sockaddr},
    helpers::generated::{bpf_bind, bpf_get_prandom_u32, bpf_set_retval, bpf_setsockopt},
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use pillion_common::{
    AF_INET, AF_INET6, Counter, Destination, Redirected, Route, SlotAddress, TCP, UDP, WorkloadConfig, flags,
    kernel,
    trace::{program, why},
};

use crate::{
    decide::decide,
    exempt::is_exempt,
    maps::{PL_REDIRECTED, PL_WORKLOADS, count, kernel_has},
    share,
    slots::{self, Taken},
    socket::{
        IPPROTO_MPTCP, IPPROTO_TCP, IPPROTO_UDP, LOOPBACK4, MAPPED, ONE, SOCK_DGRAM, SOCK_STREAM, TCP_CLOSE,
        TCP_SYN_SENT, cookie, is_mapped, listening, netns, read, socket_of, unmapped, write,
    },
    trace::{self, Outcome},
};

const PASS: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EADDRNOTAVAIL: i32 = 99;
const EPROTONOSUPPORT: i32 = 93;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
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
    let protocol = concerned(ctx, config, AF_INET);
    let sk = socket_of(ctx);
    if protocol == 0 || sk.is_null() {
        return PASS;
    }
    let destination = Destination {
        address: [read!((*ctx).user_ip4), 0, 0, 0],
        port_be: read!((*ctx).user_port) as u16,
        family: AF_INET,
    };
    let mut state = begin(sk, destination, config.workload, protocol);
    let outcome = to_companion4(ctx, sk, config, &mut state, protocol);
    trace::sent(program::CONNECT4, config, &state, &outcome);
    outcome.result
}

#[inline(always)]
fn to_companion4(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    config: &WorkloadConfig,
    state: &mut Redirected,
    protocol: u8,
) -> Outcome {
    if is_exempt(config) {
        return Outcome::passed(why::CGROUP, pass(ctx, config, false));
    }
    let route = match decide(config, &state.destination, protocol) {
        Ok(route) => route,
        Err(why) => return Outcome::passed(why, pass(ctx, config, false)),
    };
    if !listening(config.workload, route.companion_port, AF_INET, protocol) {
        return fail(ctx, config, false, route, ECONNREFUSED, why::NO_LISTENER);
    }
    let netns = netns(ctx, config.workload);
    state.bound[0] = read!((*sk).src_ip4);
    // An earlier connect has left the socket bound.
    if state.bound[0] != 0 || state.source_port != 0 {
        release_previous(ctx, netns);
    }
    let carried = if route.flags & Route::DNS != 0 {
        unasked(state);
        true
    } else {
        carry(ctx, state, config, netns, false)
    };
    if !carried || !commit(ctx, state, netns, false) {
        return fail(ctx, config, false, route, EADDRNOTAVAIL, uncarried(state));
    }
    write!((*ctx).user_ip4, LOOPBACK4);
    write!((*ctx).user_port, u32::from(route.companion_port.to_be()));
    Outcome::redirected(route, PASS)
}

#[cgroup_sock_addr(connect6)]
pub fn pl_connect6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    let protocol = concerned(ctx, config, AF_INET6);
    let sk = socket_of(ctx);
    if protocol == 0 || sk.is_null() {
        return PASS;
    }
    let (address, family) = unmapped([
        read!((*ctx).user_ip6[0]),
        read!((*ctx).user_ip6[1]),
        read!((*ctx).user_ip6[2]),
        read!((*ctx).user_ip6[3]),
    ]);
    let destination = Destination { address, port_be: read!((*ctx).user_port) as u16, family };
    let mut state = begin(sk, destination, config.workload, protocol);
    let outcome = to_companion6(ctx, sk, config, &mut state, protocol);
    trace::sent(program::CONNECT6, config, &state, &outcome);
    outcome.result
}

#[inline(always)]
fn to_companion6(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    config: &WorkloadConfig,
    state: &mut Redirected,
    protocol: u8,
) -> Outcome {
    if is_exempt(config) {
        return Outcome::passed(why::CGROUP, pass(ctx, config, true));
    }
    let route = match decide(config, &state.destination, protocol) {
        Ok(route) => route,
        Err(why) => return Outcome::passed(why, pass(ctx, config, true)),
    };
    let mapped = state.destination.family == AF_INET;
    // A link-local destination means nothing without its interface, which the companion could not be told.
    if !mapped
        && state.destination.address[0] & 0xffc0_0000_u32.to_be() == 0xfe80_0000_u32.to_be()
        && route.flags & Route::DNS == 0
    {
        return fail(ctx, config, true, route, ECONNREFUSED, why::INTERFACE);
    }
    let port = route.companion_port;
    let by4 = listening(config.workload, port, AF_INET, protocol);
    let bound =
        [read!((*sk).src_ip6[0]), read!((*sk).src_ip6[1]), read!((*sk).src_ip6[2]), read!((*sk).src_ip6[3])];
    let bound_any = bound[0] | bound[1] | bound[2] | bound[3] == 0;
    let has_port = read!((*sk).src_port) != 0;
    let netns = netns(ctx, config.workload);
    if has_port || !bound_any {
        release_previous(ctx, netns);
    }
    state.bound = if is_mapped(&bound) { [bound[3], 0, 0, 0] } else { bound };

    let dns = route.flags & Route::DNS != 0;
    // To a resolver by IPv6 nothing need be bound, so that a socket that is dissolved is as free as before.
    let unbound6 = dns && !mapped && listening(config.workload, port, AF_INET6, protocol);
    let mut carried = by4 && !unbound6 && !has_port && (bound_any || is_mapped(&bound)) && {
        if !dns {
            carry(ctx, state, config, netns, true)
        } else if bound_any {
            // Refused by a socket for IPv6 alone.
            let free = bind_to(ctx, [0, 0, MAPPED, LOOPBACK4], 0, true);
            state.flags |= if free { Redirected::REBOUND } else { 0 };
            free
        } else {
            true
        }
    };
    let mut refused = if by4 { EADDRNOTAVAIL } else { ECONNREFUSED };
    if !carried && !mapped && listening(config.workload, port, AF_INET6, protocol) {
        state.flags |= Redirected::DIALLED6;
        refused = EADDRNOTAVAIL;
        let from = if bound_any { [0, 0, 0, ONE] } else { bound };
        carried = dns || (has_port || take_port(ctx, state, from, true)) && carry_by_source(state, netns);
        if bound_any && !has_port && !dns {
            state.flags |= Redirected::REBOUND;
        }
    } else if !carried && by4 && has_port && (bound_any || is_mapped(&bound)) {
        carried = dns || carry_by_source(state, netns);
    }
    if dns {
        unasked(state);
    }
    if !carried || !commit(ctx, state, netns, true) {
        let why = if refused == ECONNREFUSED { why::NO_LISTENER } else { uncarried(state) };
        return fail(ctx, config, true, route, refused, why);
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
    write!((*ctx).user_port, u32::from(port.to_be()));
    Outcome::redirected(route, PASS)
}

/// close() of a workload's socket: gives the slot back when the connection never came about. After an established
/// connection it must stay, because the companion may not have asked yet.
#[cgroup_sock(sock_release)]
pub fn pl_release(ctx: SockContext) -> i32 {
    let sk = ctx.sock;
    let cookie = cookie(sk);
    let state = read!((*sk).state);
    // A datagram socket's companion may ask again as long as it is open.
    let over = state == TCP_SYN_SENT || state == TCP_CLOSE || read!((*sk).protocol) == IPPROTO_UDP;
    // SAFETY: the entry stays until it is removed below.
    if let Some(redirected) = unsafe { PL_REDIRECTED.get(cookie) } {
        let workload = redirected.workload;
        if over {
            slots::abandon(redirected, netns(sk, workload));
        }
        share::forget(cookie, workload);
    }
    PASS
}

/// socket(): there is no Multipath TCP within a redirected workload, as on a kernel without it (`EPROTONOSUPPORT`, upon
/// which programs take TCP). Its subflows are the kernel's own sockets: they are never released by the application, so
/// that what is kept for them would stay, and no name could be shown for them.
#[cgroup_sock(sock_create)]
pub fn pl_socket(ctx: SockContext) -> i32 {
    if read!((*ctx.sock).protocol) != IPPROTO_MPTCP {
        return PASS;
    }
    let config = PL_WORKLOADS.get();
    if config.flags & flags::OUTBOUND == 0 || is_exempt(config) {
        return PASS;
    }
    if kernel_has(kernel::RESULTS) {
        // SAFETY: sets the result of the system call, which is `EPERM` otherwise.
        unsafe { bpf_set_retval(-EPROTONOSUPPORT) };
    }
    DENY
}

/// The protocol of a connect that may be redirected, else 0. An address of another family than the socket's is the
/// kernel's to refuse.
#[inline(always)]
fn concerned(ctx: *mut bpf_sock_addr, config: &WorkloadConfig, family: u16) -> u8 {
    if config.flags & flags::OUTBOUND == 0 || read!((*ctx).user_family) != u32::from(family) {
        return 0;
    }
    let (kind, protocol) = (read!((*ctx).type_), read!((*ctx).protocol));
    if kind == SOCK_STREAM && protocol == IPPROTO_TCP {
        TCP
    } else if kind == SOCK_DGRAM && protocol == IPPROTO_UDP && config.flags & flags::DATAGRAMS != 0 {
        UDP
    } else {
        0
    }
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
fn begin(sk: *mut bpf_sock, destination: Destination, workload: u32, protocol: u8) -> Redirected {
    Redirected {
        destination,
        slot: Redirected::NO_SLOT,
        generation: 0,
        bound: [0; 4],
        flags: if protocol == UDP { Redirected::DATAGRAMS } else { 0 },
        interface: read!((*sk).bound_dev_if),
        source_port: read!((*sk).src_port),
        workload,
    }
}

/// The companion does not ask: the socket keeps its source, and shows what the application itself had bound.
#[inline(always)]
fn unasked(state: &mut Redirected) {
    state.flags |= Redirected::UNASKED;
    if SlotAddress::decode(u32::from_be(state.bound[0])).is_some() {
        state.bound = [0; 4];
        state.flags |= Redirected::REBOUND;
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
    let Some(taken) = slots::take(netns, config.workload, &state.destination) else {
        state.flags |= Redirected::EXHAUSTED;
        return false;
    };
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
    slots::keep_of_socket(state, netns)
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
fn commit(ctx: *mut bpf_sock_addr, state: &mut Redirected, netns: u64, v6: bool) -> bool {
    if !share::keep(cookie(ctx), state) {
        state.flags |= Redirected::EXHAUSTED;
        slots::abandon(state, netns);
        // Passed on, it would go out from a loopback address. What an earlier connect has left, `pass` undoes.
        if state.flags & Redirected::REBOUND != 0 {
            unbind(ctx, state.bound, v6);
        }
        return false;
    }
    if state.interface != 0 && !bind_to_interface(ctx, 0) {
        share::forget(cookie(ctx), state.workload);
        slots::abandon(state, netns);
        if state.flags & Redirected::REBOUND != 0 {
            unbind(ctx, state.bound, v6);
        }
        return false;
    }
    count(Counter::OutboundRedirected);
    true
}

/// Binds the socket to an interface, or frees it (0); whether it did. Linux 6.1; before, a socket can be freed by an empty
/// name, of an application that may do so itself (`CAP_NET_RAW`), but not bound again.
#[inline(always)]
fn bind_to_interface(ctx: *mut bpf_sock_addr, index: u32) -> bool {
    let mut value = index;
    let mut set = |option| {
        // SAFETY: a four-byte option value; a refusal leaves the socket as it is.
        unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, option, (&raw mut value).cast(), 4) == 0 }
    };
    set(SO_BINDTOIFINDEX) || (index == 0 && set(SO_BINDTODEVICE))
}

/// Lets the connect go where the application wants, and undoes what an earlier one left on the socket. What another
/// workload's programs have done stays: those of an inner one run first, and may just have taken the socket.
#[inline(always)]
fn pass(ctx: *mut bpf_sock_addr, config: &WorkloadConfig, v6: bool) -> i32 {
    let cookie = cookie(ctx);
    // What another workload's program has just redirected, which is within this one, is not this one's.
    // SAFETY: the entry stays until it is removed below.
    if let Some(previous) = unsafe { PL_REDIRECTED.get(cookie) }
        && previous.workload == config.workload
    {
        slots::abandon(previous, netns(ctx, previous.workload));
        let (flags, bound, interface) = (previous.flags, previous.bound, previous.interface);
        share::forget(cookie, config.workload);
        if flags & Redirected::REBOUND != 0 {
            unbind(ctx, bound, v6);
        }
        // Without its interface it would perhaps go another way than the application wants.
        if interface != 0 && !bind_to_interface(ctx, interface) {
            return refuse(ctx, v6, EADDRNOTAVAIL);
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

/// Why nothing carries the destination of a socket.
#[inline(always)]
fn uncarried(state: &Redirected) -> u8 {
    if state.flags & Redirected::EXHAUSTED != 0 { why::EXHAUSTED } else { why::UNBINDABLE }
}

/// The failure mode: passes on, or refuses with `errno`.
#[inline(always)]
fn fail(
    ctx: *mut bpf_sock_addr,
    config: &WorkloadConfig,
    v6: bool,
    route: Route,
    errno: i32,
    why: u8,
) -> Outcome {
    if config.flags & flags::FAIL_CLOSED == 0 {
        count(Counter::OutboundFailedOpen);
        return Outcome::failed_open(route, why, pass(ctx, config, v6));
    }
    count(Counter::OutboundFailedClosed);
    Outcome::refused(route, why, errno, refuse(ctx, v6, errno))
}

/// Refuses with `errno`. Where a program cannot set the result (before Linux 5.18), which would be `EPERM`, the connection
/// is refused by the kernel itself: it goes to port 0 on loopback, where nobody can listen.
#[inline(always)]
fn refuse(ctx: *mut bpf_sock_addr, v6: bool, errno: i32) -> i32 {
    if kernel_has(kernel::RESULTS) {
        // SAFETY: sets the result of the system call.
        unsafe { bpf_set_retval(-errno) };
        return DENY;
    }
    if !v6 {
        write!((*ctx).user_ip4, LOOPBACK4);
    } else if is_mapped_destination(ctx) {
        write!((*ctx).user_ip6[3], LOOPBACK4);
    } else {
        write!((*ctx).user_ip6[0], 0);
        write!((*ctx).user_ip6[1], 0);
        write!((*ctx).user_ip6[2], 0);
        write!((*ctx).user_ip6[3], ONE);
    }
    write!((*ctx).user_port, 0);
    PASS
}

#[inline(always)]
fn is_mapped_destination(ctx: *mut bpf_sock_addr) -> bool {
    is_mapped(&[read!((*ctx).user_ip6[0]), read!((*ctx).user_ip6[1]), read!((*ctx).user_ip6[2]), 0])
}
