//! CRI-O's containers, by the annotations that CRI-O writes into their specifications (its `internal/annotations`).
//!
//! Owns their reading. A pod is one workload, as everywhere. Pods' labels are in the sandbox's specification alone, whose bundle is beside
//! the container's. Never asks CRI-O, which waits for the start that is held.

use std::{collections::BTreeMap, io::Read as _, path::Path};

use pillion_common::hook::{ContainerId, Spec};
use pillion_workload::{Instance, InvalidName, RuntimeKind, Workload, WorkloadId};
use serde::Deserialize;

use crate::{
    cgroup2::Cgroup2Mounts,
    containerd::Resolved,
    pod::{Pod, PodError},
};

/// A specification of even 1 MiB has not been seen.
const SPEC_LIMIT: u64 = 4 << 20;

const TYPE: &str = "io.kubernetes.cri-o.ContainerType";
const SANDBOX_ID: &str = "io.kubernetes.cri-o.SandboxID";
const NAME: &str = "io.kubernetes.cri-o.KubeName";
const NAMESPACE: &str = "io.kubernetes.cri-o.Namespace";
const LABELS: &str = "io.kubernetes.cri-o.Labels";
const ANNOTATIONS: &str = "io.kubernetes.cri-o.Annotations";
/// The kubelet's, among the labels.
const POD_NAME: &str = "io.kubernetes.pod.name";
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const POD_UID: &str = "io.kubernetes.pod.uid";

