//! sendmsg() and recvmsg(): sends the datagrams of sockets without a peer to a companion, and shows its answers as coming
//! from who was asked. (Sockets with a peer are the connect programs' matter.)
//!
//! IPv4: the datagram's source is the address that stands for its destination (`peers`); the companion answers to that,
//! and `pl_reply4` gives the answer that source. IPv6 knows no such addresses on loopback: a socket has one destination, of
//! which another one follows the failure mode; but resolvers can be asked in any number, since it is the companion
//! that answers.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::bpf_set_retval,
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use pillion_common::{
    AF_INET, AF_INET6, BoundKey, Counter, Destination, HeardKey, Redirected, Route, SlotAddress, UDP,
    WorkloadConfig, flags, kernel,
    trace::{program, why},
};

use crate::{
    decide::decide,
    exempt::is_exempt,
    maps::{PL_BOUND, PL_COMPANIONS, PL_HEARD, PL_REDIRECTED, PL_WORKLOADS, count, kernel_has},
    peers, share, slots,
    socket::{
        IPPROTO_UDP, LOOPBACK4, MAPPED, ONE, TCP_ESTABLISHED, cookie, listening, netns, read, socket_of,
        unmapped, write,
    },
    trace::{self, Outcome},
};

const PASS: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EADDRNOTAVAIL: i32 = 99;

#[cgroup_sock_addr(sendmsg4)]
pub fn pl_send4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    let sk = socket_of(ctx);
    if !concerned(ctx, config) || sk.is_null() {
        return PASS;
    }
    let destination = Destination {
        address: [read!((*ctx).user_ip4), 0, 0, 0],
        port_be: read!((*ctx).user_port) as u16,
        family: AF_INET,
    };
    let outcome = to_companion4(ctx, sk, config, &destination);
    told(program::SEND4, sk, config, &destination, &outcome);
    outcome.result
}

#[inline(always)]
fn to_companion4(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    config: &WorkloadConfig,
    destination: &Destination,
) -> Outcome {
    if is_exempt(config) {
        return Outcome::passed(why::CGROUP, PASS);
    }
    let route = match decide(config, destination, UDP) {
        Ok(route) => route,
        Err(why) => return Outcome::passed(why, PASS),
    };
    if is_answer(ctx, &route, destination) {
        return Outcome::passed(why::ANSWER, PASS);
    }
    // A socket that is bound to an interface does not reach loopback.
    if read!((*sk).bound_dev_if) != 0 {
        return fail(config, route, ECONNREFUSED, why::INTERFACE);
    }
    if !listening(config.workload, route.companion_port, AF_INET, UDP) {
        return fail(config, route, ECONNREFUSED, why::NO_LISTENER);
    }
    let netns = netns(ctx, config.workload);
    let Some(address) = peers::address_of(netns, config.workload, destination) else {
        return fail(config, route, EADDRNOTAVAIL, why::EXHAUSTED);
    };
    // Of an IPv6 socket, too: it is bound to a v4-mapped address, or it could not send this.
    let bound = read!((*sk).src_ip4);
    if bound != 0 {
        let key = BoundKey { netns, address, port: read!((*sk).src_port) };
        // SAFETY: compared at once, before any other operation on the map.
        let known = unsafe { PL_BOUND.get(key) }.is_some_and(|known| *known == bound);
        if !known && PL_BOUND.insert(key, bound, 0).is_err() {
            return fail(config, route, EADDRNOTAVAIL, why::EXHAUSTED);
        }
    }
    write!((*ctx).msg_src_ip4, address);
    write!((*ctx).user_ip4, LOOPBACK4);
    write!((*ctx).user_port, u32::from(route.companion_port.to_be()));
    count(Counter::DatagramsRedirected);
    Outcome::redirected(route, PASS)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn pl_send6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    let sk = socket_of(ctx);
    if !concerned(ctx, config) || sk.is_null() {
        return PASS;
    }
    let address = [
        read!((*ctx).user_ip6[0]),
        read!((*ctx).user_ip6[1]),
        read!((*ctx).user_ip6[2]),
        read!((*ctx).user_ip6[3]),
    ];
    let destination = Destination { address, port_be: read!((*ctx).user_port) as u16, family: AF_INET6 };
    let outcome = to_companion6(ctx, sk, config, &destination);
    told(program::SEND6, sk, config, &destination, &outcome);
    outcome.result
}

