//! Stopping programs at their exec: the eBPF side of that gate, loaded only while somebody wants it.
//!
//! Owns the object, its link and its maps. The link is not pinned: it goes with the agent. What is stopped is listed in a
//! pinned map, so that [`guard`] (a process of its own that survives the agent) or [`let_go_left`] (the next agent, or
//! a cleanup) lets it go. Never decides what stays stopped.

mod guardian;
mod process;

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, RingBuf, lpm_trie::Key},
    programs::BtfTracePoint,
};
use nix::time::{ClockId, clock_gettime};
use pillion_common::{
    EXEC_BEAT, EXEC_MISSED, ExecEvent, HeldProcess, LAYOUT_VERSION, PROGRAM_NAME_BYTES, ProgramName,
};
use pillion_workload::{CgroupId, Pid, ProcessId, StartTime};

use crate::{Bpffs, RedirectError, btf};

pub use guardian::guard;
pub use process::let_go_left;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pillion-ebpf-exec"));
const PROGRAM: &str = "pl_exec";
/// What the program reads of kernel structures.
pub(crate) const MEMBERS: [btf::Member; 15] = [
    ("OFF_BPRM_FILE", "linux_binprm", "file"),
    ("OFF_FILE_DENTRY", "file", "f_path"),
    ("OFF_FILE_DENTRY", "path", "dentry"),
    ("OFF_DENTRY_NAME", "dentry", "d_name"),
    ("OFF_DENTRY_NAME", "qstr", "name"),
    ("OFF_TASK_PTRACE", "task_struct", "ptrace"),
    ("OFF_TASK_TGID", "task_struct", "tgid"),
    ("OFF_TASK_PARENT", "task_struct", "real_parent"),
    ("OFF_TASK_SIGNAL", "task_struct", "signal"),
    ("OFF_TASK_STARTED", "task_struct", "start_boottime"),
    ("OFF_SIGNAL_TTY", "signal_struct", "tty"),
    ("OFF_SIGNAL_PIDS", "signal_struct", "pids"),
    ("OFF_TASK_CGROUPS", "task_struct", "cgroups"),
    ("OFF_CGROUPS_DEFAULT", "css_set", "dfl_cgrp"),
    ("OFF_CGROUP_LEVEL", "cgroup", "level"),
];
/// What newer kernels (6.1) have no more, for which they have a helper.
const OLDER_MEMBERS: [btf::Member; 1] = [("OFF_CGROUP_ANCESTORS", "cgroup", "ancestor_ids")];

/// `USER_HZ` is 100 on every architecture: a clock tick of proc(5) in nanoseconds.
const TICK_NS: u64 = 10_000_000;
/// An agent whose heart has not beaten for so long stops nothing more.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How often [`ExecWatch::beat`] is to be called.
pub const BEAT: Duration = Duration::from_millis(300);

/// What the name of a program's file must be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileName {
    /// Just this.
    Whole(String),
    /// Anything that begins with this.
    Beginning(String),
}

impl FileName {
    fn key(&self) -> Key<ProgramName> {
        let (text, exact) = match self {
            Self::Whole(name) => (name.as_bytes(), true),
            Self::Beginning(name) => (name.as_bytes(), false),
        };
        // The kernel's copy ends with a zero, so a name that fills the key is cut by one byte.
        let length = text.len().min(PROGRAM_NAME_BYTES - 1);
        let mut bytes = [0; PROGRAM_NAME_BYTES];
        bytes[..length].copy_from_slice(&text[..length]);
        let compared = if exact && length == text.len() { length + 1 } else { length };
        Key::new(u32::try_from(8 * compared).unwrap_or(0), ProgramName { bytes })
    }
}

/// A program with such a name was executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Executed {
    /// The process.
    pub process: ProcessId,
    /// Whether it is stopped. Not so: jobs of interactive shells, and everything when the list of what is stopped is full.
    pub held: bool,
}

