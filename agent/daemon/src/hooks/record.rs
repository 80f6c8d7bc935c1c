//! What an installation has changed, so that it can be taken back to the byte.
//!
//! Owns `/etc/pillion/hooks/RUNTIME.json`. Where it is lost, the settings themselves tell what is Pillion's.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{document::Language, edit::Undo, file, runtime::Runtime};

/// The record of one runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// Of the agent that the hooks ask.
    pub(crate) state_dir: PathBuf,
    /// Files that were changed or made.
    pub(crate) files: Vec<Changed>,
    /// Directories that were made, outermost first.
    pub(crate) directories: Vec<PathBuf>,
    /// The link that the settings name.
    pub(crate) wrapper: Option<PathBuf>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Changed {
    pub(crate) path: PathBuf,
    /// `None` when there was none.
    pub(crate) before: Option<String>,
    pub(crate) after: String,
    /// How to take it back when somebody has edited it since; absent for a file that is Pillion's as a whole.
    pub(crate) undo: Option<(Language, Undo)>,
}

/// Where the record of a runtime is.
pub(crate) fn path(etc: &Path, runtime: Runtime) -> PathBuf {
    etc.join("hooks").join(format!("{runtime}.json"))
}

impl Record {
    /// Reads it; `None` when nothing is installed, or it is lost.
    pub(crate) fn read(etc: &Path, runtime: Runtime) -> anyhow::Result<Option<Self>> {
        let path = path(etc, runtime);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let record = serde_json::from_str(&text).with_context(|| {
            format!("{} is broken; without it, only Pillion's own settings are taken out", path.display())
        });
        record.map(Some)
    }

    /// Keeps it.
    pub(crate) fn write(&self, etc: &Path, runtime: Runtime) -> anyhow::Result<()> {
        file::write_own(&path(etc, runtime), &(serde_json::to_string_pretty(self)? + "\n"))
    }

    /// Forgets it.
    pub(crate) fn remove(etc: &Path, runtime: Runtime) -> anyhow::Result<()> {
        let path = path(etc, runtime);
        file::remove(&path)?;
        if let Some(directory) = path.parent() {
            file::remove_empty(directory);
        }
        Ok(())
    }
}
