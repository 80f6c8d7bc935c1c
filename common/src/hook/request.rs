//! What a hook asks. Everything in it comes from a runtime's files and is bounded before it is used.

use alloc::{collections::BTreeMap, string::String};

use serde::{Deserialize, Serialize};

use super::FrameError;

/// containerd allows 76 bytes, Docker and Podman make 64 and take names of any length; runc bounds a state file's path.
const ID_LIMIT: usize = 255;
/// `PATH_MAX`, `UNIT_NAME_MAX` of systemd being 256.
const PATH_LIMIT: usize = 4096;

/// The one message that a hook sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// For how many milliseconds from now the hook waits for the answer.
    pub patience_ms: u32,
    /// What it is about.
    pub question: Question,
}

/// What a hook wants to know, or to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Question {
    /// May this container start?
    Container(Container),
    /// May this systemd unit start?
    Unit(Unit),
    /// This container has ended. Only a hint: the agent sees to it by itself.
    Stopped(Stopped),
}

/// Where a container is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Point {
    /// In the OCI hook `createRuntime`: its namespaces are there, its root file system is not entered yet.
    CreateRuntime,
    /// In the OCI hook `prestart`, the older name of the same moment.
    Prestart,
    /// In the runtime wrapper, before the real runtime's `start`.
    Start,
}

/// A container that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Where it is held.
    pub point: Point,
    /// Which one it is.
    #[serde(flatten)]
    pub id: ContainerId,
    /// Its first process, as the hook's PID namespace, the host's, numbers it.
    pub pid: i32,
    /// When that process started, in clock ticks since boot (field 22 of `/proc/PID/stat`), where its runtime keeps it: another process may
    /// have the pid by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// What its specification says.
    #[serde(default)]
    pub spec: Spec,
}

/// A container, as its runtime knows it. The id alone says nothing: each engine has ids of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerId {
    /// The runtime's id for it.
    pub id: String,
    /// Absolute path of its bundle: the directory of its `config.json`. It tells which engine made it.
    pub bundle: String,
    /// The runtime's `--root`, where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
}

/// The parts of a container's `config.json` that tell whose it is and what it runs. A hook that cannot read the file leaves all
/// of it out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// `annotations`. When they do not all fit, some are missing: never those by which engines are told.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// `process.args[0]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
    /// `linux.cgroupsPath`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroups_path: Option<String>,
}

/// A systemd unit whose `ExecStartPre=` runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unit {
    /// Its name, such as `payments.service`.
    pub name: String,
    /// The hook's own process, which is in the unit's cgroup, as the hook numbers it. The agent takes the number that the kernel gives it
    /// for its peer and uses this one only where there is none, as with `pillion admit --offline`.
    pub pid: i32,
}

/// A container that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stopped {
    /// Which one it was.
    #[serde(flatten)]
    pub id: ContainerId,
    /// What its specification says.
    #[serde(default)]
    pub spec: Spec,
}

impl Question {
    pub(super) fn check(&self) -> Result<(), FrameError> {
        match self {
            Self::Container(container) => {
                container.id.check()?;
                container.spec.check()?;
                positive(container.pid)
            }
            Self::Unit(unit) => {
                text("name", "must be 1 to 255 bytes without slash or NUL", &unit.name, |name| {
                    name.len() <= ID_LIMIT && !name.contains('/')
                })?;
                positive(unit.pid)
            }
            Self::Stopped(stopped) => {
                stopped.id.check()?;
                stopped.spec.check()
            }
        }
    }
}

impl ContainerId {
    fn check(&self) -> Result<(), FrameError> {
        text("id", "must be 1 to 255 bytes without slash or NUL", &self.id, |id| {
            id.len() <= ID_LIMIT && !id.contains('/')
        })?;
        path("bundle", &self.bundle)?;
        self.root.as_ref().map_or(Ok(()), |root| path("root", root))
    }
}

impl Spec {
    fn check(&self) -> Result<(), FrameError> {
        let short = |text: &String| text.len() <= PATH_LIMIT;
        for (field, value) in [("program", &self.program), ("cgroupsPath", &self.cgroups_path)] {
            if let Some(value) = value {
                text(field, "must be 1 to 4096 bytes without NUL", value, |_| short(value))?;
            }
        }
        Ok(())
    }
}

fn positive(pid: i32) -> Result<(), FrameError> {
    if pid > 0 { Ok(()) } else { Err(FrameError::Field { field: "pid", rule: "must be positive" }) }
}

fn path(field: &'static str, value: &str) -> Result<(), FrameError> {
    text(field, "must be an absolute path of at most 4096 bytes without NUL", value, |path| {
        path.starts_with('/') && path.len() <= PATH_LIMIT
    })
}

fn text(
    field: &'static str,
    rule: &'static str,
    value: &str,
    more: impl FnOnce(&str) -> bool,
) -> Result<(), FrameError> {
    let good = !value.is_empty() && !value.contains('\0') && more(value);
    if good { Ok(()) } else { Err(FrameError::Field { field, rule }) }
}
