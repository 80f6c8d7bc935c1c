//! Cgroups under `pillion.slice`: made in every hierarchy that enforces a limit, killed and removed as one.
//!
//! On a pure cgroup2 machine there is one directory per cgroup; on a hybrid one there is one more in each of the v1
//! hierarchies of memory, cpu and pids, also when nothing is limited: a companion outlives the agent and must not be
//! accounted to it. The other v1 hierarchies it leaves for their roots. eBPF and identity use the cgroup2 directory alone.

mod guard;
mod mounts;
mod path;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use pillion_workload::{Cgroup, CgroupId, Resources};

pub use guard::CgroupGuard;
pub(crate) use guard::pids_in;
pub(crate) use path::escape;
pub use path::{CgroupPath, InvalidCgroupPath};

/// The cgroup that holds all of Pillion's, in every hierarchy.
pub const SLICE: &str = "pillion.slice";

/// What is done in one go may be retried this often when another task removes an empty parent meanwhile.
const CREATE_ATTEMPTS: usize = 8;
/// Processes that were sent SIGKILL get this long to vanish.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// What failed, on which cgroup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// There is no cgroup2 mount.
    #[error("no cgroup2 file system is mounted; mount one: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")]
    NoCgroup2,
    /// A file operation.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A limit that cannot be enforced.
    #[error(
        "the {controller} limit cannot be enforced: {}",
        reason.as_deref().unwrap_or("this machine has no such cgroup controller, neither v2 nor v1")
    )]
    Unenforceable {
        /// The cgroup controller that would enforce it.
        controller: &'static str,
        /// What stands in the way, when it is not a missing controller.
        reason: Option<String>,
    },
    /// Processes that do not die.
    #[error("processes in {} did not die within {timeout:?} of SIGKILL", path.display())]
    StillPopulated {
        /// The cgroup2 directory.
        path: PathBuf,
        /// How long was waited.
        timeout: Duration,
    },
    /// The task that did the work was lost with the runtime.
    #[error("the work on {} was abandoned: the runtime is shutting down", path.display())]
    Abandoned {
        /// The cgroup.
        path: PathBuf,
    },
}

impl CgroupError {
    pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}

/// The controllers that limits need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Controller {
    Memory,
    Cpu,
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
        }
    }
}

/// Where the hierarchies of this machine are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupRoots {
    v2: PathBuf,
    v2_controllers: BTreeSet<Controller>,
    v1: BTreeMap<Controller, PathBuf>,
    /// The roots of the other v1 hierarchies in which this process is not at the root.
    to_leave: Vec<PathBuf>,
}

