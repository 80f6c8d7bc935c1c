//! The BPF file system: makes sure that pins have a place, and takes back a mount that Pillion made.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::RedirectError;

/// Where the BPF file system belongs.
const MOUNT_POINT: &str = "/sys/fs/bpf";

/// Source of a mount that Pillion made, in `/proc/self/mountinfo`; systemd's is `bpf`. So the mount itself tells who must
/// take it back, whatever else is lost.
pub const MOUNT_SOURCE: &str = "pillion";

/// What a new BPF file system holds where the kernel has `CONFIG_BPF_PRELOAD`.
const OF_THE_KERNEL: [&str; 2] = ["maps.debug", "progs.debug"];

/// A directory within the BPF file system.
#[derive(Debug)]
pub struct Bpffs {
    mounted: bool,
}

impl Bpffs {
    /// Makes sure that `root` is a directory of a BPF file system; mounts one at `/sys/fs/bpf` when `root` is below it
    /// and nothing is mounted there, as systemd does at boot.
    pub fn ensure(root: &Path) -> Result<Self, RedirectError> {
        let failed = |source| RedirectError::Bpffs { path: root.to_owned(), source };
        let mut mounted = false;
        if root.starts_with(MOUNT_POINT) && !is_bpffs(Path::new(MOUNT_POINT)) {
            mount(
                Some(MOUNT_SOURCE),
                MOUNT_POINT,
                Some("bpf"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                Some("mode=0700"),
            )
            .map_err(|errno| RedirectError::Bpffs {
                path: PathBuf::from(MOUNT_POINT),
                source: errno.into(),
            })?;
            mounted = true;
        }
        fs::create_dir_all(root).map_err(failed)?;
        if is_bpffs(root) {
            return Ok(Self { mounted });
        }
        Err(failed(io::Error::other(
            "it is on another file system; mount one with `mount -t bpf bpf /sys/fs/bpf`",
        )))
    }

    /// Whether [`Bpffs::ensure`] has mounted the file system, so that somebody has to take it back.
    pub fn was_mounted_here(&self) -> bool {
        self.mounted
    }

    /// Unmounts `/sys/fs/bpf` if nothing is pinned there. To be called only for a mount that Pillion made.
    pub fn release() -> Result<bool, RedirectError> {
        let failed = |source| RedirectError::Bpffs { path: PathBuf::from(MOUNT_POINT), source };
        if !is_bpffs(Path::new(MOUNT_POINT)) {
            return Ok(true);
        }
        for entry in fs::read_dir(MOUNT_POINT).map_err(failed)? {
            if !is_of_the_kernel(&entry.map_err(failed)?.file_name()) {
                return Ok(false);
            }
        }
        umount2(MOUNT_POINT, MntFlags::empty()).map_err(|errno| failed(errno.into()))?;
        Ok(true)
    }
}

/// Whether a file of this name is no pin, and none of anybody's.
pub(crate) fn is_of_the_kernel(name: &OsStr) -> bool {
    OF_THE_KERNEL.iter().any(|known| name == *known)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|status| status.filesystem_type() == BPF_FS_MAGIC)
}
