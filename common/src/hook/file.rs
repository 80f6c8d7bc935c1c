//! The file that the agent leaves for hooks which find no agent: which policies were in force last.
//!
//! Owns its form. The agent writes it, by renaming, at its start and whenever other policies come into force; the hook reads it.
//! It says enough to let workloads pass where nothing can refuse them, and whom to ask where something can. It selects
//! nothing: there is one implementation of selection, in the program that it names.

use alloc::{string::String, vec::Vec};
use core::fmt;

use serde::{Deserialize, Serialize};

/// Its name in the agent's state directory.
pub const GATE_FILE: &str = "gate.json";

/// The form of the file that this release writes.
const FILE_VERSION: u32 = 1;
/// Policies in the thousands are some 100 KiB.
const FILE_LIMIT: usize = 4 << 20;

/// Its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GateFile {
    version: u32,
    /// What decides in the agent's place: the absolute path of the `pillion` program that wrote it, and `admit --offline` with
    /// the flags that it needs. It reads a frame with the request and writes one with the answer.
    pub command: Vec<String>,
    /// The policies in force.
    pub policies: Vec<GatePolicy>,
    /// For how long hooks are to wait for the agent, in milliseconds.
    pub patience_ms: u32,
}

/// What every version of the file has.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

/// A policy in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatePolicy {
    /// Its name.
    pub name: String,
    /// What becomes of a workload whose companions are not there.
    pub on_failure: OnFailure,
}

/// `onFailure` of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnFailure {
    /// It runs without.
    Open,
    /// It does not run.
    Closed,
}

/// Why the file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GateFileError {
    /// It is too long.
    TooLong,
    /// A release of another form wrote it.
    Version(u32),
    /// It is not such a file.
    Malformed(String),
}

impl fmt::Display for GateFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "it has more than {FILE_LIMIT} bytes"),
            Self::Version(version) => write!(f, "it is of version {version}, not {FILE_VERSION}"),
            Self::Malformed(why) => f.write_str(why),
        }
    }
}

impl core::error::Error for GateFileError {}

impl GateFile {
    /// The longest file that [`GateFile::parse`] takes, in bytes.
    pub const LIMIT: usize = FILE_LIMIT;

    /// The contents for these policies.
    pub fn new(command: Vec<String>, policies: Vec<GatePolicy>, patience_ms: u32) -> Self {
        Self { version: FILE_VERSION, command, policies, patience_ms }
    }

    /// Reads it.
    pub fn parse(text: &[u8]) -> Result<Self, GateFileError> {
        if text.len() > FILE_LIMIT {
            return Err(GateFileError::TooLong);
        }
        let malformed = |error: serde_json::Error| GateFileError::Malformed(alloc::format!("{error}"));
        // The version first: nothing else need be as this release knows it.
        let Head { version } = serde_json::from_slice(text).map_err(malformed)?;
        if version != FILE_VERSION {
            return Err(GateFileError::Version(version));
        }
        let file: Self = serde_json::from_slice(text).map_err(malformed)?;
        if !file.command.first().is_some_and(|program| program.starts_with('/')) {
            return Err(GateFileError::Malformed("its command does not begin with an absolute path".into()));
        }
        Ok(file)
    }

    /// Writes it.
    pub fn to_json(&self) -> Result<Vec<u8>, GateFileError> {
        serde_json::to_vec(self).map_err(|error| GateFileError::Malformed(alloc::format!("{error}")))
    }

    /// The names of those that refuse.
    pub fn closed(&self) -> impl Iterator<Item = &str> {
        let closed = self.policies.iter().filter(|policy| policy.on_failure == OnFailure::Closed);
        closed.map(|policy| policy.name.as_str())
    }
}
