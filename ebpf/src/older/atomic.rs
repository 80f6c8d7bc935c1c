//! What `atomic.rs` does, for kernels without its instructions (before Linux 5.12): under locks. Such a kernel refuses a
//! program in which one of those instructions stands, even where it would never be reached; hence an object of its own.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::bpf_spin_lock,
    btf_maps::Array,
    helpers::generated::{bpf_spin_lock as lock, bpf_spin_unlock as unlock},
    macros::btf_map,
};

/// A power of two. Slots with the same lock are claimed one after the other, which takes nanoseconds.
const LOCKS: u32 = 1024;

/// The kernel finds the lock in the value by the type's name.
#[repr(C)]
pub struct Lock {
    lock: bpf_spin_lock,
}

/// A lock for each slot, by the low bits of its number.
#[btf_map]
static PL_LOCKS: Array<Lock, { LOCKS as usize }> = Array::new();

/// As in `../atomic.rs`, but fewer: such a kernel follows every outcome of every try through all later ones, and gives up at a
/// million instructions.
pub const TRIES_RETURNED: u32 = 2;
/// See [`TRIES_RETURNED`].
pub const TRIES_RANDOM: u32 = 4;

/// Reads a map value that other CPUs change atomically.
#[inline(always)]
pub fn load(place: NonNull<u64>) -> u64 {
    // SAFETY: a map value, aligned; a single 64-bit load.
    unsafe { place.as_ptr().read_volatile() }
}

/// Replaces `expected` by `new`; whether it did. All changes of one place must give the same `id`.
#[inline(always)]
pub fn compare_exchange(place: NonNull<u64>, id: u32, expected: u64, new: u64) -> bool {
    change(place, id, |seen| (seen == expected).then_some(new)) == Some(expected)
}

/// Adds `value` and returns what was there before. Places that are changed so are few: they share the first lock.
#[inline(always)]
pub fn fetch_add(place: NonNull<u64>, value: u64) -> u64 {
    // Without a lock, which cannot be, nothing is there to be taken.
    change(place, 0, |seen| Some(seen.wrapping_add(value))).unwrap_or(u64::MAX)
}

/// Under the lock; returns what was there before. The kernel allows no call between lock and unlock.
#[inline(always)]
fn change(place: NonNull<u64>, id: u32, next: impl Fn(u64) -> Option<u64>) -> Option<u64> {
    let held = PL_LOCKS.get_ptr_mut(id & (LOCKS - 1))?;
    // SAFETY: the lock of a map value that a lookup has returned; it is given back below on every way.
    unsafe { lock(&raw mut (*held).lock) };
    let seen = load(place);
    if let Some(new) = next(seen) {
        // SAFETY: a map value, aligned; a single 64-bit store, under its lock.
        unsafe { place.as_ptr().write_volatile(new) };
    }
    // SAFETY: as above.
    unsafe { unlock(&raw mut (*held).lock) };
    Some(seen)
}
