//! Files and sockets in the directories that Pillion writes to.
//!
//! Owns which names in them are Pillion's: nothing else is ever taken for it, so that `--state-dir /etc` harms nobody.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
};

use super::{Inventory, InventoryError, Kind, item};
use crate::{config::Paths, hooks};

/// What Pillion puts into its run directory.
const IN_RUN_DIR: [&str; 3] = ["admin.sock", "agent.lock", "gate.sock"];
/// What Pillion puts into its state directory.
const IN_STATE_DIR: [&str; 8] =
    ["attachments", "bin", "companions", "gate.json", "held.json", "policies.json", "run", "systemd"];
/// Deeper trees are not ours.
const DEEPEST: usize = 16;

/// What is in one of our directories.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Made by Pillion: to be removed with all that is in it.
    pub(crate) ours: Vec<PathBuf>,
    /// Anything else.
    pub(crate) strange: Vec<PathBuf>,
}

/// Looks into the run directory and the state directory, in this order.
pub(crate) fn contents(paths: &Paths) -> Result<[(PathBuf, Contents); 2], InventoryError> {
    let look = |directory: &PathBuf, names: &[&str]| {
        let mut contents = Contents::default();
        for entry in entries(directory).map_err(InventoryError::at("files in", directory))? {
            let name = entry.file_name();
            let list = if is_ours(&name.to_string_lossy(), names) {
                &mut contents.ours
            } else {
                &mut contents.strange
            };
            list.push(entry.path());
        }
        Ok((directory.clone(), contents))
    };
    Ok([look(&paths.run_dir, &IN_RUN_DIR)?, look(&paths.state_dir, &IN_STATE_DIR)?])
}

/// A file is replaced by renaming over it one with a suffix, and moved aside by giving it one.
fn is_ours(name: &str, known: &[&str]) -> bool {
    known
        .iter()
        .any(|known| name.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// Adds sockets and files to `inventory`.
pub(super) fn take(paths: &Paths, inventory: &mut Inventory) -> Result<(), InventoryError> {
    for (runtime, record) in hooks::recorded(paths) {
        let detail = Some(format!("the hooks of {runtime}"));
        inventory.ours.push(item(Kind::File, record.display(), detail));
    }
    for path in drop_ins(paths)? {
        inventory.ours.push(item(Kind::File, path.display(), Some("drop-in of systemd".to_owned())));
    }
    for (directory, contents) in contents(paths)? {
        for path in &contents.ours {
            walk(path, DEEPEST, &mut |path, kind| inventory.ours.push(item(kind, path.display(), None)))
                .map_err(InventoryError::at("files in", path))?;
        }
        // With something strange in it, the directory is not ours to remove.
        if contents.strange.is_empty() && directory.is_dir() {
            inventory.ours.push(item(Kind::File, directory.display(), None));
        }
        inventory.strange.extend(contents.strange);
    }
    Ok(())
}

/// Drop-ins of systemd that this instance has written, without their copies in the state directory.
pub(crate) fn drop_ins(paths: &Paths) -> Result<Vec<PathBuf>, InventoryError> {
    // Which program they call makes no difference to whose they are.
    let drop_ins = paths.drop_ins(Path::new("/"));
    let mut files = drop_ins.files().map_err(|error| {
        let source = io::Error::other(error);
        InventoryError::at("drop-ins in", &drop_ins.runtime_dir)(source)
    })?;
    files.retain(|path| path.starts_with(&drop_ins.runtime_dir));
    Ok(files)
}

/// Calls `found` for `path` and all below it, contents before their directory. Does not follow symbolic links.
fn walk(path: &Path, depth: usize, found: &mut impl FnMut(&Path, Kind)) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if kind.is_dir() && depth > 0 {
        for entry in entries(path)? {
            walk(&entry.path(), depth - 1, found)?;
        }
    }
    found(path, if kind.is_socket() { Kind::Socket } else { Kind::File });
    Ok(())
}

fn entries(directory: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(directory) {
        Ok(entries) => {
            let mut entries: Vec<_> = entries.collect::<io::Result<_>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            Ok(entries)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn paths(root: &Path) -> Paths {
        Paths { state_dir: root.join("state"), run_dir: root.join("run"), pin_root: root.join("pins") }
    }

    #[test]
    fn finds_what_is_ours_and_leaves_the_rest_alone() {
        let root = tempfile::tempdir().unwrap();
        let paths = paths(root.path());
        fs::create_dir_all(paths.state_dir.join("companions/a/b")).unwrap();
        fs::create_dir_all(&paths.run_dir).unwrap();
        fs::write(paths.state_dir.join("companions/a/b/log"), "").unwrap();
        fs::write(paths.state_dir.join("precious"), "").unwrap();
        let _socket = UnixListener::bind(paths.run_dir.join("admin.sock")).unwrap();
        std::os::unix::fs::symlink("/etc", paths.state_dir.join("companions/link")).unwrap();

        let mut inventory = Inventory::default();
        take(&paths, &mut inventory).unwrap();
        let found: Vec<String> = inventory
            .ours
            .iter()
            .map(|item| format!("{} {}", item.kind, item.name.replace(&*root.path().to_string_lossy(), "")))
            .collect();
        assert_eq!(
            found,
            [
                "socket /run/admin.sock",
                "file /run",
                "file /state/companions/a/b/log",
                "file /state/companions/a/b",
                "file /state/companions/a",
                "file /state/companions/link",
                "file /state/companions",
            ]
        );
        assert_eq!(inventory.strange, [paths.state_dir.join("precious")]);
    }

    #[test]
    fn suffixed_names_are_known_by_what_they_replace() {
        for (name, ours) in [
            ("run", true),
            ("held.json.tmp", true),
            ("held.json.corrupt", true),
            (".run", false),
            ("running", false),
            ("ssh", false),
        ] {
            assert_eq!(is_ours(name, &IN_STATE_DIR), ours, "{name}");
        }
    }

    #[test]
    fn nothing_there_is_nothing_found() {
        let root = tempfile::tempdir().unwrap();
        let mut inventory = Inventory::default();
        take(&paths(root.path()), &mut inventory).unwrap();
        assert_eq!(inventory, Inventory::default());
    }
}