#[inline(always)]
fn to_companion6(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    config: &WorkloadConfig,
    destination: &Destination,
) -> Outcome {
    if is_exempt(config) {
        return Outcome::passed(why::CGROUP, PASS);
    }
    let route = match decide(config, destination, UDP) {
        Ok(route) => route,
        Err(why) => return Outcome::passed(why, PASS),
    };
    if is_answer(ctx, &route, destination) {
        return Outcome::passed(why::ANSWER, PASS);
    }
    let dns = route.flags & Route::DNS != 0;
    let link_local = destination.address[0] & 0xffc0_0000_u32.to_be() == 0xfe80_0000_u32.to_be();
    if read!((*sk).bound_dev_if) != 0 || link_local && !dns {
        return fail(config, route, ECONNREFUSED, why::INTERFACE);
    }
    if !listening(config.workload, route.companion_port, AF_INET6, UDP) {
        return fail(config, route, ECONNREFUSED, why::NO_LISTENER);
    }
    let why = remember(ctx, sk, config, destination, dns);
    if why != why::NOTHING {
        return fail(config, route, EADDRNOTAVAIL, why);
    }
    write!((*ctx).user_ip6[0], 0);
    write!((*ctx).user_ip6[1], 0);
    write!((*ctx).user_ip6[2], 0);
    write!((*ctx).user_ip6[3], ONE);
    write!((*ctx).user_port, u32::from(route.companion_port.to_be()));
    count(Counter::DatagramsRedirected);
    Outcome::redirected(route, PASS)
}

/// Keeps the destination of an IPv6 socket without a peer, for its answers and for the companion's question; tells why it
/// cannot.
#[inline(always)]
fn remember(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    config: &WorkloadConfig,
    destination: &Destination,
    dns: bool,
) -> u8 {
    let cookie = cookie(ctx);
    // SAFETY: compared at once; another thread's datagram may change it in between, as if it had been sent later.
    if let Some(known) = unsafe { PL_REDIRECTED.get(cookie) } {
        if known.destination == *destination {
            return why::NOTHING;
        }
        if !dns || known.flags & Redirected::UNASKED == 0 {
            return why::OTHER_DESTINATION;
        }
    }
    let state = Redirected {
        destination: *destination,
        slot: Redirected::NO_SLOT,
        generation: 0,
        bound: [
            read!((*sk).src_ip6[0]),
            read!((*sk).src_ip6[1]),
            read!((*sk).src_ip6[2]),
            read!((*sk).src_ip6[3]),
        ],
        flags: Redirected::DATAGRAMS | Redirected::DIALLED6 | if dns { Redirected::UNASKED } else { 0 },
        interface: 0,
        source_port: read!((*sk).src_port),
        workload: config.workload,
    };
    if !dns {
        if !slots::keep_of_socket(&state, netns(ctx, config.workload)) {
            return why::UNBINDABLE;
        }
    }
    let kept = share::keep(cookie, &state);
    if !kept && !dns {
        slots::abandon(&state, netns(ctx, config.workload));
    }
    if kept { why::NOTHING } else { why::EXHAUSTED }
}

/// Tells of a datagram, if the workload is traced.
#[inline(always)]
fn told(
    program: u8,
    sk: *mut bpf_sock,
    config: &WorkloadConfig,
    destination: &Destination,
    outcome: &Outcome,
) {
    if !trace::TELLS || config.flags & flags::TRACED == 0 {
        return;
    }
    let dialled6 = if program == program::SEND6 { Redirected::DIALLED6 } else { 0 };
    let socket = Redirected {
        destination: *destination,
        slot: Redirected::NO_SLOT,
        generation: 0,
        // Each by its own instruction: one at an offset that is chosen at run time is refused.
        bound: if program == program::SEND6 {
            [
                read!((*sk).src_ip6[0]),
                read!((*sk).src_ip6[1]),
                read!((*sk).src_ip6[2]),
                read!((*sk).src_ip6[3]),
            ]
        } else {
            [read!((*sk).src_ip4), 0, 0, 0]
        },
        flags: Redirected::DATAGRAMS | dialled6,
        interface: 0,
        source_port: read!((*sk).src_port),
        workload: config.workload,
    };
    trace::sent(program, config, &socket, outcome);
}

#[cgroup_sock_addr(recvmsg4)]
pub fn pl_receive4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    if concerned(ctx, config) {
        let from = Destination {
            address: [read!((*ctx).user_ip4), 0, 0, 0],
            port_be: read!((*ctx).user_port) as u16,
            family: AF_INET,
        };
        if let Some(asked) = asked(ctx, config, &from) {
            write!((*ctx).user_ip4, asked.address[0]);
            write!((*ctx).user_port, u32::from(asked.port_be));
        }
    }
    PASS
}

