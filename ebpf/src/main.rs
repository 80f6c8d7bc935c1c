//! The eBPF side of Pillion: one object with every program, compiled for `bpfel-unknown-none`.
//!
//! `decide` finds the rule for a destination (`program`: which program asks), `outbound` sends a workload's connections to
//! its companion, `udp` its datagrams, `names` shows the application what it asked for,
//! `companion` tells the companion where a connection wanted to go, `inbound` steers arriving connections, `slots` and
//! `peers` carry destinations from one to the other, `exempt` tells whom a workload's programs leave alone, `share` counts
//! what each has of what all share, `trace` tells of decisions, `maps` declares all state. Nothing here trusts a workload or a
//! companion: whatever they do, the worst is that their own connections follow the failure mode.
//!
//! Program names begin with `pl_`, map names with `PL_`: the inventory finds them by that.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

/// A function that the kernel verifies once, by itself, and not on every path to it, which would take ten times as long. It
/// has a stack frame of its own; 512 bytes are for all frames together.
macro_rules! apart {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name($($argument: $type),*) -> $result $body
    };
}
mod atomic;
mod companion;
mod decide;
mod exempt;
mod inbound;
mod maps;
mod names;
mod outbound;
mod peers;
mod program;
mod share;
mod slots;
mod socket;
mod trace;
mod udp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the verifier rejects an object in which this could be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
