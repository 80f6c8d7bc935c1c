//! Links: attached, pinned, adopted, and detached by one owner.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::programs::ProgramFd;
use aya_obj::generated::bpf_attach_type;

use crate::{RedirectError, sys};

/// A link with its pin. Dropping it leaves it in force; [`Link::detach`] ends it.
#[derive(Debug)]
pub(crate) struct Link {
    fd: OwnedFd,
    path: PathBuf,
}

impl Link {
    /// Attaches `program` and pins the link at `path`, replacing a stale pin there.
    pub(crate) fn attach(
        program: &ProgramFd,
        target: BorrowedFd<'_>,
        attach_type: bpf_attach_type,
        path: PathBuf,
    ) -> Result<Self, RedirectError> {
        let fd = sys::link_create(program.as_fd(), target, attach_type)
            .map_err(RedirectError::sys("cannot attach", &path))?;
        if let Ok(stale) = Self::adopt(&path) {
            stale.detach()?;
        }
        sys::pin(fd.as_fd(), &path).map_err(RedirectError::sys("cannot pin", &path))?;
        Ok(Self { fd, path })
    }

    /// Takes up a pinned link.
    pub(crate) fn adopt(path: &Path) -> Result<Self, RedirectError> {
        let fd = sys::get_pinned(path).map_err(RedirectError::sys("cannot open pinned link", path))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Lets the link run `program` from now on.
    pub(crate) fn run(&self, program: &ProgramFd) -> Result<(), RedirectError> {
        sys::link_update(self.fd.as_fd(), program.as_fd())
            .map_err(RedirectError::sys("cannot replace the program of", &self.path))
    }

    /// Whether a cgroup link still has its cgroup.
    pub(crate) fn has_cgroup(&self) -> bool {
        sys::cgroup_link_is_attached(self.fd.as_fd()).unwrap_or(false)
    }

    /// Ends the link before it returns, and removes its pin.
    pub(crate) fn detach(self) -> Result<(), RedirectError> {
        // A link whose cgroup or namespace is gone is detached already (ENOLINK, EINVAL): the pin is what is left.
        let _ = sys::link_detach(self.fd.as_fd());
        remove_if_there(fs::remove_file(&self.path)).map_err(RedirectError::sys("cannot unpin", &self.path))
    }
}

/// Opens a directory (a cgroup) as a target of links.
pub(crate) fn open_directory(path: &Path) -> Result<File, RedirectError> {
    File::open(path).map_err(RedirectError::sys("cannot open", path))
}

/// Treats "not there" as done.
pub(crate) fn remove_if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A companion's name as a directory of the BPF file system, which allows no dots.
pub(crate) fn directory_name(name: &str) -> String {
    name.replace('.', "+")
}
