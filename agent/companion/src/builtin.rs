//! The embedded relay as a companion: the agent's own binary, its configuration on standard input.

use std::{os::fd::OwnedFd, path::PathBuf, time::Duration};

use crate::{
    error::CompanionError,
    host::Launch,
    launch::memory_file,
    relay::{InvalidRelayConfig, RelayConfig},
};

/// Below the relay's directory, which is its working directory: the whole path may be longer than a socket's name can
/// be (unix(7): 107 bytes).
const METRICS_SOCKET: &str = "/proc/self/cwd/run/metrics.sock";
/// The relay ends by itself this long before the agent would kill it.
const DRAIN_MARGIN: Duration = Duration::from_millis(250);

/// The path is only what `ps` shows: the program is handed over as a descriptor.
pub(crate) fn command() -> Vec<String> {
    vec!["/pillion".into(), "relay".into()]
}

/// The configuration as a sealed file; it is read again after each restart, hence never a pipe.
pub(crate) fn input(launch: &Launch) -> Result<OwnedFd, CompanionError> {
    let config = config(launch)?;
    let json =
        serde_json::to_vec(&config).map_err(|error| CompanionError::RelayInput { source: error.into() })?;
    memory_file("pillion-relay", &json).map_err(|source| CompanionError::RelayInput { source })
}

fn config(launch: &Launch) -> Result<RelayConfig, InvalidRelayConfig> {
    let mut config = RelayConfig::new(launch.workload.clone(), launch.spec.name.clone());
    config.outbound_port = launch.ports.outbound;
    config.inbound_port = launch.ports.inbound;
    config.drain_grace_ms =
        launch.spec.stop_grace.saturating_sub(DRAIN_MARGIN).as_millis().try_into().unwrap_or(u64::MAX);
    config.metrics_socket = Some(PathBuf::from(METRICS_SOCKET));
    config.validate()?;
    Ok(config)
}
