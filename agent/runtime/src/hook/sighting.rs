//! What is known of a held container when nobody answers for it: what its runtime's files say.
//!
//! Owns the reading of the specification for that. Pure. Whatever they do not say may be anything.

use pillion_common::hook::Container;
use pillion_workload::{Facet, RuntimeKind, Sighting, WorkloadId};

use super::{
    owner::{Owner, owner},
    resolve::subject,
};
use crate::gate::Unidentified;

/// Of containerd's CRI plug-in (`pkg/cri/annotations`), in the specification of sandboxes and containers alike.
const CRI_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// Of CRI-O.
const CRIO_NAMESPACE: &str = "io.kubernetes.cri-o.Namespace";

/// A container that cannot be identified, for this reason.
pub(super) fn unidentified(container: &Container, reason: &str) -> Unidentified {
    let (id, spec) = (&container.id, &container.spec);
    let known = |kind| subject(kind, id, spec);
    let annotation = |key: &str| spec.annotations.get(key).cloned();
    // The program is in the specification; where that could not be read there is nothing at all.
    let program = if spec.program.is_some() { None } else { Some(Facet::Executable) };
    let of_pod = |kind, namespace: Option<String>| {
        let unknown = namespace.is_none().then_some(Facet::Namespace);
        let unknown = [Facet::Name, Facet::Labels, Facet::Image].into_iter().chain(unknown);
        // A pod has no program, its containers do.
        let unknown = unknown.chain([Facet::Executable]).collect();
        Sighting { subject: pillion_workload::Subject { namespace, ..known(kind) }, unknown }
    };
    let of_engine = |kind| {
        let unknown = [Facet::Name, Facet::Labels, Facet::Image].into_iter().chain(program).collect();
        Sighting { subject: known(kind), unknown }
    };
    let (id, sighting) = match owner(id, spec) {
        Owner::Containerd { namespace } => (
            WorkloadId::try_from(format!("{}/{namespace}/{}", RuntimeKind::Containerd, id.id)).ok(),
            of_pod(RuntimeKind::Containerd, annotation(CRI_NAMESPACE)),
        ),
        Owner::Crio => (None, of_pod(RuntimeKind::Crio, annotation(CRIO_NAMESPACE))),
        Owner::Docker => (None, of_engine(RuntimeKind::Docker)),
        Owner::Podman => (None, of_engine(RuntimeKind::Podman)),
        Owner::Nobody => {
            let unknown = program.into_iter().collect();
            (None, Sighting { subject: known(RuntimeKind::Process), unknown })
        }
    };
    let reason = format!("container {} cannot be identified: {reason}", container.id.id);
    Unidentified { id, sightings: vec![sighting], reason }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pillion_common::hook::{ContainerId, Point, Spec};

    use super::*;

    #[test]
    fn only_what_the_specification_says_is_known() {
        use Facet::{Executable, Image, Labels, Name, Namespace};
        let task = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1";
        let moby = "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby/c1";
        let store = "/var/lib/containers/storage/overlay-containers/c1/userdata";
        let pod = [Name, Labels, Image, Executable].as_slice();
        for (bundle, annotation, program, runtime, namespace, unknown) in [
            (task, Some((CRI_NAMESPACE, "shop")), true, "containerd", Some("shop"), pod),
            (task, None, true, "containerd", None, &[Name, Labels, Image, Namespace, Executable]),
            (store, Some((CRIO_NAMESPACE, "shop")), true, "crio", Some("shop"), pod),
            (store, None, true, "podman", None, &[Name, Labels, Image]),
            (moby, None, false, "docker", None, &[Name, Labels, Image, Executable]),
            ("/home/me/bundle", None, true, "process", None, &[]),
        ] {
            let annotations: BTreeMap<String, String> =
                annotation.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            let program = program.then(|| "/bin/web".to_owned());
            let container = Container {
                point: Point::Start,
                id: ContainerId { id: "c1".into(), bundle: bundle.into(), root: None },
                pid: 1,
                started: None,
                spec: Spec { annotations, program, ..Spec::default() },
            };
            let Unidentified { sightings, reason, .. } = unidentified(&container, "silence");
            assert_eq!(reason, "container c1 cannot be identified: silence");
            let [sighting] = &sightings[..] else { panic!("{sightings:?}") };
            assert_eq!(sighting.subject.runtime.as_str(), runtime, "{bundle}");
            assert_eq!(sighting.subject.namespace.as_deref(), namespace, "{bundle}");
            assert_eq!(sighting.unknown, unknown, "{bundle}");
        }
    }
}
