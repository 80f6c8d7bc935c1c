//! The drop-ins by which units are held: files and nothing else.
//!
//! Owns `50-pillion.conf` below the runtime directory of units, and the copies of it in the agent's state directory that a
//! generator puts back at boot. Touches no file that it has not written for this very agent. Never talks to systemd.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::unit::UnitName;

/// Where units and drop-ins are that last until the next boot (systemd.unit(5)).
pub const RUNTIME_DIRECTORY: &str = "/run/systemd/system";
/// The copies, in the agent's state directory.
pub const GENERATOR_DIRECTORY: &str = "systemd";

const FILE: &str = "50-pillion.conf";
const NEW_FILE: &str = ".50-pillion.new";
/// First line but one of each drop-in: whose it is.
const OWNER: &str = "# Agent: ";
/// A drop-in is a few hundred bytes.
const LONGEST: u64 = 64 << 10;

/// Where drop-ins go, and what they call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropIns {
    /// [`RUNTIME_DIRECTORY`].
    pub runtime_dir: PathBuf,
    /// The program that holds.
    pub hook: PathBuf,
    /// The agent's run directory.
    pub run_dir: PathBuf,
    /// The agent's state directory, by which drop-ins of several agents are told apart.
    pub state_dir: PathBuf,
}

/// Why drop-ins cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DropInError {
    /// A file or directory.
    #[error("cannot {operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A path that has a meaning in a unit file.
    #[error("{path} cannot be named in a unit file: it must be absolute, of letters, digits and /._+-@")]
    Path {
        /// Which one.
        path: PathBuf,
    },
    /// The hook is not there. A unit that is to call it could not start.
    #[error("there is no program {path}; units are not held without it")]
    NoHook {
        /// Where it should be.
        path: PathBuf,
    },
    /// Another agent's, or somebody else's.
    #[error("{path} is there and not of this agent; it is left alone, and its unit is not held")]
    Foreign {
        /// Which file.
        path: PathBuf,
    },
}

/// What is to be in one drop-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Content {
    /// Whether the unit is to wait, at boot, for an agent that is about to start. Not for units that come before the basic
    /// system: the agent itself comes after it.
    pub(super) behind_agent: bool,
}

