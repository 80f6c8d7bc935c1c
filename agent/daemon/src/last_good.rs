//! What the agent leaves for the time when it is not there: the policies in force, and the file that tells hooks of them.
//!
//! Owns `<state dir>/policies.json`, a copy of the policy files that were taken last, and `<state dir>/gate.json`, which hooks read (its
//! form is `common`'s). Both are replaced atomically. Used by the next agent whose policy directory is bad, and by
//! `pillion admit --offline`. Never decides which policies are good.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use pillion_common::hook::{GATE_FILE, GateFile, GatePolicy, OnFailure};
use pillion_policy::{PolicySet, SourceFile};
use pillion_workload::FailureMode;
use serde::{Deserialize, Serialize};

use crate::{
    journal::{Until, replace_file},
    policy_files,
};

/// The copy's name.
const COPY: &str = "policies.json";
/// Of the copy's layout.
const VERSION: u32 = 1;
/// As many files of the largest size as are read, in JSON.
const LIMIT: u64 = 1 << 30;

/// Keeps what was good.
#[derive(Debug, Clone)]
pub(crate) struct LastGood {
    /// Of the agent.
    pub(crate) state_dir: PathBuf,
    /// What hooks are to run in the agent's place.
    pub(crate) command: Vec<String>,
    /// How long hooks are to wait for the agent.
    pub(crate) patience: Duration,
}

/// Why there is no copy to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// None was kept.
    #[error("no agent has kept policies in {}", .0.display())]
    None(PathBuf),
    /// It cannot be used.
    #[error("the copy of the policies {} cannot be used: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Copy {
    version: u32,
    files: Vec<CopiedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CopiedFile {
    /// Its stem may name the policy.
    path: String,
    text: String,
}

/// Policies that were read, and what to do when they are no good.
#[derive(Debug)]
pub(crate) struct Read {
    /// The policies, or every fault as text.
    pub(crate) result: Result<PolicySet, String>,
    /// Those of an earlier agent, when it was asked for and there are any.
    pub(crate) fallback: Option<PolicySet>,
}

impl LastGood {
    /// Reads the policy directory and keeps what is good. What is not is stood in for by the copy at an
    /// agent's start, when nothing is in force yet. Blocks.
    pub(crate) fn read(&self, directory: &Path, at_start: bool) -> Read {
        let (kept, read) = match policy_files::load_with_files(directory) {
            Ok((policies, files)) => {
                let kept = self.keep(&files, &policies);
                (kept, Read { result: Ok(policies), fallback: None })
            }
            Err(error) => {
                let fallback = if at_start { self.fallback() } else { None };
                // This agent's program is where hooks are to look from now on.
                let kept = fallback.as_ref().map_or(Ok(()), |policies| self.write_gate_file(policies));
                (kept, Read { result: Err(error.to_string()), fallback })
            }
        };
        if let Err(error) = kept {
            let directory = self.state_dir.display();
            tracing::error!(%directory, %error, "the policies in force cannot be kept for hooks that find no agent");
        }
        read
    }

    fn fallback(&self) -> Option<PolicySet> {
        match copied(&self.state_dir) {
            Ok(policies) => Some(policies),
            Err(CopyError::None(_)) => None,
            Err(error) => {
                tracing::error!(%error, "no policies are in force");
                None
            }
        }
    }

    /// The copy first: a gate file never speaks of policies that the copy does not have yet.
    fn keep(&self, files: &[SourceFile], policies: &PolicySet) -> io::Result<()> {
        let files = files.iter().map(|file| CopiedFile {
            path: file.path.to_string_lossy().into_owned(),
            text: file.text.clone(),
        });
        let copy = Copy { version: VERSION, files: files.collect() };
        replace_if_other(&self.state_dir.join(COPY), &serde_json::to_vec(&copy)?)?;
        self.write_gate_file(policies)
    }

    fn write_gate_file(&self, policies: &PolicySet) -> io::Result<()> {
        let policies = policies.policies().iter().map(|policy| GatePolicy {
            name: policy.name().to_string(),
            on_failure: match policy.plan().on_failure {
                FailureMode::Open => OnFailure::Open,
                FailureMode::Closed => OnFailure::Closed,
            },
        });
        let patience = u32::try_from(self.patience.as_millis()).unwrap_or(u32::MAX);
        let file = GateFile::new(self.command.clone(), policies.collect(), patience);
        replace_if_other(&self.state_dir.join(GATE_FILE), &file.to_json().map_err(io::Error::other)?)
    }
}

