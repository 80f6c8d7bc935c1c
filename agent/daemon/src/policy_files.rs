//! The policy directory: reads it, distrusts it, and watches it.
//!
//! Owns the rules of who may write policies: the files, the directory and everything above them must belong to root (or
//! to the agent's own user), and nobody else may be able to write there, since a policy starts programs as root. Never decides what
//! a policy means, and never drops the policies in force: it only tells of new ones or of why they cannot be had.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use pillion_policy::{Faults, PolicySet, SourceFile};

const MAX_FILES: usize = 512;
const MAX_FILE_BYTES: u64 = pillion_policy::MAX_FILE_BYTES as u64;

/// Why policies cannot be taken into force. `Display` gives every fault, on several lines.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The directory cannot be read.
    #[error("cannot read the policy directory {}: {source}", path.display())]
    Directory {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Files that must not or cannot be read.
    #[error("{}", lines(.0))]
    Files(Vec<FileFault>),
    /// What is in them.
    #[error("{0}")]
    Policy(Faults),
}

/// Why a file or a directory is not trusted, or cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub(crate) struct FileFault {
    path: PathBuf,
    reason: String,
}

/// Reads and parses the directory. Blocks.
pub(crate) fn load(directory: &Path) -> Result<PolicySet, LoadError> {
    load_with_files(directory).map(|(policies, _)| policies)
}

/// The same, with the files that were read.
pub(crate) fn load_with_files(directory: &Path) -> Result<(PolicySet, Vec<SourceFile>), LoadError> {
    let files = read(directory, Trust::of_this_process())?;
    let policies = pillion_policy::parse(&files).map_err(LoadError::Policy)?;
    Ok((policies, files))
}

fn read(directory: &Path, trust: Trust) -> Result<Vec<SourceFile>, LoadError> {
    let in_directory = |source| LoadError::Directory { path: directory.to_owned(), source };
    let real = directory.canonicalize().map_err(in_directory)?;
    trust.path(&real).map_err(|fault| LoadError::Files(vec![fault]))?;
    let mut paths = Vec::new();
    for entry in fs::read_dir(&real).map_err(in_directory)? {
        let path = entry.map_err(in_directory)?.path();
        if is_policy_file(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.len() > MAX_FILES {
        let reason = format!("holds {} policy files, at most {MAX_FILES} are read", paths.len());
        return Err(LoadError::Files(vec![FileFault { path: real, reason }]));
    }
    let mut files = Vec::new();
    let mut faults = Vec::new();
    for path in paths {
        // Kubernetes mounts a ConfigMap as links to files: what counts is where they lead.
        let text = path.canonicalize().map_err(|error| error.to_string()).and_then(|real| {
            trust.path(real.parent().unwrap_or(&real)).map_err(|fault| fault.to_string())?;
            read_file(&real, trust)
        });
        match text {
            Ok(text) => files.push(SourceFile { path, text }),
            Err(reason) => faults.push(FileFault { path, reason }),
        }
    }
    if faults.is_empty() { Ok(files) } else { Err(LoadError::Files(faults)) }
}

/// `*.yaml` and `*.yml`, but no hidden files: editors and Kubernetes keep theirs there.
pub(crate) fn is_policy_file(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

fn read_file(path: &Path, trust: Trust) -> Result<String, String> {
    // A FIFO must not make us wait.
    let flags = nix::libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|e| format!("cannot be read: {e}"))?;
    trust.file(&file)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("is larger than {MAX_FILE_BYTES} bytes"));
    }
    String::from_utf8(bytes).map_err(|error| format!("is not UTF-8: {error}"))
}

/// Whose files are trusted.
#[derive(Debug, Clone, Copy)]
struct Trust {
    uid: u32,
}

impl Trust {
    fn of_this_process() -> Self {
        Self { uid: nix::unistd::geteuid().as_raw() }
    }

