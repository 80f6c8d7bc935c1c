//! Where workloads come from: one module a source, and what identifies a process on this node.
//!
//! Owns the watching of runtimes and the reading of `/proc`. Never decides what a workload gets, never changes one.
//!
//! A source speaks [`RuntimeEvent`]: a snapshot, then deltas; after a reconnect a snapshot again, and what it does not
//! mention is gone.

mod backoff;
mod cgroup2;
mod containerd;
mod docker;
mod event;
mod exec;
mod exits;
mod gate;
mod hook;
mod instance;
mod inventory;
mod nri;
mod pidfd;
mod pod;
mod podman;
mod process;
mod systemd;
mod tracker;
mod work;

pub use cgroup2::{Cgroup2Error, Cgroup2Mounts};
pub use containerd::{
    ContainerdConfig, ContainerdResolver, ContainerdSource, FirstInstructionProbe, Resolved, UnresolvedError,
    VersionError, containerd_version,
};
pub use docker::{
    EngineConfig, EngineError, EngineKind, EngineLookup, EngineSource, EngineVersionError, LookupError,
    engine_version,
};
pub use event::{RuntimeEvent, SourceName};
pub use exec::{ExecConfig, ExecNews, ExecSource, OwnCgroup, OwnCgroupError, Stopper};
pub use exits::Exits;
pub use gate::{Admission, Asked, Gatekeeper, Hold, Rule, Undecided, Unheld, Unidentified};
pub use hook::{
    AskError, CrioError, Described, Engine, Engines, FoundUnit, HookGate, ResolveError, UnitManager,
};
pub use instance::{InstanceError, executable_of, instance_of, open_netns, start_time};
pub use nri::{NriConfig, NriGate, read_all as read_nri};
pub use pod::PodError;
pub use podman::{PodmanFiles, PodmanSource};
pub use process::{ProcessWorkloadError, process_workload, resolve_program};
pub use systemd::{
    BusError, DropInError, DropIns, GENERATOR_DIRECTORY, InvalidUnitName, LookError, RUNTIME_DIRECTORY,
    SYSTEM_BUS, SystemdConfig, SystemdSource, UnitError, UnitName, UnitSelection, Units,
    is_booted_by_systemd, reload_units, unit_subject,
};

/// An error with all of its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Many wrappers repeat their cause's text as their own.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
