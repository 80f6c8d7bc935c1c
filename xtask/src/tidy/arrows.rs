//! Which crate may depend on which. An arrow that is not in the table is a fault.

use crate::metadata::{Metadata, Package};

/// Each member of the workspace and the members that it may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    ("pillion-common", &[]),
    ("pillion-ebpf", &["pillion-common"]),
    ("pillion-hook", &["pillion-common"]),
    ("pillion-workload", &[]),
    ("pillion-policy", &["pillion-workload"]),
    // Of `common` only the protocol of `pillion-hook`.
    ("pillion-runtime", &["pillion-common", "pillion-workload"]),
    ("pillion-companion", &["pillion-workload"]),
    ("pillion-redirect", &["pillion-common", "pillion-workload"]),
    ("pillion-attachment", &["pillion-companion", "pillion-redirect", "pillion-workload"]),
    (
        "pillion",
        &[
            "pillion-attachment",
            "pillion-common",
            "pillion-companion",
            "pillion-policy",
            "pillion-redirect",
            "pillion-runtime",
            "pillion-workload",
        ],
    ),
    // The harness knows the agent only as a program; the suite of redirection tries that crate alone.
    ("pillion-tests", &["pillion-redirect", "pillion-workload"]),
    ("xtask", &[]),
];

/// Libraries that only some members may use directly, with the reason.
const RESERVED: &[(&str, &[&str], &str)] = &[
    (
        "aya",
        &["pillion-common", "pillion-redirect", "pillion-tests"],
        "agent/redirect is the only crate of the agent that talks to eBPF",
    ),
    ("aya-ebpf", &["pillion-ebpf"], "it is for programs in the kernel"),
    (
        "containerd-client",
        &["pillion-runtime", "pillion-tests"],
        "agent/runtime is the only crate of the agent that talks to runtimes",
    ),
    ("anyhow", &["pillion", "pillion-redirect", "pillion-tests", "xtask"], "libraries have typed errors"),
];

pub(super) fn faults(metadata: &Metadata) -> Vec<String> {
    metadata.packages.iter().flat_map(of_package).collect()
}

fn of_package(package: &Package) -> Vec<String> {
    let name = package.name.as_str();
    let Some((_, allowed)) = ALLOWED.iter().find(|(member, _)| *member == name) else {
        return vec![format!("the crate {name} has no place in the map: add it to xtask/src/tidy/arrows.rs")];
    };
    let mut faults = Vec::new();
    for dependency in &package.dependencies {
        let wanted = dependency.name.as_str();
        if dependency.path.is_some() && !allowed.contains(&wanted) {
            faults.push(format!("{name} must not depend on {wanted}"));
        }
        if let Some((_, users, reason)) = RESERVED.iter().find(|(library, ..)| *library == wanted)
            && !users.contains(&name)
        {
            faults.push(format!("{name} must not depend on {wanted}: {reason}"));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Dependency;

    #[test]
    fn an_arrow_needs_its_place_in_the_table() {
        let cases: [(&str, &[&str], usize); 6] = [
            ("pillion-attachment", &["pillion-companion", "pillion-redirect"], 0),
            ("pillion-redirect", &["pillion-companion"], 1),
            ("pillion-workload", &["pillion-policy", "pillion-common"], 2),
            ("pillion-companion", &["aya"], 1),
            ("pillion-redirect", &["aya"], 0),
            ("pillion-unknown", &[], 1),
        ];
        for (name, wanted, count) in cases {
            let dependencies = wanted
                .iter()
                .map(|wanted| Dependency {
                    name: (*wanted).to_owned(),
                    path: wanted.starts_with("pillion").then(Default::default),
                })
                .collect();
            let package = Package {
                version: String::new(),
                name: name.to_owned(),
                manifest_path: std::path::PathBuf::default(),
                dependencies,
                targets: vec![],
            };
            assert_eq!(of_package(&package).len(), count, "{name} on {wanted:?}");
        }
    }
}
