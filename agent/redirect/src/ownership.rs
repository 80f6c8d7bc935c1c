//! Whose the kernel objects are, where several instances run on one machine (each has a pin root of its own).
//!
//! All programs of one load share its maps, and these are pinned: a program belongs to the pin root that holds one of
//! its maps. One without a pinned map belongs to whoever holds it open. What nobody claims is a leftover, and is
//! counted here rather than nowhere. Needs `CAP_SYS_ADMIN`: only that may list eBPF objects (bpf(2)).

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use aya::{
    maps::{MapInfo, loaded_maps},
    programs::{ProgramInfo, loaded_links, loaded_programs},
};

use crate::{Inventory, KernelObject, bpffs, sys};

pub(crate) const PROGRAM_PREFIX: &str = "pl_";
const MAP_PREFIX: &str = "PL_";
/// Deeper trees of pins are not ours.
const DEEPEST: usize = 16;

/// Everything of Pillion that the kernel holds, by owner.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ByOwner {
    /// Of the instance with this pin root, and nobody's.
    pub ours: Inventory,
    /// Of other instances: pinned below another root, or held open by a process.
    pub others: Inventory,
}

/// Sorts Pillion's programs, maps and links by owner. Also finds maps without our name that our programs use.
///
/// # Errors
/// When the kernel's lists may not be read.
pub fn inventory_by_owner(pin_root: &Path) -> io::Result<ByOwner> {
    let programs: BTreeMap<u32, Program> = list(loaded_programs())?
        .iter()
        .filter_map(Program::of)
        .map(|program| (program.object.id, program))
        .collect();
    let maps = list(loaded_maps())?;
    let links = list(loaded_links())?;
    let claims = Claims::find(pin_root)?;
    let others: BTreeSet<u32> = programs
        .values()
        .filter(|program| claims.is_anothers(program))
        .map(|program| program.object.id)
        .collect();

    let mut found = ByOwner::default();
    for (id, program) in &programs {
        found.of(others.contains(id)).programs.push(program.object.clone());
    }
    for link in links {
        if let Some(program) = programs.get(&link.program_id()) {
            let name = program.object.name.clone();
            found.of(others.contains(&link.program_id())).links.push(KernelObject { id: link.id(), name });
        }
    }
    for map in maps {
        let id = map.id();
        let name = map.name_as_str().unwrap_or_default().to_owned();
        let mut users = programs.values().filter(|program| program.maps.contains(&id)).peekable();
        if users.peek().is_none() && !name.starts_with(MAP_PREFIX) {
            continue;
        }
        let anothers = match users.peek() {
            Some(_) => users.all(|program| others.contains(&program.object.id)),
            None => claims.maps_elsewhere.contains(&id) && !claims.maps_here.contains(&id),
        };
        found.of(anothers).maps.push(KernelObject { id, name });
    }
    Ok(found)
}

/// The pinned objects below `root`; none when it does not exist.
///
/// # Errors
/// When a directory cannot be read.
pub fn pins_below(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut pins = Vec::new();
    let mut pending = vec![(root.to_owned(), DEEPEST)];
    while let Some((directory, depth)) = pending.pop() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            match entry.file_type()? {
                _ if bpffs::is_of_the_kernel(&entry.file_name()) => {}
                kind if !kind.is_dir() => pins.push(entry.path()),
                _ if depth > 0 => pending.push((entry.path(), depth - 1)),
                _ => {}
            }
        }
    }
    pins.sort();
    Ok(pins)
}

impl ByOwner {
    fn of(&mut self, another: bool) -> &mut Inventory {
        if another { &mut self.others } else { &mut self.ours }
    }
}

#[derive(Debug)]
struct Program {
    object: KernelObject,
    maps: BTreeSet<u32>,
}

impl Program {
    fn of(info: &ProgramInfo) -> Option<Self> {
        let name = info.name_as_str().filter(|name| name.starts_with(PROGRAM_PREFIX))?.to_owned();
        // A program that has just gone has no maps to tell of.
        let maps = info.map_ids().ok().flatten().unwrap_or_default().into_iter().collect();
        Some(Self { object: KernelObject { id: info.id(), name }, maps })
    }
}

/// Who claims what.
#[derive(Debug)]
struct Claims {
    maps_here: BTreeSet<u32>,
    maps_elsewhere: BTreeSet<u32>,
    programs_in_use: BTreeSet<u32>,
}

impl Claims {
    fn find(pin_root: &Path) -> io::Result<Self> {
        let mut maps_elsewhere = BTreeSet::new();
        for mount in bpf_mounts()? {
            let pins = pins_below(&mount)?;
            maps_elsewhere.extend(
                pins.iter().filter(|pin| !pin.starts_with(pin_root)).filter_map(|pin| map_pinned_at(pin)),
            );
        }
        Ok(Self {
            maps_here: pins_below(pin_root)?.iter().filter_map(|pin| map_pinned_at(pin)).collect(),
            maps_elsewhere,
            programs_in_use: programs_in_use()?,
        })
    }

