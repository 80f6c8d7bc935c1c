//! Slots: how an original destination travels with a connection.
//!
//! An outbound connection to the companion is given a source address in 127.64.0.0/10. Its low 22 bits are the
//! number of a slot, which holds the original destination, and the slot's generation. The companion's question
//! (`SO_ORIGINAL_DST`) reads them back from the peer's address. A slot is busy from the connect until the question is
//! answered; the generation makes a question that comes after the slot was given away an error, never a wrong answer.

#![allow(clippy::inline_always, reason = "eBPF programs cannot afford calls for these")]

use crate::Destination;

/// Number of slots, for all workloads together, as a power of two.
pub const SLOT_BITS: u32 = 16;
/// Number of slots.
pub const SLOTS: u32 = 1 << SLOT_BITS;
/// Bits of the generation that an address can carry.
pub const GENERATION_BITS: u32 = 22 - SLOT_BITS;

/// After this long without a datagram the address of a destination may be given to another one, in units of 2^30 ns.
pub const PEER_IDLE: u32 = 600;

/// One original destination on its way.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Generation, time and busy flag; see [`tag`]. Changed by compare-and-exchange only.
    pub tag: u64,
    /// Cookie of the network namespace in which it was taken: a question from another one is not answered.
    pub netns: u64,
    /// The original destination.
    pub destination: Destination,
    /// Number of the workload.
    pub workload: u32,
}

const _: () = assert!(size_of::<Slot>() == 40);

#[cfg(feature = "user")]
mod pod {
    #![expect(unsafe_code, reason = "aya's marker for plain old data is an unsafe trait")]
    // SAFETY: `repr(C)`, `Copy`, without padding bytes (20 + 4 + 16 = 40) or pointers.
    unsafe impl aya::Pod for super::Slot {}
}

/// The tag of a slot: generation in bits 32–63, time in bits 1–31, busy in bit 0.
pub mod tag {
    /// A busy tag of the generation after `previous`, taken at `time` (units of 2^30 ns).
    #[inline(always)]
    pub const fn next(previous: u64, time: u32) -> u64 {
        let generation = (previous >> 32).wrapping_add(1) & 0xffff_ffff;
        (generation << 32) | ((time as u64 & 0x7fff_ffff) << 1) | 1
    }

    /// The same tag, not busy.
    #[inline(always)]
    pub const fn freed(tag: u64) -> u64 {
        tag & !1
    }

    /// Whether the slot waits for its question.
    #[inline(always)]
    pub const fn is_busy(tag: u64) -> bool {
        tag & 1 == 1
    }

    /// Generation.
    #[inline(always)]
    pub const fn generation(tag: u64) -> u32 {
        (tag >> 32) as u32
    }

    /// The same tag, taken at `time`.
    #[inline(always)]
    pub const fn at(tag: u64, time: u32) -> u64 {
        (tag & 0xffff_ffff_0000_0001) | ((time as u64 & 0x7fff_ffff) << 1)
    }

    /// When the slot was taken, in units of 2^30 ns.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "31 bits are kept")]
    pub const fn time(tag: u64) -> u32 {
        (tag >> 1) as u32 & 0x7fff_ffff
    }

    /// Units of 2^30 ns since the slot was taken.
    #[inline(always)]
    pub const fn age(tag: u64, now: u32) -> u32 {
        now.wrapping_sub(time(tag)) & 0x7fff_ffff
    }
}

/// The address that carries the number of a slot and its generation in its low 22 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotAddress {
    /// Number of the slot.
    pub slot: u32,
    /// Generation, modulo 2^[`GENERATION_BITS`].
    pub generation: u32,
}

/// 127.64.0.0/10, host byte order: the sources of redirected connections.
const CONNECTIONS: u32 = 0x7f40_0000;
/// 127.128.0.0/10, host byte order: the sources of redirected datagrams of sockets without a peer.
const PEERS: u32 = 0x7f80_0000;
const MASK: u32 = 0xffc0_0000;

impl SlotAddress {
    /// The address of a connection, host byte order.
    #[inline(always)]
    pub const fn encode(slot: u32, generation: u32) -> u32 {
        CONNECTIONS | Self::bits(slot, generation)
    }

    /// Reads an address in host byte order; `None` outside of 127.64.0.0/10.
    #[inline(always)]
    pub const fn decode(address: u32) -> Option<Self> {
        Self::within(CONNECTIONS, address)
    }

    /// The address that stands for a destination of datagrams, host byte order.
    #[inline(always)]
    pub const fn encode_peer(slot: u32, generation: u32) -> u32 {
        PEERS | Self::bits(slot, generation)
    }

    /// Reads an address in host byte order; `None` outside of 127.128.0.0/10.
    #[inline(always)]
    pub const fn decode_peer(address: u32) -> Option<Self> {
        Self::within(PEERS, address)
    }

    /// Whether `generation`, in full, may be the one that the address carries.
    #[inline(always)]
    pub const fn is_of(self, generation: u32) -> bool {
        generation & ((1 << GENERATION_BITS) - 1) == self.generation
    }

    #[inline(always)]
    const fn bits(slot: u32, generation: u32) -> u32 {
        ((generation << SLOT_BITS) | (slot & (SLOTS - 1))) & !MASK
    }

    #[inline(always)]
    const fn within(network: u32, address: u32) -> Option<Self> {
        if address & MASK != network {
            return None;
        }
        let bits = address & !MASK;
        Some(Self { slot: bits & (SLOTS - 1), generation: bits >> SLOT_BITS })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_carries_slot_and_generation() {
        for (slot, generation) in [(0, 0), (1, 1), (SLOTS - 1, 63), (0x1234, 0xffff_ffff), (7, 64)] {
            let address = SlotAddress::encode(slot, generation);
            assert_eq!(address >> 22, 0x7f40_0000 >> 22, "{address:#x}");
            let back = SlotAddress::decode(address).unwrap();
            assert_eq!(back.slot, slot);
            assert!(back.is_of(generation));
            assert!(!back.is_of(generation.wrapping_add(1)));
            let peer = SlotAddress::encode_peer(slot, generation);
            assert_eq!(peer >> 22, 0x7f80_0000 >> 22, "{peer:#x}");
            assert_eq!(SlotAddress::decode_peer(peer), Some(back));
            assert_eq!((SlotAddress::decode(peer), SlotAddress::decode_peer(address)), (None, None));
        }
        for outside in [0x7f00_0001, 0x7f80_0000, 0x7f3f_ffff, 0x0a40_0000, 0] {
            assert_eq!(SlotAddress::decode(outside), None, "{outside:#x}");
        }
    }

    #[test]
    fn a_tag_counts_generations_and_ages() {
        let first = tag::next(0, 100);
        assert!(tag::is_busy(first));
        assert_eq!(tag::generation(first), 1);
        assert_eq!(tag::age(first, 130), 30);
        assert_eq!(tag::at(first, 130), tag::next(0, 130));
        let free = tag::freed(first);
        assert!(!tag::is_busy(free));
        assert_eq!(tag::generation(free), 1);
        assert_eq!(tag::generation(tag::next(free, 101)), 2);
        assert_eq!(tag::generation(tag::next(0xffff_ffff_0000_0001, 0)), 0, "generations wrap");
        assert_eq!(tag::age(tag::next(0, 0x7fff_ffff), 1), 2, "time wraps");
    }
}