/// The program in force. Dropping it stops nothing more; what is stopped stays listed.
pub struct ExecWatch {
    names: LpmTrie<MapData, ProgramName, u32>,
    in_names: BTreeSet<(u32, ProgramName)>,
    held: HashMap<MapData, u32, HeldProcess>,
    exempt: HashMap<MapData, u64, u32>,
    state: Array<MapData, u64>,
    pin: PathBuf,
    /// Holds program and link.
    object: Ebpf,
}

/// Where executions are told. Readable when there is one.
pub struct ExecEvents(RingBuf<MapData>);

impl std::fmt::Debug for ExecWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecWatch").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ExecEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecEvents").finish_non_exhaustive()
    }
}

impl AsRawFd for ExecEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl ExecEvents {
    /// The next one that waits.
    pub fn next_waiting(&mut self) -> Option<Executed> {
        loop {
            let item = self.0.next()?;
            // A kernel of another build is impossible: the object is ours.
            let Ok(bytes) = <[u8; size_of::<ExecEvent>()]>::try_from(&*item) else { continue };
            let word =
                |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            let started = u64::from(word(8)) | u64::from(word(12)) << 32;
            let Ok(pid) = i32::try_from(word(0)) else { continue };
            return Some(Executed {
                process: ProcessId { pid: Pid(pid), started: StartTime(started / TICK_NS) },
                held: word(4) & ExecEvent::HELD != 0,
            });
        }
    }
}

impl ExecWatch {
    /// Loads the program, which stops nothing before [`ExecWatch::set_names`]. Takes some tens of milliseconds.
    ///
    /// # Errors
    /// Also when this process is not in the machine's PID namespace: the program tells of processes by their numbers there.
    pub fn load(pin_root: &Path) -> Result<(Self, ExecEvents), RedirectError> {
        process::in_machines_pid_namespace()?;
        Bpffs::ensure(pin_root)?;
        let directory = directory(pin_root);
        fs::create_dir_all(&directory).map_err(RedirectError::sys("cannot create", &directory))?;
        let pin = directory.join(std::process::id().to_string());
        let offsets = btf::Offsets::of_this_kernel(&MEMBERS, &OLDER_MEMBERS)?;
        let mut loader = EbpfLoader::new();
        let patience = u64::try_from(PATIENCE.as_nanos()).unwrap_or(u64::MAX);
        let agent = std::process::id();
        loader.override_global("PATIENCE_NS", &patience, true).override_global("AGENT", &agent, true);
        for (name, offset) in offsets.globals() {
            loader.override_global(name, offset, true);
        }
        let object_failed = |error| RedirectError::Object(Box::new(error));
        let mut object = loader.load(OBJECT).map_err(object_failed)?;
        let refused = |source| RedirectError::Program { program: PROGRAM, source: Box::new(source) };
        let btf = Btf::from_sys_fs().map_err(|error| RedirectError::Btf(error.to_string()))?;
        let program = object.program_mut(PROGRAM).ok_or(RedirectError::Missing(PROGRAM))?;
        let program: &mut BtfTracePoint = program.try_into().map_err(refused)?;
        program.load("sched_process_exec", &btf).map_err(refused)?;
        let held: HashMap<MapData, u32, HeldProcess> = typed(&mut object, "PL_EXEC_HELD")?;
        held.pin(&pin).map_err(|error| RedirectError::sys("cannot pin", &pin)(io::Error::other(error)))?;
        let attached = Self::attach(object, pin.clone());
        if attached.is_err() {
            // Nothing is listed in it.
            let _ = fs::remove_file(&pin);
        }
        attached
    }

    fn attach(mut object: Ebpf, pin: PathBuf) -> Result<(Self, ExecEvents), RedirectError> {
        let held = process::open(&pin).map_err(RedirectError::sys("cannot open", &pin))?;
        let events = ExecEvents(typed(&mut object, "PL_EXEC_EVENTS")?);
        let mut watch = Self {
            names: typed(&mut object, "PL_EXEC_NAMES")?,
            in_names: BTreeSet::new(),
            held,
            exempt: typed(&mut object, "PL_EXEC_EXEMPT")?,
            state: typed(&mut object, "PL_EXEC_STATE")?,
            pin,
            object,
        };
        watch.beat()?;
        let refused = |source| RedirectError::Program { program: PROGRAM, source: Box::new(source) };
        let program = watch.object.program_mut(PROGRAM).ok_or(RedirectError::Missing(PROGRAM))?;
        let program: &mut BtfTracePoint = program.try_into().map_err(refused)?;
        program.attach().map_err(refused)?;
        Ok((watch, events))
    }

