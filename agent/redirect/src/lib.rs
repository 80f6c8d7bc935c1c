//! Redirection: loads the eBPF programs once, attaches them to workloads, and owns what is attached.
//!
//! The only crate that talks to eBPF. Owns programs, maps, links and pins; never starts a process, never decides what
//! is to be redirected. It redirects only to a [`ReadyCompanion`](pillion_workload::ReadyCompanion), whose listening
//! sockets it hands to the kernel: the kernel itself drops a socket that is closed, so that the failure mode acts
//! at once, and while no agent runs.
//!
//! Pins, below the pin root (default `/sys/fs/bpf/pillion`), for layout version 2:
//!
//! ```text
//! v2/maps/PL_…                      every map of the object
//! v2/links/NUMBER/pl_…              the links of one workload's cgroup and network namespace
//! v2/links/NUMBER/COMPANION/pl_…    the links of one companion's cgroup
//! v2/held/PID                       what the agent with this pid has stopped at exec
//! ```

mod answering;
mod bpffs;
mod btf;
mod conflicts;
mod counters;
mod dataplane;
mod decision;
mod error;
mod exec;
mod features;
mod guard;
mod inventory;
mod links;
mod lookup;
mod nesting;
mod object;
mod ownership;
mod probe;
mod rules;
mod steer;
mod sweep;
mod sys;
mod tables;
mod trace;

pub use bpffs::{Bpffs, MOUNT_SOURCE};
pub use conflicts::{Neighbour, Order, neighbours_of, neighbours_on_machine};
pub use counters::Counters;
pub use dataplane::{Dataplane, LoadOptions};
pub use decision::{Because, Caller, DecidedBy, Decision, Outcome, Rule};
pub use error::RedirectError;
pub use exec::{BEAT, ExecEvents, ExecWatch, Executed, FileName, guard, let_go_left};
pub use features::{KernelFeature, Support, kernel_features};
pub use guard::{AttachRequest, RedirectGuard, RedirectRecord, Sources};
pub use inventory::{Inventory, KernelObject, inventory};
pub use lookup::TableAnswer;
pub use object::is_redirected;
pub use ownership::{ByOwner, inventory_by_owner, pins_below};
pub use pillion_common::{LAYOUT_VERSION, Share};
pub use probe::{Feature, probe};
pub use trace::{TRACE_PERIOD, TraceBatch, TraceSession, TraceSettings};
