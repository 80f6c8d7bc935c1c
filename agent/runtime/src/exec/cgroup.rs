//! A cgroup of its own for a process, below the one that it is in (cgroup2).
//!
//! Owns making it, entering, and giving back. Marked with its owner, so that a later agent or a cleanup finds it and
//! only its own. Never ends a process.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use pillion_workload::{Cgroup, Pid, ProcessId, StartTime};
use rustix::fs::{XattrFlags, getxattr, setxattr};

use crate::cgroup2::{Cgroup2Error, Cgroup2Mounts};

const PREFIX: &str = "pillion-";
/// The owner's state directory. `trusted.` is for root alone.
const MARK: &str = "trusted.pillion.state";
/// Longer than any path.
const MARK_LIMIT: usize = 4096;
/// A process that forks while it is moved is met again.
const ATTEMPTS: u32 = 100;
const DEEPEST: usize = 32;

/// Why a process cannot have a cgroup of its own.
#[derive(Debug, thiserror::Error)]
pub enum OwnCgroupError {
    /// The directory cannot be made or marked.
    #[error("cannot make the cgroup {}", path.display())]
    Make {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process cannot enter it.
    #[error("cannot move process {pid} into {}{}", path.display(), hint(source))]
    Enter {
        /// Which process.
        pid: Pid,
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// cgroup2 cannot be found.
    #[error(transparent)]
    Mounts(#[from] Cgroup2Error),
}

/// What the kernel means by these (Documentation/admin-guide/cgroup-v2.rst).
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::OPNOTSUPP) => ", which is in a threaded cgroup",
        Some(rustix::io::Errno::BUSY) => ", whose parent gives controllers to its children",
        _ => "",
    }
}

/// The cgroup of one process and its descendants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnCgroup {
    path: PathBuf,
    process: ProcessId,
}

impl OwnCgroup {
    /// Makes it below `within`, and moves the process there. On an error nothing is left.
    pub(crate) fn make(process: ProcessId, within: &Path, owner: &Path) -> Result<Self, OwnCgroupError> {
        let path = within.join(format!("{PREFIX}{}-{}", process.pid, process.started.0));
        let own = Self { path, process };
        let failed = |source| OwnCgroupError::Make { path: own.path.clone(), source };
        fs::create_dir(&own.path).map_err(failed)?;
        let mark = owner.as_os_str().as_encoded_bytes();
        let entered = match setxattr(&own.path, MARK, mark, XattrFlags::empty()) {
            Ok(()) => fs::write(own.path.join("cgroup.procs"), process.pid.to_string())
                .map_err(|source| OwnCgroupError::Enter { pid: process.pid, path: own.path.clone(), source }),
            Err(error) => Err(failed(error.into())),
        };
        if let Err(error) = entered {
            // Nobody is in it.
            let _ = fs::remove_dir(&own.path);
            return Err(error);
        }
        Ok(own)
    }

    /// All cgroups of this owner.
    ///
    /// # Errors
    /// When cgroup2 is not there or cannot be read.
    pub fn all_of(owner: &Path) -> Result<Vec<Self>, OwnCgroupError> {
        let mounts = Cgroup2Mounts::discover()?;
        let (mut found, mut waiting) = (Vec::new(), vec![(mounts.mount_point().to_owned(), DEEPEST)]);
        while let Some((directory, depth)) = waiting.pop() {
            for path in children(&directory) {
                if let Some(process) = named(&path)
                    && is_marked(&path, owner)
                {
                    found.push(Self { path: path.clone(), process });
                }
                if depth > 0 {
                    waiting.push((path, depth - 1));
                }
            }
        }
        Ok(found)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process that it was made for.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// Moves what is in it to its parent, and removes it. Nothing to do when it is gone.
    ///
    /// # Errors
    /// When a process cannot be moved, or new ones come faster than they are moved.
    pub fn give_back(&self) -> io::Result<()> {
        let Some(parent) = self.path.parent() else { return Ok(()) };
        let mut attempt = 1;
        loop {
            match empty(&self.path, &parent.join("cgroup.procs"), DEEPEST) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(_) => attempt += 1,
            }
        }
    }
}

/// Whether a cgroup is one of these, or below one, whoever's.
pub(crate) fn is_within_one(path: &Path) -> bool {
    path.ancestors().any(|part| named(part).is_some())
}

/// Those below it too: a descendant may have made some.
fn empty(directory: &Path, to: &Path, depth: usize) -> io::Result<()> {
    if depth > 0 {
        for child in children(directory) {
            empty(&child, to, depth - 1)?;
        }
    }
    for pid in fs::read_to_string(directory.join("cgroup.procs"))?.lines() {
        match fs::write(to, pid) {
            // It has ended.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
            other => other?,
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    // Gone meanwhile: none.
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn named(path: &Path) -> Option<ProcessId> {
    let (pid, started) = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
    Some(ProcessId { pid: Pid(pid.parse().ok()?), started: StartTime(started.parse().ok()?) })
}

fn is_marked(path: &Path, owner: &Path) -> bool {
    let mut value = [0; MARK_LIMIT];
    let length = getxattr(path, MARK, &mut value).unwrap_or(0);
    value.get(..length) == Some(owner.as_os_str().as_encoded_bytes()) && length > 0
}

/// The cgroup as others know it.
pub(crate) fn identity(own: &OwnCgroup) -> Result<Cgroup, Cgroup2Error> {
    crate::cgroup2::inspect(own.path.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_process() {
        for (path, process) in [
            ("/sys/fs/cgroup/pillion-12-345", Some((12, 345))),
            ("/sys/fs/cgroup/pillion.slice", None),
            ("/sys/fs/cgroup/pillion-test.1.2", None),
            ("/sys/fs/cgroup/pillion-12", None),
            ("/sys/fs/cgroup/pillion-12-x", None),
            ("/", None),
        ] {
            let process =
                process.map(|(pid, started)| ProcessId { pid: Pid(pid), started: StartTime(started) });
            assert_eq!(named(Path::new(path)), process, "{path}");
            assert_eq!(is_within_one(&Path::new(path).join("below")), process.is_some(), "{path}");
        }
    }
}
