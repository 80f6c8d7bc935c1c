//! Taking slots and giving them back.
//!
//! A slot is claimed by compare-and-exchange on its tag, so two CPUs never hold the same one. Order: a slot that was
//! never used, then the one given back longest ago, then any one whose companion has not asked for longer than the
//! expiry (found by random probing; they are leftovers of companions that died with a full backlog).

use core::ptr::NonNull;

use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use pillion_common::{
    AF_INET, AF_INET6, BySource, BySourceKey, Counter, Destination, Redirected, Share, Slot, TCP, UDP,
    kernel, tag,
};

use crate::maps::{PL_FREE, PL_FRESH, PL_SLOTS, SLOT_EXPIRY, USABLE_SLOTS, count, kernel_has};
use crate::socket::{LOOPBACK4, ONE};
use crate::{atomic, share, socket::Packed};

/// A slot held by this run of a program.
#[derive(Clone, Copy)]
pub struct Taken {
    pub slot: u32,
    pub generation: u32,
}

/// Time in units of 2^30 ns (about a second), of the monotonic clock.
#[inline(always)]
pub fn now() -> u32 {
    let ns = if kernel_has(kernel::COARSE_CLOCK) {
        // SAFETY: takes nothing, returns a number.
        unsafe { bpf_ktime_get_coarse_ns() }
    } else {
        // SAFETY: as above.
        unsafe { bpf_ktime_get_ns() }
    };
    (ns >> 30) as u32 & 0x7fff_ffff
}

#[inline(always)]
pub fn tag_of(slot: *mut Slot) -> NonNull<u64> {
    // SAFETY: a map value that a lookup has returned, hence not null.
    unsafe { NonNull::new_unchecked(&raw mut (*slot).tag) }
}

/// Claims slot `id` unless it waits for its question.
#[inline(always)]
fn claim(id: u32, time: u32, netns: u64, workload: u32, destination: &Destination) -> Option<Taken> {
    let slot = PL_SLOTS.get_ptr_mut(id)?;
    let seen = atomic::load(tag_of(slot));
    let expired = tag::is_busy(seen);
    if expired && tag::age(seen, time) < SLOT_EXPIRY.load() {
        return None;
    }
    let taken = tag::next(seen, time);
    if !atomic::compare_exchange(tag_of(slot), id, seen, taken) {
        return None;
    }
    if expired {
        count(Counter::SlotsExpired);
        // SAFETY: the claim makes this run the only one that looks at or changes what the one before has written.
        share::give(unsafe { (*slot).workload }, Share::SLOTS);
    }
    // SAFETY: the claim makes this run the only writer; a reader checks the tag before and after.
    unsafe {
        (*slot).netns = netns;
        (*slot).workload = workload;
        (*slot).destination = *destination;
    }
    Some(Taken { slot: id, generation: tag::generation(taken) })
}

/// Takes a slot for `destination`; `None` when all of them wait for their questions.
#[inline(always)]
pub fn take(netns: u64, workload: u32, destination: &Destination) -> Option<Taken> {
    let Packed { low, high, end } = Packed::of(destination);
    let taken = take_slot(netns, low, high, end, workload);
    (taken != NONE).then_some(Taken { slot: taken as u32, generation: (taken >> 32) as u32 })
}

/// What [`take_slot`] returns for none: no slot has this number.
const NONE: u64 = u64::MAX;

/// Number and, above it, generation. Takes numbers alone, see [`Packed`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_slot(netns: u64, low: u64, high: u64, end: u64, workload: u32) -> u64 {
    let destination = Packed { low, high, end }.destination();
    if !share::take(workload, Share::SLOTS) {
        return NONE;
    }
    match find(netns, workload, &destination) {
        Some(taken) => u64::from(taken.generation) << 32 | u64::from(taken.slot),
        None => {
            share::give(workload, Share::SLOTS);
            NONE
        }
    }
}

#[inline(always)]
fn find(netns: u64, workload: u32, destination: &Destination) -> Option<Taken> {
    let time = now();
    let usable = USABLE_SLOTS.load();
    if let Some(fresh) = PL_FRESH.get_ptr_mut(0).and_then(NonNull::new) {
        if atomic::load(fresh) < u64::from(usable) {
            let id = atomic::fetch_add(fresh, 1);
            if id < u64::from(usable)
                && let Some(taken) = claim(id as u32, time, netns, workload, destination)
            {
                return Some(taken);
            }
        }
    }
    for _ in 0..atomic::TRIES_RETURNED {
        let Ok(Some(id)) = PL_FREE.pop() else { break };
        if let Some(taken) = claim(id, time, netns, workload, destination) {
            return Some(taken);
        }
    }
    for _ in 0..atomic::TRIES_RANDOM {
        // SAFETY: takes nothing, returns a number.
        let random = unsafe { bpf_get_prandom_u32() } % usable;
        if let Some(taken) = claim(random, time, netns, workload, destination) {
            return Some(taken);
        }
    }
    count(Counter::SlotsExhausted);
    None
}

/// Gives a slot back, if it still waits in that generation.
#[inline(always)]
pub fn give_back(taken: Taken) {
    let Some(slot) = PL_SLOTS.get_ptr_mut(taken.slot) else { return };
    let seen = atomic::load(tag_of(slot));
    if tag::generation(seen) == taken.generation {
        free(slot, taken.slot, seen);
    }
}

