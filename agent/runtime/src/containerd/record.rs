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
use crate::pod::{Pod, TEXT_LIMIT};

/// containerd bounds a message to 16 MiB; a spec of even 1 MiB has not been seen.
const SPEC_LIMIT: usize = 4 << 20;
/// `PATH_MAX`.
const PATH_LIMIT: usize = 4096;

/// Labels and annotations of containerd's CRI plug-in (`pkg/cri/server/helpers.go`, `pkg/cri/annotations`) and of the
/// kubelet (`pkg/kubelet/types/labels.go`).
mod cri {
    pub(super) const KIND: &str = "io.cri-containerd.kind";
    pub(super) const SANDBOX: &str = "sandbox";
    pub(super) const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
    /// What the client said of the sandbox, since 1.6 also as annotations of its specification.
    pub(super) const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
    pub(super) const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
    pub(super) const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
    /// The plug-in's own record of a sandbox, an extension of the container's (`store/sandbox/metadata.go`): JSON, and
    /// the only place that has the pod's annotations, and its labels without those of the sandbox's image.
    pub(super) const SANDBOX_METADATA: &str = "io.cri-containerd.sandbox.metadata";
    pub(super) const NAME: &str = "io.kubernetes.pod.name";
    pub(super) const NAMESPACE: &str = "io.kubernetes.pod.namespace";
    pub(super) const UID: &str = "io.kubernetes.pod.uid";
    pub(super) const CONTAINER: &str = "io.kubernetes.container.name";
}
/// In names of shims.
const OWN_KERNEL: [&str; 4] = ["runsc", "kata", "firecracker", "hyperv"];
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
    /// The pod, of a sandbox.
    pod: Option<Box<Pod>>,
    /// The shim that runs it, such as `io.containerd.runc.v2`.
    runtime: Option<String>,
    /// What could not be read, and why.
    pub(super) faults: Vec<String>,
}

impl Record {
    pub(super) fn parse(mut container: Container) -> Self {
        let mut faults = Vec::new();
        let metadata = container.extensions.remove(cri::SANDBOX_METADATA);
        let spec = container.spec.map(|spec| parse_spec(&spec.value)).transpose();
        let spec = spec.unwrap_or_else(|fault| {
            faults.push(fault);
            None
        });
        let spec = spec.unwrap_or_default();
        let runtime = container.runtime.map(|runtime| runtime.name).filter(|name| name.len() <= PATH_LIMIT);
        let cgroup = spec.linux.and_then(|linux| linux.cgroups_path).filter(|path| path.len() <= PATH_LIMIT);
        let executable = spec.process.and_then(|process| process.args?.into_iter().next()).and_then(absolute);
        let labels = bounded(container.labels.into_iter().collect(), "labels", &mut faults);
        let annotations = bounded(spec.annotations.unwrap_or_default(), "annotations", &mut faults);
        let pod = labels.get(cri::KIND).is_some_and(|kind| kind == cri::SANDBOX).then(|| {
            let metadata = metadata.map(|metadata| parse_metadata(&metadata.value)).transpose();
            let metadata = metadata.unwrap_or_else(|fault| {
                faults.push(fault);
                None
            });
            Box::new(pod(metadata.map(|metadata| metadata.config), &labels, &annotations))
        });
        Self {
            labels,
            annotations,
            image: Some(container.image).filter(|image| !image.is_empty() && image.len() <= PATH_LIMIT),
            executable,
            cgroup,
            pod,
            runtime,
            faults,
        }
    }

    /// The shim, when it runs containers in a kernel of its own: in a virtual machine (Kata Containers, Firecracker), or in user
    /// space (gVisor). Their sockets are not this kernel's, so nothing that is attached here sees them.
    pub(super) fn own_kernel(&self) -> Option<&str> {
        let name = self.runtime.as_deref()?;
        OWN_KERNEL.iter().any(|shim| name.contains(shim)).then_some(name)
    }

    /// The pod, when this is a pod's sandbox.
    pub(super) fn pod(&self) -> Option<&Pod> {
        self.pod.as_deref()
    }

    /// The same, when the cgroup that the sandbox asked for is below one of the pod's own: then the pod is one workload.
    pub(super) fn whole_pod(&self) -> Option<&Pod> {
        let parent = self.cgroup.as_deref().and_then(parent)?;
        self.pod().filter(|pod| pod.owns(&parent))
    }

