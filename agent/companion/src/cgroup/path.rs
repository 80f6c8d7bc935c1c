//! Names of cgroups below [`SLICE`]: validated, so that no id can name a directory elsewhere.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use pillion_workload::{CompanionName, WorkloadId};

use super::SLICE;

/// Deeper trees are not ours; also bounds [`leaves`].
const DEEPEST: usize = 4;

/// A path below [`SLICE`], the same in all hierarchies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupPath(String);

/// A path that cannot be a cgroup's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid cgroup path {0:?}: must be one to {DEEPEST} names of letters, digits and -_.+:@\\, none beginning with a dot"
)]
pub struct InvalidCgroupPath(pub String);

impl CgroupPath {
    /// Where a workload's process is born that `pillion run` starts.
    pub fn workload(workload: &WorkloadId) -> Self {
        Self(format!("{}/workload", escape(workload)))
    }

    /// A companion's. The prefix keeps its name from meeting a control file of the kernel, such as `memory.max`.
    pub fn companion(workload: &WorkloadId, companion: &CompanionName) -> Self {
        Self(format!("{}/companion-{companion}", escape(workload)))
    }

    /// The path below [`SLICE`].
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn below(&self, root: &Path) -> PathBuf {
        root.join(SLICE).join(&self.0)
    }

    /// Every directory from `root` to the parent of this cgroup.
    pub(super) fn ancestors_below(&self, root: &Path) -> Vec<PathBuf> {
        let leaf = self.below(root);
        let mut ancestors: Vec<_> =
            leaf.ancestors().skip(1).take(self.depth()).map(Path::to_path_buf).collect();
        ancestors.reverse();
        ancestors
    }

    /// How many directories below the hierarchy's root this is.
    pub(super) fn depth(&self) -> usize {
        self.0.split('/').count() + 1
    }
}

impl TryFrom<&str> for CgroupPath {
    type Error = InvalidCgroupPath;

    fn try_from(path: &str) -> Result<Self, InvalidCgroupPath> {
        let valid_name = |name: &str| {
            !name.is_empty()
                && name.len() <= 255
                && !name.starts_with('.')
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+:@\\".contains(&b))
        };
        if path.split('/').all(valid_name) && path.split('/').count() <= DEEPEST {
            Ok(Self(path.to_owned()))
        } else {
            Err(InvalidCgroupPath(path.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A workload id as one file name. Ids hold `/` but never `+`, so that no two ids become one; they begin with a letter
/// or digit and are at most 253 bytes long, so that the result is a file name.
pub(crate) fn escape(workload: &WorkloadId) -> String {
    workload.as_str().replace('/', "+")
}

/// Adds every cgroup below `root`'s slice that has none below it.
pub(super) fn leaves(root: &Path, found: &mut BTreeSet<CgroupPath>) -> io::Result<()> {
    let mut pending = vec![String::new()];
    while let Some(path) = pending.pop() {
        let mut leaf = true;
        let entries = match fs::read_dir(root.join(SLICE).join(&path)) {
            Ok(entries) => entries,
            // Removed since it was listed, or there is no slice at all.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if entry.file_type()?.is_dir() {
                leaf = false;
                let below = if path.is_empty() { name } else { format!("{path}/{name}") };
                if CgroupPath::try_from(below.as_str()).is_ok() {
                    pending.push(below);
                }
            }
        }
        if let (true, Ok(path)) = (leaf, CgroupPath::try_from(path.as_str())) {
            found.insert(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_become_single_names() {
        let workload: WorkloadId = "containerd/default/web..x".parse().expect("valid");
        let companion: CompanionName = "memory.max".parse().expect("valid");
        assert_eq!(
            CgroupPath::companion(&workload, &companion).as_str(),
            "containerd+default+web..x/companion-memory.max"
        );
        assert_eq!(CgroupPath::workload(&workload).as_str(), "containerd+default+web..x/workload");
    }

    #[test]
    fn only_plain_relative_paths_are_taken() {
        let long = "a".repeat(256);
        for (path, valid) in [
            ("a", true),
            ("a+b/companion-c", true),
            ("a/b/c/d", true),
            ("a/b/c/d/e", false),
            ("", false),
            ("/a", false),
            ("a/", false),
            ("a//b", false),
            ("../a", false),
            ("a/..", false),
            ("a/.b", false),
            ("a b", false),
            ("a\0", false),
            (long.as_str(), false),
        ] {
            assert_eq!(CgroupPath::try_from(path).is_ok(), valid, "{path:?}");
        }
    }

    #[test]
    fn ancestors_begin_at_the_root() {
        let path = CgroupPath::try_from("a/b").expect("valid");
        let ancestors = path.ancestors_below(Path::new("/c"));
        assert_eq!(ancestors, ["/c", "/c/pillion.slice", "/c/pillion.slice/a"].map(PathBuf::from));
    }

    #[test]
    fn leaves_of_a_tree() {
        let root = std::env::temp_dir().join(format!("pillion-leaves-{}", std::process::id()));
        for directory in ["a/b", "a/c", "d", "e/.f"] {
            fs::create_dir_all(root.join(SLICE).join(directory)).expect("temporary directory");
        }
        let mut found = BTreeSet::new();
        leaves(&root, &mut found).expect("readable");
        fs::remove_dir_all(&root).expect("removable");
        let found: Vec<_> = found.iter().map(CgroupPath::as_str).collect();
        assert_eq!(found, ["a/b", "a/c", "d"]);
    }
}
