//! Containers and units that `pillion-hook` holds: as OCI hook, as runtime wrapper, or in a unit's drop-in.
//!
//! `server.rs` speaks with the hooks, `resolve.rs` finds out what they hold, `owner.rs` whose it is, `crio.rs` reads
//! what CRI-O writes, and `engine.rs` says what is asked of other engines than containerd, and
//! `sighting.rs` what is known when nobody answers. Never decides: that is the controller's, through the gatekeeper.

mod crio;
mod engine;
mod owner;
mod resolve;
mod server;
mod sighting;

pub use crio::CrioError;
pub use engine::{AskError, Described, Engine, FoundUnit, UnitManager};
pub use resolve::{Engines, ResolveError};
pub use server::HookGate;