    fn is_anothers(&self, program: &Program) -> bool {
        if !program.maps.is_disjoint(&self.maps_here) {
            return false;
        }
        !program.maps.is_disjoint(&self.maps_elsewhere) || self.programs_in_use.contains(&program.object.id)
    }
}

/// `None` for pins of links and programs: these open too, but have no map's name where a map has its name.
fn map_pinned_at(path: &Path) -> Option<u32> {
    let map = MapInfo::from_pin(path).ok()?;
    map.name_as_str().is_some_and(|name| name.starts_with(MAP_PREFIX)).then(|| map.id())
}

fn bpf_mounts() -> io::Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let mounts = text.lines().filter(|line| line.contains(" - bpf "));
    Ok(mounts.filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect())
}

/// Who holds these programs, or links that run them, on this machine: each pin by its path, each process by pid and name. Those
/// that cannot be looked at are left out.
pub(crate) fn holders_of(programs: &BTreeSet<u32>) -> BTreeMap<u32, Vec<String>> {
    let mut holders: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let pins =
        bpf_mounts().unwrap_or_default().into_iter().filter_map(|mount| pins_below(&mount).ok()).flatten();
    for pin in pins {
        // The kernel says of a descriptor of a program or a link which program it is.
        let Ok(held) = sys::get_pinned(&pin) else { continue };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", held.as_raw_fd())).unwrap_or_default();
        if let Some(program) = program_of(&info).filter(|program| programs.contains(program)) {
            holders.entry(program).or_default().push(format!("pinned at {}", pin.display()));
        }
    }
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = process.file_name().into_string() else { continue };
        if pid == own || pid.parse::<u32>().is_err() {
            continue;
        }
        let mut held = BTreeSet::new();
        for descriptor in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let is_bpf = fs::read_link(descriptor.path())
                .is_ok_and(|target| target.to_string_lossy().starts_with("anon_inode:bpf"));
            if is_bpf {
                let info = process.path().join("fdinfo").join(descriptor.file_name());
                held.extend(program_of(&fs::read_to_string(info).unwrap_or_default()));
            }
        }
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        for program in held.intersection(programs) {
            holders.entry(*program).or_default().push(format!("process {pid} ({})", name.trim_end()));
        }
    }
    holders
}

/// `prog_id:` in `/proc/PID/fdinfo/FD`.
fn program_of(info: &str) -> Option<u32> {
    info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok())
}

/// Ids of all programs that a process other than this one holds open: `prog_id:` in `/proc/PID/fdinfo/FD`.
fn programs_in_use() -> io::Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc")?.flatten() {
        let name = process.file_name();
        let is_other = name.to_str().is_some_and(|name| name.parse::<u32>().is_ok() && name != own);
        if !is_other {
            continue;
        }
        // Processes end while one looks.
        for descriptor in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let is_program = fs::read_link(descriptor.path())
                .is_ok_and(|target| target.to_string_lossy().contains("bpf-prog"));
            if is_program {
                let info = process.path().join("fdinfo").join(descriptor.file_name());
                let text = fs::read_to_string(info).unwrap_or_default();
                ids.extend(program_of(&text));
            }
        }
    }
    Ok(ids)
}

/// An object that goes away while the kernel's list is walked is no error; not being allowed to walk it is one.
fn list<T, E: Error + Send + Sync + 'static>(
    objects: impl Iterator<Item = Result<T, E>>,
) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for object in objects {
        match object {
            Ok(object) => found.push(object),
            Err(error) => match root_cause(&error) {
                Some(io::ErrorKind::NotFound) => {}
                Some(kind) => return Err(io::Error::new(kind, error)),
                None => return Err(io::Error::other(error)),
            },
        }
    }
    Ok(found)
}

fn root_cause(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Some(error.kind());
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_belongs_to_who_pins_its_maps() {
        let claims = Claims {
            maps_here: [1, 2].into(),
            maps_elsewhere: [3].into(),
            programs_in_use: [10, 11, 12].into(),
        };
        for (id, maps, another) in [
            (10, &[1, 9][..], false),
            (11, &[3, 9][..], true),
            (12, &[9][..], true),
            (13, &[9][..], false),
            (14, &[][..], false),
        ] {
            let program = Program {
                object: KernelObject { id, name: "pl_x".into() },
                maps: maps.iter().copied().collect(),
            };
            assert_eq!(claims.is_anothers(&program), another, "{id}");
        }
    }

    #[test]
    fn pins_are_found_at_any_depth() {
        let root = std::env::temp_dir().join(format!("pillion-pins-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/b/link"), "").unwrap();
        fs::write(root.join("map"), "").unwrap();
        let found = pins_below(&root);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found.unwrap(), [root.join("a/b/link"), root.join("map")]);
        assert_eq!(pins_below(&root).unwrap(), Vec::<PathBuf>::new());
    }
}
