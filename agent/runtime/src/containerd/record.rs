//! Reads what containerd keeps about a container.
//!
//! Owns the parsing of container records and task states. Never does IO. The records were written by whoever may create
//! containers, so nothing in them is trusted: sizes are bounded and a broken part is left out, with a reason.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use containerd_client::{services::v1::Container, types::v1::Status};
use pillion_workload::{FirstInstruction, RuntimeKind, Subject};
use serde::Deserialize;

use super::Key;

/// containerd bounds a message to 16 MiB; a spec of even 1 MiB has not been seen.
const SPEC_LIMIT: usize = 4 << 20;
/// containerd bounds a label's key and value to 4 KiB together, but not their number; annotations not at all.
const TEXT_LIMIT: usize = 1 << 20;
/// `PATH_MAX`.
const PATH_LIMIT: usize = 4096;

/// Labels and annotations of containerd's CRI plug-in (`pkg/cri/server/helpers.go`, `pkg/cri/annotations`) and of the
/// kubelet (`pkg/kubelet/types/labels.go`).
mod cri {
    pub(super) const KIND: &str = "io.cri-containerd.kind";
    pub(super) const SANDBOX: &str = "sandbox";
    pub(super) const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
    pub(super) const NAMESPACE: &str = "io.kubernetes.pod.namespace";
    pub(super) const CONTAINER: &str = "io.kubernetes.container.name";
}
/// The name that nerdctl gives a container.
const NERDCTL_NAME: &str = "nerdctl/name";

/// What is kept of a container's record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Record {
    pub(super) labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    image: Option<String>,
    executable: Option<PathBuf>,
    /// `linux.cgroupsPath`: what the runtime made the container's cgroup from.
    pub(super) cgroup: Option<String>,
    /// What could not be read, and why.
    pub(super) faults: Vec<String>,
}

impl Record {
    pub(super) fn parse(container: Container) -> Self {
        let mut faults = Vec::new();
        let spec = container.spec.map(|spec| parse_spec(&spec.value)).transpose();
        let spec = spec.unwrap_or_else(|fault| {
            faults.push(fault);
            None
        });
        let spec = spec.unwrap_or_default();
        let cgroup = spec.linux.and_then(|linux| linux.cgroups_path).filter(|path| path.len() <= PATH_LIMIT);
        let executable = spec.process.and_then(|process| process.args?.into_iter().next()).and_then(absolute);
        Self {
            labels: bounded(container.labels.into_iter().collect(), "labels", &mut faults),
            annotations: bounded(spec.annotations.unwrap_or_default(), "annotations", &mut faults),
            image: Some(container.image).filter(|image| !image.is_empty() && image.len() <= PATH_LIMIT),
            executable,
            cgroup,
            faults,
        }
    }

    /// A pod's sandbox: no workload, but it bears the pod's labels.
    pub(super) fn is_sandbox(&self) -> bool {
        self.labels.get(cri::KIND).is_some_and(|kind| kind == cri::SANDBOX)
    }

    /// The id of the container's sandbox, in the same containerd namespace. Only CRI's containers have one.
    pub(super) fn sandbox(&self) -> Option<&str> {
        self.labels.get(cri::KIND).filter(|kind| *kind != cri::SANDBOX)?;
        self.annotations.get(cri::SANDBOX_ID).map(String::as_str)
    }

    /// What policies select on. The container's own labels win over its pod's.
    pub(super) fn subject(&self, key: &Key, sandbox: Option<&Self>) -> Subject {
        let mut labels = sandbox.map(|sandbox| sandbox.labels.clone()).unwrap_or_default();
        labels.extend(self.labels.clone());
        let name = labels.get(cri::CONTAINER).or_else(|| labels.get(NERDCTL_NAME)).unwrap_or(&key.container);
        Subject {
            runtime: RuntimeKind::Containerd,
            name: name.clone(),
            namespace: Some(labels.get(cri::NAMESPACE).unwrap_or(&key.namespace).clone()),
            annotations: self.annotations.clone(),
            image: self.image.clone(),
            unit: None,
            executable: self.executable.clone(),
            labels,
        }
    }
}

/// Whether a task in this state has begun. A stopped one may have been killed before its start.
pub(super) fn first_instruction(status: Status) -> FirstInstruction {
    match status {
        Status::Created => FirstInstruction::Before,
        Status::Running | Status::Paused | Status::Pausing => FirstInstruction::After,
        Status::Stopped | Status::Unknown => FirstInstruction::Unknown,
    }
}

