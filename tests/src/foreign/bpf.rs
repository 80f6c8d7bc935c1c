//! bpf(2) for programs of a few instructions: made, attached, and taken back by the harness, never by the agent.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper for programs without an object file")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const MAP_CREATE: i64 = 0;
const MAP_UPDATE: i64 = 2;
const PROG_LOAD: i64 = 5;
const OBJ_PIN: i64 = 6;
const PROG_ATTACH: i64 = 8;
const PROG_DETACH: i64 = 9;
const PROG_QUERY: i64 = 16;
const LINK_CREATE: i64 = 28;

/// `union bpf_attr`, as far as it is used; fields by their offsets, which are the kernel's ABI.
#[repr(C, align(8))]
struct Attribute([u8; 144]);

impl Attribute {
    fn new() -> Self {
        Self([0; 144])
    }

    fn word(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Self {
        self.word(at, u32::try_from(fd.as_raw_fd()).expect("a descriptor is not negative"))
    }

    fn pointer<T>(mut self, at: usize, value: *const T) -> Self {
        self.0[at..at + 8].copy_from_slice(&(value as u64).to_ne_bytes());
        self
    }

    fn call(&mut self, command: i64) -> io::Result<i32> {
        // SAFETY: the attribute is whole; pointers within it are of values that the callers keep until this returns.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(i32::try_from(result).unwrap_or(i32::MAX))
        }
    }

    fn descriptor(&mut self, command: i64) -> io::Result<OwnedFd> {
        let fd = self.call(command)?;
        // SAFETY: a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Loads a program.
pub(super) fn load(name: &str, kind: u32, attach_type: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    let license = c"GPL";
    let mut attribute = Attribute::new()
        .word(0, kind)
        .word(4, u32::try_from(instructions.len()).expect("few"))
        .pointer(8, instructions.as_ptr())
        .pointer(16, license.as_ptr())
        .word(68, attach_type);
    attribute.0[48..48 + name.len()].copy_from_slice(name.as_bytes());
    attribute.descriptor(PROG_LOAD)
}

/// Attaches by a link.
pub(super) fn link(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    Attribute::new().fd(0, program).fd(4, target).word(8, attach_type).descriptor(LINK_CREATE)
}

/// Attaches without a link, as older programs do.
pub(super) fn attach(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
    flags: u32,
) -> io::Result<()> {
    Attribute::new()
        .fd(0, target)
        .fd(4, program)
        .word(8, attach_type)
        .word(12, flags)
        .call(PROG_ATTACH)
        .map(drop)
}

/// Takes back [`attach`].
pub(super) fn detach(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<()> {
    Attribute::new().fd(0, target).fd(4, program).word(8, attach_type).call(PROG_DETACH).map(drop)
}

/// The ids of what is attached to this very target.
pub(super) fn attached(target: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; 64];
    let mut attribute =
        Attribute::new().fd(0, target).word(4, attach_type).pointer(16, ids.as_mut_ptr()).word(24, 64);
    attribute.call(PROG_QUERY)?;
    let count = u32::from_ne_bytes(attribute.0[24..28].try_into().expect("four bytes"));
    Ok(ids[..usize::try_from(count).unwrap_or(0).min(64)].to_vec())
}

/// Pins a program or link.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    Attribute::new().pointer(0, path.as_ptr()).fd(8, object).call(OBJ_PIN).map(drop)
}

/// A map of one socket.
pub(super) fn map_of(socket: impl AsFd) -> io::Result<OwnedFd> {
    const SOCKMAP: u32 = 15;
    let map = Attribute::new().word(0, SOCKMAP).word(4, 4).word(8, 4).word(12, 1).descriptor(MAP_CREATE)?;
    let (key, value) = (0_u32, socket.as_fd().as_raw_fd());
    Attribute::new()
        .fd(0, map.as_fd())
        .pointer(8, &raw const key)
        .pointer(16, &raw const value)
        .call(MAP_UPDATE)?;
    Ok(map)
}
