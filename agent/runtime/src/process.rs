//! Describes a process that `pillion run` holds, as a workload.
//!
//! Owns the naming of process workloads. Never starts a process.

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
};

use pillion_workload::{InvalidName, Pid, RuntimeKind, Subject, Workload, WorkloadId};
use rustix::fs::{Access, AtFlags, CWD};

use crate::instance::{InstanceError, instance_of};

/// Why a process cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum ProcessWorkloadError {
    /// The process cannot be identified.
    #[error("cannot identify the held process")]
    Instance(#[from] InstanceError),
    /// Its id breaks the rules of ids.
    #[error("cannot name the held process")]
    Name(#[from] InvalidName),
    /// The program was not found.
    #[error("cannot find the program {program:?}")]
    NotFound {
        /// What was asked for.
        program: PathBuf,
        /// Why the last candidate did not do.
        source: io::Error,
    },
}

/// Describes a held child that is going to execute `executable` (absolute, see [`resolve_program`]).
///
/// To be called while the child is in its final cgroup and network namespace. The id is
/// `process/<pid>-<start time in clock ticks since boot>`: unique until the next boot.
pub fn process_workload(pid: Pid, executable: &Path) -> Result<Workload, ProcessWorkloadError> {
    let instance = instance_of(pid)?;
    let id = WorkloadId::try_from(format!("{}/{pid}-{}", RuntimeKind::Process, instance.process.started.0))?;
    let name = executable.file_name().unwrap_or(executable.as_os_str()).to_string_lossy().into_owned();
    let subject =
        Subject { executable: Some(executable.to_owned()), ..Subject::new(RuntimeKind::Process, name) };
    Ok(Workload { id, subject, instance })
}

/// The absolute path that execvp(3) would execute: `program` itself when it has a slash, else the first executable
/// regular file of that name in `search` (a `PATH`). Symbolic links are kept as they are.
pub fn resolve_program(
    program: &OsStr,
    search: Option<&OsStr>,
    directory: &Path,
) -> Result<PathBuf, ProcessWorkloadError> {
    let named = Path::new(program);
    let candidates: Vec<PathBuf> = if program.as_encoded_bytes().contains(&b'/') {
        vec![directory.join(named)]
    } else if program.is_empty() {
        Vec::new()
    } else {
        // An empty entry of PATH means the current directory: joining it gives just that.
        std::env::split_paths(search.unwrap_or(OsStr::new("/bin:/usr/bin")))
            .map(|entry| directory.join(entry).join(named))
            .collect()
    };
    let mut failure = io::Error::from(io::ErrorKind::NotFound);
    for candidate in candidates {
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            // "permission denied" says more than "not found" in a later directory.
            Err(error) if failure.kind() == io::ErrorKind::NotFound => failure = error,
            Err(_) => {}
        }
    }
    Err(ProcessWorkloadError::NotFound { program: named.to_owned(), source: failure })
}

fn executable(path: &Path) -> io::Result<()> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "not a regular file"));
    }
    Ok(rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)?)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn describes_a_process() {
        let pid = Pid(std::process::id().try_into().expect("a pid fits an i32"));
        let workload = process_workload(pid, Path::new("/usr/bin/curl")).expect("alive");
        let started = workload.instance.process.started.0;
        assert_eq!(workload.id.as_str(), format!("process/{pid}-{started}"));
        assert_eq!(workload.subject.name, "curl");
        assert_eq!(workload.subject.executable.as_deref(), Some(Path::new("/usr/bin/curl")));
    }

    #[test]
    fn finds_programs_as_execvp_does() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for (name, mode) in [("a/tool", 0o644), ("b/tool", 0o755), ("b/other", 0o755)] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("has one")).expect("created");
            fs::write(&path, "").expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("changed");
        }
        fs::create_dir_all(root.path().join("a/other")).expect("created");
        let search = std::env::join_paths([root.path().join("a"), root.path().join("b")]).expect("no colon");
        for (program, wanted) in [
            ("tool", Some("b/tool")),
            ("other", Some("b/other")),
            ("b/tool", Some("b/tool")),
            ("./b/tool", Some("./b/tool")),
            ("a/tool", None),
            ("a/other", None),
            ("missing", None),
            ("", None),
        ] {
            let found = resolve_program(OsStr::new(program), Some(&search), root.path());
            assert_eq!(found.ok(), wanted.map(|path| root.path().join(path)), "{program}");
        }
    }
}