    /// Whether this container is a part of the pod with this sandbox, and of its workload.
    pub(super) fn is_part_of(&self, sandbox: &Self) -> bool {
        let parents = (self.cgroup.as_deref().and_then(parent), sandbox.cgroup.as_deref().and_then(parent));
        sandbox.whole_pod().is_some() && parents.0 == parents.1
    }

    /// The label that the kubelet gives sandboxes and containers alike, when the client of this sandbox does so too.
    pub(super) fn pod_uid_label(&self) -> Option<(&'static str, &str)> {
        let uid = self.labels.get(cri::UID)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (!uid.is_empty() && uid.bytes().all(plain)).then_some((cri::UID, uid))
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
        let name =
            labels.get(cri::CONTAINER).or_else(|| labels.get(NERDCTL_NAME)).unwrap_or(&key.container).clone();
        Subject {
            namespace: Some(labels.get(cri::NAMESPACE).unwrap_or(&key.namespace).clone()),
            annotations: self.annotations.clone(),
            image: self.image.clone(),
            executable: self.executable.clone(),
            labels,
            ..Subject::new(RuntimeKind::Containerd, name)
        }
    }
}

/// The containers of pods that have this name there, as a filter for containerd's listing.
pub(super) fn named(name: &str) -> String {
    format!("labels.{:?}=={name:?}", cri::CONTAINER)
}

/// The containers of CRI, which are not sandboxes, as a filter for containerd's listing.
pub(super) fn cri_containers() -> String {
    format!("labels.{:?}==container", cri::KIND)
}

/// Where a `linux.cgroupsPath` puts the cgroup: its parent. Of `slice:prefix:name` that is the slice.
fn parent(cgroups_path: &str) -> Option<PathBuf> {
    match cgroups_path.split_once(':') {
        Some((slice, _)) => Some(PathBuf::from(slice)),
        None => Path::new(cgroups_path).parent().map(Path::to_owned),
    }
}

