//! Newtypes for every id that crosses a crate.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A name that breaks the rules of its type; `Display` says which rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} {value:?}: {rule}")]
pub struct InvalidName {
    /// Which kind of name, for example `companion name`.
    pub what: &'static str,
    /// What was given, shortened to 80 characters.
    pub value: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $max:literal, $extra:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidName;
            fn try_from(value: String) -> Result<Self, InvalidName> {
                let rule = if value.is_empty() {
                    "must not be empty"
                } else if value.len() > $max {
                    concat!("must be at most ", $max, " bytes long")
                } else if !value.bytes().all(|b| b.is_ascii_alphanumeric() || $extra.contains(&b)) {
                    concat!("may hold only ASCII letters, digits and one of ", stringify!($extra))
                } else if !value.as_bytes()[0].is_ascii_alphanumeric() {
                    "must begin with a letter or a digit"
                } else {
                    return Ok(Self(value));
                };
                Err(InvalidName { what: $what, value: value.chars().take(80).collect(), rule })
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;
            fn from_str(value: &str) -> Result<Self, InvalidName> {
                Self::try_from(value.to_owned())
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// Names a workload on this node: `<runtime>/<runtime's namespace>/<name>`, such as
    /// `containerd/default/web` or `process/4711-90210`. Stable while the workload lives; a workload
    /// recreated under the same name has the same `WorkloadId` and another [`crate::Instance`]. What unit names of
    /// systemd may hold is allowed; a slash is the only character of it that cannot be in a file name.
    WorkloadId, "workload id", 253, b"-_./:@\\"
);
name!(
    /// Names a companion within its policy.
    CompanionName, "companion name", 63, b"-_."
);
name!(
    /// `metadata.name` of an `InjectionPolicy`; unique among all loaded files.
    PolicyName, "policy name", 253, b"-_."
);

/// A process id in the agent's PID namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pid(pub i32);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Start time of a process in clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StartTime(pub u64);

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid, in the agent's PID namespace.
    pub pid: Pid,
    /// When it started.
    pub started: StartTime,
}

/// Inode of a cgroup2 directory, which is what eBPF calls the cgroup's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CgroupId(pub u64);

/// A network namespace: device and inode of its nsfs file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of the nsfs mount.
    pub device: u64,
    /// Inode within nsfs, as in `net:[4026531840]`.
    pub inode: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// Where a workload comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Started by `pillion run`, or a process of the host that is held at its exec.
    Process,
    /// A container of containerd, in any of its namespaces, or a Kubernetes pod that it runs.
    Containerd,
    /// A container of Docker Engine.
    Docker,
    /// A container of Podman.
    Podman,
    /// A container of CRI-O.
    Crio,
    /// A unit of systemd.
    Systemd,
}

impl RuntimeKind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 6] =
        [Self::Process, Self::Containerd, Self::Docker, Self::Podman, Self::Crio, Self::Systemd];

    /// The name used in policies and output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Crio => "crio",
            Self::Systemd => "systemd",
        }
    }
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A runtime name that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown runtime {0:?}")]
pub struct UnknownRuntime(pub String);

impl FromStr for RuntimeKind {
    type Err = UnknownRuntime;
    fn from_str(value: &str) -> Result<Self, UnknownRuntime> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == value)
            .ok_or_else(|| UnknownRuntime(value.to_owned()))
    }
}
