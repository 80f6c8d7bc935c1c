//! exec(): stops a new program before its first instruction, while a policy selects programs by path.
//!
//! An object of its own, loaded only then: no other machine runs anything of it. It compares the program's file name with
//! what policies name, which is all it decides; user space does the rest, and lets go. Nothing is stopped that is not first
//! in `PL_EXEC_HELD`, by which whoever comes later lets it go, and nothing while the agent's heart does not beat.
#![no_std]
#![no_main]

use aya_ebpf::{
    Global,
    btf_maps::{Array, HashMap, LpmTrie, RingBuf, lpm_trie::Key},
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
        bpf_get_current_task, bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_probe_read_kernel_str,
        bpf_send_signal,
    },
    macros::{btf_map, btf_tracepoint},
    programs::BtfTracePointContext,
};
use pillion_common::{EXEC_BEAT, EXEC_MISSED, ExecEvent, HeldProcess, PROGRAM_NAME_BYTES, ProgramName};

const SIGSTOP: u32 = 19;
/// `PIDTYPE_PGID` of `enum pid_type`, as an index of `signal_struct.pids`.
const PIDTYPE_PGID: u64 = 2;
/// Cgroups above the process's own that are looked at; the root, level 0, is never exempt.
const LEVELS: i32 = 12;
/// The bits of the longest key.
const NAME_BITS: u32 = 8 * PROGRAM_NAME_BYTES as u32;

/// First bytes of file names; with the zero at its end a whole name.
#[btf_map]
pub static PL_EXEC_NAMES: LpmTrie<ProgramName, u32, 1024> = LpmTrie::new();
/// What is stopped, by process. Pinned: what outlives the agent is let go by whoever finds it.
#[btf_map]
pub static PL_EXEC_HELD: HashMap<u32, HeldProcess, 4096> = HashMap::new();
/// Cgroups in which nothing is stopped: companions, and what is attached already.
#[btf_map]
pub static PL_EXEC_EXEMPT: HashMap<u64, u32, 16384> = HashMap::new();
/// The agent's heart ([`EXEC_BEAT`]), and what it was not told of ([`EXEC_MISSED`]).
#[btf_map]
pub static PL_EXEC_STATE: Array<u64, 2> = Array::new();
/// To the agent.
#[btf_map]
pub static PL_EXEC_EVENTS: RingBuf<ExecEvent, 262_144> = RingBuf::new();

/// The agent's process: its own children are not stopped.
#[unsafe(no_mangle)]
pub static AGENT: Global<u32> = Global::new(0);
/// After this long without a beat nothing is stopped any more.
#[unsafe(no_mangle)]
pub static PATIENCE_NS: Global<u64> = Global::new(0);
// Offsets of members, in bytes, as this kernel's BTF says.
#[unsafe(no_mangle)]
pub static OFF_BPRM_FILE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_FILE_DENTRY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_DENTRY_NAME: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_PTRACE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_TGID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_PARENT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_SIGNAL: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_STARTED: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_SIGNAL_TTY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_SIGNAL_PIDS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_TASK_CGROUPS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_CGROUPS_DEFAULT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static OFF_CGROUP_LEVEL: Global<u32> = Global::new(0);
/// Zero where a cgroup has no list of its ancestors' ids (from Linux 6.1 on): there is a helper then.
#[unsafe(no_mangle)]
pub static OFF_CGROUP_ANCESTORS: Global<u32> = Global::new(0);

/// `sched_process_exec(task, old_pid, bprm)`: the new program is in place and has not run.
#[btf_tracepoint(function = "sched_process_exec")]
pub fn pl_exec(ctx: BtfTracePointContext) -> i32 {
    let bprm: *const u8 = ctx.arg(2);
    let file: u64 = read(bprm as u64 + u64::from(OFF_BPRM_FILE.load()));
    let dentry: u64 = read(file + u64::from(OFF_FILE_DENTRY.load()));
    let name: u64 = read(dentry + u64::from(OFF_DENTRY_NAME.load()));
    let mut key = Key::new(NAME_BITS, ProgramName { bytes: [0; PROGRAM_NAME_BYTES] });
    // SAFETY: the buffer is as long as is said.
    let length = unsafe {
        bpf_probe_read_kernel_str((&raw mut key.data).cast(), PROGRAM_NAME_BYTES as u32, name as *const _)
    };
    if length > 0 && PL_EXEC_NAMES.get(&key).is_some() {
        matched();
    }
    0
}

