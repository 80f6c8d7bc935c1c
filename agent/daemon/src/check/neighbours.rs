//! Programs of others that run for the same sockets as Pillion's would.

use pillion_redirect::neighbours_on_machine;

use super::{Finding, RUN_AS_ROOT};
use crate::{conflicts, inventory};

const CHECK: &str = "other programs";

/// One finding for each where something is at stake, and one that names the rest.
pub(super) fn checks() -> Vec<Finding> {
    let Some(root) = inventory::mounts()
        .ok()
        .and_then(|mounts| mounts.into_iter().find(|mount| mount.fs_type == "cgroup2"))
        .map(|mount| mount.mount_point)
    else {
        // Which is a finding of its own.
        return Vec::new();
    };
    let neighbours = match neighbours_on_machine(&root) {
        Ok(neighbours) => neighbours,
        Err(error) => return vec![Finding::warn(CHECK, "not known", error.to_string(), RUN_AS_ROOT)],
    };
    let (spoiling, harmless): (Vec<_>, Vec<_>) =
        neighbours.iter().partition(|neighbour| neighbour.at_stake.is_some());
    let names: Vec<String> = harmless.into_iter().map(conflicts::sentence).collect();
    let found = if names.is_empty() { "none that matter".to_owned() } else { names.join("; ") };
    let mut findings = vec![Finding::ok(CHECK, found)];
    findings.extend(spoiling.into_iter().map(|neighbour| {
        Finding::warn(
            format!("{CHECK}: {}", neighbour.attach_type),
            conflicts::sentence(neighbour),
            neighbour.at_stake.clone().unwrap_or_default(),
            "see to its owner whether it is wanted; Pillion detaches nothing that is not its own",
        )
    }));
    findings
}