    /// A directory and everything above it: who may write to one of them can put another file in place. A sticky
    /// directory such as /tmp lets nobody replace what belongs to others. Below a directory that only its owner can
    /// enter, nobody else gets to write, whatever the modes there: the kubelet makes a ConfigMap's directory 0777 below
    /// /var/lib/kubelet/pods, which is 0750 and root's.
    fn path(self, directory: &Path) -> Result<(), FileFault> {
        let from_the_root: Vec<&Path> = directory.ancestors().collect();
        let mut sealed_off = false;
        for ancestor in from_the_root.into_iter().rev() {
            let sticky_will_do = ancestor != directory;
            let checked = ancestor
                .symlink_metadata()
                .map_err(|error| format!("cannot be read: {error}"))
                .and_then(|metadata| {
                    self.owner(&metadata)?;
                    if !sealed_off {
                        Self::writers(&metadata, sticky_will_do)?;
                    }
                    sealed_off |= Self::only_the_owner_enters(&metadata);
                    Ok(())
                });
            checked.map_err(|reason| FileFault { path: ancestor.to_owned(), reason })?;
        }
        Ok(())
    }

    /// Root's group counts as root. The directory's owner has been checked.
    fn only_the_owner_enters(metadata: &Metadata) -> bool {
        let forbidden = if metadata.gid() == 0 { 0o001 } else { 0o011 };
        metadata.mode() & forbidden == 0
    }

    fn file(self, file: &File) -> Result<(), String> {
        let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
        if !metadata.is_file() {
            return Err("is not a regular file".to_owned());
        }
        self.owner(&metadata)?;
        Self::writers(&metadata, false)
    }

    fn owner(self, metadata: &Metadata) -> Result<(), String> {
        let owner = metadata.uid();
        if owner != 0 && owner != self.uid {
            let whose = if self.uid == 0 { "root".to_owned() } else { format!("root or uid {}", self.uid) };
            return Err(format!("belongs to uid {owner}, but must belong to {whose}: chown it"));
        }
        Ok(())
    }

    fn writers(metadata: &Metadata, sticky_will_do: bool) -> Result<(), String> {
        let mode = metadata.mode();
        let sticky = sticky_will_do && mode & 0o1000 != 0;
        if mode & 0o022 != 0 && !sticky {
            return Err(format!("may be written by others (mode {:04o}): chmod go-w", mode & 0o7777));
        }
        Ok(())
    }
}

