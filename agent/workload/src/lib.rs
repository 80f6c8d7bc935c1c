//! What a workload is, and what may be planned for it: the vocabulary that every other crate speaks.
//!
//! Owns ids, descriptions, plans and the token of a ready companion. Never does IO, never decides.

mod gate;
mod id;
mod plan;
mod ready;
mod subject;

pub use gate::Gate;
pub use id::{
    CgroupId, CompanionName, InvalidName, NetnsId, Pid, PolicyName, ProcessId, RuntimeKind, StartTime,
    UnknownRuntime, WorkloadId,
};
pub use plan::{
    CompanionKind, CompanionSpec, Exclusions, ExecSpec, ExistingConnections, FailureMode, InboundRule,
    OutboundRule, Plan, Probe, Readiness, RedirectSpec, Resources, Target, UserSpec,
};
pub use ready::{Family, Listener, ReadyCompanion};
pub use subject::{Cgroup, Facet, FirstInstruction, Instance, Sighting, Subject, Workload};
