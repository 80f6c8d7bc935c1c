//! Which engine made a container that is held.
//!
//! Owns the reading of bundle paths and annotations. Pure: never does IO. A bundle is a directory that the engine made, so its
//! path counts for more than annotations, which whoever makes a container may give it.

use std::path::{Component, Path};

use pillion_common::hook::{ContainerId, Spec};

use crate::containerd::ContainerdConfig;

/// Who made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// containerd, in this namespace of it.
    Containerd {
        /// The namespace.
        namespace: String,
    },
    /// Docker Engine, which runs its containers in a containerd of its own or of the machine, in its namespace `moby`.
    Docker,
    /// Podman.
    Podman,
    /// CRI-O.
    Crio,
    /// Whoever called the runtime: nothing says that an engine did.
    Nobody,
}

/// The directories below containerd's state directory that hold bundles as `<namespace>/<id>`.
const CONTAINERD: [&str; 2] = ["io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux"];
/// Says which engine manages the container (Podman's libpod and CRI-O both set it).
const MANAGER: &str = "io.container.manager";
/// All of CRI-O's own annotations.
const CRIO: &str = "io.kubernetes.cri-o.";

pub(super) fn owner(container: &ContainerId, spec: &Spec) -> Owner {
    if let Some(namespace) = containerd_namespace(container) {
        return if ContainerdConfig::is_dockers(&namespace) {
            Owner::Docker
        } else {
            Owner::Containerd { namespace }
        };
    }
    let manager = spec.annotations.get(MANAGER).map(String::as_str);
    // Podman takes some of CRI-O's annotations for its own (`io.kubernetes.cri-o.TTY`), so these count only where no manager is named.
    let of_crio =
        manager.map_or_else(|| spec.annotations.keys().any(|key| key.starts_with(CRIO)), |it| it == "cri-o");
    // Both keep their bundles in a store of containers/storage.
    match (is_in_store(container), manager) {
        (true, _) if of_crio => Owner::Crio,
        (true, _) | (false, Some("libpod")) => Owner::Podman,
        (false, _) if of_crio => Owner::Crio,
        (false, _) => Owner::Nobody,
    }
}

/// `…/io.containerd.runtime.v2.task/<namespace>/<id>`.
fn containerd_namespace(container: &ContainerId) -> Option<String> {
    let mut names = Path::new(&container.bundle).components().rev().map(|component| match component {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let (id, namespace, directory) = (names.next()??, names.next()??, names.next()??);
    (id == container.id && CONTAINERD.contains(&directory)).then(|| namespace.to_owned())
}

/// `…/overlay-containers/<id>/userdata`; the driver may be another one.
fn is_in_store(container: &ContainerId) -> bool {
    let mut names = Path::new(&container.bundle).iter().rev().map(|name| name.to_str());
    names.next() == Some(Some("userdata"))
        && names.next() == Some(Some(&container.id))
        && names.next().flatten().is_some_and(|name| name.ends_with("-containers"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(bundle: &str, annotations: &[(&str, &str)]) -> Owner {
        let container = ContainerId { id: "c1".into(), bundle: bundle.into(), root: None };
        let annotations = annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        owner(&container, &Spec { annotations, ..Spec::default() })
    }

    #[test]
    fn bundles_of_all_engines() {
        let containerd = |namespace: &str| Owner::Containerd { namespace: namespace.into() };
        let libpod = [(MANAGER, "libpod")];
        let crio = [("io.kubernetes.cri-o.SandboxID", "s")];
        // As Podman 4.3 writes them.
        let podman = [(MANAGER, "libpod"), ("io.kubernetes.cri-o.TTY", "false")];
        for (bundle, annotations, wanted) in [
            ("/run/containerd/io.containerd.runtime.v2.task/default/c1", &[][..], containerd("default")),
            ("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/c1", &libpod, containerd("k8s.io")),
            ("/run/containerd/io.containerd.runtime.v1.linux/default/c1", &[], containerd("default")),
            ("/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby/c1", &[], Owner::Docker),
            ("/run/containerd/io.containerd.runtime.v2.task/moby/c1", &[], Owner::Docker),
            // Docker 28 with `userns-remap`.
            (
                "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby-1000.1000/c1",
                &[],
                Owner::Docker,
            ),
            ("/run/containerd/io.containerd.runtime.v2.task/default/other", &[], Owner::Nobody),
            ("/run/containerd/io.containerd.runtime.v2.task/c1", &[], Owner::Nobody),
            ("/var/lib/containers/storage/overlay-containers/c1/userdata", &libpod, Owner::Podman),
            ("/var/lib/containers/storage/vfs-containers/c1/userdata", &[], Owner::Podman),
            ("/var/lib/containers/storage/overlay-containers/c1/userdata", &podman, Owner::Podman),
            ("/elsewhere", &libpod, Owner::Podman),
            ("/run/containers/storage/overlay-containers/c1/userdata", &crio, Owner::Crio),
            ("/run/containers/storage/overlay-containers/c2/userdata", &[], Owner::Nobody),
            ("/elsewhere", &crio, Owner::Crio),
            ("/home/me/bundle", &[], Owner::Nobody),
            ("/", &[], Owner::Nobody),
        ] {
            assert_eq!(of(bundle, annotations), wanted, "{bundle} {annotations:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bundle_has_an_owner(bundle in "/.*", key in ".*", value in ".*") {
            let _ = of(&bundle, &[(&key, &value)]);
        }
    }
}
