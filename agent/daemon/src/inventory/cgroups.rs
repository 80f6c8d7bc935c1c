//! Cgroups below `pillion.slice` in every hierarchy, and the processes in them.
//!
//! Beside those, the cgroups of processes that were held at their exec, each below the one that the process was in.
//!
//! The slice is shared by all instances on a machine. The directory below it is one workload's, `pillion.slice/<id>`;
//! it is of the instance in whose state directory that workload has files, or whose files its processes have open.
//! The instance with the usual state directory owns all that nobody else claims, so that nothing is left for ever.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use pillion_companion::cgroup::SLICE;
use pillion_runtime::OwnCgroup;
use procfs::process::MountInfo;

use super::{Inventory, InventoryError, Kind, item};
use crate::config::Paths;

/// Where `config` puts it by default.
const USUAL_STATE_DIR: &str = "/var/lib/pillion";
/// Deeper trees do not exist: the kernel's default limit is far above, our own trees have four levels.
const DEEPEST: usize = 32;

/// The cgroups of one workload, in all hierarchies.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// Directories, contents before their parent.
    pub(crate) directories: Vec<PathBuf>,
    /// Processes, with their names.
    pub(crate) processes: BTreeMap<i32, String>,
}

/// Adds cgroups and processes to `inventory`.
pub(super) fn take(
    paths: &Paths,
    known: &BTreeSet<String>,
    mounts: &[MountInfo],
    inventory: &mut Inventory,
) -> Result<(), InventoryError> {
    let mut nobodys = true;
    for (name, group) in groups(mounts)? {
        let ours = known.contains(&name) || is_ours(&name, &group, paths);
        nobodys &= ours;
        if ours {
            inventory.workloads.insert(name);
        }
        let list = if ours { &mut inventory.ours } else { &mut inventory.elsewhere };
        list.extend(group.directories.iter().map(|path| item(Kind::Cgroup, path.display(), None)));
        list.extend(group.processes.into_iter().map(|(pid, name)| item(Kind::Process, pid, Some(name))));
    }
    for own in OwnCgroup::all_of(&paths.state_dir).unwrap_or_default() {
        let detail = format!("of process {}, which stays", own.process().pid);
        inventory.ours.push(item(Kind::Cgroup, own.path().display(), Some(detail)));
    }
    if nobodys {
        inventory.ours.extend(slices(mounts).map(|path| item(Kind::Cgroup, path.display(), None)));
    }
    Ok(())
}

/// The cgroups of these workloads, as they are now.
pub(crate) fn of(workloads: &BTreeSet<String>, mounts: &[MountInfo]) -> Result<Vec<Group>, InventoryError> {
    let groups = groups(mounts)?;
    Ok(groups.into_iter().filter(|(name, _)| workloads.contains(name)).map(|(_, group)| group).collect())
}

/// The slice's directories that exist, one a hierarchy.
pub(crate) fn slices(mounts: &[MountInfo]) -> impl Iterator<Item = PathBuf> {
    mounts
        .iter()
        .filter(|mount| matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2"))
        .map(|mount| mount.mount_point.join(SLICE))
        .filter(|path| path.is_dir())
}

fn groups(mounts: &[MountInfo]) -> Result<BTreeMap<String, Group>, InventoryError> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for slice in slices(mounts) {
        for directory in directories(&slice).map_err(InventoryError::at("cgroups in", &slice))? {
            let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let group = groups.entry(name).or_default();
            walk(&directory, DEEPEST, group).map_err(InventoryError::at("cgroups in", &directory))?;
        }
    }
    Ok(groups)
}

fn walk(directory: &Path, depth: usize, group: &mut Group) -> io::Result<()> {
    if depth > 0 {
        for child in directories(directory)? {
            walk(&child, depth - 1, group)?;
        }
    }
    for pid in processes(directory) {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        group.processes.insert(pid, name.trim_end().to_owned());
    }
    group.directories.push(directory.to_owned());
    Ok(())
}

/// The processes of one cgroup; none when it has just gone. 0 stands for those of other PID namespaces: not ours.
pub(crate) fn processes(directory: &Path) -> Vec<i32> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid > 0).collect()
}

fn directories(parent: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn is_ours(name: &str, group: &Group, paths: &Paths) -> bool {
    if has_files(name, paths) {
        return true;
    }
    let mut files = group.processes.keys().flat_map(|&pid| output_files(pid));
    if paths.state_dir == Path::new(USUAL_STATE_DIR) {
        // Unless it writes to the directory of a companion elsewhere.
        let companion = Path::new("companions").join(name);
        files.all(|file| file.starts_with(&paths.state_dir) || !contains(&file, &companion))
    } else {
        files.any(|file| file.starts_with(&paths.state_dir))
    }
}

fn has_files(name: &str, paths: &Paths) -> bool {
    let of_runs = directories(&paths.runs()).unwrap_or_default();
    let homes = of_runs.into_iter().map(|run| run.join("companions")).chain([paths.companions()]);
    homes.into_iter().any(|home| home.join(name).is_dir())
}

/// Companions write their output to files in the state directory. The link's text keeps the path of a removed file.
fn output_files(pid: i32) -> impl Iterator<Item = PathBuf> {
    [1, 2]
        .into_iter()
        .filter_map(move |descriptor| fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).ok())
}

fn contains(path: &Path, part: &Path) -> bool {
    let wanted: Vec<_> = part.components().collect();
    path.components().collect::<Vec<_>>().windows(wanted.len()).any(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_paths_are_whole_names() {
        let part = Path::new("companions/process+1-2");
        for (path, found) in [
            ("/tmp/x/companions/process+1-2/r/log/out (deleted)", true),
            ("/tmp/x/companions/process+1-23/r/log/out", false),
            ("/dev/null", false),
        ] {
            assert_eq!(contains(Path::new(path), part), found, "{path}");
        }
    }
}