    /// Where what is stopped is listed, for [`guard`].
    pub fn pin(&self) -> &Path {
        &self.pin
    }

    /// Programs whose file has one of these names are stopped from now on, and no others.
    pub fn set_names(&mut self, names: &BTreeSet<FileName>) -> Result<(), RedirectError> {
        let wanted: BTreeSet<(u32, ProgramName)> =
            names.iter().map(FileName::key).map(|key| (key.prefix_len(), key.data())).collect();
        for (length, name) in self.in_names.difference(&wanted) {
            match self.names.remove(&Key::new(*length, *name)) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(RedirectError::map("PL_EXEC_NAMES")(error)),
            }
        }
        for (length, name) in wanted.difference(&self.in_names) {
            self.names
                .insert(&Key::new(*length, *name), 1, 0)
                .map_err(RedirectError::map("PL_EXEC_NAMES"))?;
        }
        self.in_names = wanted;
        Ok(())
    }

    /// Says that the agent is alive. To be called every [`BEAT`].
    pub fn beat(&mut self) -> Result<(), RedirectError> {
        self.state.set(EXEC_BEAT, monotonic_ns(), 0).map_err(RedirectError::map("PL_EXEC_STATE"))
    }

    /// How many programs with such a name were neither stopped nor told of, because the queue was full.
    pub fn missed(&self) -> u64 {
        self.state.get(&EXEC_MISSED, 0).unwrap_or(0)
    }

    /// Nothing in this cgroup or below it is stopped.
    pub fn exempt(&mut self, cgroup: CgroupId) -> Result<(), RedirectError> {
        self.exempt.insert(cgroup.0, 1, 0).map_err(RedirectError::map("PL_EXEC_EXEMPT"))
    }

    /// It is again.
    pub fn no_longer_exempt(&mut self, cgroup: CgroupId) {
        // Not there: nothing to do.
        let _ = self.exempt.remove(&cgroup.0);
    }

    /// The process runs again.
    pub fn forget(&mut self, pid: Pid) {
        if let Ok(pid) = u32::try_from(pid.0) {
            // Let go by the guardian meanwhile.
            let _ = self.held.remove(&pid);
        }
    }

    /// Ends it: nothing is stopped any more, and what was is let go.
    pub fn end(self) -> io::Result<()> {
        let Self { pin, held, object, .. } = self;
        // The link first.
        drop(object);
        process::let_go_all(held)?;
        fs::remove_file(&pin)?;
        if let Some(directory) = pin.parent() {
            // Another agent's pin may be in it.
            let _ = fs::remove_dir(directory);
        }
        Ok(())
    }
}

fn directory(pin_root: &Path) -> PathBuf {
    pin_root.join(format!("v{LAYOUT_VERSION}")).join("held")
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    map: &'static str,
) -> Result<T, RedirectError> {
    let found = object.take_map(map).ok_or(RedirectError::Missing(map))?;
    found.try_into().map_err(|source| RedirectError::Layout { map, source: Box::new(source) })
}

fn monotonic_ns() -> u64 {
    // Fails for no clock that exists.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_keys() {
        let long = "x".repeat(40);
        for (name, bits) in [
            (FileName::Whole("curl".into()), 40),
            (FileName::Beginning("pay".into()), 24),
            (FileName::Beginning(String::new()), 0),
            (FileName::Whole(long.clone()), 248),
            (FileName::Beginning(long), 248),
        ] {
            assert_eq!(name.key().prefix_len(), bits, "{name:?}");
        }
    }
}
