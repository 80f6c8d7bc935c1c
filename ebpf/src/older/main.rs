//! The object of `../main.rs` for kernels without atomic instructions (before Linux 5.12): the same programs, which take
//! slots under locks.
#![no_std]
#![no_main]

/// As in `../main.rs`, but for kernels that verify only such functions by themselves that take no pointers (before Linux
/// 5.12).
macro_rules! apart {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$doc])*
        #[inline(never)]
        fn $name($($argument: $type),*) -> $result $body
    };
}
mod atomic;
#[path = "../companion.rs"]
mod companion;
#[path = "../decide.rs"]
mod decide;
#[path = "../exempt.rs"]
mod exempt;
#[path = "../inbound.rs"]
mod inbound;
#[path = "../maps.rs"]
mod maps;
#[path = "../names.rs"]
mod names;
#[path = "../outbound.rs"]
mod outbound;
#[path = "../peers.rs"]
mod peers;
mod program;
#[path = "../share.rs"]
mod share;
#[path = "../slots.rs"]
mod slots;
#[path = "../socket.rs"]
mod socket;
mod trace;
#[path = "../udp.rs"]
mod udp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the verifier rejects an object in which this could be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
