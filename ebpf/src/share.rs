//! How much of what all workloads share one of them has: one that makes connections without end follows its failure mode
//! long before the others have to.
//!
//! A share is counted where a thing is taken and where it is given back, each by whoever does it, so it is exact but for
//! takers on several CPUs at the same instant, who may pass the bound by one each. For a workload that is nobody any more
//! nothing is counted.

use core::ptr::NonNull;

use pillion_common::{BySource, BySourceKey, Counter, Redirected, Share, WORKLOADS};

use crate::{
    atomic,
    maps::{CONNECTIONS_PER_WORKLOAD, PL_BY_SOURCE, PL_REDIRECTED, PL_SHARES, SLOTS_PER_WORKLOAD, count},
};

const BPF_NOEXIST: u64 = 1;
/// No workload has this number.
const NOBODY: u32 = 0;

/// Adds one to what a workload has, unless it has as much as it may.
#[inline(always)]
pub fn take(workload: u32, part: usize) -> bool {
    share_take(workload, part as u32) != 0
}

/// Takes it off again.
#[inline(always)]
pub fn give(workload: u32, part: usize) {
    share_give(workload, part as u32);
}

// Both take numbers alone, and can thus be verified once, by themselves, on every kernel that is supported: on the paths
// to them they would be too much for one without `apart!`.

/// See [`take`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn share_take(workload: u32, part: u32) -> u32 {
    let Some(taken) = place(workload, part) else { return 1 };
    let slots = part == Share::SLOTS as u32 || part == Share::PEERS as u32;
    let bound = if slots { SLOTS_PER_WORKLOAD.load() } else { CONNECTIONS_PER_WORKLOAD.load() };
    if atomic::load(taken).cast_signed() >= i64::from(bound) {
        count(Counter::ShareExhausted);
        return 0;
    }
    atomic::fetch_add(taken, 1);
    1
}

/// See [`give`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn share_give(workload: u32, part: u32) -> u32 {
    if let Some(taken) = place(workload, part) {
        atomic::fetch_add(taken, u64::MAX);
    }
    0
}

#[inline(always)]
fn place(workload: u32, part: u32) -> Option<NonNull<u64>> {
    let share = PL_SHARES.get_ptr_mut(workload % WORKLOADS)?;
    // SAFETY: a map value that the lookup has returned.
    if unsafe { (*share).owner } != u64::from(workload) {
        return None;
    }
    // SAFETY: a map value that the lookup has returned, and one of its four elements.
    NonNull::new(unsafe { (&raw mut (*share).taken).cast::<u64>().add((part & 3) as usize) })
}

/// Keeps what the application of a socket is to see.
#[inline(always)]
pub fn keep(cookie: u64, state: &Redirected) -> bool {
    // SAFETY: copied at once, before any other operation on the map.
    let known = unsafe { PL_REDIRECTED.get(cookie) }.map_or(NOBODY, |known| known.workload);
    let another = known != state.workload;
    if another && !take(state.workload, Share::CONNECTIONS) {
        return false;
    }
    if known == NOBODY && PL_REDIRECTED.insert(cookie, state, BPF_NOEXIST).is_ok() {
        return true;
    }
    // Another thread's datagram may have been first.
    if PL_REDIRECTED.get_ptr(cookie).is_some() && PL_REDIRECTED.insert(cookie, state, 0).is_ok() {
        // One entry for two counts, of this workload or of one within or around it.
        if another {
            give(if known == NOBODY { state.workload } else { known }, Share::CONNECTIONS);
        }
        return true;
    }
    if another {
        give(state.workload, Share::CONNECTIONS);
    }
    count(Counter::SlotsExhausted);
    false
}

/// Forgets it.
#[inline(always)]
pub fn forget(cookie: u64, workload: u32) {
    if PL_REDIRECTED.remove(cookie).is_ok() {
        give(workload, Share::CONNECTIONS);
    }
}

/// Keeps a destination by source; instead of what is known of the same source only if `replace` says so of that.
#[inline(always)]
pub fn keep_by_source(key: &BySourceKey, value: &BySource, replace: impl Fn(&BySource) -> bool) -> bool {
    if !take(value.workload, Share::BY_SOURCE) {
        return false;
    }
    if PL_BY_SOURCE.insert(key, value, BPF_NOEXIST).is_ok() {
        return true;
    }
    // SAFETY: copied at once, before any other operation on the map.
    match unsafe { PL_BY_SOURCE.get(key) }.copied() {
        Some(known) if replace(&known) && PL_BY_SOURCE.insert(key, value, 0).is_ok() => {
            give(known.workload, Share::BY_SOURCE);
            true
        }
        _ => {
            count(Counter::SlotsExhausted);
            give(value.workload, Share::BY_SOURCE);
            false
        }
    }
}

/// Forgets it; whether it was known.
#[inline(always)]
pub fn forget_by_source(key: &BySourceKey) -> bool {
    // SAFETY: copied at once, before any other operation on the map.
    let Some(workload) = unsafe { PL_BY_SOURCE.get(key) }.map(|known| known.workload) else { return false };
    let known = PL_BY_SOURCE.remove(key).is_ok();
    if known {
        give(workload, Share::BY_SOURCE);
    }
    known
}