/// The parts of an OCI runtime specification (config.json, 1.x) that matter here. All other fields may be anything.
#[derive(Debug, Default, Deserialize)]
struct Spec {
    process: Option<SpecProcess>,
    linux: Option<SpecLinux>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
struct SpecProcess {
    args: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct SpecLinux {
    #[serde(rename = "cgroupsPath")]
    cgroups_path: Option<String>,
}

/// containerd keeps the spec as JSON, whatever the `Any` is named. Its absence is no fault.
fn parse_spec(json: &[u8]) -> Result<Spec, String> {
    if json.len() > SPEC_LIMIT {
        return Err(format!("its spec has {} bytes, more than {SPEC_LIMIT}", json.len()));
    }
    if json.is_empty() {
        return Ok(Spec::default());
    }
    serde_json::from_slice(json).map_err(|error| format!("its spec is not valid: {error}"))
}

fn absolute(program: String) -> Option<PathBuf> {
    (program.len() < PATH_LIMIT && Path::new(&program).is_absolute() && !program.contains('\0'))
        .then(|| program.into())
}

fn bounded(
    texts: BTreeMap<String, String>,
    what: &'static str,
    faults: &mut Vec<String>,
) -> BTreeMap<String, String> {
    let size: usize = texts.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size <= TEXT_LIMIT {
        return texts;
    }
    faults.push(format!("its {what} have {size} bytes, more than {TEXT_LIMIT}"));
    BTreeMap::new()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost_types::Any;

    use super::*;

    fn container(spec: &str, labels: &[(&str, &str)]) -> Container {
        Container {
            id: "c1".into(),
            image: "localhost/busybox:1".into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                value: spec.into(),
            }),
            ..Container::default()
        }
    }

    #[test]
    fn reads_specs() {
        for (spec, executable, annotations, faults) in [
            (r#"{"process":{"args":["/bin/sh","-c","x"]},"annotations":{"a":"b"}}"#, Some("/bin/sh"), 1, 0),
            (r#"{"process":{"args":["sh"]},"annotations":null}"#, None, 0, 0),
            (r#"{"process":{"args":[]},"hooks":{"prestart":17}}"#, None, 0, 0),
            (r#"{"process":null}"#, None, 0, 0),
            ("{}", None, 0, 0),
            ("", None, 0, 0),
            (r#"{"process":{"args":["/a\u0000b"]}}"#, None, 0, 0),
            (r#"{"process":{"args":[1]}}"#, None, 0, 1),
            (r#"{"annotations":{"a":1}}"#, None, 0, 1),
            ("[]", None, 0, 1),
            ("not JSON", None, 0, 1),
            (&"[".repeat(100_000), None, 0, 1),
            (&format!("{{{}}}", " ".repeat(SPEC_LIMIT)), None, 0, 1),
            (&format!(r#"{{"annotations":{{"a":"{}"}}}}"#, "x".repeat(TEXT_LIMIT)), None, 0, 1),
        ] {
            let record = Record::parse(container(spec, &[]));
            let shown = &spec[..spec.len().min(60)];
            assert_eq!(record.executable.as_deref(), executable.map(Path::new), "{shown}");
            assert_eq!(record.annotations.len(), annotations, "{shown}");
            assert_eq!(record.faults.len(), faults, "{shown}: {:?}", record.faults);
        }
    }

    #[test]
    fn describes_containers_of_all_kinds() {
        let pod = [("app", "api"), ("io.kubernetes.pod.namespace", "payments"), ("tier", "pod")];
        let sandbox = Record::parse(container("{}", &[&pod[..], &[(cri::KIND, "sandbox")]].concat()));
        assert!(sandbox.is_sandbox());
        assert_eq!(sandbox.sandbox(), None);
        let spec = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s1"}}"#;
        let labels = [(cri::KIND, "container"), (cri::CONTAINER, "web"), ("tier", "own")];
        let inner = Record::parse(container(spec, &labels));
        assert_eq!(inner.sandbox(), Some("s1"));
        assert_eq!(Record::parse(container(spec, &[])).sandbox(), None);

        let key = Key::new("k8s.io", "c1");
        let subject = inner.subject(&key, Some(&sandbox));
        assert_eq!((subject.name.as_str(), subject.namespace.as_deref()), ("web", Some("payments")));
        assert_eq!(subject.labels["app"], "api");
        assert_eq!(subject.labels["tier"], "own");
        assert_eq!(subject.labels[cri::KIND], "container");
        assert_eq!(subject.image.as_deref(), Some("localhost/busybox:1"));

        let key = Key::new("default", "c1");
        let plain = Record::parse(container("{}", &[])).subject(&key, None);
        assert_eq!((plain.name.as_str(), plain.namespace.as_deref()), ("c1", Some("default")));
        let nerdctl = Record::parse(container("{}", &[(NERDCTL_NAME, "db")])).subject(&key, None);
        assert_eq!(nerdctl.name, "db");
    }

    proptest! {
        #[test]
        fn arbitrary_records_never_panic(
            value: Vec<u8>,
            image: String,
            labels in proptest::collection::hash_map(".*", ".*", 0..4),
        ) {
            let spec = Some(Any { type_url: String::new(), value });
            let record = Record::parse(Container { image, labels, spec, ..Container::default() });
            let _ = record.subject(&Key::new("a", "b"), Some(&record));
        }

        #[test]
        fn json_of_any_shape_never_panics(arg in ".*", annotation in ".*") {
            let spec = serde_json::json!({
                "process": { "args": [arg], "user": annotation }, "annotations": { "x": annotation },
            });
            let record = Record::parse(container(&spec.to_string(), &[]));
            prop_assert!(record.executable.is_none_or(|path| path.is_absolute()));
        }
    }
}
