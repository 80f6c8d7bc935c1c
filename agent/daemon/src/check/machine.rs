//! The machine around Pillion: policies, containerd, ports, and what earlier instances left.

use std::{collections::BTreeSet, fs, io, path::Path};

use pillion_runtime::{ContainerdConfig, containerd_version};

use super::{Finding, RUN_AS_ROOT};
use crate::{
    config::Paths,
    inventory::{self, Kind, User},
    policy_files::{self, LoadError},
    render::count,
};

/// Ports that companions get when the policy names none.
const DEFAULT_PORTS: [u16; 2] = [15_001, 15_006];
/// Fewer ephemeral ports run out under load.
const FEW_PORTS: u32 = 8_192;

/// The policy directory: there, to be trusted, and all of it valid, by the rules that the agent goes by.
pub(super) fn policies(directory: &Path) -> Finding {
    const CHECK: &str = "policies";
    let shown = directory.display();
    match policy_files::load(directory) {
        Ok(set) => Finding::ok(CHECK, format!("{} valid in {shown}", set.policies().len())),
        Err(LoadError::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Finding::warn(
                CHECK,
                format!("no {shown}"),
                "without policies no workload gets a companion",
                format!("mkdir -p {shown}, and put a policy into it"),
            )
        }
        Err(error @ LoadError::Directory { .. }) => {
            Finding::fail(CHECK, "cannot be read", error.to_string(), RUN_AS_ROOT)
        }
        Err(error @ LoadError::Files(_)) => Finding::fail(
            CHECK,
            "not to be trusted, or not readable",
            format!("policies start programs as root, so nobody else may be able to write them\n{error}"),
            format!("chown -R root:root {shown} && chmod -R go-w {shown}"),
        ),
        Err(LoadError::Policy(faults)) => Finding::fail(
            CHECK,
            count(faults.len(), "fault"),
            "the agent does not load an invalid set; a running one keeps the last good set",
            format!("pillion validate {shown}"),
        ),
    }
}

/// containerd: absent is fine for a machine without containers, but worth saying.
pub(super) async fn containerd(socket: &Path) -> Finding {
    const CHECK: &str = "containerd";
    let shown = socket.display();
    if !socket.exists() {
        return Finding::warn(
            CHECK,
            format!("no {shown}"),
            "containerd is not running, or its socket is elsewhere: containers get no companions",
            "start containerd, or name its socket with --containerd-socket (none: do not look for it)",
        );
    }
    match containerd_version(&ContainerdConfig::at(socket)).await {
        Ok(version) => Finding::ok(CHECK, format!("{version} at {shown}")),
        Err(error) => Finding::warn(
            CHECK,
            format!("{shown} does not answer"),
            format!("{:#}", anyhow::Error::from(error)),
            "is containerd running, and may you use its socket? try: ctr version",
        ),
    }
}

/// Companions listen where connections that the machine makes could take the port first.
pub(super) fn ports() -> Finding {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
    match read("ip_local_port_range") {
        Ok(range) => judge_ports(&range, &read("ip_local_reserved_ports").unwrap_or_default()),
        Err(error) => Finding::warn("local ports", "not known", error.to_string(), "is /proc/sys mounted?"),
    }
}

fn judge_ports(range: &str, reserved: &str) -> Finding {
    const CHECK: &str = "local ports";
    let mut bounds = range.split_whitespace().filter_map(|word| word.parse::<u16>().ok());
    let (Some(low), Some(high)) = (bounds.next(), bounds.next()) else {
        return Finding::warn(
            CHECK,
            "not known",
            format!("cannot read {range:?}"),
            "sysctl net.ipv4.ip_local_port_range",
        );
    };
    let found = format!("{low}-{high}");
    let taken: Vec<String> = DEFAULT_PORTS
        .into_iter()
        .filter(|port| (low..=high).contains(port) && !is_reserved(*port, reserved))
        .map(|port| port.to_string())
        .collect();
    if !taken.is_empty() {
        let ports = taken.join(",");
        return Finding::warn(
            CHECK,
            found,
            format!("connections of the host may happen to use {ports}, where companions listen by default"),
            format!("sysctl -w net.ipv4.ip_local_reserved_ports={ports} (add what is there already)"),
        );
    }
    let number = u32::from(high).saturating_sub(u32::from(low)) + 1;
    if number < FEW_PORTS {
        return Finding::warn(
            CHECK,
            found,
            format!("only {number} ports for connections that the machine makes; a relay makes one for each"),
            "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
        );
    }
    Finding::ok(CHECK, found)
}

/// `8080,9148-9150` as in Documentation/networking/ip-sysctl.rst.
fn is_reserved(port: u16, reserved: &str) -> bool {
    reserved.trim().split(',').any(|part| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        matches!((low.parse::<u16>(), high.parse::<u16>()), (Ok(low), Ok(high)) if (low..=high).contains(&port))
    })
}

/// What is in force although no agent runs. Without the right to look this says nothing: `capabilities` says it.
pub(super) fn leftovers(paths: &Paths) -> Option<Finding> {
    const CHECK: &str = "leftovers";
    let inventory = match inventory::take(paths, &BTreeSet::new()) {
        Ok(inventory) => inventory,
        Err(error) => {
            return nix::unistd::geteuid()
                .is_root()
                .then(|| Finding::warn(CHECK, "not known", error.to_string(), "grant CAP_SYS_ADMIN"));
        }
    };
    let in_force: Vec<String> = inventory
        .counts()
        .into_iter()
        .filter(|(kind, number)| *number > 0 && !matches!(kind, Kind::File | Kind::Socket))
        .map(|(kind, number)| count(number, &kind.to_string()).replace("processs", "processes"))
        .collect();
    if in_force.is_empty() {
        return Some(Finding::ok(CHECK, "none"));
    }
    let found = in_force.join(", ");
    Some(match inventory::user(paths) {
        Ok(User::Agent(_)) => Finding::ok(CHECK, format!("none: {found} of the running agent")),
        Ok(User::Runs(_)) => Finding::ok(CHECK, format!("none: {found} of a `pillion run`")),
        Ok(User::Nobody(_)) | Err(_) => Finding::warn(
            CHECK,
            found,
            "an agent or a `pillion run` ended without taking it away; it stays in force",
            "start the agent, which takes over what is its, or remove all: pillion cleanup",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn port_ranges_are_judged() {
        for (range, reserved, verdict) in [
            ("32768\t60999\n", "", Verdict::Ok),
            ("1024 65535", "", Verdict::Warn),
            ("1024 65535", "15001,15006\n", Verdict::Ok),
            ("1024 65535", "80,15000-15010", Verdict::Ok),
            ("1024 65535", "15001", Verdict::Warn),
            ("60000 60999", "", Verdict::Warn),
            ("60999 60000", "", Verdict::Warn),
            ("what", "", Verdict::Warn),
        ] {
            assert_eq!(judge_ports(range, reserved).verdict, verdict, "{range} {reserved}");
        }
    }
}
