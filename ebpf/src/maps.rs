//! All maps and load-time constants. The agent pins every map, so that state outlives the agent.

use aya_ebpf::{
    Global,
    bindings::bpf_map_type::BPF_MAP_TYPE_CGROUP_STORAGE_DEPRECATED as CGROUP_STORAGE,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, RingBuf, SockHash},
    helpers::generated::bpf_get_local_storage,
    macros::btf_map,
};
use pillion_common::{
    BoundKey, BySource, BySourceKey, CONNECTIONS, CompanionConfig, Counter, ExecutableKey, ExemptKey,
    HeardKey, InboundRule, ListenerKey, Network4, Network6, PeerKey, PeerSlot, PortKey, Redirected, Route,
    RouteKey, SLOTS, Share, Slot, UserKey, WORKLOADS, WorkloadConfig,
    trace::{TraceEvent, TraceState, Traced},
};

/// `BPF_F_NO_PREALLOC`: memory is taken when an entry is made.
const NO_PREALLOC: usize = 1;

/// Storage of the cgroup that the running program is *attached to*, whichever cgroup below it the socket is in. That
/// makes one loaded program serve every workload at the cost of a load, and makes nested cgroups right.
/// (`BPF_MAP_TYPE_CGRP_STORAGE`, its successor, is keyed by a cgroup pointer that these programs cannot get.)
///
/// A `u64` key, the cgroup's id, makes all programs of a cgroup share the value (Linux 5.9).
#[repr(C)]
pub struct AttachedCgroupStorage<V> {
    r#type: *const [i32; CGROUP_STORAGE as usize],
    key: *const u64,
    value: *const V,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; 0],
}

// SAFETY: a map definition; the pointers are types for the loader and are never followed.
unsafe impl<V> Sync for AttachedCgroupStorage<V> {}

impl<V> AttachedCgroupStorage<V> {
    const fn new() -> Self {
        use core::ptr::null;
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }

    /// The value; zeroes until the agent has written it.
    #[inline(always)]
    pub fn get(&self) -> &V {
        // SAFETY: the helper returns the storage of the attached cgroup, never null; the agent replaces the value as
        // a whole by pointing the kernel at a new buffer, so a reader sees one version.
        unsafe { &*bpf_get_local_storage((&raw const *self).cast_mut().cast(), 0).cast::<V>() }
    }
}

/// What the programs on a workload's cgroup do.
#[btf_map]
pub static PL_WORKLOADS: AttachedCgroupStorage<WorkloadConfig> = AttachedCgroupStorage::new();
/// What the programs on a companion's cgroup know.
#[btf_map]
pub static PL_COMPANIONS: AttachedCgroupStorage<CompanionConfig> = AttachedCgroupStorage::new();

/// Original destinations on their way.
#[btf_map]
pub static PL_SLOTS: Array<Slot, { SLOTS as usize }> = Array::new();
/// Slots that were given back, oldest first. Twice the size: a slot that was claimed out of turn leaves its old entry.
#[btf_map]
pub static PL_FREE: Queue<u32, { 2 * SLOTS as usize }> = Queue::new();
/// How many were ever taken from the fresh ones: of the slots (element 0), of the peers (element 1).
#[btf_map]
pub static PL_FRESH: Array<u64, 2> = Array::new();
/// Destinations by the source of the connection: once asked for, and of sockets that cannot take a slot's address.
#[btf_map]
pub static PL_BY_SOURCE: HashMap<BySourceKey, BySource, { CONNECTIONS as usize }, NO_PREALLOC> =
    HashMap::new();

/// What applications are to see, by socket cookie. A hash and not socket storage, because making the latter takes
/// 0.8 µs, more than all the rest of a connect; `pl_release` takes entries out, and a detach what is left.
#[btf_map]
pub static PL_REDIRECTED: HashMap<u64, Redirected, { CONNECTIONS as usize }, NO_PREALLOC> = HashMap::new();

/// What each workload has of what all share, by its number modulo their count. The agent says whose each is. An array and
/// no hash, because a connection looks here six times.
#[btf_map]
pub static PL_SHARES: Array<Share, { WORKLOADS as usize }> = Array::new();

