//! Everything of Pillion that the kernel holds on this machine, whoever loaded it.

use std::collections::BTreeSet;

use serde::Serialize;

/// One kernel object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct KernelObject {
    /// The kernel's id.
    pub id: u32,
    /// Its name; for a link the name of its program.
    pub name: String,
}

/// Programs, maps and links whose names are Pillion's. The kernel cuts names to 15 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// Loaded programs.
    pub programs: Vec<KernelObject>,
    /// Maps.
    pub maps: Vec<KernelObject>,
    /// Links that run one of the programs.
    pub links: Vec<KernelObject>,
}

/// Asks the kernel for all of its programs, maps and links and keeps Pillion's. An object that goes away meanwhile is
/// left out.
pub fn inventory() -> Inventory {
    let mut programs: Vec<KernelObject> = aya::programs::loaded_programs()
        .flatten()
        .filter_map(|program| {
            let name = program.name_as_str()?.to_owned();
            name.starts_with("pl_").then_some(KernelObject { id: program.id(), name })
        })
        .collect();
    let mut maps: Vec<KernelObject> = aya::maps::loaded_maps()
        .flatten()
        .filter_map(|map| {
            let name = map.name_as_str()?.to_owned();
            name.starts_with("PL_").then_some(KernelObject { id: map.id(), name })
        })
        .collect();
    let ours: BTreeSet<u32> = programs.iter().map(|program| program.id).collect();
    let mut links: Vec<KernelObject> = aya::programs::loaded_links()
        .flatten()
        .filter(|link| ours.contains(&link.program_id()))
        .map(|link| {
            let name = programs
                .iter()
                .find(|p| p.id == link.program_id())
                .map_or_else(String::new, |p| p.name.clone());
            KernelObject { id: link.id(), name }
        })
        .collect();
    programs.sort();
    maps.sort();
    links.sort();
    Inventory { programs, maps, links }
}
