//! Raw bpf(2) calls that aya does not offer (0.14): links of every cgroup type can be made, pinned, replaced
//! atomically and detached, and cgroup storage with a shared key can be written.
//!
//! The only unsafe code of this crate. Each call passes a zeroed `bpf_attr` with the fields of one command set; the
//! kernel copies what it needs before the call returns, so the borrows below live long enough.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper for these commands")]

use std::{
    ffi::{CStr, CString},
    io, mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_prog_type};

fn bpf(command: bpf_cmd, attr: &bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is a whole, initialised bpf_attr; pointers within it are set by the callers from live borrows.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, std::ptr::from_ref(attr), size_of::<bpf_attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(i32::MAX)) }
}

fn bpf_fd(command: bpf_cmd, attr: &bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the command returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of plain integers; all zeroes is the documented empty value.
    unsafe { mem::zeroed() }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

#[expect(clippy::cast_sign_loss, reason = "an open descriptor is not negative")]
fn number(fd: RawFd) -> u32 {
    fd as u32
}

/// One instruction of eBPF, `struct bpf_insn`: the source register in the upper half of `registers`, the destination in
/// the lower.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

/// `BPF_PROG_LOAD` of a few instructions, to see whether the kernel takes them.
pub(crate) fn load_instructions(
    program: bpf_prog_type,
    attach: bpf_attach_type,
    instructions: &[Instruction],
) -> io::Result<OwnedFd> {
    const LICENSE: &CStr = c"Dual MIT/GPL";
    let mut attr = zeroed();
    attr.__bindgen_anon_3.prog_type = program as u32;
    attr.__bindgen_anon_3.expected_attach_type = attach as u32;
    attr.__bindgen_anon_3.insn_cnt = u32::try_from(instructions.len()).unwrap_or(u32::MAX);
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.license = LICENSE.as_ptr() as u64;
    bpf_fd(bpf_cmd::BPF_PROG_LOAD, &attr)
}

/// `BPF_LINK_CREATE` on a cgroup or network namespace (Linux 5.7).
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // Writes to fields of a union of plain integers: always initialised, nothing is dropped.
    attr.link_create.__bindgen_anon_1.prog_fd = number(program.as_raw_fd());
    attr.link_create.__bindgen_anon_2.target_fd = number(target.as_raw_fd());
    attr.link_create.attach_type = attach_type as u32;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &attr)
}

/// `BPF_LINK_UPDATE`: the link runs `program` from one moment to the next (Linux 5.7).
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_update.link_fd = number(link.as_raw_fd());
    attr.link_update.__bindgen_anon_1.new_prog_fd = number(program.as_raw_fd());
    bpf(bpf_cmd::BPF_LINK_UPDATE, &attr).map(drop)
}

/// `BPF_LINK_DETACH`: takes effect before it returns, unlike the last close (Linux 5.9).
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = number(link.as_raw_fd());
    bpf(bpf_cmd::BPF_LINK_DETACH, &attr).map(drop)
}

/// Whether a cgroup link is still attached: the kernel detaches it when its cgroup is removed.
pub(crate) fn cgroup_link_is_attached(link: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: a struct of plain integers.
    let mut info: bpf_link_info = unsafe { mem::zeroed() };
    let mut attr = zeroed();
    attr.info.bpf_fd = number(link.as_raw_fd());
    attr.info.info_len = number(i32::try_from(size_of::<bpf_link_info>()).unwrap_or(0));
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &attr)?;
    // SAFETY: for a cgroup link the kernel has written this field: zero when the cgroup is gone.
    Ok(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id } != 0)
}

/// The ids of the programs that run for this cgroup, also those attached above it, in the order in which they run (Linux 4.15).
pub(crate) fn effective_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<Vec<u32>> {
    const EFFECTIVE: u32 = 1;
    Ok(query(cgroup, attach_type, EFFECTIVE)?.0)
}

/// The ids of the programs that are attached to this very cgroup or network namespace, in their order, and with which flags
/// of `BPF_PROG_ATTACH` (Linux 4.15).
pub(crate) fn attached_programs(
    target: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<(Vec<u32>, u32)> {
    query(target, attach_type, 0)
}

/// `BPF_PROG_QUERY`.
fn query(target: BorrowedFd<'_>, attach_type: bpf_attach_type, flags: u32) -> io::Result<(Vec<u32>, u32)> {
    // The kernel runs at most 64 of one cgroup, and ours is among the first that are attached above it.
    let mut ids = [0_u32; 256];
    let mut attr = zeroed();
    attr.query.__bindgen_anon_1.target_fd = number(target.as_raw_fd());
    attr.query.attach_type = attach_type as u32;
    attr.query.query_flags = flags;
    attr.query.prog_ids = ids.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = u32::try_from(ids.len()).unwrap_or(0);
    bpf(bpf_cmd::BPF_PROG_QUERY, &attr)?;
    // SAFETY: the command has written how many there are, and the flags.
    let (count, attached) = unsafe { (attr.query.__bindgen_anon_2.prog_cnt, attr.query.attach_flags) };
    let ids = ids.iter().take(usize::try_from(count).unwrap_or(0)).copied().collect();
    Ok((ids, attached))
}

/// `BPF_OBJ_PIN`.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = number(object.as_raw_fd());
    bpf(bpf_cmd::BPF_OBJ_PIN, &attr).map(drop)
}

/// `BPF_OBJ_GET`.
pub(crate) fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &attr)
}

/// `BPF_MAP_UPDATE_ELEM` on cgroup storage whose key is the cgroup's id. The kernel swaps the value as a whole.
/// `ENOENT` when no program that uses the map is attached to that cgroup.
pub(crate) fn write_cgroup_storage<V: aya::Pod>(
    map: BorrowedFd<'_>,
    cgroup: u64,
    value: &V,
) -> io::Result<()> {
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = number(map.as_raw_fd());
    attr.__bindgen_anon_2.key = std::ptr::from_ref(&cgroup) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = std::ptr::from_ref(value) as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &attr).map(drop)
}

/// `BPF_MAP_LOOKUP_ELEM` on cgroup storage whose key is the cgroup's id. `ENOENT` as above.
pub(crate) fn read_cgroup_storage<V: aya::Pod + Default>(map: BorrowedFd<'_>, cgroup: u64) -> io::Result<V> {
    let mut value = V::default();
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = number(map.as_raw_fd());
    attr.__bindgen_anon_2.key = std::ptr::from_ref(&cgroup) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = std::ptr::from_mut(&mut value) as u64;
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &attr)?;
    Ok(value)
}
