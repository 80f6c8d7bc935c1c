//! Finds the cgroup2 directory of a process, on pure cgroup2 and on hybrid machines.
//!
//! Owns the reading of `/proc/self/mountinfo` and of the `0::` line of `/proc/PID/cgroup` (cgroups(7),
//! `proc_pid_mountinfo(5)`). Never creates, moves or removes a cgroup.
//!
//! A process names its cgroup relative to the root of *our* cgroup namespace, and a mount names its root the same way.
//! So a mount covers a cgroup when its root is a prefix of the cgroup's path, component by component; both may begin
//! with `..` when they lie outside our namespace:
//!
//! | mount root | cgroup of the process | directory |
//! | --- | --- | --- |
//! | `/` | `/kubepods/a` | `<mount point>/kubepods/a` |
//! | `/kubepods` (a bind mount) | `/kubepods/a` | `<mount point>/a` |
//! | `/../..` (mounted by the parent namespace) | `/../../b` | `<mount point>/b` |
//! | `/` (mounted in our own namespace) | `/../b` | not visible: an error that says so |

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Component, Path, PathBuf},
};

use pillion_workload::{Cgroup, CgroupId};

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// A node with some thousand containers has a mountinfo of a few MiB.
const MOUNTINFO_LIMIT: u64 = 64 << 20;

/// Why a cgroup2 directory cannot be named.
#[derive(Debug, thiserror::Error)]
pub enum Cgroup2Error {
    /// mountinfo is not readable.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Only cgroup v1 here.
    #[error(
        "no cgroup2 file system is mounted; mount one, for example: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    NotMounted,
    /// The cgroup lies outside what is mounted here.
    #[error(
        "cgroup {cgroup:?} is not below any cgroup2 mount of this process ({mounts}); \
         the agent must run in the host's cgroup namespace and see all of the hierarchy"
    )]
    NotVisible {
        /// Path within the hierarchy, as `/proc/PID/cgroup` shows it.
        cgroup: PathBuf,
        /// The mounts that were looked at.
        mounts: String,
    },
    /// The cgroup has been removed.
    #[error("cgroup {path:?} does not exist any more")]
    Gone {
        /// The directory.
        path: PathBuf,
    },
    /// Another error about the directory.
    #[error("cannot inspect cgroup {path:?}")]
    Inspect {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The cgroup2 mounts of this process, as they were when read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup2Mounts(Vec<Mount>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    root: PathBuf,
    point: PathBuf,
}

impl Cgroup2Mounts {
    /// Reads `/proc/self/mountinfo`.
    pub fn discover() -> Result<Self, Cgroup2Error> {
        let path = Path::new("/proc/self/mountinfo");
        let text = read_limited(path, MOUNTINFO_LIMIT)
            .map_err(|source| Cgroup2Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text)
    }

    fn parse(mountinfo: &[u8]) -> Result<Self, Cgroup2Error> {
        let mut mounts: Vec<Mount> = mountinfo.split(|&b| b == b'\n').filter_map(parse_mount).collect();
        if mounts.is_empty() {
            return Err(Cgroup2Error::NotMounted);
        }
        // The one that shows most comes first; among equals the machine's usual one, which is mounted first.
        mounts.sort_by_key(|m| m.root.components().filter(|c| matches!(c, Component::Normal(_))).count());
        Ok(Self(mounts))
    }

    /// The mount point that shows most of the hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid machine.
    pub fn mount_point(&self) -> &Path {
        &self.0[0].point
    }

    /// The directory of a cgroup that `/proc/PID/cgroup` names `path`, with its inode.
    pub fn resolve(&self, path: &Path) -> Result<Cgroup, Cgroup2Error> {
        let mut failure = None;
        for directory in self.candidates(path) {
            match inspect(directory) {
                Ok(cgroup) => return Ok(cgroup),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| Cgroup2Error::NotVisible {
            cgroup: path.to_owned(),
            mounts: self
                .0
                .iter()
                .map(|m| format!("{} at {}", m.root.display(), m.point.display()))
                .collect::<Vec<_>>()
                .join(", "),
        }))
    }

    fn candidates<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
        self.0.iter().filter_map(move |mount| {
            let below = path.strip_prefix(&mount.root).ok()?;
            // A `..` that the root does not account for would climb out of the mount.
            below.components().all(|c| matches!(c, Component::Normal(_))).then(|| mount.point.join(below))
        })
    }
}

/// The cgroup2 path in the text of a `/proc/PID/cgroup`: what follows `0::`. `None` when it is not there or when the
/// cgroup has been removed under a zombie.
pub(crate) fn path_in_hierarchy(text: &[u8]) -> Option<PathBuf> {
    let path = text.split(|&b| b == b'\n').find_map(|line| line.strip_prefix(b"0::"))?;
    if !path.starts_with(b"/") || path.ends_with(b" (deleted)") {
        return None;
    }
    Some(PathBuf::from(OsStr::from_bytes(path)))
}

