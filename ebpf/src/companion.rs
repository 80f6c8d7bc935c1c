//! The companion's side: answers SO_ORIGINAL_DST, so that an unmodified proxy learns where a connection wanted to go.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sockopt},
    macros::{cgroup_sock, cgroup_sockopt},
    programs::{SockContext, SockoptContext},
};
use pillion_common::{AF_INET, AF_INET6, BySourceKey, Counter, Destination, SlotAddress, TCP, UDP};

use crate::{
    maps::{PL_BY_SOURCE, PL_COMPANIONS, count},
    peers, share,
    slots::{self, Asked},
    socket::{IPPROTO_TCP, IPPROTO_UDP, MAPPED, local, netns, read, remote, write},
};

const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
const ORIGINAL_DST: i32 = 80;
/// Above this length the kernel shows a program no buffer and wants `optlen` set to zero.
const PAGE: i32 = 4096;

#[cgroup_sockopt(getsockopt)]
pub fn pl_original(ctx: SockoptContext) -> i32 {
    let ctx = ctx.sockopt;
    let level = read!((*ctx).level);
    if read!((*ctx).optname) == ORIGINAL_DST && (level == SOL_IP || level == SOL_IPV6) {
        let sk = read!((*ctx).__bindgen_anon_1.sk);
        if !sk.is_null()
            && let Some(destination) = original_destination(ctx, sk)
            && answer(ctx, level, &destination)
        {
            return 1;
        }
    }
    if read!((*ctx).optlen) > PAGE {
        write!((*ctx).optlen, 0);
    }
    1
}

/// close() of a companion's socket: forgets the answer, or takes back the slot of a connection that it never asked for.
#[cgroup_sock(sock_release)]
pub fn pl_unasked(ctx: SockContext) -> i32 {
    let sk = ctx.sock;
    if read!((*sk).protocol) != IPPROTO_TCP {
        return 1;
    }
    let (peer, family) = remote(sk);
    let netns = netns(sk, PL_COMPANIONS.get().workload);
    let asked = share::forget_by_source(&source_key(sk, netns, peer, family, TCP));
    if !asked
        && let Some(address) = slot_address(&peer, family)
        && let Asked::Found(_, _, seen) = slots::ask(address, netns, false)
    {
        slots::answered(address.slot, seen);
    }
    1
}

#[inline(always)]
fn slot_address(peer: &[u32; 4], family: u16) -> Option<SlotAddress> {
    if family == AF_INET { SlotAddress::decode(u32::from_be(peer[0])) } else { None }
}

#[inline(always)]
fn source_key(sk: *mut bpf_sock, netns: u64, peer: [u32; 4], family: u16, protocol: u8) -> BySourceKey {
    BySourceKey {
        netns,
        address: peer,
        port: u32::from(u16::from_be(read!((*sk).dst_port))),
        family,
        protocol: u16::from(protocol),
    }
}

#[inline(always)]
fn original_destination(ctx: *mut bpf_sockopt, sk: *mut bpf_sock) -> Option<Destination> {
    let (peer, family) = remote(sk);
    let netns = netns(ctx, PL_COMPANIONS.get().workload);
    let protocol = match read!((*sk).protocol) {
        IPPROTO_TCP => TCP,
        IPPROTO_UDP => UDP,
        _ => return None,
    };
    let key = source_key(sk, netns, peer, family, protocol);
    // SAFETY: copied at once, before any other operation on the map.
    if let Some(kept) = unsafe { PL_BY_SOURCE.get(key) } {
        return Some(kept.destination);
    }
    let address = slot_address(&peer, family);
    if protocol == UDP {
        // Its socket keeps the slot until it is closed: a companion that has forgotten a flow asks again.
        return match address {
            Some(address) => match slots::ask(address, netns, true) {
                Asked::Found(destination, ..) => Some(destination),
                Asked::Stale => None,
            },
            None if family == AF_INET => peers::destination_of(peer[0], netns),
            None => None,
        };
    }
    let Some(address) = address else {
        // What the kernel's connection tracking has answered is right for all else: a cgroup that is not Pillion's own holds
        // other servers, too, and ports to which netfilter sends connections.
        return if read!((*ctx).retval) == 0 { None } else { steered(sk) };
    };
    match slots::ask(address, netns, false) {
        Asked::Found(destination, workload, seen) => {
            // Without room to keep the answer the slot stays taken: the companion may ask again.
            if slots::keep_answer(&key, &destination, workload, seen) {
                slots::answered(address.slot, seen);
            }
            count(Counter::DestinationsAnswered);
            Some(destination)
        }
        Asked::Stale => {
            count(Counter::DestinationsStale);
            None
        }
    }
}

/// A connection on a port that the companion does not listen on came by `sk_lookup`: it wanted to go where it is.
#[inline(always)]
fn steered(sk: *mut bpf_sock) -> Option<Destination> {
    let port = read!((*sk).src_port) as u16;
    let own = &PL_COMPANIONS.get().ports;
    if own[0] == 0 || own.iter().any(|listening| *listening == port) {
        return None;
    }
    let (address, family) = local(sk);
    Some(Destination { address, port_be: port.to_be(), family })
}

/// Writes the answer: a sockaddr_in for IPv4 at `SOL_IP`, otherwise a sockaddr_in6 if the buffer takes it. An IPv6
/// destination is given at `SOL_IP` too, because a companion that listens on 127.0.0.1 only asks there.
#[inline(always)]
fn answer(ctx: *mut bpf_sockopt, level: i32, destination: &Destination) -> bool {
    let start = read!((*ctx).__bindgen_anon_2.optval) as usize;
    let end = read!((*ctx).__bindgen_anon_3.optval_end) as usize;
    let is4 = destination.family == AF_INET;
    let head = |family: u16| u32::from(family) | (u32::from(destination.port_be) << 16);
    let words = start as *mut u32;
    if level == SOL_IP && is4 {
        if start + 16 > end {
            return false;
        }
        // SAFETY: 16 bytes, checked above; the verifier checks it again.
        unsafe {
            *words = head(AF_INET);
            *words.add(1) = destination.address[0];
            *words.add(2) = 0;
            *words.add(3) = 0;
        }
        write!((*ctx).optlen, 16);
    } else {
        if start + 28 > end {
            return false;
        }
        let address = if is4 { [0, 0, MAPPED, destination.address[0]] } else { destination.address };
        // SAFETY: 28 bytes, checked above; the verifier checks it again.
        unsafe {
            *words = head(AF_INET6);
            *words.add(1) = 0;
            *words.add(2) = address[0];
            *words.add(3) = address[1];
            *words.add(4) = address[2];
            *words.add(5) = address[3];
            *words.add(6) = 0;
        }
        write!((*ctx).optlen, 28);
    }
    write!((*ctx).retval, 0);
    true
}
