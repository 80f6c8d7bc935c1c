//! 64-bit atomics (Linux 5.12; `older/atomic.rs` does without). Rust's own are compiled out for this target, which it takes for one without
//! compare-and-exchange, although the instruction set has it since version 3.

use core::{arch::asm, ptr::NonNull};

/// How many slots that were given back are tried, one after the other.
pub const TRIES_RETURNED: u32 = 8;
/// How many random ones then.
pub const TRIES_RANDOM: u32 = 32;

/// Reads a map value that other CPUs change atomically.
#[inline(always)]
pub fn load(place: NonNull<u64>) -> u64 {
    // SAFETY: a map value, aligned; a single 64-bit load.
    unsafe { place.as_ptr().read_volatile() }
}

/// Replaces `expected` by `new`; whether it did. A full barrier. `_id` is for kernels without the instruction.
#[inline(always)]
pub fn compare_exchange(place: NonNull<u64>, _id: u32, expected: u64, new: u64) -> bool {
    let seen: u64;
    // SAFETY: a map value, aligned. The instruction compares with r0 and leaves the old value there.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({place} + 0, r0, {new})",
            place = in(reg) place.as_ptr(),
            new = in(reg) new,
            inlateout("r0") expected => seen,
            options(nostack),
        );
    }
    seen == expected
}

/// Adds `value` and returns what was there before. A full barrier.
#[inline(always)]
pub fn fetch_add(place: NonNull<u64>, value: u64) -> u64 {
    let mut value = value;
    // SAFETY: a map value, aligned.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({place} + 0), {value})",
            place = in(reg) place.as_ptr(),
            value = inout(reg) value,
            options(nostack),
        );
    }
    value
}