pub(crate) fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut text = Vec::new();
    fs::File::open(path)?.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

/// Opens the directory once, so that the file system's type and the inode are of the same file.
pub(crate) fn inspect(path: PathBuf) -> Result<Cgroup, Cgroup2Error> {
    let directory = match fs::File::open(&path) {
        Ok(directory) => directory,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Err(Cgroup2Error::Gone { path }),
        Err(source) => return Err(Cgroup2Error::Inspect { path, source }),
    };
    let found = rustix::fs::fstatfs(&directory)
        .map_err(io::Error::from)
        .and_then(|fs| Ok((fs.f_type.cast_unsigned(), directory.metadata()?.ino())));
    match found {
        Ok((CGROUP2_MAGIC, inode)) => Ok(Cgroup { id: CgroupId(inode), path }),
        Ok(_) => Err(Cgroup2Error::Inspect {
            path,
            source: io::Error::other("not on a cgroup2 file system; something is mounted over it"),
        }),
        Err(source) => Err(Cgroup2Error::Inspect { path, source }),
    }
}

/// `36 35 98:0 /root /point options optional-fields… - cgroup2 source options`
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let root = unescape(fields.nth(3)?);
    let point = unescape(fields.next()?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    (kind == b"cgroup2" && root.starts_with(b"/") && point.starts_with(b"/"))
        .then(|| Mount { root: OsStr::from_bytes(&root).into(), point: OsStr::from_bytes(&point).into() })
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if byte == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:9 - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:10 master:1 - cgroup2 cgroup2 rw
";

    #[test]
    fn finds_the_directory() {
        let pure = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let bind = "41 31 0:38 /kubepods /mnt/pods rw - cgroup2 cgroup2 rw\n";
        let parent = "41 31 0:38 /../.. /host rw - cgroup2 cgroup2 rw\n";
        let odd = "41 31 0:38 / /mnt/a\\040b\\134c rw - cgroup2 cgroup2 rw\n";
        let both = format!("{bind}{pure}");
        for (mountinfo, cgroup, directories) in [
            (HYBRID, "/default/web", &["/sys/fs/cgroup/unified/default/web"][..]),
            (pure, "/", &["/sys/fs/cgroup/"]),
            (pure, "/../a", &[]),
            (bind, "/kubepods/a", &["/mnt/pods/a"]),
            (bind, "/kubepods2/a", &[]),
            (bind, "/kubepods/../a", &[]),
            (parent, "/../../b", &["/host/b"]),
            (parent, "/b", &[]),
            (parent, "/../../../b", &[]),
            (odd, "/x", &["/mnt/a b\\c/x"]),
            (&both, "/kubepods/a", &["/sys/fs/cgroup/kubepods/a", "/mnt/pods/a"]),
        ] {
            let mounts = Cgroup2Mounts::parse(mountinfo.as_bytes()).expect("has a cgroup2 mount");
            let found: Vec<_> = mounts.candidates(Path::new(cgroup)).collect();
            let wanted: Vec<_> = directories.iter().map(PathBuf::from).collect();
            assert_eq!(found, wanted, "{mountinfo} {cgroup}");
        }
    }

    #[test]
    fn says_when_only_v1_is_mounted() {
        let text = HYBRID.replace("cgroup2 cgroup2", "cgroup cgroup");
        assert!(matches!(Cgroup2Mounts::parse(text.as_bytes()), Err(Cgroup2Error::NotMounted)));
    }

    #[test]
    fn reads_the_process_line() {
        for (text, path) in [
            ("9:name=systemd:/\n1:cpu:/x\n0::/a/b\n", Some("/a/b")),
            ("0::/\n", Some("/")),
            ("0::/../x", Some("/../x")),
            ("0::/gone (deleted)\n", None),
            ("1:cpu:/x\n", None),
            ("0::\n", None),
            ("", None),
        ] {
            assert_eq!(path_in_hierarchy(text.as_bytes()), path.map(PathBuf::from), "{text}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, path: String) {
            let _ = path_in_hierarchy(&bytes);
            if let Ok(mounts) = Cgroup2Mounts::parse(&bytes) {
                let _ = mounts.candidates(Path::new(&path)).count();
            }
            let mut line = b"1 2 0:1 / /m rw - cgroup2 ".to_vec();
            line.extend(&bytes);
            let mounts = Cgroup2Mounts::parse(&line).expect("the first line is a cgroup2 mount");
            for directory in mounts.candidates(Path::new(&path)) {
                prop_assert!(directory.starts_with("/"));
            }
        }
    }
}
