//! What one `pillion run` has on the machine: its name, its directories and its pins, and the sweeping of those whose
//! `pillion run` was killed.
//!
//! Everything bears the pid and the start time of its `pillion run`, so that the dead are told from the living without
//! a journal: `<state dir>/run/run-PID-START`, `<pin root>/run-PID-START`, and cgroups of the workload
//! `process/PID-START`.

use std::{collections::BTreeSet, fs, io, path::PathBuf};

use anyhow::Context;
use pillion_companion::cgroup::{CgroupPath, CgroupRoots};
use pillion_runtime::start_time;
use pillion_workload::{Pid, ProcessId, RuntimeKind, StartTime, WorkloadId};
use tracing::{info, warn};

use crate::{config::Paths, lock::make_directory};

const PREFIX: &str = "run-";

/// One `pillion run`.
#[derive(Debug, Clone)]
pub(super) struct Instance {
    process: ProcessId,
    paths: Paths,
}

impl Instance {
    /// This process.
    pub(super) fn of_this_process(paths: &Paths) -> anyhow::Result<Self> {
        let pid = Pid(i32::try_from(std::process::id())?);
        let started = start_time(pid).context("cannot tell when this process started")?;
        Ok(Self { process: ProcessId { pid, started }, paths: paths.clone() })
    }

    fn name(&self) -> String {
        format!("{PREFIX}{}-{}", self.process.pid, self.process.started.0)
    }

    /// The id of the workload. It bears our pid rather than the command's, which is not known before its cgroup is.
    pub(super) fn workload(&self) -> WorkloadId {
        let id = format!("{}/{}-{}", RuntimeKind::Process, self.process.pid, self.process.started.0);
        id.try_into().expect("letters, digits, a slash and a dash")
    }

    /// Companions' files.
    pub(super) fn state_dir(&self) -> PathBuf {
        self.paths.runs().join(self.name())
    }

    /// Links and maps.
    pub(super) fn pin_root(&self) -> PathBuf {
        self.paths.pin_root.join(self.name())
    }

    pub(super) fn make_directories(&self) -> anyhow::Result<()> {
        for path in [&self.paths.state_dir, &self.paths.runs(), &self.state_dir()] {
            // Companions look for their files below it under their own users.
            make_directory(path, 0o711)
                .with_context(|| format!("cannot make {} (pillion run needs root)", path.display()))?;
        }
        Ok(())
    }

    /// Removes files and pins. What it shares with others goes when it is the last.
    pub(super) fn remove_files(&self) -> io::Result<()> {
        gone(fs::remove_dir_all(self.pin_root()))?;
        gone(fs::remove_dir_all(self.state_dir()))?;
        for shared in [&self.paths.pin_root, &self.paths.runs(), &self.paths.state_dir] {
            // Not empty: others need it.
            let _ = fs::remove_dir(shared);
        }
        Ok(())
    }

    fn parse(name: &str, paths: &Paths) -> Option<Self> {
        let (pid, started) = name.strip_prefix(PREFIX)?.split_once('-')?;
        let process = ProcessId { pid: Pid(pid.parse().ok()?), started: StartTime(started.parse().ok()?) };
        let instance = Self { process, paths: paths.clone() };
        // Neither a sign nor leading zeros: what is removed must be what was found.
        (instance.name() == name).then_some(instance)
    }

    fn is_dead(&self) -> bool {
        match start_time(self.process.pid) {
            Ok(started) => started != self.process.started,
            Err(error) => error.is_gone(),
        }
    }

    async fn sweep(&self, cgroups: &CgroupRoots) -> anyhow::Result<()> {
        // Without its process nothing but the pins keeps the links: this detaches them.
        gone(fs::remove_dir_all(self.pin_root()))?;
        let workload = self.workload();
        let of_it = CgroupPath::workload(&workload);
        let prefix = of_it.as_str().trim_end_matches("workload").to_owned();
        for path in cgroups.list()? {
            if path.as_str().starts_with(&prefix)
                && let Some(cgroup) = cgroups.open(&path).await?
            {
                cgroup.remove().await?;
            }
        }
        self.remove_files()?;
        Ok(())
    }
}

/// Removes what killed `pillion run`s have left. What cannot be removed is told and left to `pillion cleanup`.
pub(super) async fn sweep_the_dead(paths: &Paths, cgroups: &CgroupRoots) {
    for dead in found(paths).into_iter().filter(Instance::is_dead) {
        match dead.sweep(cgroups).await {
            Ok(()) => info!(instance = %dead.name(), "swept what a killed `pillion run` had left"),
            Err(error) => {
                warn!(instance = %dead.name(), error = %format!("{error:#}"), "a killed `pillion run` has left something that cannot be removed");
            }
        }
    }
}

fn found(paths: &Paths) -> Vec<Instance> {
    let names: BTreeSet<String> = [paths.runs(), paths.pin_root.clone()]
        .into_iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flat_map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()))
        .collect();
    names.iter().filter_map(|name| Instance::parse(name, paths)).collect()
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(root: &std::path::Path) -> Paths {
        Paths { state_dir: root.join("state"), run_dir: root.join("run"), pin_root: root.join("pins") }
    }

    #[test]
    fn names_lead_back_and_nothing_else_does() {
        let paths = paths(std::path::Path::new("/x"));
        let here = Instance::of_this_process(&paths).unwrap();
        assert_eq!(Instance::parse(&here.name(), &paths).unwrap().process, here.process);
        for other in
            ["run-", "run-1", "run-1-", "run-01-2", "run-+1-2", "run-1-2-3", "run-1-2/..", "v1", "../run-1-2"]
        {
            assert!(Instance::parse(other, &paths).is_none(), "{other}");
        }
    }

    #[test]
    fn the_living_are_not_swept() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths(directory.path());
        let here = Instance::of_this_process(&paths).unwrap();
        here.make_directories().unwrap();
        let mut dead = here.clone();
        dead.process.started.0 += 1;
        fs::create_dir_all(dead.pin_root().join("v1/links")).unwrap();
        let dead: Vec<String> =
            found(&paths).into_iter().filter(Instance::is_dead).map(|instance| instance.name()).collect();
        assert_eq!((found(&paths).len(), dead.len()), (2, 1));
        here.remove_files().unwrap();
        assert!(!here.state_dir().exists());
        assert!(!paths.state_dir.exists(), "the last one takes what is shared");
        assert!(paths.pin_root.exists(), "somebody is still there");
    }
}
