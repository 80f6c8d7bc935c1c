//! cgroup2 directories of a test's own, on machines with cgroup2 alone and on those that keep v1 beside it.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use procfs::process::Process;

use crate::wait_until;

/// A cgroup2 directory. Dropping it kills what is inside and removes it, with all cgroups below.
#[derive(Debug)]
pub struct CgroupGuard {
    path: PathBuf,
}

impl CgroupGuard {
    /// A new cgroup at the top of the hierarchy; its name begins with `pillion-test`.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::at(cgroup2_mount()?.join(format!("pillion-test.{}.{number}", process::id())))
    }

    /// A new cgroup below this one.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::at(self.path.join(name))
    }

    /// A new cgroup below that of a process.
    pub fn below(pid: u32, name: &str) -> Result<Self> {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("a cgroup2 path")?;
        Self::at(cgroup2_mount()?.join(path).join(name))
    }

    fn at(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("cannot make the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its inode, which eBPF calls the cgroup's id.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// Moves a process inside.
    pub fn add(&self, pid: u32) -> Result<()> {
        let file = self.path.join("cgroup.procs");
        fs::write(&file, pid.to_string()).with_context(|| format!("cannot move {pid} to {}", file.display()))
    }

    /// A command whose process is inside before its program begins, so that all its sockets are.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        command_in(&self.path, program)
    }
}

/// The same for a cgroup that is somebody else's.
pub fn command_in(cgroup: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#]).arg(cgroup).arg(program);
    command
}

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Kills what is in a cgroup (of either version) and removes it with all below. Quiet about what is gone already; what
/// stays shows in the inventory.
pub(crate) fn remove(path: &Path) {
    if let Ok(entries) = fs::read_dir(path) {
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            remove(&entry.path());
        }
    }
    let procs = path.join("cgroup.procs");
    let _ = wait_until("an empty cgroup", Duration::from_secs(5), || {
        let Ok(pids) = fs::read_to_string(&procs) else { return true };
        for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        match fs::remove_dir(path) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    });
}

/// Where cgroup2 is mounted.
pub fn cgroup2_mount() -> Result<PathBuf> {
    mounts()?
        .into_iter()
        .find(|(kind, _)| kind == "cgroup2")
        .map(|(_, path)| path)
        .context("cgroup2 is not mounted on this machine")
}

/// All cgroup hierarchies: one on a machine with cgroup2 alone, several on a hybrid one. Type and mount point.
pub fn mounts() -> Result<Vec<(String, PathBuf)>> {
    let mounts = Process::myself()?.mountinfo().context("cannot read the mounts")?;
    Ok(mounts
        .into_iter()
        .filter(|mount| mount.fs_type.starts_with("cgroup"))
        .map(|mount| (mount.fs_type, mount.mount_point))
        .collect())
}