#[inline(always)]
fn free(slot: *mut Slot, id: u32, seen: u64) {
    // SAFETY: a map value; of another workload by now only if the tag is another too, which is compared below.
    let workload = unsafe { core::ptr::read_volatile(&raw const (*slot).workload) };
    if tag::is_busy(seen) && atomic::compare_exchange(tag_of(slot), id, seen, tag::freed(seen)) {
        // A slot that cannot be queued is found by random probing.
        let _ = PL_FREE.push(id, 0);
        share::give(workload, Share::SLOTS);
    }
}

/// What a question about a slot finds.
pub enum Asked {
    /// The destination, the workload's number and the slot's tag; the slot is to be given back with [`answered`].
    Found(Destination, u32, u64),
    /// The slot does not wait for this question: it was given back, or belongs to another connection by now.
    Stale,
}

/// Reads the slot of an address. The tag is read before and after, so a half-written destination is never returned.
///
/// `given_back`: also of a slot that was given back and not taken again, which has its content still. Datagrams may be on their
/// way when their socket is closed.
#[inline(always)]
pub fn ask(address: pillion_common::SlotAddress, netns: u64, given_back: bool) -> Asked {
    let Some(slot) = PL_SLOTS.get_ptr_mut(address.slot) else { return Asked::Stale };
    let before = atomic::load(tag_of(slot));
    // SAFETY: a map value; may be written at the same time by a claim, which the second look at the tag detects.
    let (destination, owner, workload) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*slot).destination),
            core::ptr::read_volatile(&raw const (*slot).netns),
            core::ptr::read_volatile(&raw const (*slot).workload),
        )
    };
    let after = atomic::load(tag_of(slot));
    if !(tag::is_busy(before) || given_back)
        || tag::generation(before) != tag::generation(after)
        || !address.is_of(tag::generation(before))
        || owner != netns
        || destination.family == 0
    {
        return Asked::Stale;
    }
    Asked::Found(destination, workload, before)
}

/// Gives back the slot of an answered (or abandoned) question.
#[inline(always)]
pub fn answered(id: u32, seen: u64) {
    if let Some(slot) = PL_SLOTS.get_ptr_mut(id) {
        free(slot, id, seen);
    }
}

/// Keeps a destination by the source of the connection. Fails while another connection from the same source is known,
/// because its answer would be wrong.
#[inline(always)]
fn keep_by_source(key: &BySourceKey, destination: &Destination, workload: u32) -> bool {
    let time = now();
    let value = BySource { destination: *destination, time, workload };
    share::keep_by_source(key, &value, |held| {
        // A datagram socket that is connected again has another destination from now on.
        key.protocol == u16::from(UDP) || time.wrapping_sub(held.time) & 0x7fff_ffff >= SLOT_EXPIRY.load()
    })
}

/// Keeps the answer from the slot with tag `seen` for as long as the companion has the connection open.
#[inline(always)]
pub fn keep_answer(key: &BySourceKey, destination: &Destination, workload: u32, seen: u64) -> bool {
    let value = BySource { destination: *destination, time: tag::time(seen), workload };
    share::keep_by_source(key, &value, |_| true)
}

/// Gives back whatever carries the destination of a socket whose connection did not come about.
#[inline(always)]
pub fn abandon(redirected: &Redirected, netns: u64) {
    abandon_socket(redirected, netns);
}

apart! {
    /// See [`abandon`].
    fn abandon_socket(redirected: *const Redirected, netns: u64) -> u32 {
        // SAFETY: the verifier sees to it that it is null or a socket's entry.
        if let Some(redirected) = unsafe { redirected.as_ref() } {
            release(redirected, netns);
        }
        0
    }
}

/// Keeps the destination of a socket by its source, as [`keep_by_source`] does.
#[inline(always)]
pub fn keep_of_socket(redirected: &Redirected, netns: u64) -> bool {
    keep_socket(redirected, netns) != 0
}

apart! {
    /// See [`keep_of_socket`].
    fn keep_socket(redirected: *const Redirected, netns: u64) -> u32 {
        // SAFETY: the verifier sees to it that it is null or a socket's entry.
        let Some(redirected) = (unsafe { redirected.as_ref() }) else { return 0 };
        let key = key_of(redirected, netns);
        u32::from(keep_by_source(&key, &redirected.destination, redirected.workload))
    }
}

#[inline(always)]
fn release(redirected: &Redirected, netns: u64) {
    if redirected.flags & Redirected::UNASKED != 0 {
        return;
    }
    if redirected.slot != Redirected::NO_SLOT {
        give_back(Taken { slot: redirected.slot, generation: redirected.generation });
        return;
    }
    share::forget_by_source(&key_of(redirected, netns));
}

/// The key under which the destination of a socket is kept: its source as the companion sees it.
#[inline(always)]
fn key_of(redirected: &Redirected, netns: u64) -> BySourceKey {
    let dialled6 = redirected.flags & Redirected::DIALLED6 != 0;
    let bound = redirected.bound;
    let address = if bound[0] | bound[1] | bound[2] | bound[3] != 0 {
        bound
    } else if dialled6 {
        [0, 0, 0, ONE]
    } else {
        [LOOPBACK4, 0, 0, 0]
    };
    BySourceKey {
        netns,
        address,
        port: redirected.source_port,
        family: if dialled6 { AF_INET6 } else { AF_INET },
        protocol: u16::from(if redirected.flags & Redirected::DATAGRAMS == 0 { TCP } else { UDP }),
    }
}