/// What is known of a pod: from the plug-in's own record, else from what it wrote into specification and labels.
fn pod(
    config: Option<SandboxConfig>,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> Pod {
    let SandboxConfig { metadata, labels: own, annotations: of_pod } = config.unwrap_or_default();
    let text = |told: String, annotation: &str, label: &str| {
        let kept = || annotations.get(annotation).or_else(|| labels.get(label)).cloned().unwrap_or_default();
        if told.is_empty() { kept() } else { told }
    };
    let without_kind = || {
        let mut labels = labels.clone();
        labels.remove(cri::KIND);
        labels
    };
    Pod {
        name: text(metadata.name, cri::SANDBOX_NAME, cri::NAME),
        namespace: text(metadata.namespace, cri::SANDBOX_NAMESPACE, cri::NAMESPACE),
        uid: text(metadata.uid, cri::SANDBOX_UID, cri::UID),
        labels: own.unwrap_or_else(without_kind),
        annotations: of_pod.unwrap_or_default(),
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

/// The extension of a sandbox's record: `{"Version": "v1", "Metadata": {…}}`, with the configuration that the client of
/// CRI gave, by Go's names of its JSON.
#[derive(Debug, Default, Deserialize)]
struct SandboxMetadata {
    #[serde(rename = "Config", default)]
    config: SandboxConfig,
}

#[derive(Debug, Default, Deserialize)]
struct SandboxConfig {
    #[serde(default)]
    metadata: SandboxName,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SandboxName {
    name: String,
    uid: String,
    namespace: String,
}

fn parse_metadata(json: &[u8]) -> Result<SandboxMetadata, String> {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(rename = "Metadata")]
        metadata: SandboxMetadata,
    }
    if json.len() > SPEC_LIMIT {
        return Err(format!("its sandbox metadata have {} bytes, more than {SPEC_LIMIT}", json.len()));
    }
    let parsed = serde_json::from_slice(json).map(|versioned: Versioned| versioned.metadata);
    parsed.map_err(|error| format!("its sandbox metadata are not valid: {error}"))
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
    fn shims_with_a_kernel_of_their_own_are_known_by_name() {
        for (name, own) in [
            ("io.containerd.runc.v2", false),
            ("io.containerd.runsc.v1", true),
            ("io.containerd.kata.v2", true),
            ("io.containerd.kata-qemu.v2", true),
            ("aws.firecracker", true),
            ("", false),
        ] {
            let runtime =
                containerd_client::services::v1::container::Runtime { name: name.into(), options: None };
            let record = Record::parse(Container { runtime: Some(runtime), ..Container::default() });
            assert_eq!(record.own_kernel(), own.then_some(name), "{name}");
        }
        assert_eq!(Record::parse(Container::default()).own_kernel(), None);
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
        assert!(sandbox.pod().is_some());
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

    fn sandbox(spec: &str, labels: &[(&str, &str)], metadata: Option<&str>) -> Record {
        let mut container = container(spec, &[labels, &[(cri::KIND, "sandbox")]].concat());
        if let Some(metadata) = metadata {
            let metadata = Any { type_url: "Metadata".into(), value: metadata.into() };
            container.extensions.insert(cri::SANDBOX_METADATA.to_owned(), metadata);
        }
        Record::parse(container)
    }

    #[test]
    fn describes_pods() {
        let metadata = r#"{"Version":"v1","Metadata":{"ID":"s1","Config":{
            "metadata":{"name":"web-1","uid":"u-1","namespace":"shop","attempt":1},
            "labels":{"app":"web"},"annotations":{"team":"a"},"linux":{"cgroup_parent":"/pods/podu-1"}}}}"#;
        let labels = [("app", "web"), ("of-the-image", "x"), (cri::UID, "u-1"), (cri::NAME, "by-label")];
        let spec = r#"{"linux":{"cgroupsPath":"/pods/podu-1/s1"},
            "annotations":{"io.kubernetes.cri.sandbox-namespace":"by-annotation"}}"#;

        let told = sandbox(spec, &labels, Some(metadata));
        let pod = told.whole_pod().expect("the parent is its own");
        assert_eq!((pod.name.as_str(), pod.namespace.as_str(), pod.uid.as_str()), ("web-1", "shop", "u-1"));
        assert_eq!(pod.labels, [("app".to_owned(), "web".to_owned())].into());
        assert_eq!(pod.annotations["team"], "a");
        assert_eq!(told.pod_uid_label(), Some((cri::UID, "u-1")));

        // Without the extension, or with a broken one: what else there is.
        for (metadata, faults) in [(None, 0), (Some("{"), 1), (Some(r#"{"Metadata":{"Config":7}}"#), 1)] {
            let told = sandbox(spec, &labels, metadata);
            let pod = told.whole_pod().expect("the label has the uid");
            assert_eq!((pod.name.as_str(), pod.namespace.as_str()), ("by-label", "by-annotation"));
            assert_eq!(pod.labels.len(), labels.len());
            assert_eq!(told.faults.len(), faults, "{:?}", told.faults);
        }
    }

    #[test]
    fn a_pod_is_one_workload_only_in_a_cgroup_of_its_own() {
        let path = |path: &str| format!(r#"{{"linux":{{"cgroupsPath":"{path}"}}}}"#);
        let labels = [(cri::UID, "a-b")];
        for (of_sandbox, of_container, whole, part) in [
            ("/k/poda-b/s1", "/k/poda-b/c1", true, true),
            ("k-poda_b.slice:cri-containerd:s1", "k-poda_b.slice:cri-containerd:c1", true, true),
            ("/k8s.io/s1", "/k8s.io/c1", false, false),
            ("/k/poda-b/s1", "/k8s.io/c1", true, false),
            ("system.slice:cri-containerd:s1", "system.slice:cri-containerd:c1", false, false),
            ("/poda-b", "/poda-b", false, false),
            ("", "", false, false),
        ] {
            let sandbox = sandbox(&path(of_sandbox), &labels, None);
            let container = Record::parse(container(&path(of_container), &[(cri::KIND, "container")]));
            assert_eq!(sandbox.whole_pod().is_some(), whole, "{of_sandbox}");
            assert_eq!(container.is_part_of(&sandbox), part, "{of_sandbox} {of_container}");
        }
        let odd = sandbox("{}", &[(cri::UID, r#"x" or true"#)], None);
        assert_eq!(odd.pod_uid_label(), None);
    }

    proptest! {
        #[test]
        fn arbitrary_sandboxes_never_panic(metadata: Vec<u8>, path: String, uid: String) {
            let spec = serde_json::json!({ "linux": { "cgroupsPath": path } }).to_string();
            let mut container = container(&spec, &[(cri::KIND, "sandbox"), (cri::UID, &uid)]);
            let metadata = Any { type_url: String::new(), value: metadata };
            container.extensions.insert(cri::SANDBOX_METADATA.to_owned(), metadata);
            let record = Record::parse(container);
            let _ = (record.whole_pod(), record.is_part_of(&record), record.pod_uid_label());
        }

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