impl DropIns {
    /// The drop-ins that are there, by the name that they are for, with their text.
    fn present_in(&self, directory: &Path) -> Result<BTreeMap<String, String>, DropInError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| DropInError::File { operation, path, source }
        };
        let mut present = BTreeMap::new();
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(present),
            entries => entries.map_err(failed("list", directory))?,
        };
        for entry in entries {
            let name = entry.map_err(failed("list", directory))?.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".d")) else { continue };
            if UnitName::try_from(name).is_ok()
                && let Some(text) = read(&file_of(directory, name)).filter(|text| self.is_ours(text))
            {
                present.insert(name.to_owned(), text);
            }
        }
        Ok(present)
    }

    /// Makes the drop-ins be these: writes what is missing or different, removes what is not wanted. Returns whether
    /// anything that systemd reads has changed, and what went wrong; the rest is done all the same.
    pub(super) fn set(&self, wanted: &BTreeMap<String, Content>) -> (bool, Vec<DropInError>) {
        let mut problems = Vec::new();
        let mut changed = false;
        let texts: BTreeMap<&str, String> = match self.check() {
            Ok(()) => wanted.iter().map(|(name, content)| (name.as_str(), self.text(*content))).collect(),
            Err(_) if wanted.is_empty() => BTreeMap::new(),
            Err(error) => {
                // What is there stays as it is: a unit that was to be held must not become one that is not.
                return (false, vec![error]);
            }
        };
        for (directory, read_by_systemd) in [(self.copies(), false), (self.runtime_dir.clone(), true)] {
            let present = match self.present_in(&directory) {
                Ok(present) => present,
                Err(error) => {
                    problems.push(error);
                    continue;
                }
            };
            let mut attempt = |result: Result<(), DropInError>| match result {
                Ok(()) => changed |= read_by_systemd,
                Err(error) => problems.push(error),
            };
            for (name, text) in &texts {
                if present.get(*name) != Some(text) {
                    attempt(self.write(&directory, name, text));
                }
            }
            for name in present.keys().filter(|name| !texts.contains_key(name.as_str())) {
                attempt(remove(&directory, name));
            }
        }
        (changed, problems)
    }

    /// The paths of all drop-ins of this agent and of their copies.
    pub fn files(&self) -> Result<Vec<PathBuf>, DropInError> {
        let mut files = Vec::new();
        for directory in [self.runtime_dir.clone(), self.copies()] {
            files.extend(self.present_in(&directory)?.keys().map(|name| file_of(&directory, name)));
        }
        Ok(files)
    }

    /// Removes all of them. Returns whether systemd must read its units again.
    pub fn clear(&self) -> (bool, Vec<DropInError>) {
        self.set(&BTreeMap::new())
    }

    fn copies(&self) -> PathBuf {
        self.state_dir.join(GENERATOR_DIRECTORY)
    }

    fn check(&self) -> Result<(), DropInError> {
        for path in [&self.hook, &self.run_dir, &self.state_dir] {
            let plain = path.to_str().is_some_and(|path| {
                path.starts_with('/')
                    && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._+-@".contains(&b))
            });
            if !plain {
                return Err(DropInError::Path { path: path.clone() });
            }
        }
        match fs::metadata(&self.hook) {
            Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => Ok(()),
            Ok(_) | Err(_) => Err(DropInError::NoHook { path: self.hook.clone() }),
        }
    }

    fn text(&self, content: Content) -> String {
        let order = if content.behind_agent { "[Unit]\nAfter=pillion.service\n" } else { "" };
        format!(
            "# Written by Pillion, for a policy that selects this unit: it asks the agent before it runs anything.\n\
             {OWNER}{}\n\
             # Not to be edited. `pillion cleanup` removes it.\n\
             {order}[Service]\nExecCondition=+{} --run-dir {} --state-dir {} systemd %n\n",
            self.state_dir.display(),
            self.hook.display(),
            self.run_dir.display(),
            self.state_dir.display(),
        )
    }

    fn is_ours(&self, text: &str) -> bool {
        let owner = text.lines().find_map(|line| line.strip_prefix(OWNER));
        owner.is_some_and(|owner| Path::new(owner) == self.state_dir)
    }

    fn write(&self, directory: &Path, name: &str, text: &str) -> Result<(), DropInError> {
        let path = file_of(directory, name);
        let parent = path.parent().unwrap_or(directory);
        let fail = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| DropInError::File { operation, path, source }
        };
        fs::create_dir_all(parent).map_err(fail("make", parent))?;
        if read(&path).is_some_and(|text| !self.is_ours(&text)) {
            return Err(DropInError::Foreign { path });
        }
        let new = parent.join(NEW_FILE);
        let write = || -> io::Result<()> {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
            io::Write::write_all(&mut file, text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&new);
            fail("write", &path)(source)
        })
    }
}

fn file_of(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.d")).join(FILE)
}

/// The text of a drop-in; what cannot be read is none of ours.
fn read(path: &Path) -> Option<String> {
    let metadata = fs::symlink_metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > LONGEST {
        return Some(String::new());
    }
    Some(fs::read_to_string(path).unwrap_or_default())
}

