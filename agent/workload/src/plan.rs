//! What a policy wants for a workload: companions, redirection, and what to do when that fails.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{CompanionName, Glob, PolicyName, RedirectSpec};

/// Everything that must be in force before the workload may run. Made by the policy crate, always consistent:
/// every [`Target`](crate::Target) names a companion of the same plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The policy that won.
    pub policy: PolicyName,
    /// Started in this order.
    pub companions: Vec<CompanionSpec>,
    /// Which sockets go where.
    pub redirect: RedirectSpec,
    /// What happens to sockets and to the workload while a companion is not there.
    pub on_failure: FailureMode,
    /// What happens to connections that were open before redirection was in force. Absent in records of earlier agents.
    #[serde(default)]
    pub existing_connections: ExistingConnections,
}

/// What to do when a companion is missing, not ready or dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureMode {
    /// Traffic passes as if Pillion were not there.
    Open,
    /// New connections are refused (`ECONNREFUSED`).
    Closed,
}

/// What to do with connections that the rules would have taken, had they been in force when these were made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExistingConnections {
    /// They stay as they are.
    #[default]
    Keep,
    /// They are reset, so that the workload makes them anew, through the companion.
    Reset,
}

/// A companion process to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CompanionSpec {
    /// Unique within the plan.
    pub name: CompanionName,
    /// What to run.
    pub kind: CompanionKind,
    /// The user it runs as.
    pub user: UserSpec,
    /// When it counts as ready.
    pub ready: Readiness,
    /// Limits on its cgroup.
    pub resources: Resources,
    /// Time between SIGTERM and SIGKILL.
    pub stop_grace: Duration,
}

impl CompanionSpec {
    /// Whether somebody else runs it.
    pub fn is_external(&self) -> bool {
        matches!(self.kind, CompanionKind::External(_))
    }
}

/// The kinds of companions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompanionKind {
    /// A program of the host.
    Exec(ExecSpec),
    /// The embedded transparent TCP relay.
    Relay,
    /// Somebody else runs it; connections are only sent to it.
    External(ExternalSpec),
}

/// By what a companion is known that somebody else runs: the process that listens on its ports must match every field that
/// is given, and at least one is. A list matches when any item does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalSpec {
    /// Its program, as an absolute path in its own mount namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub executables: Vec<Glob>,
    /// Its user, by name or number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<String>,
    /// Its container, by the name that Kubernetes gives it in the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Its cgroup2, as a path from the root of the hierarchy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Glob>,
}

/// A program of the host. `{{ name }}` variables in `command` and in the templates' text are replaced at start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecSpec {
    /// Absolute path of the program, then its arguments.
    pub command: Vec<String>,
    /// Files rendered into the companion's directory `{{ dir }}` under their base names.
    pub templates: Vec<PathBuf>,
}

/// User and group, by name or by number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserSpec {
    /// User name or uid.
    pub user: String,
    /// Group name or gid; the user's primary group when absent (for a bare uid: the same number).
    pub group: Option<String>,
}

/// When a companion counts as ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    /// What is asked. Without one, every redirected port must accept a TCP connection.
    pub probe: Option<Probe>,
    /// The companion has this long from its start.
    pub timeout: Duration,
}

/// A readiness question, asked from within the workload's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// The port accepts a connection on loopback.
    Tcp {
        /// Port on loopback.
        port: u16,
    },
    /// `GET path` on loopback answers 200–399.
    Http {
        /// Port on loopback.
        port: u16,
        /// Begins with `/`.
        path: String,
    },
    /// The command exits with 0.
    Exec {
        /// Program and arguments; variables as in [`ExecSpec::command`].
        command: Vec<String>,
    },
}

/// Limits; what is absent is not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// Bytes.
    pub memory: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u32>,
    /// Number of tasks.
    pub pids: Option<u32>,
}
