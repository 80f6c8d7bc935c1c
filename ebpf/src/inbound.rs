//! sk_lookup in the workload's network namespace: steers arriving connections to the companion's listener.
//!
//! Left alone: what arrives on loopback, what this host sent to itself (the companion's own dial to the application
//! among it), and every port without a rule.

use aya_ebpf::{
    bindings::{
        bpf_sk_lookup, bpf_sock,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use pillion_common::{
    AF_INET, AF_INET6, Counter, Destination, InboundRule, ListenerKey, PortKey, Route, TCP, flags, kernel,
    trace::{TraceEvent, program, why},
};

use crate::{
    maps::{PL_INBOUND, PL_LISTENERS, STEER_WORKLOAD, count, kernel_has},
    socket::{IPPROTO_TCP, TCP_LISTEN, is_local4, is_local6, is_mapped, read},
    trace::{self, Outcome},
};

/// A socket that another program of the namespace has selected before is not taken.
const BPF_SK_LOOKUP_F_REPLACE: u64 = 1;
/// Index of the loopback interface in every network namespace.
const LOOPBACK_INTERFACE: u32 = 1;
/// What the kernel tells who connects to a port of this host that is refused.
const ECONNREFUSED: i32 = 111;

#[sk_lookup]
pub fn pl_steer(ctx: SkLookupContext) -> u32 {
    let ctx = ctx.lookup;
    if read!((*ctx).protocol) != IPPROTO_TCP {
        return SK_PASS;
    }
    // What comes by loopback to another address than the interface's own counts as arriving at that address's interface.
    if kernel_has(kernel::ARRIVAL_INTERFACE) {
        if read!((*ctx).ingress_ifindex) == LOOPBACK_INTERFACE {
            return SK_PASS;
        }
    } else if is_for_loopback(ctx) {
        return SK_PASS;
    }
    let workload = STEER_WORKLOAD.load();
    let key = PortKey { workload, port: read!((*ctx).local_port) as u16, pad: 0 };
    // SAFETY: copied at once, before any other operation on the map.
    let Some(rule) = (unsafe { PL_INBOUND.get(key) }).copied() else { return SK_PASS };
    let outcome = steer(ctx, workload, &rule);
    if trace::TELLS && rule.flags & flags::TRACED != 0 {
        let [source, original] = ends(ctx);
        trace::arrived(program::STEER, workload, &source, &original, &outcome);
    }
    outcome.result as u32
}

#[inline(always)]
fn steer(ctx: *mut bpf_sk_lookup, workload: u32, rule: &InboundRule) -> Outcome {
    let Some(family) = arriving_from_outside(ctx) else { return Outcome::passed(why::OWN, SK_PASS as i32) };
    let route =
        Route { companion_port: rule.companion_port, flags: Route::REDIRECT, rule: TraceEvent::NO_RULE };
    let key = ListenerKey { workload, port: rule.companion_port, family: family as u8, protocol: TCP };
    // SAFETY: a lookup in a map of sockets returns a referenced socket or null; it is released below.
    let sk =
        unsafe { bpf_map_lookup_elem((&raw const PL_LISTENERS).cast_mut().cast(), (&raw const key).cast()) };
    if !sk.is_null() {
        let steered = read!((*sk.cast::<bpf_sock>()).state) == TCP_LISTEN
            // SAFETY: context and referenced socket.
            && unsafe { bpf_sk_assign(ctx.cast(), sk, BPF_SK_LOOKUP_F_REPLACE) } == 0;
        // SAFETY: the reference taken above.
        unsafe { bpf_sk_release(sk) };
        if steered {
            count(Counter::InboundRedirected);
            return Outcome::redirected(route, SK_PASS as i32);
        }
    }
    if rule.flags & flags::FAIL_CLOSED != 0 {
        count(Counter::InboundFailedClosed);
        // The kernel heeds this unless another's program selects a socket, which cannot be taken back.
        return Outcome::refused(route, why::NO_LISTENER, ECONNREFUSED, SK_DROP as i32);
    }
    count(Counter::InboundFailedOpen);
    Outcome::failed_open(route, why::NO_LISTENER, SK_PASS as i32)
}

/// The connection's source and destination.
#[inline(always)]
fn ends(ctx: *mut bpf_sk_lookup) -> [Destination; 2] {
    let (source, original) = if read!((*ctx).family) == u32::from(AF_INET) {
        ([read!((*ctx).remote_ip4), 0, 0, 0], [read!((*ctx).local_ip4), 0, 0, 0])
    } else {
        (
            [
                read!((*ctx).remote_ip6[0]),
                read!((*ctx).remote_ip6[1]),
                read!((*ctx).remote_ip6[2]),
                read!((*ctx).remote_ip6[3]),
            ],
            [
                read!((*ctx).local_ip6[0]),
                read!((*ctx).local_ip6[1]),
                read!((*ctx).local_ip6[2]),
                read!((*ctx).local_ip6[3]),
            ],
        )
    };
    let family = read!((*ctx).family) as u16;
    let local_port = read!((*ctx).local_port) as u16;
    [
        Destination { address: source, port_be: read!((*ctx).remote_port), family },
        Destination { address: original, port_be: local_port.to_be(), family },
    ]
}

/// Whether it is for 127.0.0.0/8 or `::1`.
#[inline(always)]
fn is_for_loopback(ctx: *mut bpf_sk_lookup) -> bool {
    if read!((*ctx).family) == u32::from(AF_INET) {
        return is_local4(read!((*ctx).local_ip4));
    }
    is_local6(&[
        read!((*ctx).local_ip6[0]),
        read!((*ctx).local_ip6[1]),
        read!((*ctx).local_ip6[2]),
        read!((*ctx).local_ip6[3]),
    ])
}

/// The family of a packet from another host; `None` for one of this host.
#[inline(always)]
fn arriving_from_outside(ctx: *mut bpf_sk_lookup) -> Option<u16> {
    if read!((*ctx).family) == u32::from(AF_INET) {
        let remote = read!((*ctx).remote_ip4);
        return (remote != read!((*ctx).local_ip4) && !is_local4(remote)).then_some(AF_INET);
    }
    let remote = [
        read!((*ctx).remote_ip6[0]),
        read!((*ctx).remote_ip6[1]),
        read!((*ctx).remote_ip6[2]),
        read!((*ctx).remote_ip6[3]),
    ];
    let local = [
        read!((*ctx).local_ip6[0]),
        read!((*ctx).local_ip6[1]),
        read!((*ctx).local_ip6[2]),
        read!((*ctx).local_ip6[3]),
    ];
    let own =
        remote[0] == local[0] && remote[1] == local[1] && remote[2] == local[2] && remote[3] == local[3];
    (!own && !is_local6(&remote) && !is_mapped(&remote)).then_some(AF_INET6)
}
