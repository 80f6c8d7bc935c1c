//! A workload: what a policy can say about it, and which cgroup and namespace it is.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{CgroupId, NetnsId, ProcessId, RuntimeKind, WorkloadId};

/// A running workload on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Its name on this node.
    pub id: WorkloadId,
    /// What policies select on.
    pub subject: Subject,
    /// Which one it is; differs when recreated under the same name.
    pub instance: Instance,
}

/// What policies select on. A field that the runtime does not have is absent, and then no selector on it matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Where it comes from.
    pub runtime: RuntimeKind,
    /// The runtime's name for it: container name or id, program name.
    pub name: String,
    /// Kubernetes namespace of a pod's container, else containerd's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels, as the runtime keeps them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations, as the runtime keeps them. Shown, not selected on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Image reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// systemd unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Absolute path of the program in its own mount namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executable: Option<PathBuf>,
}

impl Subject {
    /// One of which no more is known than this.
    pub fn new(runtime: RuntimeKind, name: impl Into<String>) -> Self {
        Self {
            runtime,
            name: name.into(),
            namespace: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            image: None,
            unit: None,
            executable: None,
        }
    }
}

/// What is known of a workload that could not be identified: less than policies select on, perhaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// What is known. Of what is unknown it has nothing, or a part.
    pub subject: Subject,
    /// What may be anything.
    pub unknown: Vec<Facet>,
}

/// A thing that policies select on and that may be unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Facet {
    /// [`Subject::namespace`].
    Namespace,
    /// [`Subject::labels`]: there may be others.
    Labels,
    /// [`Subject::image`].
    Image,
    /// [`Subject::executable`].
    Executable,
    /// [`Subject::name`].
    Name,
}

impl From<Subject> for Sighting {
    /// All of it is known.
    fn from(subject: Subject) -> Self {
        Self { subject, unknown: Vec::new() }
    }
}

/// Identity: cgroup, network namespace and first process. Equal only for the very same instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The cgroup2 directory that holds all its processes.
    pub cgroup: Cgroup,
    /// Its network namespace.
    pub netns: NetnsId,
    /// Its first process.
    pub process: ProcessId,
}

/// A cgroup2 directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cgroup {
    /// Inode of the directory.
    pub id: CgroupId,
    /// Absolute path of the directory, below the cgroup2 mount.
    pub path: PathBuf,
}

/// Whether redirection was in force before the workload's first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirstInstruction {
    /// It was held, or seen not to have begun when the attach was complete.
    Before,
    /// It had begun.
    After,
    /// It cannot be told.
    Unknown,
}
