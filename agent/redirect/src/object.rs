//! The embedded eBPF object: its programs, where each is attached, and how it is loaded onto pinned maps.

use std::{os::fd::AsFd, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    programs::{CgroupSock, CgroupSockAddr, CgroupSockopt, Program, ProgramFd, SkLookup},
};
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_GETSOCKOPT, BPF_CGROUP_INET_SOCK_CREATE, BPF_CGROUP_INET_SOCK_RELEASE,
    BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET4_GETSOCKNAME,
    BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_INET6_GETSOCKNAME,
    BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_UDP6_SENDMSG,
};

use crate::{
    RedirectError,
    btf::{self, Offsets},
    features::Kernel,
    sys,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pillion-ebpf"));
/// The same programs for kernels without atomic instructions.
static OLDER_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pillion-ebpf-older"));

/// A program that is attached to cgroups.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CgroupProgram {
    pub(crate) name: &'static str,
    pub(crate) attach_type: bpf_attach_type,
    /// Attached only where datagrams are redirected.
    pub(crate) for_datagrams: bool,
}

const fn on(name: &'static str, attach_type: bpf_attach_type) -> CgroupProgram {
    CgroupProgram { name, attach_type, for_datagrams: false }
}

const fn for_datagrams(name: &'static str, attach_type: bpf_attach_type) -> CgroupProgram {
    CgroupProgram { name, attach_type, for_datagrams: true }
}

/// On a workload's cgroup, in the order of attaching: what shows names before what redirects, and first a program that
/// uses the configuration, because its storage is made by that.
pub(crate) const WORKLOAD_PROGRAMS: [CgroupProgram; 12] = [
    on("pl_name4", BPF_CGROUP_INET4_GETSOCKNAME),
    on("pl_name6", BPF_CGROUP_INET6_GETSOCKNAME),
    on("pl_peer4", BPF_CGROUP_INET4_GETPEERNAME),
    on("pl_peer6", BPF_CGROUP_INET6_GETPEERNAME),
    on("pl_release", BPF_CGROUP_INET_SOCK_RELEASE),
    on("pl_socket", BPF_CGROUP_INET_SOCK_CREATE),
    for_datagrams("pl_receive4", BPF_CGROUP_UDP4_RECVMSG),
    for_datagrams("pl_receive6", BPF_CGROUP_UDP6_RECVMSG),
    for_datagrams("pl_send4", BPF_CGROUP_UDP4_SENDMSG),
    for_datagrams("pl_send6", BPF_CGROUP_UDP6_SENDMSG),
    on("pl_connect4", BPF_CGROUP_INET4_CONNECT),
    on("pl_connect6", BPF_CGROUP_INET6_CONNECT),
];

/// On a companion's cgroup.
pub(crate) const COMPANION_PROGRAMS: [CgroupProgram; 3] = [
    on("pl_original", BPF_CGROUP_GETSOCKOPT),
    on("pl_unasked", BPF_CGROUP_INET_SOCK_RELEASE),
    for_datagrams("pl_reply4", BPF_CGROUP_UDP4_SENDMSG),
];

/// On a workload's network namespace, one instance a workload.
pub(crate) const STEER_PROGRAM: &str = "pl_steer";

/// Every map of the objects.
pub(crate) const MAPS: [&str; 25] = [
    "PL_WORKLOADS",
    "PL_COMPANIONS",
    "PL_SLOTS",
    "PL_FREE",
    "PL_FRESH",
    "PL_BY_SOURCE",
    "PL_REDIRECTED",
    "PL_SHARES",
    "PL_NETS4",
    "PL_NETS6",
    "PL_ROUTES",
    "PL_USERS",
    "PL_EXECUTABLES",
    "PL_PEERS",
    "PL_PEER_OF",
    "PL_BOUND",
    "PL_HEARD",
    "PL_LISTENERS",
    "PL_INBOUND",
    "PL_EXEMPT",
    "PL_COUNTERS",
    "PL_TRACED",
    "PL_TRACE_STATE",
    "PL_TRACE",
    "PL_LOCKS",
];