/// The class of destinations, by IPv4 network.
#[btf_map]
pub static PL_NETS4: LpmTrie<Network4, u32, 1_048_576> = LpmTrie::new();
/// The class of destinations, by IPv6 network.
#[btf_map]
pub static PL_NETS6: LpmTrie<Network6, u32, 1_048_576> = LpmTrie::new();
/// Rules, by class of destinations, protocol and port.
#[btf_map]
pub static PL_ROUTES: LpmTrie<RouteKey, Route, 1_048_576> = LpmTrie::new();
/// Users that are left alone.
#[btf_map]
pub static PL_USERS: HashMap<UserKey, u32, 65536, NO_PREALLOC> = HashMap::new();
/// Programs that are left alone.
#[btf_map]
pub static PL_EXECUTABLES: HashMap<ExecutableKey, u32, 65536, NO_PREALLOC> = HashMap::new();

/// Destinations of datagrams that have an address of their own.
#[btf_map]
pub static PL_PEERS: Array<Slot, { SLOTS as usize }> = Array::new();
/// Which of them a destination has.
#[btf_map]
pub static PL_PEER_OF: HashMap<PeerKey, PeerSlot, { SLOTS as usize }, NO_PREALLOC> = HashMap::new();
/// The addresses, network byte order, that datagram sockets are bound to.
#[btf_map]
pub static PL_BOUND: LruHashMap<BoundKey, u32, 65536> = LruHashMap::new();
/// Who has sent datagrams to the workload's sockets.
#[btf_map]
pub static PL_HEARD: LruHashMap<HeardKey, u32, 65536> = LruHashMap::new();

/// Cgroups that a workload's programs leave alone.
#[btf_map]
pub static PL_EXEMPT: HashMap<ExemptKey, u32, 16384, NO_PREALLOC> = HashMap::new();

/// Companions' listening sockets. The kernel takes a socket out when it is closed: its presence says that the
/// companion lives, whatever the agent does.
#[btf_map]
pub static PL_LISTENERS: SockHash<ListenerKey, 16384> = SockHash::new();
/// Redirected inbound ports.
#[btf_map]
pub static PL_INBOUND: HashMap<PortKey, InboundRule, 65536, NO_PREALLOC> = HashMap::new();

/// Workloads that are traced, by number.
#[btf_map]
pub static PL_TRACED: HashMap<u32, Traced, 1024, NO_PREALLOC> = HashMap::new();
/// What is kept for each of them.
#[btf_map]
pub static PL_TRACE_STATE: HashMap<u32, TraceState, 1024, NO_PREALLOC> = HashMap::new();
/// Decisions about them, to the agent.
#[btf_map]
pub static PL_TRACE: RingBuf<TraceEvent, 262_144> = RingBuf::new();

/// Indexed by [`Counter`].
#[btf_map]
pub static PL_COUNTERS: PerCpuArray<u64, 16> = PerCpuArray::new();

// Offsets of members of kernel structures, in bytes, as this kernel's BTF says; all zero where no programs can be told
// apart.
#[unsafe(no_mangle)]
pub static OFF_TASK_MM: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_FS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_MM_EXE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_FILE_PATH: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_FS_ROOT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_PATH_DENTRY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_PATH_MOUNT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_DENTRY_PARENT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_DENTRY_NAME: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_MOUNT_VFS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_VFS_ROOT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_MOUNT_PARENT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_MOUNT_POINT: Global<u32> = Global::new(0);

/// The workload that this instance of `pl_steer` serves: `sk_lookup` programs cannot tell their namespace.
#[unsafe(no_mangle)]
pub static STEER_WORKLOAD: Global<u32> = Global::new(0);
/// How many slots, and as many destinations of datagrams, may be used, at most [`SLOTS`].
#[unsafe(no_mangle)]
pub static USABLE_SLOTS: Global<u32> = Global::new(SLOTS);
/// How many of them one workload may have.
#[unsafe(no_mangle)]
pub static SLOTS_PER_WORKLOAD: Global<u32> = Global::new(SLOTS);
/// How many open connections one workload may have, and how many destinations kept by source.
#[unsafe(no_mangle)]
pub static CONNECTIONS_PER_WORKLOAD: Global<u32> = Global::new(CONNECTIONS);
/// After this many units of 2^30 ns an unasked slot is taken back.
#[unsafe(no_mangle)]
pub static SLOT_EXPIRY: Global<u32> = Global::new(900);

/// What this kernel has, see [`pillion_common::kernel`].
#[unsafe(no_mangle)]
pub static KERNEL: Global<u32> = Global::new(0);

/// Whether this kernel has it. Known to the verifier, which does not look at the branch that is not taken.
#[inline(always)]
pub fn kernel_has(feature: u32) -> bool {
    KERNEL.load() & feature != 0
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = PL_COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the element of this CPU; programs on one CPU do not preempt each other in the middle of an add
        // often enough to matter for a statistic.
        unsafe { *value += 1 };
    }
}
