//! Companions: processes that Pillion starts next to a workload, in its network namespace and in cgroups of their own.
//!
//! Owns the launcher, companion cgroups, readiness, supervision and companion logs. Never decides what to run (that is
//! a plan's matter), never touches eBPF, and never enters a namespace on a thread of the async runtime.
//!
//! The walk of one companion: [`start`] prepares its directory ([`mod@render`]) and cgroups ([`cgroup`]), runs the
//! program through the launcher ([`launch`]), waits until it is ready, fetches its listening sockets, and hands out a
//! [`Companion`] that is supervised until it is stopped or left.

mod builtin;
mod companion;
mod connections;
mod directory;
mod error;
mod exec;
mod external;
mod host;
mod listeners;
mod logs;
mod netns;
mod outside;
mod probe;
mod process;
mod readiness;
mod supervise;
mod tree;
mod user;
mod watch;

pub mod cgroup;
pub mod launch;
pub mod relay;
pub mod render;

pub use companion::{Companion, CompanionEvent, CompanionRecord, discard, start};
pub use connections::{ResetError, reset_connections};
pub use error::CompanionError;
pub use host::{ContainerNames, Host, HostConfig, Launch, ResolvedPorts};
pub use logs::{LogLine, Stream};
pub use netns::{NetnsError, listening_ports};
pub use process::{Ending, Process, ProcessError};
pub use user::{UserError, resolve_user};