/// What the programs read of kernel structures, to tell which program a process executes.
pub(crate) const MEMBERS: [btf::Member; 14] = [
    ("OFF_TASK_MM", "task_struct", "mm"),
    ("OFF_TASK_FS", "task_struct", "fs"),
    ("OFF_MM_EXE", "mm_struct", "exe_file"),
    ("OFF_FILE_PATH", "file", "f_path"),
    ("OFF_FS_ROOT", "fs_struct", "root"),
    ("OFF_PATH_DENTRY", "path", "dentry"),
    ("OFF_PATH_MOUNT", "path", "mnt"),
    ("OFF_DENTRY_PARENT", "dentry", "d_parent"),
    ("OFF_DENTRY_NAME", "dentry", "d_name"),
    ("OFF_DENTRY_NAME", "qstr", "name"),
    ("OFF_MOUNT_VFS", "mount", "mnt"),
    ("OFF_VFS_ROOT", "vfsmount", "mnt_root"),
    ("OFF_MOUNT_PARENT", "mount", "mnt_parent"),
    ("OFF_MOUNT_POINT", "mount", "mnt_mountpoint"),
];

/// Whether connections of this cgroup are redirected already, by a link on it or above it, of whichever instance.
pub fn is_redirected(cgroup: &Path) -> bool {
    let running = std::fs::File::open(cgroup)
        .and_then(|directory| sys::effective_programs(directory.as_fd(), BPF_CGROUP_INET4_CONNECT));
    let Ok(running) = running else { return false };
    !running.is_empty()
        && aya::programs::loaded_programs()
            .flatten()
            .any(|program| running.contains(&program.id()) && program.name_as_str() == Some("pl_connect4"))
}

/// Values that are fixed when a program is loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Constants {
    pub(crate) kernel: Kernel,
    pub(crate) usable_slots: u32,
    pub(crate) slots_per_workload: u32,
    pub(crate) connections_per_workload: u32,
    pub(crate) slot_expiry: u32,
    pub(crate) steer_workload: u32,
    /// How many entries maps have that are made, and how many those of rules.
    pub(crate) connections: u32,
    pub(crate) table_entries: u32,
}

/// Parses the object and makes its maps, or takes those pinned in `maps`. No program is loaded yet. Without `offsets` no
/// programs can be left alone.
pub(crate) fn open(
    maps: Option<&Path>,
    constants: &Constants,
    offsets: Option<&Offsets>,
) -> Result<Ebpf, RedirectError> {
    let mut loader = EbpfLoader::new();
    loader
        .override_global("KERNEL", &constants.kernel.bits, true)
        .override_global("USABLE_SLOTS", &constants.usable_slots, true)
        .override_global("SLOTS_PER_WORKLOAD", &constants.slots_per_workload, true)
        .override_global("CONNECTIONS_PER_WORKLOAD", &constants.connections_per_workload, true)
        .override_global("SLOT_EXPIRY", &constants.slot_expiry, true)
        .override_global("STEER_WORKLOAD", &constants.steer_workload, true);
    for map in ["PL_BY_SOURCE", "PL_REDIRECTED"] {
        loader.map_max_entries(map, constants.connections);
    }
    for map in ["PL_NETS4", "PL_NETS6", "PL_ROUTES"] {
        loader.map_max_entries(map, constants.table_entries);
    }
    for (global, offset) in offsets.into_iter().flat_map(Offsets::globals) {
        loader.override_global(global, offset, true);
    }
    if let Some(directory) = maps {
        for name in MAPS {
            loader.map_pin_path(name, directory.join(name));
        }
    }
    let object = if constants.kernel.atomics { OBJECT } else { OLDER_OBJECT };
    loader.load(object).map_err(|error| RedirectError::Object(Box::new(error)))
}

/// Loads one program into the kernel and returns a descriptor of it.
pub(crate) fn load_program(object: &mut Ebpf, name: &'static str) -> Result<ProgramFd, RedirectError> {
    let refused = |source| RedirectError::Program { program: name, source: Box::new(source) };
    let program = object.program_mut(name).ok_or(RedirectError::Missing(name))?;
    match program {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::CgroupSock(program) => CgroupSock::load(program),
        Program::CgroupSockopt(program) => CgroupSockopt::load(program),
        Program::SkLookup(program) => SkLookup::load(program),
        _ => return Err(RedirectError::Missing(name)),
    }
    .map_err(refused)?;
    program.fd().map_err(refused)?.try_clone().map_err(|error| refused(error.into()))
}