fn remove(directory: &Path, name: &str) -> Result<(), DropInError> {
    let path = file_of(directory, name);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(DropInError::File { operation: "remove", path, source });
        }
        Ok(()) | Err(_) => {}
    }
    // Not empty: others' drop-ins are in it.
    for empty in path.ancestors().skip(1).take(1) {
        let _ = fs::remove_dir(empty);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drop_ins(root: &Path) -> DropIns {
        let hook = root.join("pillion-hook");
        fs::write(&hook, "").expect("written");
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("changed");
        DropIns {
            runtime_dir: root.join("units"),
            hook,
            run_dir: root.join("run"),
            state_dir: root.join("state"),
        }
    }

    fn present(drop_ins: &DropIns) -> BTreeMap<String, String> {
        drop_ins.present_in(&drop_ins.runtime_dir).expect("readable")
    }

    fn wanted(names: &[(&str, bool)]) -> BTreeMap<String, Content> {
        names
            .iter()
            .map(|(name, behind_agent)| ((*name).into(), Content { behind_agent: *behind_agent }))
            .collect()
    }

    #[test]
    fn what_is_wanted_is_there_and_nothing_else() {
        let root = tempfile::tempdir().expect("temporary directory");
        let drop_ins = drop_ins(root.path());
        let names = || present(&drop_ins).into_keys().collect::<Vec<_>>();
        for (names_wanted, changes) in [
            (&[("a.service", true), ("p-.service", false)][..], true),
            (&[("a.service", true), ("p-.service", false)], false),
            (&[("a.service", false), ("p-.service", false)], true),
            (&[("b@.service", true)], true),
            (&[], true),
            (&[], false),
        ] {
            let (changed, problems) = drop_ins.set(&wanted(names_wanted));
            assert!(problems.is_empty(), "{problems:?}");
            assert_eq!(changed, changes, "{names_wanted:?}");
            assert_eq!(names(), names_wanted.iter().map(|(name, _)| *name).collect::<Vec<_>>());
            let copies = drop_ins.present_in(&drop_ins.copies()).expect("readable");
            assert_eq!(copies, present(&drop_ins));
            assert_eq!(drop_ins.files().expect("readable").len(), 2 * names_wanted.len());
        }
        assert_eq!(fs::read_dir(&drop_ins.runtime_dir).expect("there").count(), 0);
    }

    #[test]
    fn the_text_is_a_drop_in() {
        let root = tempfile::tempdir().expect("temporary directory");
        let drop_ins = drop_ins(root.path());
        let behind = drop_ins.text(Content { behind_agent: true });
        let hook = drop_ins.hook.display();
        assert!(behind.contains("[Unit]\nAfter=pillion.service\n[Service]\n"), "{behind}");
        assert!(behind.contains(&format!("\nExecCondition=+{hook} --run-dir ")), "{behind}");
        assert!(behind.ends_with(" systemd %n\n"));
        assert!(!drop_ins.text(Content { behind_agent: false }).contains("After="));
    }

    #[test]
    fn others_files_are_left_alone() {
        let root = tempfile::tempdir().expect("temporary directory");
        let drop_ins = drop_ins(root.path());
        let other = DropIns { state_dir: root.path().join("other"), ..drop_ins.clone() };
        assert!(other.set(&wanted(&[("a.service", true)])).0);
        let hand = drop_ins.runtime_dir.join("b.service.d");
        fs::create_dir_all(&hand).expect("made");
        fs::write(hand.join(FILE), "[Service]\n").expect("written");
        fs::write(hand.join("10-hand.conf"), "[Service]\n").expect("written");

        let (changed, problems) =
            drop_ins.set(&wanted(&[("a.service", true), ("b.service", true), ("c.service", true)]));
        assert!(changed);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems.iter().all(|problem| matches!(problem, DropInError::Foreign { .. })));
        assert_eq!(present(&drop_ins).into_keys().collect::<Vec<_>>(), ["c.service"]);
        assert!(drop_ins.clear().1.is_empty());
        assert_eq!(present(&other).len(), 1);
        assert!(hand.join(FILE).exists() && hand.join("10-hand.conf").exists());
    }

    #[test]
    fn without_the_hook_nothing_is_written_and_all_can_be_removed() {
        let root = tempfile::tempdir().expect("temporary directory");
        let drop_ins = drop_ins(root.path());
        assert!(drop_ins.set(&wanted(&[("a.service", true)])).0);
        fs::remove_file(&drop_ins.hook).expect("removed");
        let (changed, problems) = drop_ins.set(&wanted(&[("b.service", true)]));
        assert!(!changed && matches!(problems[..], [DropInError::NoHook { .. }]));
        assert_eq!(present(&drop_ins).len(), 1, "what is held stays held");
        let (changed, problems) = drop_ins.clear();
        assert!(changed && problems.is_empty());
        let odd = DropIns { run_dir: "/run/a b".into(), ..drop_ins };
        assert!(matches!(odd.set(&wanted(&[("a.service", true)])).1[..], [DropInError::Path { .. }]));
    }
}