impl CgroupRoots {
    /// Reads `/proc/self/mountinfo` (proc(5)) and the controllers that cgroup2 offers.
    pub fn discover() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read_to_string(path).map_err(CgroupError::io("read", path))?;
        let mounts = mounts::parse(&text);
        let path = Path::new("/proc/self/cgroup");
        let membership = fs::read_to_string(path).map_err(CgroupError::io("read", path))?;
        let to_leave = mounts.to_leave(&membership);
        let v2 = mounts.v2.ok_or(CgroupError::NoCgroup2)?;
        let path = v2.join("cgroup.controllers");
        let offered = fs::read_to_string(&path).map_err(CgroupError::io("read", &path))?;
        let v2_controllers = Controller::ALL
            .into_iter()
            .filter(|controller| offered.split_whitespace().any(|word| word == controller.name()))
            .collect();
        Ok(Self { v2, v2_controllers, v1: mounts.v1, to_leave })
    }

    /// Mount point of cgroup2.
    pub fn unified(&self) -> &Path {
        &self.v2
    }

    /// The files to which a process writes `0` to be in none of this process's v1 cgroups any more, besides those of the
    /// guard. A runtime that ends the agent's container kills whatever is in one of its cgroups: runc goes by `devices`.
    pub fn leave_files(&self) -> Vec<PathBuf> {
        self.to_leave.iter().map(|root| root.join("cgroup.procs")).collect()
    }

    /// Makes the cgroup with its limits. One that is left over under this name is killed and made anew.
    ///
    /// # Errors
    /// Also when a limit is asked for that no hierarchy of this machine can enforce. Nothing is left then.
    pub async fn create(&self, path: &CgroupPath, resources: &Resources) -> Result<CgroupGuard, CgroupError> {
        let (roots, name, resources) = (self.clone(), path.clone(), resources.clone());
        in_background(path, move || roots.create_now(&name, &resources)).await
    }

    /// Takes up what exists under this name, in whichever hierarchies; `None` when nothing does.
    pub async fn open(&self, path: &CgroupPath) -> Result<Option<CgroupGuard>, CgroupError> {
        let (roots, name) = (self.clone(), path.clone());
        in_background(path, move || roots.open_now(&name)).await
    }

    /// All cgroups below [`SLICE`] that have no cgroups below them, in any hierarchy.
    pub fn list(&self) -> Result<BTreeSet<CgroupPath>, CgroupError> {
        let mut found = BTreeSet::new();
        for root in self.hierarchies() {
            path::leaves(root, &mut found).map_err(CgroupError::io("list", &root.join(SLICE)))?;
        }
        Ok(found)
    }

    /// cgroup2 first, then each v1 mount once: cpu may share its mount with other controllers.
    fn hierarchies(&self) -> Vec<&Path> {
        let mut roots = vec![self.v2.as_path()];
        for root in self.v1.values() {
            if !roots.contains(&root.as_path()) {
                roots.push(root);
            }
        }
        roots
    }

    fn create_now(&self, path: &CgroupPath, resources: &Resources) -> Result<CgroupGuard, CgroupError> {
        if let Some(leftover) = self.open_now(path)? {
            leftover.kill_now(KILL_TIMEOUT)?;
            leftover.remove_now()?;
        }
        for root in self.hierarchies() {
            make_directories(root, path)?;
        }
        // From here on the guard removes what was made when anything fails.
        let guard = self.open_now(path)?.ok_or(CgroupError::NoCgroup2)?;
        let enabled = self.enable_controllers(path);
        self.limit(path, resources, &enabled)?;
        Ok(guard)
    }

    fn open_now(&self, path: &CgroupPath) -> Result<Option<CgroupGuard>, CgroupError> {
        let unified = path.below(&self.v2);
        let id = match fs::metadata(&unified) {
            Ok(metadata) => CgroupId(metadata.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => CgroupId(0),
            Err(source) => return Err(CgroupError::io("inspect", &unified)(source)),
        };
        let mut others = Vec::new();
        for root in self.hierarchies().into_iter().skip(1) {
            let directory = path.below(root);
            if directory.is_dir() {
                others.push(directory);
            }
        }
        if id == CgroupId(0) && others.is_empty() {
            return Ok(None);
        }
        let memory_v1 = self.v1.get(&Controller::Memory).map(|root| path.below(root));
        Ok(Some(CgroupGuard::new(Cgroup { id, path: unified }, others, memory_v1, path.depth())))
    }

    /// Enables what cgroup2 offers in every ancestor; tells which controllers work in the new cgroup.
    fn enable_controllers(&self, path: &CgroupPath) -> BTreeMap<Controller, Result<(), io::Error>> {
        let mut outcome: BTreeMap<_, _> = self.v2_controllers.iter().map(|c| (*c, Ok(()))).collect();
        for directory in path.ancestors_below(&self.v2) {
            let file = directory.join("cgroup.subtree_control");
            let enabled = fs::read_to_string(&file).unwrap_or_default();
            for (controller, outcome) in &mut outcome {
                let name = controller.name();
                if outcome.is_ok() && !enabled.split_whitespace().any(|word| word == name) {
                    *outcome = fs::write(&file, format!("+{name}"));
                }
            }
        }
        outcome
    }

    fn limit(
        &self,
        path: &CgroupPath,
        resources: &Resources,
        enabled: &BTreeMap<Controller, Result<(), io::Error>>,
    ) -> Result<(), CgroupError> {
        for (controller, [v2, v1]) in settings(resources) {
            let (directory, files) = match (enabled.get(&controller), self.v1.get(&controller)) {
                (Some(Ok(())), _) => (path.below(&self.v2), v2),
                (_, Some(root)) => (path.below(root), v1),
                (Some(Err(error)), None) => {
                    return Err(CgroupError::Unenforceable {
                        controller: controller.name(),
                        reason: Some(format!("cgroup2 refuses to enable the controller: {error}")),
                    });
                }
                (None, None) => {
                    return Err(CgroupError::Unenforceable { controller: controller.name(), reason: None });
                }
            };
            for (file, value) in files {
                let file = directory.join(file);
                fs::write(&file, &value).map_err(|error| CgroupError::Unenforceable {
                    controller: controller.name(),
                    reason: Some(format!("writing {value:?} to {}: {error}", file.display())),
                })?;
            }
        }
        if resources.memory.is_some() && matches!(enabled.get(&Controller::Memory), Some(Ok(()))) {
            // A companion that lost one of its processes is worth nothing: let it end as a whole and be restarted.
            // Linux 4.19; without it only the restart comes later.
            let _ = fs::write(path.below(&self.v2).join("memory.oom.group"), "1");
        }
        Ok(())
    }
}

