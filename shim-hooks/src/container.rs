//! What a container's own files say of it: its `config.json`, and what its runtime keeps.
//!
//! Owns their parsing. They were written by whoever may create containers: sizes are bounded, and every other field may be anything.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use pillion_common::hook::Spec;
use serde::Deserialize;

/// A specification of even 1 MiB has not been seen.
pub(crate) const FILE_LIMIT: usize = 4 << 20;
/// What annotations may have together, well below a request's limit even when JSON escapes much of it.
const ANNOTATIONS_LIMIT: usize = 128 << 10;
/// Annotations by which engines are told, and which tell what they know.
const OF_ENGINES: [&str; 4] = ["io.kubernetes.", "io.container", "io.podman.", "org.opencontainers."];

/// A container that its runtime has created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Created {
    pub(crate) pid: i32,
    /// In clock ticks since boot.
    pub(crate) started: Option<u64>,
    pub(crate) bundle: String,
}

/// Why a file says nothing.
#[derive(Debug)]
pub(crate) struct FileError {
    path: PathBuf,
    why: io::Error,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot read {}: {}", self.path.display(), self.why)
    }
}

/// `config.json` of a bundle (OCI runtime specification, 1.x).
#[derive(Debug, Default, Deserialize)]
struct Config {
    annotations: Option<BTreeMap<String, String>>,
    process: Option<Process>,
    linux: Option<Linux>,
}

