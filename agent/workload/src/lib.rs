//! What a workload is, and what may be planned for it: the vocabulary that every other crate speaks.
//!
//! Owns ids, descriptions, plans and the token of a ready companion. Never does IO, never decides.

mod gate;
mod glob;
mod id;
mod plan;
mod ports;
mod ready;
mod redirect;
mod subject;

pub use gate::Gate;
pub use glob::{Glob, InvalidGlob};
pub use id::{
    CgroupId, CompanionName, InvalidName, NetnsId, Pid, PolicyName, ProcessId, RuntimeKind, StartTime,
    UnknownRuntime, WorkloadId,
};
pub use plan::{
    CompanionKind, CompanionSpec, ExecSpec, ExistingConnections, ExternalSpec, FailureMode, Plan, Probe,
    Readiness, Resources, UserSpec,
};
pub use ports::PortSet;
pub use ready::{Family, Listener, ReadyCompanion};
pub use redirect::{
    DNS_PORT, Exclusions, Exemptions, InboundRule, LONGEST_EXECUTABLE_NAME, MOST_EXECUTABLE_NAMES,
    OutboundRule, Passes, Protocol, RedirectSpec, Route, Target, is_local,
};
pub use subject::{Cgroup, Facet, FirstInstruction, Instance, Sighting, Subject, Workload};
