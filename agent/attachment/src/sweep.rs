//! Takes back what no record tells of: a record was lost or broken, or the agent was killed before it could write one.
//!
//! Goes by what is there: links by their pins, companions by their directories. Never touches what a record tells of.

use std::{collections::BTreeSet, ffi::OsStr, fs, path::Path};

use pillion_workload::{CompanionName, WorkloadId};

use crate::{chain, node::Node, record::Record};

/// To be called before anything is adopted or attached, with all that will be. Tells what was found, and what could not be
/// taken back.
pub async fn sweep(node: &Node, records: &[Record]) -> Swept {
    let mut swept = Swept::default();
    let numbers = records.iter().filter_map(|record| Some(record.guard.as_ref()?.number)).collect();
    match node.dataplane.sweep(&numbers) {
        Ok(attachments) => swept.attachments = attachments,
        Err(error) => swept.left.push(format!("redirection: {}", chain(&error))),
    }
    let known: BTreeSet<(&WorkloadId, &CompanionName)> = records
        .iter()
        .flat_map(|record| record.plan.companions.iter().map(|spec| (&record.workload.id, &spec.name)))
        .collect();
    for (workload, companion) in companions(&node.host.config().state_dir.join("companions")) {
        if known.contains(&(&workload, &companion)) {
            continue;
        }
        match pillion_companion::discard(&node.host, &workload, &companion).await {
            Ok(()) => swept.companions += 1,
            Err(error) => swept.left.push(format!("companion {companion} of {workload}: {}", chain(&error))),
        }
    }
    swept
}

/// What [`sweep`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// Redirections that were ended.
    pub attachments: usize,
    /// Companions that were removed.
    pub companions: usize,
    /// What could not be taken back, and why.
    pub left: Vec<String>,
}

/// All companions that have a directory. What has another name is not ours.
fn companions(directory: &Path) -> Vec<(WorkloadId, CompanionName)> {
    let mut found = Vec::new();
    for (name, path) in directories(directory) {
        // An id has slashes where the directory has `+`, which no id has.
        let Ok(workload) = name.replace('+', "/").parse::<WorkloadId>() else { continue };
        let names = directories(&path).into_iter().filter_map(|(name, _)| name.parse().ok());
        found.extend(names.map(|name| (workload.clone(), name)));
    }
    found
}

fn directories(directory: &Path) -> Vec<(String, std::path::PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| Some((OsStr::to_str(&entry.file_name())?.to_owned(), entry.path())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_found_by_their_directories() {
        let directory = tempfile::tempdir().unwrap();
        for path in
            ["containerd+default+web/relay/log", "process+1-2/a", "process+1-2/b", "..odd name/a", "x y"]
        {
            fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        fs::write(directory.path().join("process+1-2/file"), "").unwrap();
        let mut found: Vec<String> = companions(directory.path())
            .iter()
            .map(|(workload, name)| format!("{workload} {name}"))
            .collect();
        found.sort();
        assert_eq!(found, ["containerd/default/web relay", "process/1-2 a", "process/1-2 b"]);
        assert!(companions(&directory.path().join("absent")).is_empty());
    }
}