#[derive(Debug, Deserialize)]
struct Process {
    args: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct Linux {
    #[serde(rename = "cgroupsPath")]
    cgroups_path: Option<String>,
}

/// Reads the specification in a bundle.
pub(crate) fn read_spec(bundle: &str) -> Result<Spec, FileError> {
    let path = Path::new(bundle).join("config.json");
    let text = read(&path).map_err(|why| FileError { path: path.clone(), why })?;
    parse_spec(&text).map_err(|why| FileError { path, why: io::Error::other(why) })
}

fn parse_spec(text: &[u8]) -> serde_json::Result<Spec> {
    let config: Config = serde_json::from_slice(text)?;
    let short = |text: &String| !text.is_empty() && text.len() <= 4096 && !text.contains('\0');
    let program = config.process.and_then(|process| process.args?.into_iter().next());
    Ok(Spec {
        annotations: bounded(config.annotations.unwrap_or_default()),
        program: program.filter(short),
        cgroups_path: config.linux.and_then(|linux| linux.cgroups_path).filter(short),
    })
}

/// As many as fit, those of engines first.
pub(crate) fn bounded(annotations: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let of_engine = |key: &str| OF_ENGINES.iter().any(|prefix| key.starts_with(prefix));
    let (first, then): (Vec<_>, Vec<_>) = annotations.into_iter().partition(|(key, _)| of_engine(key));
    let mut left = ANNOTATIONS_LIMIT;
    let fits = |(key, value): &(String, String)| {
        let rest = left.checked_sub(key.len().saturating_add(value.len()));
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    first.into_iter().chain(then).filter(fits).collect()
}

/// Where the runtimes keep what they know of a container, below their root.
const STATE_FILES: [&str; 2] = ["state.json", "status"];

/// What of the runtimes' files matters here.
///
/// | runtime | file | pid | its start | bundle |
/// | --- | --- | --- | --- | --- |
/// | runc 1.x | `state.json` | `init_process_pid` | `init_process_start` | `config.labels`, `bundle=…` |
/// | crun 1.x | `status` | `pid` | `process-start-time` | `bundle` |
/// | youki | `state.json`, as OCI has it | `pid` | not kept | `bundle` |
#[derive(Debug, Deserialize)]
struct State {
    pid: Option<i32>,
    init_process_pid: Option<i32>,
    #[serde(alias = "process-start-time")]
    init_process_start: Option<u64>,
    bundle: Option<String>,
    config: Option<StateConfig>,
}

#[derive(Debug, Deserialize)]
struct StateConfig {
    labels: Option<Vec<String>>,
}

/// Reads what a runtime keeps below `root` of the container `id`. `None` when there is no file of a known kind.
pub(crate) fn read_state(root: &Path, id: &str) -> Option<Created> {
    // The id is a single name to every runtime.
    if id.is_empty() || id.contains('/') || id == ".." {
        return None;
    }
    let directory = root.join(id);
    STATE_FILES.iter().find_map(|file| parse_state(&read(&directory.join(file)).ok()?))
}

/// What a runtime's file says, or its answer to `state`.
pub(crate) fn parse_state(text: &[u8]) -> Option<Created> {
    let state: State = serde_json::from_slice(text).ok()?;
    let pid = state.init_process_pid.or(state.pid).filter(|pid| *pid > 0)?;
    let labelled = |config: StateConfig| {
        config.labels?.into_iter().find_map(|label| Some(label.strip_prefix("bundle=")?.to_owned()))
    };
    let bundle = state.bundle.or_else(|| state.config.and_then(labelled))?;
    let started = state.init_process_start.filter(|ticks| *ticks > 0);
    bundle.starts_with('/').then_some(Created { pid, started, bundle })
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut text = Vec::new();
    let limit = u64::try_from(FILE_LIMIT).unwrap_or(u64::MAX);
    fs::File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut text)?;
    if text.len() > FILE_LIMIT {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {FILE_LIMIT} bytes"),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn specifications() {
        let spec = parse_spec(
            br#"{"ociVersion":"1.0.2","process":{"args":["/bin/sh","-c"],"user":{}},"hooks":null,
                "annotations":{"a":"b"},"linux":{"cgroupsPath":"/default/web","resources":{}}}"#,
        )
        .unwrap();
        assert_eq!(spec.program.as_deref(), Some("/bin/sh"));
        assert_eq!(spec.cgroups_path.as_deref(), Some("/default/web"));
        assert_eq!(spec.annotations["a"], "b");
        assert_eq!(parse_spec(b"{}").unwrap(), Spec::default());
        assert_eq!(parse_spec(br#"{"process":{"args":[]},"annotations":null}"#).unwrap(), Spec::default());
        for bad in ["", "[]", r#"{"annotations":{"a":1}}"#, &"[".repeat(100_000)] {
            assert!(parse_spec(bad.as_bytes()).is_err(), "{}", &bad[..bad.len().min(40)]);
        }
    }

    #[test]
    fn annotations_of_engines_are_the_last_to_go() {
        let long = "x".repeat(100 << 10);
        let annotations = BTreeMap::from([
            ("a".to_owned(), long.clone()),
            ("b".to_owned(), "short".to_owned()),
            ("io.kubernetes.pod.name".to_owned(), long),
        ]);
        let kept = bounded(annotations);
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["b", "io.kubernetes.pod.name"]);
    }

    #[test]
    fn states_of_all_runtimes() {
        let created = |pid, started, bundle: &str| Some(Created { pid, started, bundle: bundle.into() });
        for (text, expected) in [
            (
                r#"{"id":"web","init_process_pid":42,"init_process_start":1,"cgroup_paths":{},
                    "config":{"rootfs":"/r","labels":["other","bundle=/b"],"pid":null}}"#,
                created(42, Some(1), "/b"),
            ),
            (
                r#"{"pid":7,"process-start-time":9,"bundle":"\/b\/c","rootfs":"/b/r"}"#,
                created(7, Some(9), "/b/c"),
            ),
            (
                r#"{"ociVersion":"1.0.2","id":"x","status":"created","pid":3,"bundle":"/b"}"#,
                created(3, None, "/b"),
            ),
            (r#"{"pid":0,"bundle":"/b"}"#, None),
            (r#"{"pid":-4,"bundle":"/b"}"#, None),
            (r#"{"pid":4,"bundle":"b"}"#, None),
            (r#"{"pid":4}"#, None),
            (r#"{"bundle":"/b"}"#, None),
            ("", None),
        ] {
            assert_eq!(parse_state(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_state_is_found_below_the_root_and_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        for (id, file) in [("runc", "state.json"), ("crun", "status")] {
            fs::create_dir(root.path().join(id)).unwrap();
            fs::write(root.path().join(id).join(file), r#"{"pid":5,"bundle":"/b"}"#).unwrap();
            assert_eq!(read_state(root.path(), id).map(|created| created.pid), Some(5));
        }
        for id in ["", "..", "none", "../runc", "./runc"] {
            assert_eq!(read_state(&root.path().join("crun"), id), None, "{id}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(text: Vec<u8>) {
            let _ = (parse_spec(&text), parse_state(&text));
        }

        #[test]
        fn json_of_any_shape_never_panics(a in ".*", b in ".*", pid: i64) {
            let json = serde_json::json!({
                "pid": pid, "bundle": a, "annotations": { (a.clone()): b }, "process": { "args": [b] },
                "linux": { "cgroupsPath": a }, "config": { "labels": [a, b] },
            });
            if let Some(created) = parse_state(json.to_string().as_bytes()) {
                prop_assert!(created.pid > 0 && created.bundle.starts_with('/'));
            }
            let _ = parse_spec(json.to_string().as_bytes());
        }

        #[test]
        fn annotations_always_fit(
            lengths in proptest::collection::btree_map("(io.kubernetes.)?[a-z]{0,4}", 0..70_000_usize, 0..8),
        ) {
            let annotations = lengths.into_iter().map(|(key, length)| (key, "x".repeat(length))).collect();
            let size: usize = bounded(annotations).iter().map(|(key, value)| key.len() + value.len()).sum();
            prop_assert!(size <= ANNOTATIONS_LIMIT);
        }
    }
}
