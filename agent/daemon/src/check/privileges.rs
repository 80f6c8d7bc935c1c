//! What this process may do: capabilities and resource limits.

use caps::{CapSet, Capability};
use nix::sys::resource::{Resource, getrlimit};

use super::{Finding, RUN_AS_ROOT};

/// How badly a capability is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Must,
    Should,
}

/// What each capability is needed for.
const NEEDED: [(Capability, Need, &str); 11] = [
    (Capability::CAP_BPF, Need::Must, "loading eBPF programs and making maps"),
    (Capability::CAP_NET_ADMIN, Need::Must, "attaching eBPF programs to sockets and network namespaces"),
    (
        Capability::CAP_SYS_ADMIN,
        Need::Must,
        "entering network namespaces, listing eBPF objects, mounting bpffs",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        Need::Must,
        "opening the namespaces of workloads and fetching companions' sockets",
    ),
    (Capability::CAP_SETUID, Need::Must, "running companions as their own user"),
    (Capability::CAP_SETGID, Need::Must, "running companions with their own group"),
    (Capability::CAP_SETPCAP, Need::Must, "taking capabilities away from companions"),
    (Capability::CAP_KILL, Need::Must, "stopping companions, which run as other users"),
    (Capability::CAP_CHOWN, Need::Must, "giving companions their directories"),
    (Capability::CAP_DAC_OVERRIDE, Need::Must, "writing to the directories of companions"),
    (Capability::CAP_SYS_RESOURCE, Need::Should, "raising limits of companions above the agent's own"),
];

/// One finding for the capabilities, one for the limits.
pub(super) fn checks() -> Vec<Finding> {
    vec![capabilities(), descriptors()]
}

fn capabilities() -> Finding {
    const CHECK: &str = "capabilities";
    let held = match caps::read(None, CapSet::Effective) {
        Ok(held) => held,
        Err(error) => {
            return Finding::fail(CHECK, "not known", error.to_string(), "is /proc mounted?");
        }
    };
    let missing: Vec<_> = NEEDED.iter().filter(|(capability, ..)| !held.contains(capability)).collect();
    if missing.is_empty() {
        return Finding::ok(CHECK, format!("all {} that are needed", NEEDED.len()));
    }
    let found = format!("{} of {}", NEEDED.len() - missing.len(), NEEDED.len());
    let cause: Vec<String> = missing
        .iter()
        .map(|(capability, _, purpose)| format!("without {capability}: no {purpose}"))
        .collect();
    let cause = cause.join("\n");
    let cure = if nix::unistd::geteuid().is_root() {
        "whatever started this process (container runtime, systemd unit) took them away: \
         grant them there, for example with CapabilityBoundingSet= or securityContext.capabilities"
    } else {
        RUN_AS_ROOT
    };
    if missing.iter().any(|(_, need, _)| *need == Need::Must) {
        Finding::fail(CHECK, found, cause, cure)
    } else {
        Finding::warn(CHECK, found, cause, cure)
    }
}

/// The agent holds a few descriptors for each workload: namespace, cgroup, links, companions' pidfds and listeners.
fn descriptors() -> Finding {
    const CHECK: &str = "open files";
    const ENOUGH: u64 = 16_384;
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= ENOUGH => Finding::ok(CHECK, format!("up to {hard}")),
        Ok((_, hard)) => Finding::warn(
            CHECK,
            format!("up to {hard}"),
            format!("a node with many workloads needs more; so does a relay: {ENOUGH} is enough for both"),
            "raise the hard limit: LimitNOFILE= in the unit, or ulimit -Hn",
        ),
        Err(errno) => {
            Finding::warn(CHECK, "not known", errno.to_string(), "is getrlimit(2) filtered by seccomp?")
        }
    }
}