type Files = Vec<(&'static str, String)>;

/// What to write for each limit: to cgroup2's files, or to v1's.
fn settings(resources: &Resources) -> Vec<(Controller, [Files; 2])> {
    let mut settings = Vec::new();
    if let Some(bytes) = resources.memory {
        let value = bytes.to_string();
        let v1 = vec![("memory.limit_in_bytes", value.clone())];
        settings.push((Controller::Memory, [vec![("memory.max", value)], v1]));
    }
    if let Some(millis) = resources.cpu_millis {
        // The kernel takes no quota under 1 ms, so that small shares need the longest period, 1 s.
        let period = if millis < 10 { 1_000_000 } else { 100_000 };
        let quota = u64::from(millis) * period / 1000;
        let v1 = vec![("cpu.cfs_period_us", period.to_string()), ("cpu.cfs_quota_us", quota.to_string())];
        settings.push((Controller::Cpu, [vec![("cpu.max", format!("{quota} {period}"))], v1]));
    }
    if let Some(pids) = resources.pids {
        let files = vec![("pids.max", pids.to_string())];
        settings.push((Controller::Pids, [files.clone(), files]));
    }
    settings
}

fn make_directories(root: &Path, path: &CgroupPath) -> Result<(), CgroupError> {
    let leaf = path.below(root);
    let mut attempts = 0;
    loop {
        attempts += 1;
        match fs::create_dir_all(&leaf) {
            Ok(()) => return Ok(()),
            // Somebody removed a parent that was empty for a moment.
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < CREATE_ATTEMPTS => {}
            Err(source) => return Err(CgroupError::io("create", &leaf)(source)),
        }
    }
}

/// Cgroup files can block on locks of the kernel for milliseconds: never on a worker thread of the runtime.
async fn in_background<T: Send + 'static>(
    path: &CgroupPath,
    work: impl FnOnce() -> Result<T, CgroupError> + Send + 'static,
) -> Result<T, CgroupError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(CgroupError::Abandoned { path: path.below(Path::new("/")) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_file_contents() {
        let cases = [
            (
                Resources { memory: Some(1 << 20), ..Resources::default() },
                "memory.max=1048576 | memory.limit_in_bytes=1048576",
            ),
            (
                Resources { cpu_millis: Some(500), ..Resources::default() },
                "cpu.max=50000 100000 | cpu.cfs_period_us=100000 cpu.cfs_quota_us=50000",
            ),
            (
                Resources { cpu_millis: Some(1), ..Resources::default() },
                "cpu.max=1000 1000000 | cpu.cfs_period_us=1000000 cpu.cfs_quota_us=1000",
            ),
            (
                Resources { cpu_millis: Some(u32::MAX), ..Resources::default() },
                "cpu.max=429496729500 100000 | cpu.cfs_period_us=100000 cpu.cfs_quota_us=429496729500",
            ),
            (Resources { pids: Some(64), ..Resources::default() }, "pids.max=64 | pids.max=64"),
            (Resources::default(), ""),
        ];
        for (resources, want) in cases {
            let text = |files: &Files| {
                files.iter().map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(" ")
            };
            let got: Vec<_> = settings(&resources)
                .iter()
                .map(|(_, [v2, v1])| format!("{} | {}", text(v2), text(v1)))
                .collect();
            assert_eq!(got.join("; "), want);
        }
    }

    /// Plain files stand for the kernel's: which of them are written, and with what.
    #[test]
    fn cgroup2_is_preferred_and_its_controllers_are_enabled_on_the_way_down() {
        let base = std::env::temp_dir().join(format!("pillion-cgroup-{}", std::process::id()));
        let (v2, v1) = (base.join("v2"), base.join("v1"));
        let path = CgroupPath::try_from("a/b").expect("valid");
        fs::create_dir_all(path.below(&v2)).expect("temporary directory");
        fs::create_dir_all(path.below(&v1)).expect("temporary directory");
        fs::write(v2.join("cgroup.subtree_control"), "cpu memory pids").expect("written");
        let roots = CgroupRoots {
            v2: v2.clone(),
            v2_controllers: BTreeSet::from([Controller::Memory]),
            v1: BTreeMap::from([(Controller::Memory, v1.clone()), (Controller::Pids, v1.clone())]),
            to_leave: Vec::new(),
        };
        let enabled = roots.enable_controllers(&path);
        let resources = Resources { memory: Some(7), pids: Some(9), cpu_millis: None };
        roots.limit(&path, &resources, &enabled).expect("both can be enforced");
        let read = |file: PathBuf| fs::read_to_string(file).ok();
        let slice = v2.join(SLICE);
        assert_eq!(
            read(v2.join("cgroup.subtree_control")).as_deref(),
            Some("cpu memory pids"),
            "was enabled"
        );
        assert_eq!(read(slice.join("cgroup.subtree_control")).as_deref(), Some("+memory"));
        assert_eq!(read(slice.join("a/cgroup.subtree_control")).as_deref(), Some("+memory"));
        assert_eq!(read(slice.join("a/b/cgroup.subtree_control")), None, "processes live there");
        assert_eq!(read(slice.join("a/b/memory.max")).as_deref(), Some("7"));
        assert_eq!(read(path.below(&v1).join("memory.limit_in_bytes")), None, "cgroup2 does it");
        assert_eq!(read(path.below(&v1).join("pids.max")).as_deref(), Some("9"));
        fs::remove_dir_all(&base).expect("removed");
    }

    #[test]
    fn a_limit_without_controller_is_an_error() {
        let roots = CgroupRoots {
            v2: PathBuf::from("/nonexistent"),
            v2_controllers: BTreeSet::new(),
            v1: BTreeMap::new(),
            to_leave: Vec::new(),
        };
        let path = CgroupPath::try_from("a").expect("valid");
        let resources = Resources { memory: Some(1), ..Resources::default() };
        let error = roots.limit(&path, &resources, &BTreeMap::new()).expect_err("nothing can enforce it");
        assert_eq!(
            error.to_string(),
            "the memory limit cannot be enforced: this machine has no such cgroup controller, neither v2 nor v1"
        );
    }
}
