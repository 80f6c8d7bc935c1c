//! The embedded relay: a transparent TCP relay that needs nothing but its own process.

mod config;
mod connection;
mod engine;
mod metrics;
mod origin;
mod outq;
mod peer;
mod record;
mod slab;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::{self, Write},
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

pub use config::{
    DEFAULT_CONNECT_TIMEOUT_MS, DEFAULT_DRAIN_GRACE_MS, DEFAULT_MAX_CONNECTIONS, InvalidRelayConfig,
    RelayConfig,
};
use engine::{Limits, Relay};
use metrics::Metrics;
use origin::OriginalDestination;
use record::{Direction, Records};
use socket::Listener;

/// Descriptors that are not connections: standard streams, listeners, epoll, signals, metrics, and some to spare.
const OTHER_DESCRIPTORS: u64 = 32;
/// At the end, stdout gets this long to take the records that still wait.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// The hidden `pillion relay`: relays until it is told to stop. To be called before any thread exists, because it
/// blocks SIGTERM for the process. SIGPIPE is ignored already by every Rust program.
///
/// Exits with 0 after a drain, 1 when it cannot start or fails (the cause is on stderr), 2 when `config` is invalid.
pub fn main(config: RelayConfig) -> ExitCode {
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when stderr does not take it either.
            let _ = writeln!(io::stderr(), "pillion relay: {error}");
            match error {
                RelayError::Config(_) => ExitCode::from(2),
                RelayError::Listen { .. } | RelayError::Metrics { .. } | RelayError::System { .. } => {
                    ExitCode::FAILURE
                }
            }
        }
    }
}

/// Why a relay did not start, or failed.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Config(#[from] InvalidRelayConfig),
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot serve metrics on {}: {source}", path.display())]
    Metrics { path: PathBuf, source: io::Error },
    #[error("cannot {operation}: {source}")]
    System { operation: &'static str, source: io::Error },
}

impl RelayError {
    fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { operation, source: source.into() }
    }
}

/// Builds every part, in order, and runs the loop.
fn run(config: RelayConfig) -> Result<(), RelayError> {
    config.validate()?;
    let stop = stop_requests().map_err(RelayError::system("receive signals"))?;
    let limits = Limits {
        connections: connection_limit(config.max_connections),
        connect_timeout: Duration::from_millis(config.connect_timeout_ms),
        drain_grace: Duration::from_millis(config.drain_grace_ms),
    };
    let mut listeners = Vec::new();
    let ports = [(Direction::Outbound, config.outbound_port), (Direction::Inbound, config.inbound_port)];
    for (direction, port) in ports {
        let Some(port) = port else { continue };
        let found = Listener::on_loopback(direction, port)
            .map_err(|(address, source)| RelayError::Listen { address, source: source.into() })?;
        listeners.extend(found);
    }
    let (metrics, registry) = Metrics::new();
    if let Some(path) = config.metrics_socket {
        metrics::serve(&path, registry).map_err(|source| RelayError::Metrics { path, source })?;
    }
    let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(RelayError::system("use stdout"))?;
    let records = Records::spawn(config.workload, File::from(stdout), metrics.records_dropped.clone())
        .map_err(RelayError::system("start a thread"))?;
    let relay = Relay::new(listeners, OriginalDestination::Kernel, limits, (metrics, records), stop)
        .map_err(RelayError::system("wait for events"))?;
    let records = relay.run().map_err(RelayError::system("wait for events"))?;
    records.finish(LAST_RECORDS);
    Ok(())
}

/// A descriptor that becomes readable at each SIGTERM.
fn stop_requests() -> nix::Result<OwnedFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    Ok(signals.into())
}

/// As many connections as are wanted and the descriptors allow, at least one.
fn connection_limit(wanted: u32) -> usize {
    let wanted = u64::from(wanted);
    let descriptors = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => {
            let enough = hard.min(2 * wanted + OTHER_DESCRIPTORS).max(soft);
            if setrlimit(Resource::RLIMIT_NOFILE, enough, hard).is_ok() { enough } else { soft }
        }
        Ok((soft, _)) => soft,
        Err(_) => 1_024,
    };
    let allowed = descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2;
    usize::try_from(wanted.min(allowed).max(1)).unwrap_or(usize::MAX)
}
