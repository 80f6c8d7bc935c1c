//! A companion's directory: `<state>/companions/<workload>/<companion>/`, readable by its user and written by root.
//!
//! ```text
//! <template>…    rendered templates            root, the companion's group  0640
//! run/           for the companion's own use   the companion's user         0700
//! log/           its output, see `logs`        root                         0700
//! ```

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, fchown},
    path::{Path, PathBuf},
};

use nix::unistd::{getegid, geteuid};
use pillion_workload::{CompanionName, WorkloadId};

use crate::{cgroup, error::CompanionError, launch::Identity, render, tree};

/// Subdirectory for the companion's own files: sockets, temporary files.
pub(crate) const RUN: &str = "run";
/// Subdirectory for its output.
pub(crate) const LOG: &str = "log";

/// Owns the directory: [`Self::remove`] removes it, and so does dropping it.
#[derive(Debug)]
pub(crate) struct CompanionDirectory {
    path: PathBuf,
    armed: bool,
}

impl CompanionDirectory {
    /// The path, whether it is there or not.
    pub(crate) fn path_of(state: &Path, workload: &WorkloadId, companion: &CompanionName) -> PathBuf {
        state.join("companions").join(cgroup::escape(workload)).join(companion.as_str())
    }

    /// Makes the directory, or takes up the one that is there.
    pub(crate) fn open(path: PathBuf, identity: &Identity) -> Result<Self, CompanionError> {
        let directory = Self { path, armed: true };
        let path = &directory.path;
        // Searchable on the way down: the companion reaches its files under its own user.
        let parent = path.parent().unwrap_or(path);
        DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed("create", parent))?;
        let (root, its_group) = (geteuid().as_raw(), getegid().as_raw());
        for (directory, mode, uid, gid) in [
            (path.clone(), 0o750, root, identity.gid),
            (path.join(RUN), 0o700, identity.uid, identity.gid),
            (path.join(LOG), 0o700, root, its_group),
        ] {
            match DirBuilder::new().mode(0o700).create(&directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                outcome => outcome.map_err(failed("create", &directory))?,
            }
            chown(&directory, Some(uid), Some(gid)).map_err(failed("change the owner of", &directory))?;
            fs::set_permissions(&directory, Permissions::from_mode(mode))
                .map_err(failed("change the mode of", &directory))?;
        }
        Ok(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Renders a template into the directory under its base name.
    pub(crate) fn render(
        &self,
        template: &Path,
        variables: &render::Variables,
        identity: &Identity,
    ) -> Result<(), CompanionError> {
        let text = read_template(template)?;
        let rendered = variables
            .render(&text)
            .map_err(|source| CompanionError::Render { what: template.display().to_string(), source })?;
        let name = template.file_name().filter(|name| *name != RUN && *name != LOG);
        let name = name.ok_or_else(|| {
            failed("render under its own name", template)(io::ErrorKind::InvalidFilename.into())
        })?;
        let path = self.path.join(name);
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            fchown(&file, Some(geteuid().as_raw()), Some(identity.gid))?;
            file.set_permissions(Permissions::from_mode(0o640))?;
            file.write_all(rendered.as_bytes())
        };
        write().map_err(failed("write", &path))
    }

    /// Removes the directory, and its workload's when nothing else is in it.
    pub(crate) fn remove(mut self) -> Result<(), CompanionError> {
        self.armed = false;
        self.remove_now().map_err(failed("remove", &self.path))
    }

    /// Gives up ownership: the directory stays.
    pub(crate) fn leave(mut self) {
        self.armed = false;
    }

    /// Whether dropping it removes it.
    pub(crate) fn set_armed(&mut self, armed: bool) {
        self.armed = armed;
    }

    fn remove_now(&self) -> io::Result<()> {
        tree::remove(&self.path)?;
        for parent in self.path.ancestors().skip(1).take(2) {
            // Not empty: another companion's.
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }
}

impl Drop for CompanionDirectory {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.remove_now()
        {
            tracing::warn!(path = %self.path.display(), %error, "a dropped companion's directory could not be removed");
        }
    }
}

fn read_template(path: &Path) -> Result<String, CompanionError> {
    let refuse = |kind: io::ErrorKind, why: &'static str| failed("read", path)(io::Error::new(kind, why));
    // Not blocking: a FIFO must not hold us up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed("read", path))?;
    let metadata = file.metadata().map_err(failed("inspect", path))?;
    if !metadata.is_file() {
        return Err(refuse(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    if metadata.permissions().mode() & 0o002 != 0 {
        return Err(refuse(io::ErrorKind::PermissionDenied, "everybody may write to it; cure: chmod o-w"));
    }
    let mut text = String::new();
    let limit = u64::try_from(render::LONGEST).unwrap_or(u64::MAX);
    File::take(file, limit + 1).read_to_string(&mut text).map_err(failed("read", path))?;
    if text.len() > render::LONGEST {
        return Err(refuse(io::ErrorKind::FileTooLarge, "it is longer than 4 MiB"));
    }
    Ok(text)
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CompanionError {
    let path = path.to_owned();
    move |source| CompanionError::Directory { operation, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_identity() -> Identity {
        Identity {
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            groups: Vec::new(),
        }
    }

    #[test]
    fn templates_are_checked_before_they_are_read() {
        let base = std::env::temp_dir().join(format!("pillion-template-{}", std::process::id()));
        fs::create_dir_all(&base).expect("temporary directory");
        let fifo = base.join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).expect("made");
        for (name, content, mode, valid) in [
            ("good", b"text".as_slice(), 0o644, true),
            ("group", b"text", 0o664, true),
            ("world", b"text", 0o666, false),
            ("binary", b"\xff", 0o644, false),
            ("long", &vec![b'a'; render::LONGEST + 1], 0o644, false),
        ] {
            let path = base.join(name);
            fs::write(&path, content).expect("written");
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("changed");
            assert_eq!(read_template(&path).is_ok(), valid, "{name}");
        }
        assert!(read_template(&fifo).is_err());
        assert!(read_template(&base).is_err());
        assert!(read_template(&base.join("nosuch")).is_err());
        fs::remove_dir_all(&base).expect("removed");
    }

    #[test]
    fn a_directory_is_made_rendered_into_and_removed() {
        let base = std::env::temp_dir().join(format!("pillion-directory-{}", std::process::id()));
        let (workload, name) = ("a/b/c".parse().expect("valid"), "envoy".parse().expect("valid"));
        let path = CompanionDirectory::path_of(&base, &workload, &name);
        assert_eq!(path, base.join("companions/a+b+c/envoy"));
        let identity = own_identity();
        let directory = CompanionDirectory::open(path.clone(), &identity).expect("made");
        let template = base.join("envoy.yaml");
        fs::write(&template, "port: {{ port }}").expect("written");
        let mut variables = render::Variables::default();
        variables.set("port", "1");
        directory.render(&template, &variables, &identity).expect("rendered");
        assert_eq!(fs::read_to_string(path.join("envoy.yaml")).expect("there"), "port: 1");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o750);
        let reserved = base.join(RUN);
        fs::write(&reserved, "").expect("written");
        assert!(directory.render(&reserved, &variables, &identity).is_err());
        directory.remove().expect("removed");
        assert!(!base.join("companions").exists());
        tree::remove(&base).expect("removed");
    }
}
