//! Containers and units that `pillion-hook` holds: as OCI hook, as runtime wrapper, or in a unit's drop-in.
//!
//! `server.rs` speaks with the hooks, `resolve.rs` finds out what they hold, `owner.rs` whose it is, and `engine.rs` says what is
//! asked of engines other than containerd. Never decides: that is the controller's, through the gatekeeper.

mod engine;
mod owner;
mod resolve;
mod server;

pub use engine::{AskError, Described, Engine, FoundUnit, UnitManager};
pub use resolve::{Engines, ResolveError};
pub use server::HookGate;
