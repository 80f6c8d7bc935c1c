//! Where members of kernel structures are, as `/sys/kernel/btf/vmlinux` says: Rust programs have no relocation by BTF (CO-RE).
//!
//! Reads one file of the kernel's (BTF, Documentation/bpf/btf.rst). A file that is not as it should be is an error, never
//! a panic.

use std::{collections::HashMap, fs};

use crate::RedirectError;

const FILE: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u32 = 0xeb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// Anonymous members within each other.
const DEEPEST: u32 = 8;

/// Global of the program, structure, member; the offsets of several members for one global are added.
pub(crate) type Member = (&'static str, &'static str, &'static str);

/// Offsets in bytes, by global; members of members are added.
#[derive(Debug)]
pub(crate) struct Offsets(HashMap<&'static str, u32>);

impl Offsets {
    /// `optional` are those that not every kernel has: zero where it has not.
    pub(crate) fn of_this_kernel(members: &[Member], optional: &[Member]) -> Result<Self, RedirectError> {
        let bytes = fs::read(FILE).map_err(RedirectError::sys("cannot read", FILE.as_ref()))?;
        let types = Types::parse(&bytes).ok_or_else(|| RedirectError::Btf("it has another form".into()))?;
        let mut offsets = HashMap::new();
        for (global, structure, member) in members.iter().copied() {
            let offset = types
                .offset(structure, member)
                .ok_or_else(|| RedirectError::Btf(format!("it has no {structure}.{member}")))?;
            *offsets.entry(global).or_default() += offset;
        }
        for (global, structure, member) in optional.iter().copied() {
            offsets.insert(global, types.offset(structure, member).unwrap_or_default());
        }
        Ok(Self(offsets))
    }

    pub(crate) fn globals(&self) -> impl Iterator<Item = (&'static str, &u32)> {
        self.0.iter().map(|(name, offset)| (*name, offset))
    }
}

struct Types<'a> {
    bytes: &'a [u8],
    strings: usize,
    /// Where each type is; ids begin with 1.
    at: Vec<usize>,
}

impl<'a> Types<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::try_from(word(bytes, 4)?).ok()?;
        if word(bytes, 0)? & 0xffff != MAGIC {
            return None;
        }
        let part = |at: usize| usize::try_from(word(bytes, at)?).ok();
        let (start, length, strings) = (header + part(8)?, part(12)?, header + part(16)?);
        let end = start.checked_add(length)?;
        let (mut at, mut types) = (start, Vec::new());
        while at < end {
            types.push(at);
            let info = word(bytes, at + 4)?;
            let members = usize::try_from(info & 0xffff).ok()?;
            at += 12
                + match info >> 24 & 0x1f {
                    // int, variable, declaration tag
                    1 | 14 | 17 => 4,
                    3 => 12,
                    // struct, union, section, 64-bit enum
                    4 | 5 | 15 | 19 => members * 12,
                    // enum, prototype
                    6 | 13 => members * 8,
                    _ => 0,
                };
        }
        Some(Self { bytes, strings, at: types })
    }

    fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let named = |at: &&usize| {
            word(self.bytes, **at + 4).is_some_and(|info| info >> 24 & 0x1f == STRUCT)
                && word(self.bytes, **at).is_some_and(|name| self.is(name, structure))
        };
        self.at.iter().filter(named).find_map(|at| self.within(*at, member, DEEPEST))
    }

    /// In bytes, also of a member of an anonymous structure or union within.
    fn within(&self, at: usize, member: &str, depth: u32) -> Option<u32> {
        let info = word(self.bytes, at + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) || depth == 0 {
            return None;
        }
        for index in 0..usize::try_from(info & 0xffff).ok()? {
            let place = at + 12 + index * 12;
            let (name, kind, offset) =
                (word(self.bytes, place)?, word(self.bytes, place + 4)?, word(self.bytes, place + 8)?);
            let bits = if info >> 31 == 1 { offset & 0x00ff_ffff } else { offset };
            if self.is(name, member) {
                return Some(bits / 8);
            }
            if self.is(name, "") {
                let inner = self.at.get(usize::try_from(kind).ok()?.checked_sub(1)?)?;
                if let Some(offset) = self.within(*inner, member, depth - 1) {
                    return Some(bits / 8 + offset);
                }
            }
        }
        None
    }

    fn is(&self, name: u32, wanted: &str) -> bool {
        let text = usize::try_from(name).ok().and_then(|name| self.bytes.get(self.strings + name..));
        text.is_some_and(|text| {
            text.get(..wanted.len()) == Some(wanted.as_bytes()) && text.get(wanted.len()) == Some(&0)
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_all_of_them() {
        for members in [&crate::exec::MEMBERS[..], &crate::object::MEMBERS] {
            let globals: std::collections::BTreeSet<_> = members.iter().map(|(global, ..)| *global).collect();
            let offsets = Offsets::of_this_kernel(members, &[]).expect("a kernel with BTF");
            assert_eq!(offsets.0.len(), globals.len());
            assert!(offsets.0["OFF_DENTRY_NAME"] > 0);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for length in 0..64 {
            assert!(Types::parse(&vec![0xff; length]).is_none());
        }
        let mut header = vec![0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
        header.extend([0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(Types::parse(&header).is_none());
    }
}
