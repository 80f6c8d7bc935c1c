//! What of Pillion is on this machine, found by looking at the machine and not at any record of it.
//!
//! Owns the looking: eBPF objects, pins, cgroups, processes, mounts, sockets and files. Never changes anything; that is
//! `cleanup`'s part. Finds leftovers also when the journal is lost.

pub(crate) mod cgroups;
pub(crate) mod files;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, OFlag},
};
use pillion_runtime::start_time;
use pillion_workload::{Pid, StartTime};
use procfs::process::{MountInfo, Process};
use serde::{Serialize, Serializer};

use crate::{config::Paths, lock::take_soon};

/// Kinds of things, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Kind {
    /// A file below the pin root.
    Pin,
    /// An eBPF link.
    Link,
    /// An eBPF program.
    Program,
    /// An eBPF map.
    Map,
    /// A process in one of our cgroups.
    Process,
    /// A cgroup directory, in any hierarchy.
    Cgroup,
    /// Something mounted at or below one of our directories.
    Mount,
    /// A Unix socket.
    Socket,
    /// A file or directory.
    File,
}

impl Kind {
    /// All kinds.
    pub(crate) const ALL: [Self; 9] = [
        Self::Pin,
        Self::Link,
        Self::Program,
        Self::Map,
        Self::Process,
        Self::Cgroup,
        Self::Mount,
        Self::Socket,
        Self::File,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pin => "pin",
            Self::Link => "link",
            Self::Program => "program",
            Self::Map => "map",
            Self::Process => "process",
            Self::Cgroup => "cgroup",
            Self::Mount => "mount",
            Self::Socket => "socket",
            Self::File => "file",
        })
    }
}

/// One thing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Item {
    /// What it is.
    pub(crate) kind: Kind,
    /// Its path, or its number and name.
    pub(crate) name: String,
    /// More, for those who look closer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
}

/// Everything that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Inventory {
    /// This instance's, sorted.
    pub(crate) ours: Vec<Item>,
    /// Of Pillion, but another instance's: in use by a live process or pinned elsewhere.
    pub(crate) elsewhere: Vec<Item>,
    /// In our directories, but not of Pillion.
    pub(crate) strange: Vec<PathBuf>,
    /// The workloads whose cgroups are this instance's, by the cgroup's name.
    pub(crate) workloads: BTreeSet<String>,
}

impl Inventory {
    /// How many there are of each kind; every kind is there.
    pub(crate) fn counts(&self) -> BTreeMap<Kind, usize> {
        let mut counts: BTreeMap<Kind, usize> = Kind::ALL.into_iter().map(|kind| (kind, 0)).collect();
        for item in &self.ours {
            *counts.entry(item.kind).or_default() += 1;
        }
        counts
    }
}

impl Serialize for Inventory {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            counts: BTreeMap<Kind, usize>,
            items: &'a [Item],
        }
        Shape { counts: self.counts(), items: &self.ours }.serialize(serializer)
    }
}

/// Where one could not look.
#[derive(Debug, thiserror::Error)]
#[error("cannot list {what}{}: {source}", path.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default())]
pub(crate) struct InventoryError {
    what: &'static str,
    path: Option<PathBuf>,
    source: io::Error,
}

impl InventoryError {
    pub(super) fn of(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { what, path: None, source }
    }

    pub(super) fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = Some(path.to_owned());
        move |source| Self { what, path, source }
    }
}

/// Looks everywhere. `known` are workloads that an earlier look found to be ours: what tells it, open files and
/// directories, may be gone by now.
pub(crate) fn take(paths: &Paths, known: &BTreeSet<String>) -> Result<Inventory, InventoryError> {
    let mounts = mounts()?;
    let mut inventory = Inventory::default();
    kernel_objects(&paths.pin_root, &mut inventory)?;
    cgroups::take(paths, known, &mounts, &mut inventory)?;
    for mount in &mounts {
        let found = item(Kind::Mount, mount.mount_point.display(), Some(mount.fs_type.clone()));
        match mount_is_ours(mount, paths) {
            Some(true) => inventory.ours.push(found),
            Some(false) => inventory.elsewhere.push(found),
            None => {}
        }
    }
    files::take(paths, &mut inventory)?;
    inventory.ours.sort();
    inventory.elsewhere.sort();
    Ok(inventory)
}

/// Whether Pillion made the mount, and then whether it is this instance's to take back.
fn mount_is_ours(mount: &MountInfo, paths: &Paths) -> Option<bool> {
    let point = &mount.mount_point;
    if point.starts_with(&paths.run_dir) || point.starts_with(&paths.state_dir) {
        return Some(true);
    }
    let made_by_us =
        mount.fs_type == "bpf" && mount.mount_source.as_deref() == Some(pillion_redirect::MOUNT_SOURCE);
    // With something pinned in it by somebody else, it stays.
    made_by_us.then(|| {
        paths.pin_root.starts_with(point)
            && pillion_redirect::pins_below(point)
                .is_ok_and(|pins| pins.iter().all(|pin| pin.starts_with(&paths.pin_root)))
    })
}