/// Why a container of CRI-O is not known.
#[derive(Debug, thiserror::Error)]
pub enum CrioError {
    /// It does not say which pod it is of.
    #[error("container {id} of CRI-O has no annotation {annotation}")]
    Annotation {
        /// Its id.
        id: String,
        /// What is missing.
        annotation: &'static str,
    },
    /// Its pod's labels cannot be had.
    #[error("cannot read the specification of the pod's sandbox, {path}")]
    Sandbox {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The pod is not identified.
    #[error("cannot identify the pod of container {id}")]
    Pod {
        /// The container's id.
        id: String,
        /// Why.
        source: PodError,
    },
    /// Its name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// The workload of a container whose own cgroup and first process are `own`. Reads a file.
pub(super) fn resolve(
    mounts: &Cgroup2Mounts,
    container: &ContainerId,
    spec: &Spec,
    own: Instance,
) -> Result<Resolved, CrioError> {
    let id = container.id.as_str();
    let annotation = |annotation: &'static str| {
        let value = spec.annotations.get(annotation).map(String::as_str);
        value.ok_or_else(|| CrioError::Annotation { id: id.to_owned(), annotation })
    };
    let of_pod = |source| CrioError::Pod { id: id.to_owned(), source };
    let name = |id: &str| WorkloadId::try_from(format!("{}/{id}", RuntimeKind::Crio));
    let is_sandbox = annotation(TYPE)? == "sandbox";
    let sandbox = if is_sandbox { id } else { annotation(SANDBOX_ID)? };
    let pod = if is_sandbox { pod(&spec.annotations) } else { pod(&beside(container, sandbox)?) };
    let subject = pillion_workload::Subject { runtime: RuntimeKind::Crio, ..pod.subject() };
    let instance = if is_sandbox {
        pod.instance_of_sandbox(&own.cgroup.path, &own)
    } else {
        pod.instance_beside(mounts, &own.cgroup.path, id, sandbox)
    };
    match instance {
        Ok(instance) => {
            let pod = Box::new(Workload { id: name(sandbox)?, subject, instance });
            Ok(if is_sandbox { Resolved::Sandbox(pod) } else { Resolved::Member(pod) })
        }
        // Its containers are workloads, each for itself, and its sandbox is none.
        Err(PodError::Shared { .. }) if is_sandbox => {
            Ok(Resolved::Nothing("the pod has no cgroup of its own".to_owned()))
        }
        Err(PodError::Shared { .. }) => {
            Ok(Resolved::Container(Box::new(Workload { id: name(id)?, subject, instance: own })))
        }
        Err(source) => Err(of_pod(source)),
    }
}

/// The annotations of the sandbox, whose bundle is `../../<sandbox>/userdata`.
fn beside(container: &ContainerId, sandbox: &str) -> Result<BTreeMap<String, String>, CrioError> {
    #[derive(Deserialize)]
    struct Config {
        annotations: Option<BTreeMap<String, String>>,
    }
    let bundle = Path::new(&container.bundle);
    let store = bundle.ancestors().nth(2).unwrap_or(bundle);
    // An id is a single name: nothing else is looked into.
    let sandbox = Path::new(sandbox).file_name().unwrap_or_default();
    let path = store.join(sandbox).join("userdata/config.json");
    let failed = |source| CrioError::Sandbox { path: path.display().to_string(), source };
    let mut text = Vec::new();
    let file = std::fs::File::open(&path).map_err(failed)?;
    file.take(SPEC_LIMIT).read_to_end(&mut text).map_err(failed)?;
    let config: Config = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
    Ok(config.annotations.unwrap_or_default())
}

/// What a sandbox's annotations say of its pod. Labels that are not JSON are none.
fn pod(annotations: &BTreeMap<String, String>) -> Pod {
    let map = |key: &str| -> BTreeMap<String, String> {
        annotations.get(key).and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default()
    };
    let labels = map(LABELS);
    let text = |annotation: &str, label: &str| {
        annotations.get(annotation).or_else(|| labels.get(label)).cloned().unwrap_or_default()
    };
    Pod {
        name: text(NAME, POD_NAME),
        namespace: text(NAMESPACE, POD_NAMESPACE),
        uid: text(POD_UID, POD_UID),
        annotations: map(ANNOTATIONS),
        labels,
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::{Cgroup, CgroupId, NetnsId, Pid, ProcessId, StartTime};
    use proptest::prelude::*;

    use super::*;

    fn sandbox() -> BTreeMap<String, String> {
        let text = |text: &str| text.to_owned();
        BTreeMap::from([
            (text(TYPE), text("sandbox")),
            (text(NAME), text("web-1")),
            (text(NAMESPACE), text("shop")),
            (
                text(LABELS),
                text(r#"{"io.kubernetes.pod.uid":"u-1","io.kubernetes.pod.name":"web-1","app":"web"}"#),
            ),
            (text(ANNOTATIONS), text(r#"{"team":"a"}"#)),
        ])
    }

    fn own(path: &str) -> Instance {
        Instance {
            cgroup: Cgroup { id: CgroupId(1), path: path.into() },
            netns: NetnsId { device: 1, inode: 1 },
            process: ProcessId { pid: Pid(1), started: StartTime(1) },
        }
    }

    fn resolved(bundle: &str, annotations: BTreeMap<String, String>) -> Result<Resolved, CrioError> {
        let container = ContainerId { id: "c1".into(), bundle: bundle.into(), root: None };
        let spec = Spec { annotations, ..Spec::default() };
        let mounts = Cgroup2Mounts::discover().expect("this machine has cgroup2");
        resolve(&mounts, &container, &spec, own("/cg/shared/crio-c1"))
    }

    #[test]
    fn a_sandbox_tells_its_pod() {
        let pod = pod(&sandbox());
        assert_eq!((pod.name.as_str(), pod.namespace.as_str(), pod.uid.as_str()), ("web-1", "shop", "u-1"));
        assert_eq!((pod.labels["app"].as_str(), pod.annotations["team"].as_str()), ("web", "a"));
    }

    #[test]
    fn a_container_has_the_labels_of_its_pod() {
        let store = tempfile::tempdir().expect("a temporary directory");
        let bundle = |id: &str| store.path().join(format!("overlay-containers/{id}/userdata"));
        std::fs::create_dir_all(bundle("s1")).expect("made");
        let config = serde_json::json!({ "annotations": sandbox(), "process": { "args": [] } });
        std::fs::write(bundle("s1").join("config.json"), config.to_string()).expect("written");
        let of = |sandbox: &str| {
            let annotations = [(TYPE, "container"), (SANDBOX_ID, sandbox)];
            let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
            resolved(&bundle("c1").display().to_string(), annotations.into())
        };
        // In a cgroup that is not the pod's own it is a workload for itself.
        let Ok(Resolved::Container(workload)) = of("s1") else { panic!("{:?}", of("s1")) };
        assert_eq!((workload.id.as_str(), workload.subject.name.as_str()), ("crio/c1", "web-1"));
        assert_eq!(
            (workload.subject.runtime, workload.subject.labels["app"].as_str()),
            (RuntimeKind::Crio, "web")
        );
        for missing in ["s2", "", "../s1/x"] {
            assert!(matches!(of(missing), Err(CrioError::Sandbox { .. })), "{missing}");
        }
        assert!(matches!(resolved("/b", BTreeMap::new()), Err(CrioError::Annotation { .. })));
        assert!(matches!(resolved("/b", sandbox()), Ok(Resolved::Nothing(_))));
    }

    proptest! {
        #[test]
        fn arbitrary_annotations_never_panic(kind in "sandbox|.*", id in ".*", labels in ".*", bundle in "/.*") {
            let annotations = [(TYPE, kind), (SANDBOX_ID, id), (LABELS, labels)];
            let _ = resolved(&bundle, annotations.map(|(key, value)| (key.to_owned(), value)).into());
        }
    }
}
