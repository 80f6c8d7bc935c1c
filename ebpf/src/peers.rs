//! Destinations of datagrams from sockets without a peer: each has an address of its own in 127.128.0.0/10, which such
//! datagrams bear as their source on the way to the companion, and its answers on the way back.
//!
//! So one socket may ask several destinations at once, and each answer comes from the one that was asked. A destination has
//! its address, for one workload, until it was not used for [`PEER_IDLE`] and another needs it.

use core::ptr::NonNull;

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use pillion_common::{Counter, Destination, PEER_IDLE, PeerKey, PeerSlot, Share, SlotAddress, tag};

use crate::{
    atomic,
    maps::{PL_FRESH, PL_PEER_OF, PL_PEERS, USABLE_SLOTS, count},
    share,
    slots::{now, tag_of},
};

const BPF_NOEXIST: u64 = 1;

/// The address of `destination`, network byte order; `None` when all are in use.
#[inline(always)]
pub fn address_of(netns: u64, workload: u32, destination: &Destination) -> Option<u32> {
    let key = PeerKey { netns, destination: *destination, workload };
    let time = now();
    // SAFETY: copied at once, before any other operation on the map.
    if let Some(known) = unsafe { PL_PEER_OF.get(key) }.copied() {
        if let Some(slot) = PL_PEERS.get_ptr_mut(known.slot) {
            let seen = atomic::load(tag_of(slot));
            if tag::is_busy(seen) && tag::generation(seen) == known.generation {
                if tag::time(seen) != time {
                    // Whoever else does this at the same time does the same.
                    atomic::compare_exchange(tag_of(slot), known.slot, seen, tag::at(seen, time));
                }
                return Some(encoded(known));
            }
        }
        let _ = PL_PEER_OF.remove(key);
    }
    if !share::take(workload, Share::PEERS) {
        return None;
    }
    let Some(taken) = take(&key, time) else {
        share::give(workload, Share::PEERS);
        return None;
    };
    if PL_PEER_OF.insert(key, taken, BPF_NOEXIST).is_ok() {
        return Some(encoded(taken));
    }
    // Another CPU was first: the slot that is not needed ages.
    // SAFETY: as above.
    unsafe { PL_PEER_OF.get(key) }.copied().map(encoded)
}

#[inline(always)]
fn encoded(peer: PeerSlot) -> u32 {
    SlotAddress::encode_peer(peer.slot, peer.generation).to_be()
}

#[inline(always)]
fn take(key: &PeerKey, time: u32) -> Option<PeerSlot> {
    let usable = USABLE_SLOTS.load();
    if let Some(fresh) = PL_FRESH.get_ptr_mut(1).and_then(NonNull::new)
        && atomic::load(fresh) < u64::from(usable)
    {
        let id = atomic::fetch_add(fresh, 1);
        if id < u64::from(usable)
            && let Some(taken) = claim(id as u32, key, time)
        {
            return Some(taken);
        }
    }
    for _ in 0..atomic::TRIES_RANDOM {
        // SAFETY: takes nothing, returns a number.
        let random = unsafe { bpf_get_prandom_u32() } % usable;
        if let Some(taken) = claim(random, key, time) {
            return Some(taken);
        }
    }
    count(Counter::SlotsExhausted);
    None
}

#[inline(always)]
fn claim(id: u32, key: &PeerKey, time: u32) -> Option<PeerSlot> {
    let slot = PL_PEERS.get_ptr_mut(id)?;
    let seen = atomic::load(tag_of(slot));
    if tag::is_busy(seen) && tag::age(seen, time) < PEER_IDLE {
        return None;
    }
    let taken = tag::next(seen, time);
    if !atomic::compare_exchange(tag_of(slot), id, seen, taken) {
        return None;
    }
    // SAFETY: the claim makes this run the only writer; a reader checks the tag before and after.
    unsafe {
        if tag::is_busy(seen) {
            let old = PeerKey {
                netns: (*slot).netns,
                destination: (*slot).destination,
                workload: (*slot).workload,
            };
            let _ = PL_PEER_OF.remove(old);
            share::give(old.workload, Share::PEERS);
        }
        (*slot).netns = key.netns;
        (*slot).workload = key.workload;
        (*slot).destination = key.destination;
    }
    Some(PeerSlot { slot: id, generation: tag::generation(taken) })
}

/// The destination that an address, in network byte order, stands for in this namespace.
#[inline(always)]
pub fn destination_of(address: u32, netns: u64) -> Option<Destination> {
    let address = SlotAddress::decode_peer(u32::from_be(address))?;
    let slot = PL_PEERS.get_ptr_mut(address.slot)?;
    let before = atomic::load(tag_of(slot));
    // SAFETY: a map value; may be written at the same time by a claim, which the second look at the tag detects.
    let (destination, owner) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*slot).destination),
            core::ptr::read_volatile(&raw const (*slot).netns),
        )
    };
    let after = atomic::load(tag_of(slot));
    let valid = tag::is_busy(before)
        && tag::generation(before) == tag::generation(after)
        && address.is_of(tag::generation(before))
        && owner == netns
        && destination.family != 0;
    valid.then_some(destination)
}
