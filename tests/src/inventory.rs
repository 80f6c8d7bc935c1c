//! What is on the machine that Pillion or a test could leave behind, so that two moments can be compared.
//!
//! Kernel objects, mounts and devices are listed whoever made them; cgroups, processes, sockets and files only when they
//! are Pillion's or a test's by name or mark, because the rest of a machine is never still. Only looks.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use procfs::process::{Process, all_processes};
use serde::{Deserialize, Serialize};

use crate::{cgroup, process::MARK, wait_until};

/// Where Pillion keeps things.
const DIRECTORIES: &[&str] = &["/run/pillion", "/var/lib/pillion", "/var/log/pillion"];
/// Where a program may leave temporary files; only names that begin with `pillion` count.
const TEMPORARY: &[&str] = &["/tmp", "/var/tmp", "/run", "/dev/shm"];
/// In names of cgroups and sockets.
const OURS: &str = "pillion";
/// Programs whose processes count.
const EXECUTABLES: &[&str] = &["pillion", "pillion-hook", "pillion-puppet"];
/// Deeper files are not looked for.
const DEPTH: usize = 8;

/// A set of lines, each `kind: what`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Looks at everything, now.
    pub fn take() -> Result<Self> {
        let mut found = Self::default();
        found.kernel_objects();
        found.tree("pin", Path::new("/sys/fs/bpf"), DEPTH);
        found.cgroups()?;
        found.mounts()?;
        found.processes()?;
        found.unix_sockets()?;
        for directory in DIRECTORIES {
            found.tree("file", Path::new(directory), DEPTH);
        }
        for directory in TEMPORARY {
            for path in entries(Path::new(directory)).filter(|path| is_named_ours(path)) {
                found.add("file", path.display());
            }
        }
        for path in entries(Path::new("/sys/class/net")).chain(entries(Path::new("/run/netns"))) {
            found.add("network", path.display());
        }
        Ok(found)
    }

    /// The lines, sorted.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// What is here and was not in `before`.
    pub fn added_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// An error that lists what the machine has more now than in this earlier inventory, and still has after `settle`: the
    /// kernel frees some things only some time after their last user is gone.
    pub fn expect_nothing_added(&self, settle: Duration) -> Result<()> {
        let mut added = Vec::new();
        let mut failure = None;
        let same = wait_until("the machine as it was before", settle, || match Self::take() {
            Ok(now) => {
                added = now.added_since(self);
                added.is_empty()
            }
            Err(error) => {
                failure = Some(error);
                true
            }
        });
        match (failure, same) {
            (Some(error), _) => Err(error),
            (None, Ok(())) => Ok(()),
            (None, Err(_)) => bail!("left behind on the machine:\n  {}", added.join("\n  ")),
        }
    }

    fn add(&mut self, kind: &str, what: impl std::fmt::Display) {
        self.0.insert(format!("{kind}: {what}"));
    }

    fn kernel_objects(&mut self) {
        // An error is an object that went away between two system calls.
        for program in aya::programs::loaded_programs().flatten() {
            let name = String::from_utf8_lossy(program.name());
            // systemd's, which come and go with its units.
            if !name.starts_with("sd_") {
                self.add("program", format_args!("{} {name}", program.id()));
            }
        }
        for map in aya::maps::loaded_maps().flatten() {
            self.add("map", format_args!("{} {}", map.id(), String::from_utf8_lossy(map.name())));
        }
        for link in aya::programs::loaded_links().flatten() {
            self.add("link", format_args!("{} of program {}", link.id(), link.program_id()));
        }
    }

    fn cgroups(&mut self) -> Result<()> {
        for (kind, mount) in cgroup::mounts()? {
            let mut open = vec![mount];
            while let Some(directory) = open.pop() {
                for path in entries(&directory).filter(|path| path.is_dir() && !path.is_symlink()) {
                    if path.to_string_lossy().contains(OURS) {
                        self.add(&kind, path.display());
                    }
                    open.push(path);
                }
            }
        }
        Ok(())
    }

    fn mounts(&mut self) -> Result<()> {
        for mount in Process::myself()?.mountinfo().context("cannot read the mounts")? {
            self.add("mount", format_args!("{} {}", mount.mount_point.display(), mount.fs_type));
        }
        Ok(())
    }

    /// A process of ours also stands for its namespaces, sockets and open files: they live as long as it does.
    fn processes(&mut self) -> Result<()> {
        let own = ancestors()?;
        for process in all_processes().context("cannot read /proc")?.flatten() {
            if own.contains(&process.pid) || !is_ours(&process) || waits_with_its_agent(&process) {
                continue;
            }
            let command = process.cmdline().unwrap_or_default().join(" ");
            self.add("process", format_args!("{} {command}", process.pid));
        }
        Ok(())
    }

    fn unix_sockets(&mut self) -> Result<()> {
        for socket in procfs::net::unix().context("cannot read the unix sockets")? {
            if let Some(path) = socket.path.filter(|path| path.to_string_lossy().contains(OURS)) {
                self.add("socket", path.display());
            }
        }
        Ok(())
    }

    /// Everything below `directory`, and itself.
    fn tree(&mut self, kind: &str, directory: &Path, depth: usize) {
        if !directory.exists() {
            return;
        }
        self.add(kind, directory.display());
        for path in entries(directory) {
            if path.is_dir() && !path.is_symlink() && depth > 0 {
                self.tree(kind, &path, depth - 1);
            } else {
                self.add(kind, path.display());
            }
        }
    }
}

/// The paths in a directory; none when it is not there.
fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn is_named_ours(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(OURS))
}

fn is_ours(process: &Process) -> bool {
    let by_executable = || {
        let path = process.exe().ok()?;
        let name = path.file_name()?.to_str()?.trim_end_matches(" (deleted)").to_owned();
        Some(EXECUTABLES.contains(&name.as_str()))
    };
    let by_mark = || Some(process.environ().ok()?.contains_key(std::ffi::OsStr::new(MARK)));
    let by_cgroup = || {
        let memberships = process.cgroups().ok()?;
        Some(memberships.into_iter().any(|membership| membership.pathname.contains(OURS)))
    };
    // A zombie is not there any more: its parent has only not asked yet.
    let dead = process.stat().is_ok_and(|stat| stat.state == 'Z');
    !dead && (by_executable() == Some(true) || by_mark() == Some(true) || by_cgroup() == Some(true))
}

/// Whether it is one of those that an agent keeps ready to become companions, which end with it. One whose agent is gone is
/// not.
fn waits_with_its_agent(process: &Process) -> bool {
    let is = |process: &Process, word: &str| {
        process.cmdline().is_ok_and(|words| words.get(1).is_some_and(|second| second == word))
    };
    let in_no_cgroup_of_ours = || {
        let memberships = process.cgroups();
        memberships.is_ok_and(|all| all.into_iter().all(|membership| !membership.pathname.contains(OURS)))
    };
    let agent = || Process::new(process.stat().ok()?.ppid).ok();
    is(process, "companion") && in_no_cgroup_of_ours() && agent().is_some_and(|agent| is(&agent, "agent"))
}

/// This process and those that started it.
fn ancestors() -> Result<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    let mut process = Process::myself().context("cannot read /proc/self")?;
    loop {
        found.insert(process.pid);
        let parent = process.stat().context("cannot read /proc")?.ppid;
        match Process::new(parent) {
            Ok(next) if parent != 0 => process = next,
            _ => return Ok(found),
        }
    }
}