/// The policies that an agent with this state directory kept last.
pub(crate) fn copied(state_dir: &Path) -> Result<PolicySet, CopyError> {
    let path = state_dir.join(COPY);
    let unusable = |reason: String| CopyError::Unusable { path: path.clone(), reason };
    let bytes = match read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(CopyError::None(state_dir.to_owned()));
        }
        Err(error) => return Err(unusable(error.to_string())),
    };
    let copy: Copy = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
    if copy.version != VERSION {
        return Err(unusable(format!("its layout has version {}, not {VERSION}", copy.version)));
    }
    let files: Vec<SourceFile> =
        copy.files.into_iter().map(|file| SourceFile { path: file.path.into(), text: file.text }).collect();
    // Another release may be stricter.
    pillion_policy::parse(&files).map_err(|faults| unusable(faults.to_string()))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn replace_if_other(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if read(path).is_ok_and(|there| there == bytes) { Ok(()) } else { replace_file(path, bytes, Until::Disk) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn policy(name: &str, mode: &str) -> String {
        format!(
            "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: {{ name: {name} }}\n\
             spec: {{ select: {{ labels: {{ app: {name} }} }}, companions: [{{ name: r, builtin: relay }}], \
             redirect: {{ outbound: [{{ to: r }}] }}, onFailure: {mode} }}\n"
        )
    }

    struct Place {
        root: tempfile::TempDir,
        last_good: LastGood,
    }

    impl Place {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            for directory in ["state", "policies"] {
                fs::create_dir(root.path().join(directory)).unwrap();
                let mode = fs::Permissions::from_mode(0o755);
                fs::set_permissions(root.path().join(directory), mode).unwrap();
            }
            let last_good = LastGood {
                state_dir: root.path().join("state"),
                command: vec!["/usr/bin/pillion".into(), "admit".into()],
                patience: Duration::from_secs(7),
            };
            Self { root, last_good }
        }

        fn write(&self, file: &str, text: &str) {
            let path = self.root.path().join("policies").join(file);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        }

        fn read(&self, fall_back: bool) -> Read {
            self.last_good.read(&self.root.path().join("policies"), fall_back)
        }

        fn gate_file(&self) -> GateFile {
            GateFile::parse(&fs::read(self.root.path().join("state/gate.json")).unwrap()).unwrap()
        }
    }

    #[test]
    fn what_was_good_is_kept_and_stands_in_for_what_is_not() {
        let place = Place::new();
        place.write("bad.yaml", "kind: Nonsense\n");
        let read = place.read(true);
        assert!(read.result.is_err() && read.fallback.is_none());
        assert!(matches!(copied(&place.last_good.state_dir), Err(CopyError::None(_))));
        assert!(!place.root.path().join("state/gate.json").exists());

        place.write("bad.yaml", &(policy("a", "open") + "---\n" + &policy("b", "closed")));
        let good = place.read(true).result.unwrap();
        assert_eq!(copied(&place.last_good.state_dir).unwrap(), good);
        let file = place.gate_file();
        assert_eq!((file.closed().collect::<Vec<_>>(), file.policies.len()), (vec!["b"], 2));
        assert_eq!((file.patience_ms, &file.command), (7000, &place.last_good.command));
        let mode = fs::metadata(place.root.path().join("state/policies.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        place.write("bad.yaml", "kind: Nonsense\n");
        let read = place.read(true);
        assert!(read.result.is_err());
        assert_eq!(read.fallback, Some(good));
        assert!(place.read(false).fallback.is_none(), "an agent that has policies keeps them by itself");
        assert_eq!(place.gate_file(), file);

        place.write("bad.yaml", "");
        place.read(false).result.unwrap();
        assert!(place.gate_file().policies.is_empty());
    }

    #[test]
    fn a_copy_that_is_no_good_is_told() {
        let place = Place::new();
        for bad in [
            &b""[..],
            b"{}",
            b"\xff",
            br#"{"version":2,"files":[]}"#,
            br#"{"version":1,"files":[{"path":"a.yaml","text":"x: ["}]}"#,
        ] {
            fs::write(place.root.path().join("state/policies.json"), bad).unwrap();
            let error = copied(&place.last_good.state_dir).unwrap_err();
            assert!(matches!(error, CopyError::Unusable { .. }), "{error}");
            assert!(error.to_string().contains("policies.json"), "{error}");
        }
    }
}
