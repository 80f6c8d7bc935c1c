//! The embedded relay: a transparent TCP relay that needs nothing but its own process.

mod config;

use std::process::ExitCode;

pub use config::{
    DEFAULT_CONNECT_TIMEOUT_MS, DEFAULT_DRAIN_GRACE_MS, DEFAULT_MAX_CONNECTIONS, InvalidRelayConfig, RelayConfig,
};

/// The hidden `pillion relay`: relays until it is told to stop.
pub fn main(config: RelayConfig) -> ExitCode {
    match config.validate() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(2),
    }
}
