//! The embedded relay as a companion: what it is told.

use std::{path::PathBuf, time::Duration};

use pillion_workload::Protocol;

use crate::{
    error::CompanionError,
    host::Launch,
    launch::Program,
    relay::{InvalidRelayConfig, RelayConfig},
};

/// Below the relay's directory, which is its working directory: the whole path may be longer than a socket's name can
/// be (unix(7): 107 bytes).
const METRICS_SOCKET: &str = "/proc/self/cwd/run/metrics.sock";
/// The relay ends by itself this long before the agent would kill it.
const DRAIN_MARGIN: Duration = Duration::from_millis(250);

/// What a launcher is to become.
pub(crate) fn program(launch: &Launch) -> Result<Program, CompanionError> {
    Ok(Program::Relay(Box::new(config(launch)?)))
}

fn config(launch: &Launch) -> Result<RelayConfig, InvalidRelayConfig> {
    let mut config = RelayConfig::new(launch.workload.clone(), launch.spec.name.clone());
    config.outbound_port = launch.ports.outbound;
    config.inbound_port = launch.ports.inbound;
    config.udp =
        launch.ports.outbound.is_some_and(|port| launch.ports.listening.contains(&(port, Protocol::Udp)));
    config.drain_grace_ms =
        launch.spec.stop_grace.saturating_sub(DRAIN_MARGIN).as_millis().try_into().unwrap_or(u64::MAX);
    config.metrics_socket = Some(PathBuf::from(METRICS_SOCKET));
    config.validate()?;
    Ok(config)
}