fn lines(faults: &[FileFault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const POLICY: &str = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: { name: p }\n\
        spec: { select: { runtimes: [process] }, companions: [{ name: r, builtin: relay }], \
        redirect: { outbound: [{ to: \"r:15001\" }] }, onFailure: open }\n";

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Owned by this user, mode 0755, below a sticky /tmp.
    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        mode(directory.path(), 0o755);
        directory
    }

    #[test]
    fn reads_policy_files_in_order_and_nothing_else() {
        let directory = directory();
        for name in ["b.yaml", "a.yml", "c.yaml~", ".hidden.yaml", "README"] {
            fs::write(
                directory.path().join(name),
                POLICY.replace("name: p", &format!("name: {}", &name[..1])),
            )
            .unwrap();
            mode(&directory.path().join(name), 0o644);
        }
        symlink("a.yml", directory.path().join("z.yaml")).unwrap();
        let files = read(directory.path(), Trust::of_this_process()).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["a.yml", "b.yaml", "z.yaml"]);
    }

    #[test]
    fn a_policy_is_loaded_and_an_empty_directory_is_no_fault() {
        let directory = directory();
        assert_eq!(load(directory.path()).unwrap().policies().len(), 0);
        fs::write(directory.path().join("p.yaml"), POLICY).unwrap();
        mode(&directory.path().join("p.yaml"), 0o600);
        assert_eq!(load(directory.path()).unwrap().policies().len(), 1);
        fs::write(directory.path().join("p.yaml"), "kind: Nonsense\n").unwrap();
        assert!(matches!(load(directory.path()), Err(LoadError::Policy(_))));
    }

    #[test]
    fn what_others_may_write_is_refused() {
        let directory = directory();
        let file = directory.path().join("p.yaml");
        fs::write(&file, POLICY).unwrap();
        for (file_mode, directory_mode, wanted) in [
            (0o644, 0o755, None),
            (0o664, 0o755, Some("p.yaml: may be written by others (mode 0664)")),
            (0o646, 0o755, Some("(mode 0646)")),
            (0o644, 0o775, Some("(mode 0775)")),
            (0o644, 0o1777, Some("(mode 1777)")),
        ] {
            mode(&file, file_mode);
            mode(directory.path(), directory_mode);
            let got = read(directory.path(), Trust::of_this_process()).map_err(|error| error.to_string());
            match wanted {
                None => assert!(got.is_ok(), "{got:?}"),
                Some(text) => assert!(got.as_ref().is_err_and(|error| error.contains(text)), "{got:?}"),
            }
        }
    }

    #[test]
    fn a_directory_above_counts_too() {
        let top = directory();
        let inner = top.path().join("policy.d");
        fs::create_dir(&inner).unwrap();
        mode(&inner, 0o755);
        mode(top.path(), 0o777);
        assert!(read(&inner, Trust::of_this_process()).is_err());
        // A link into such a place does not help.
        let other = directory();
        fs::write(inner.join("p.yaml"), POLICY).unwrap();
        symlink(inner.join("p.yaml"), other.path().join("p.yaml")).unwrap();
        assert!(read(other.path(), Trust::of_this_process()).is_err());
    }

    /// What the kubelet makes of a ConfigMap: a directory for everybody, and links to links to files.
    #[test]
    fn a_config_map_counts_where_nobody_else_gets_to() {
        let top = directory();
        let volume = top.path().join("pods/policy");
        let version = volume.join("..2026_11_25");
        fs::create_dir_all(&version).unwrap();
        fs::write(version.join("p.yaml"), POLICY).unwrap();
        symlink("..2026_11_25", volume.join("..data")).unwrap();
        symlink("..data/p.yaml", volume.join("p.yaml")).unwrap();
        mode(&version.join("p.yaml"), 0o644);
        mode(&version, 0o755);
        mode(&volume, 0o777);
        for (pods, trusted) in
            [(0o750, nix::unistd::getegid().as_raw() == 0), (0o700, true), (0o755, false), (0o701, false)]
        {
            mode(&top.path().join("pods"), pods);
            let got = read(&volume, Trust::of_this_process());
            assert_eq!(got.is_ok(), trusted, "{pods:o}: {got:?}");
        }
        // A file that all may write is none of the kubelet's.
        mode(&top.path().join("pods"), 0o700);
        mode(&version.join("p.yaml"), 0o666);
        assert!(read(&volume, Trust::of_this_process()).is_err());
    }

    #[test]
    fn another_owner_is_refused() {
        let metadata = Path::new("/proc/self/status").metadata().unwrap();
        let stranger = Trust { uid: metadata.uid() };
        assert!(stranger.owner(&metadata).is_ok());
        if metadata.uid() == 0 {
            let directory = directory();
            let file = directory.path().join("p.yaml");
            fs::write(&file, POLICY).unwrap();
            mode(&file, 0o644);
            std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
            let error = read(directory.path(), Trust { uid: 0 }).unwrap_err();
            assert!(error.to_string().contains("belongs to uid 12345, but must belong to root"), "{error}");
        }
    }

    #[test]
    fn files_that_are_no_files_do_not_block() {
        let directory = directory();
        nix::unistd::mkfifo(&directory.path().join("f.yaml"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        fs::create_dir(directory.path().join("d.yaml")).unwrap();
        symlink("nowhere", directory.path().join("l.yaml")).unwrap();
        let error = read(directory.path(), Trust::of_this_process()).unwrap_err();
        let LoadError::Files(faults) = error else { panic!("{error}") };
        assert_eq!(faults.len(), 3);
    }
}
