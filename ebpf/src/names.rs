//! getpeername(), getsockname() and accept(): an application sees the addresses it asked for, not the companion's.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use pillion_common::{AF_INET, Redirected, SlotAddress};

use crate::{
    maps::{PL_REDIRECTED, PL_WORKLOADS},
    socket::{MAPPED, cookie, is_local6, is_mapped, read, socket_of, write},
};

#[cgroup_sock_addr(getpeername4)]
pub fn pl_peer4(ctx: SockAddrContext) -> i32 {
    if let Some(redirected) = redirected(ctx.sock_addr) {
        write!((*ctx.sock_addr).user_ip4, redirected.destination.address[0]);
        write!((*ctx.sock_addr).user_port, u32::from(redirected.destination.port_be));
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn pl_peer6(ctx: SockAddrContext) -> i32 {
    if let Some(redirected) = redirected(ctx.sock_addr) {
        show6(ctx.sock_addr, redirected.destination.address, redirected.destination.family == AF_INET);
        write!((*ctx.sock_addr).user_port, u32::from(redirected.destination.port_be));
    }
    1
}

#[cgroup_sock_addr(getsockname4)]
pub fn pl_name4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    if let Some(redirected) = redirected(ctx) {
        if is_connected(ctx) {
            let source =
                if redirected.bound[0] != 0 { redirected.bound[0] } else { PL_WORKLOADS.get().source4 };
            write!((*ctx).user_ip4, source);
        } else if SlotAddress::decode(u32::from_be(read!((*ctx).user_ip4))).is_some() {
            write!((*ctx).user_ip4, redirected.bound[0]);
        }
    }
    1
}

#[cgroup_sock_addr(getsockname6)]
pub fn pl_name6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    if let Some(redirected) = redirected(ctx) {
        let config = PL_WORKLOADS.get();
        let bound = redirected.bound;
        let bound_any = bound[0] | bound[1] | bound[2] | bound[3] == 0;
        let is4 = redirected.destination.family == AF_INET;
        if is_connected(ctx) {
            let source = if !bound_any {
                bound
            } else if is4 {
                [config.source4, 0, 0, 0]
            } else {
                config.source6
            };
            show6(ctx, source, is4);
        } else if redirected.flags & Redirected::REBOUND != 0 && is_loopback(ctx) {
            show6(ctx, bound, is4 && !bound_any);
        }
    }
    1
}

/// Whether the socket has a peer, be it one that has reset it. Without one it shows what the application has bound, not
/// what Pillion has left from a connection that was dissolved (connect() with `AF_UNSPEC`) or failed.
#[inline(always)]
fn is_connected(ctx: *mut bpf_sock_addr) -> bool {
    let sk = socket_of(ctx);
    !sk.is_null() && read!((*sk).dst_port) != 0
}

/// Whether the address to be shown is one that Pillion binds: a slot's, or `::1`.
#[inline(always)]
fn is_loopback(ctx: *mut bpf_sock_addr) -> bool {
    let address = [
        read!((*ctx).user_ip6[0]),
        read!((*ctx).user_ip6[1]),
        read!((*ctx).user_ip6[2]),
        read!((*ctx).user_ip6[3]),
    ];
    if is_mapped(&address) {
        return SlotAddress::decode(u32::from_be(address[3])).is_some();
    }
    is_local6(&address)
}

/// What this workload's programs have done with the socket. One that an inner workload's have taken is for the programs
/// there, which have run by now and know its addresses.
#[inline(always)]
fn redirected(ctx: *mut bpf_sock_addr) -> Option<&'static Redirected> {
    // SAFETY: the entry stays while its socket is open, which it is during this call.
    unsafe { PL_REDIRECTED.get(cookie(ctx)) }
        .filter(|redirected| redirected.workload == PL_WORKLOADS.get().workload)
}

#[inline(always)]
fn show6(ctx: *mut bpf_sock_addr, address: [u32; 4], mapped: bool) {
    let words = if mapped { [0, 0, MAPPED, address[0]] } else { address };
    write!((*ctx).user_ip6[0], words[0]);
    write!((*ctx).user_ip6[1], words[1]);
    write!((*ctx).user_ip6[2], words[2]);
    write!((*ctx).user_ip6[3], words[3]);
}