#[cgroup_sock_addr(recvmsg6)]
pub fn pl_receive6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let config = PL_WORKLOADS.get();
    if concerned(ctx, config) {
        let words = [
            read!((*ctx).user_ip6[0]),
            read!((*ctx).user_ip6[1]),
            read!((*ctx).user_ip6[2]),
            read!((*ctx).user_ip6[3]),
        ];
        let (address, family) = unmapped(words);
        let from = Destination { address, port_be: read!((*ctx).user_port) as u16, family };
        if let Some(asked) = asked(ctx, config, &from) {
            let words =
                if asked.family == AF_INET { [0, 0, MAPPED, asked.address[0]] } else { asked.address };
            write!((*ctx).user_ip6[0], words[0]);
            write!((*ctx).user_ip6[1], words[1]);
            write!((*ctx).user_ip6[2], words[2]);
            write!((*ctx).user_ip6[3], words[3]);
            write!((*ctx).user_port, u32::from(asked.port_be));
        }
    }
    PASS
}

/// Who was asked, if the datagram is a companion's answer. Of others the sender is noted, so that the application can
/// answer it.
#[inline(always)]
fn asked(ctx: *mut bpf_sock_addr, config: &WorkloadConfig, from: &Destination) -> Option<Destination> {
    if from.family == AF_INET && SlotAddress::decode_peer(u32::from_be(from.address[0])).is_some() {
        return peers::destination_of(from.address[0], netns(ctx, config.workload));
    }
    let loopback = if from.family == AF_INET {
        from.address[0] == LOOPBACK4
    } else {
        from.address[0] | from.address[1] | from.address[2] == 0 && from.address[3] == ONE
    };
    if loopback {
        // SAFETY: copied at once, before any other operation on the map.
        let (marks, destination) = unsafe { PL_REDIRECTED.get(cookie(ctx)) }
            .map(|redirected| (redirected.flags, redirected.destination))?;
        let sk = socket_of(ctx);
        // A socket with a peer hears nobody else; to one without, others on loopback may send as well.
        let answered = marks & Redirected::DATAGRAMS != 0
            && !sk.is_null()
            && (read!((*sk).state) == TCP_ESTABLISHED
                || listening(config.workload, u16::from_be(from.port_be), from.family, UDP));
        return answered.then_some(destination);
    }
    if config.flags & flags::ANSWERS != 0 {
        let key = heard(ctx, from);
        if PL_HEARD.get_ptr(key).is_none() {
            let _ = PL_HEARD.insert(key, 1, 0);
        }
    }
    None
}

/// Whether this goes to somebody who has sent something to this very socket: an answer of the application's, which is a
/// server then.
#[inline(always)]
fn is_answer(ctx: *mut bpf_sock_addr, route: &Route, to: &Destination) -> bool {
    route.flags & Route::DNS == 0 && PL_HEARD.get_ptr(heard(ctx, to)).is_some()
}

#[inline(always)]
fn heard(ctx: *mut bpf_sock_addr, peer: &Destination) -> HeardKey {
    HeardKey {
        socket: cookie(ctx),
        address: peer.address,
        port_be: peer.port_be,
        family: peer.family,
        pad: 0,
    }
}

/// sendmsg() of a companion: an answer to an address that stands for a destination comes from there.
#[cgroup_sock_addr(sendmsg4)]
pub fn pl_reply4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let address = read!((*ctx).user_ip4);
    if SlotAddress::decode_peer(u32::from_be(address)).is_none() {
        return PASS;
    }
    let port = u32::from(u16::from_be(read!((*ctx).user_port) as u16));
    let netns = netns(ctx, PL_COMPANIONS.get().workload);
    // SAFETY: copied at once, before any other operation on the map.
    let bound = unsafe { PL_BOUND.get(BoundKey { netns, address, port }) }.copied();
    write!((*ctx).msg_src_ip4, address);
    if let Some(bound) = bound {
        write!((*ctx).user_ip4, bound);
    }
    PASS
}

#[inline(always)]
fn concerned(ctx: *mut bpf_sock_addr, config: &WorkloadConfig) -> bool {
    config.flags & flags::DATAGRAMS != 0 && read!((*ctx).protocol) == IPPROTO_UDP
}

/// The failure mode: passes on, or refuses with `errno`; before Linux 5.18 with `EPERM`.
#[inline(always)]
fn fail(config: &WorkloadConfig, route: Route, errno: i32, why: u8) -> Outcome {
    if config.flags & flags::FAIL_CLOSED == 0 {
        count(Counter::OutboundFailedOpen);
        return Outcome::failed_open(route, why, PASS);
    }
    count(Counter::OutboundFailedClosed);
    if kernel_has(kernel::RESULTS) {
        // SAFETY: sets the result of the system call.
        unsafe { bpf_set_retval(-errno) };
    }
    Outcome::refused(route, why, errno, DENY)
}
