//! Gates: the synchronous points at which a workload is held until its plan is in force.
//!
//! Only the vocabulary. Who holds and who releases is told in `agent/runtime`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A synchronous point before the workload's first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    /// `pillion run`: the launcher has not executed the command yet.
    Run,
    /// containerd's Node Resource Interface: `StartContainer` has not been answered yet (containerd 1.7).
    Nri,
    /// An OCI hook, `createRuntime` (OCI runtime specification 1.0.2).
    Hook,
    /// A runtime wrapper: the real runtime's `start` has not been executed yet.
    Wrapper,
    /// `ExecStartPre=` of a systemd unit.
    Systemd,
    /// A process stopped at its exec.
    Exec,
}

impl Gate {
    /// All gates, in the order in which they are shown.
    pub const ALL: [Self; 6] = [Self::Run, Self::Nri, Self::Hook, Self::Wrapper, Self::Systemd, Self::Exec];

    /// The name used in output, JSON and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Nri => "nri",
            Self::Hook => "hook",
            Self::Wrapper => "wrapper",
            Self::Systemd => "systemd",
            Self::Exec => "exec",
        }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
