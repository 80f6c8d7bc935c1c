//! Replacing a configuration file of somebody else's.
//!
//! Owns the care: what is not safe to replace is refused, nothing is ever half-written, owner and mode stay, and there is a
//! back-up of the first.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

/// No configuration is as long.
const LIMIT: u64 = 16 << 20;
/// Behind the name of the file.
const BACKUP: &str = ".before-pillion";
/// Behind the name while it is written.
const NEW: &str = ".pillion-new";

/// Reads a file that is to be replaced; `None` when there is none. Refuses what would not survive that, or is not root's.
pub(crate) fn read(path: &Path) -> anyhow::Result<Option<String>> {
    let shown = path.display();
    let opened = OpenOptions::new().read(true).custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) => {
            let target = fs::canonicalize(path).unwrap_or_default();
            bail!(
                "{shown} is a symbolic link, which would be replaced by a file\nname what it leads to: --config {}",
                target.display()
            )
        }
        Err(error) => return Err(error).with_context(|| format!("cannot open {shown}")),
    };
    let metadata = file.metadata().with_context(|| format!("cannot look at {shown}"))?;
    if !metadata.is_file() {
        bail!("{shown} is not a file");
    }
    let owner = nix::unistd::geteuid().as_raw();
    if metadata.uid() != owner || metadata.mode() & 0o022 != 0 {
        bail!(
            "{shown} belongs to user {} and has mode {:o}: whoever may write it rules the runtime\nchown root {shown} && chmod go-w {shown}",
            metadata.uid(),
            metadata.mode() & 0o7777
        );
    }
    let mut text = String::new();
    file.take(LIMIT + 1).read_to_string(&mut text).with_context(|| format!("cannot read {shown}"))?;
    if text.len() as u64 > LIMIT {
        bail!("{shown} has more than {LIMIT} bytes");
    }
    Ok(Some(text))
}

/// A new text beside the file that it is to replace. Removed when it does not.
#[derive(Debug)]
pub(crate) struct Draft {
    path: PathBuf,
    new: PathBuf,
    kept: bool,
}

impl Draft {
    /// Writes it, with owner and mode of the file that is there.
    pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<Self> {
        Self::like(path, path, text)
    }

    /// The same, with owner and mode of another file.
    fn like(model: &Path, path: &Path, text: &str) -> anyhow::Result<Self> {
        let new = beside(path, NEW);
        let draft = Self { path: path.to_owned(), new: new.clone(), kept: false };
        let written = || -> io::Result<()> {
            // Of an attempt that was killed.
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            let mode = match fs::symlink_metadata(model) {
                Ok(old) => {
                    fchown(&file, Some(old.uid()), Some(old.gid()))?;
                    old.mode() & 0o7777
                }
                Err(_) => 0o644,
            };
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()
        };
        written().with_context(|| format!("cannot write {}", new.display()))?;
        Ok(draft)
    }

    /// Where it is, for a runtime to look at.
    pub(crate) fn place(&self) -> &Path {
        &self.new
    }

    /// Puts it in place, in one step.
    pub(crate) fn replace(mut self) -> anyhow::Result<()> {
        fs::rename(&self.new, &self.path)
            .with_context(|| format!("cannot replace {}", self.path.display()))?;
        self.kept = true;
        sync_directory(&self.path)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing reads it.
            let _ = fs::remove_file(&self.new);
        }
    }
}

/// Writes a file of Pillion's own.
pub(crate) fn write_own(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(directory) = path.parent() {
        make_directory(directory)?;
    }
    Draft::write(path, text)?.replace()
}

/// Makes a directory and those above it; returns those that were not there, outermost first.
pub(crate) fn make_directory(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut missing: Vec<PathBuf> =
        path.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
    missing.reverse();
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(missing)
}

/// Keeps the text as it was before Pillion ever changed it: an earlier back-up stays as it is. Returns where.
pub(crate) fn back_up(path: &Path, text: &str) -> anyhow::Result<PathBuf> {
    let backup = beside(path, BACKUP);
    match fs::symlink_metadata(&backup) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let draft = Draft::like(path, &backup, text)?;
            // Not over one that has come up meanwhile.
            let linked = fs::hard_link(draft.place(), &backup);
            linked.with_context(|| format!("cannot write {}", backup.display()))?;
            sync_directory(&backup)?;
        }
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", backup.display())),
    }
    Ok(backup)
}

/// Removes the back-up of a file that is again as it was. One that says something else stays, and is returned.
pub(crate) fn drop_backup(path: &Path, text: Option<&str>) -> anyhow::Result<Option<PathBuf>> {
    let backup = beside(path, BACKUP);
    match fs::read_to_string(&backup) {
        Ok(kept) if Some(kept.as_str()) == text => remove(&backup).map(|()| None),
        Ok(_) => Ok(Some(backup)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", backup.display())),
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        Ok(()) | Err(_) => sync_directory(path),
    }
}

/// Removes a directory when it is empty.
pub(crate) fn remove_empty(path: &Path) {
    // It is not empty, or not there.
    let _ = fs::remove_dir(path);
}

fn sync_directory(path: &Path) -> anyhow::Result<()> {
    let Some(directory) = path.parent() else { return Ok(()) };
    match File::open(directory) {
        Ok(directory_file) => {
            directory_file.sync_all().with_context(|| format!("cannot write {} to disk", directory.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot open {}", directory.display())),
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_backed_up_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.json");
        fs::write(&path, "one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("one"));
        // In the order of an installation.
        let draft = Draft::write(&path, "two").unwrap();
        let backup = back_up(&path, "one").unwrap();
        draft.replace().unwrap();
        assert_eq!(fs::metadata(&backup).unwrap().mode() & 0o777, 0o640);
        assert_eq!(back_up(&path, "two").unwrap(), backup);
        assert_eq!(fs::read_to_string(&backup).unwrap(), "one");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert_eq!(drop_backup(&path, Some("two")).unwrap().as_deref(), Some(&*backup));
        drop(Draft::write(&path, "three").unwrap());
        assert_eq!(read(&path).unwrap().as_deref(), Some("two"));
        assert_eq!(drop_backup(&path, Some("one")).unwrap(), None);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_safe_to_replace_is_refused_with_a_cure() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        assert_eq!(read(&path("none")).unwrap(), None);
        fs::write(path("open"), "").unwrap();
        fs::set_permissions(path("open"), fs::Permissions::from_mode(0o666)).unwrap();
        symlink(path("open"), path("link")).unwrap();
        fs::create_dir(path("directory")).unwrap();
        fs::write(path("binary"), [0xff, 0xfe]).unwrap();
        for (name, cure) in [
            ("open", "chmod go-w"),
            ("link", "--config "),
            ("directory", "not a file"),
            ("binary", "cannot read"),
        ] {
            let error = format!("{:#}", read(&path(name)).unwrap_err());
            assert!(error.contains(cure), "{name}: {error}");
        }
    }
}
