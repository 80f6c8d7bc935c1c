//! Joins companions and redirection into an attachment: a workload with its companions in force.
//!
//! Owns the state machine ([`State`]), the walk and its roll-back, and what is recorded of it. Never decides which
//! workload gets what (policy and controller do), never writes files, never touches eBPF itself.
//!
//! The walk: ports are settled in the workload's namespace, companions are started in the order of the plan, sockets are
//! redirected. It is taken back in reverse. A companion that does not become ready does not end the walk: redirection
//! comes into force without it, `onFailure` acts in the kernel (open: connections pass, closed: they are refused), and
//! the companion is tried again until it is ready.

mod claims;
mod companions;
mod driver;
#[cfg(test)]
mod driver_tests;
mod existing;
mod machinery;
mod namespace;
mod node;
mod ports;
mod record;
mod report;
mod slot;
mod state;
mod sweep;
mod telling;
#[cfg(test)]
mod testing;
mod undo;

pub use namespace::NamespaceError;
pub use node::{Handle, Job, Node, attach, discard};
pub use ports::{DEFAULT_INBOUND, DEFAULT_OUTBOUND, PortError, Resolved};
pub use record::{BoxFuture, Ledger, Record, Witness};
pub use report::{CompanionView, Happening, Report, View, Wish};
pub use state::{InvalidTransition, State, Transition};
pub use sweep::{Swept, sweep};

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // Transparent variants repeat their source.
        if !text.ends_with(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}