fn kernel_objects(pin_root: &Path, inventory: &mut Inventory) -> Result<(), InventoryError> {
    let pins = pillion_redirect::pins_below(pin_root).map_err(InventoryError::at("pins in", pin_root))?;
    inventory.ours.extend(pins.iter().map(|path| item(Kind::Pin, path.display(), None)));
    if pins.is_empty() && pin_root.is_dir() {
        // Nothing is pinned, but the directory is there.
        inventory.ours.push(item(Kind::Pin, pin_root.display(), Some("directory".to_owned())));
    }
    let found = pillion_redirect::inventory_by_owner(pin_root).map_err(InventoryError::of("eBPF objects"))?;
    for (list, objects) in [(&mut inventory.ours, found.ours), (&mut inventory.elsewhere, found.others)] {
        for (kind, objects) in
            [(Kind::Link, objects.links), (Kind::Program, objects.programs), (Kind::Map, objects.maps)]
        {
            list.extend(objects.into_iter().map(|object| item(kind, object.id, Some(object.name))));
        }
    }
    Ok(())
}

/// The mounts of our mount namespace.
pub(crate) fn mounts() -> Result<Vec<MountInfo>, InventoryError> {
    let mounts = Process::myself().and_then(|me| me.mountinfo());
    mounts.map(|mounts| mounts.0).map_err(|error| InventoryError::of("mounts")(io::Error::other(error)))
}

/// Who uses what is there.
#[derive(Debug)]
pub(crate) enum User {
    /// Nobody, and no agent can start while these live.
    Nobody(Locks),
    /// An agent, which holds flock(2) locks for as long as it runs; its pid, where it says so.
    Agent(Option<i32>),
    /// At least one `pillion run`.
    Runs(Vec<i32>),
}

/// The agent's locks, each on a file or directory.
#[derive(Debug)]
pub(crate) struct Locks(Vec<(PathBuf, Flock<fs::File>)>);

impl Locks {
    /// Gives up the one on `path`, which has been removed: open, it would keep its file system from being unmounted.
    pub(crate) fn let_go(&mut self, path: &Path) {
        self.0.retain(|(locked, _)| locked != path);
    }
}

/// Takes the agent's locks if they can be had, on a file in the run directory, the state directory and the pin root; then
/// looks for live `pillion run`s.
pub(crate) fn user(paths: &Paths) -> Result<User, InventoryError> {
    let mut locks = Vec::new();
    for path in [paths.run_dir.join("agent.lock"), paths.state_dir.clone(), paths.pin_root.clone()] {
        let file = match fs::OpenOptions::new().read(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(InventoryError::at("who holds", &path)(error)),
        };
        match take_soon(file) {
            Ok(lock) => locks.push((path, lock)),
            Err((file, Errno::EWOULDBLOCK)) => {
                let text = io::read_to_string(io::Read::take(file, 64)).unwrap_or_default();
                return Ok(User::Agent(text.trim().parse().ok()));
            }
            Err((_, errno)) => return Err(InventoryError::at("who holds", &path)(errno.into())),
        }
    }
    let runs = live_runs(paths);
    Ok(if runs.is_empty() { User::Nobody(Locks(locks)) } else { User::Runs(runs) })
}

/// Each `pillion run` has a state directory that bears its pid and start time.
fn live_runs(paths: &Paths) -> Vec<i32> {
    let entries = fs::read_dir(paths.runs()).into_iter().flatten().flatten();
    entries.filter_map(|entry| live_run(entry.file_name().to_str()?)).collect()
}

fn live_run(name: &str) -> Option<i32> {
    let (pid, started) = name.strip_prefix("run-")?.split_once('-')?;
    let (pid, started) = (pid.parse().ok()?, started.parse().ok()?);
    let alive = start_time(Pid(pid)).is_ok_and(|actual| actual == StartTime(started));
    alive.then_some(pid)
}

pub(super) fn item(kind: Kind, name: impl fmt::Display, detail: Option<String>) -> Item {
    Item { kind, name: name.to_string(), detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_lives_while_its_very_process_does() {
        let own = i32::try_from(std::process::id()).unwrap();
        let started = start_time(Pid(own)).unwrap().0;
        for (name, alive) in [
            (format!("run-{own}-{started}"), true),
            (format!("run-{own}-{}", started + 1), false),
            (format!("{own}-{started}"), false),
            ("run-x-y".to_owned(), false),
        ] {
            assert_eq!(live_run(&name), alive.then_some(own), "{name}");
        }
    }
}