#[inline(always)]
fn matched() {
    let Some(beat) = PL_EXEC_STATE.get_ptr(EXEC_BEAT) else { return };
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the element; one word, which the agent alone writes.
    let beat = unsafe { core::ptr::read_volatile(beat) };
    // SAFETY: take nothing.
    let (task, pid) = unsafe { (bpf_get_current_task(), (bpf_get_current_pid_tgid() >> 32) as u32) };
    let parent: u64 = read(task + u64::from(OFF_TASK_PARENT.load()));
    let parent_pid: u32 = read(parent + u64::from(OFF_TASK_TGID.load()));
    // A tracer would see the stop as one of its own making.
    let traced: u32 = read(task + u64::from(OFF_TASK_PTRACE.load()));
    if traced != 0 || pid == AGENT.load() || parent_pid == AGENT.load() || is_exempt() {
        return;
    }
    let started_ns: u64 = read(task + u64::from(OFF_TASK_STARTED.load()));
    let mut event = ExecEvent { pid, flags: 0, started_ns };
    let held = HeldProcess { started_ns, held_ns: now };
    let may_stop = now.wrapping_sub(beat) <= PATIENCE_NS.load() && !is_job(task, parent);
    if may_stop && PL_EXEC_HELD.insert(pid, held, 0).is_ok() {
        event.flags = ExecEvent::HELD;
    }
    let told = PL_EXEC_EVENTS.output(event, 0).is_ok();
    if told && event.flags != 0 {
        // SAFETY: takes a number. The signal is acted upon on the way to the first instruction.
        if unsafe { bpf_send_signal(SIGSTOP) } != 0 {
            let _ = PL_EXEC_HELD.remove(pid);
        }
    } else if !told {
        let _ = PL_EXEC_HELD.remove(pid);
        if let Some(missed) = PL_EXEC_STATE.get_ptr_mut(EXEC_MISSED) {
            // SAFETY: the element; a count that is only shown.
            unsafe { *missed += 1 };
        }
    }
}

/// A job of an interactive shell, which would take the stop for its user's and go on without it: it has a terminal and a
/// process group of its own.
#[inline(always)]
fn is_job(task: u64, parent: u64) -> bool {
    let signal: u64 = read(task + u64::from(OFF_TASK_SIGNAL.load()));
    let terminal: u64 = read(signal + u64::from(OFF_SIGNAL_TTY.load()));
    if terminal == 0 {
        return false;
    }
    let parents: u64 = read(parent + u64::from(OFF_TASK_SIGNAL.load()));
    let group_at = u64::from(OFF_SIGNAL_PIDS.load()) + 8 * PIDTYPE_PGID;
    let (own, its): (u64, u64) = (read(signal + group_at), read(parents + group_at));
    own != its
}

#[inline(always)]
fn is_exempt() -> bool {
    // SAFETY: takes nothing.
    if PL_EXEC_EXEMPT.get_ptr(unsafe { bpf_get_current_cgroup_id() }).is_some() {
        return true;
    }
    let (cgroup, depth) = own_cgroup();
    for level in 1..=LEVELS {
        let id = if OFF_CGROUP_ANCESTORS.load() == 0 {
            // SAFETY: takes a number; 0 when there is no such level.
            unsafe { bpf_get_current_ancestor_cgroup_id(level) }
        } else if level > depth {
            0
        } else {
            read(cgroup + u64::from(OFF_CGROUP_ANCESTORS.load()) + 8 * level as u64)
        };
        if id == 0 {
            return false;
        }
        if PL_EXEC_EXEMPT.get_ptr(id).is_some() {
            return true;
        }
    }
    false
}

/// The process's cgroup2 and its level, where ancestors are looked up in it.
#[inline(always)]
fn own_cgroup() -> (u64, i32) {
    if OFF_CGROUP_ANCESTORS.load() == 0 {
        return (0, 0);
    }
    // SAFETY: takes nothing.
    let task = unsafe { bpf_get_current_task() };
    let cgroups: u64 = read(task + u64::from(OFF_TASK_CGROUPS.load()));
    let cgroup: u64 = read(cgroups + u64::from(OFF_CGROUPS_DEFAULT.load()));
    (cgroup, read(cgroup + u64::from(OFF_CGROUP_LEVEL.load())))
}

/// Zeroes where nothing can be read.
#[inline(always)]
fn read<T: Copy + Default>(address: u64) -> T {
    let mut value = T::default();
    // SAFETY: the destination is a value of that size; the helper checks the source.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, address as *const _) };
    value
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the verifier rejects an object in which this could be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
