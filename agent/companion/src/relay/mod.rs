//! The embedded relay, `builtin: relay`: a transparent relay of TCP, and of UDP where it is told so, in one process, without
//! privileges, that needs nothing. It dials where each redirected connection wanted to go and copies bytes both ways. Never looks into them, never
//! redirects anything itself, never talks to the agent but by records on stdout and metrics on a unix socket.
//!
//! # The walk of a connection
//! `engine` accepts it, `origin` finds its original destination, `socket` dials that, `connection` copies
//! (`peer` is one of its two sockets), `record` writes its JSON line, `metrics` counts it. UDP is in `datagram`.
//!
//! # What is kept of TCP
//! - *Ends*: each direction ends by itself; the end of a stream is passed on after its last byte. There is no idle
//!   timeout: two quiet, half-closed sides stay for ever. Keepalive finds peers that vanished.
//! - *Back-pressure*: a side is not read while the other one does not take what was read. At most one chunk
//!   (512 KiB) waits in the process for each direction, and only for a side that is slow; beyond 128 KiB each, 9 MiB at most
//!   for all of them (`surplus`). The kernel is given no more than 64 KiB that it cannot send yet.
//! - *Resets*: after a reset by one side, what it had sent before is passed on and acknowledged (for at most 30 s),
//!   then the other side is reset. A failed dial resets the client, whose own connect had succeeded by then. What the
//!   sender's kernel threw away at its reset is lost, as it is without a relay.
//! - *Urgent data*: passed on as such, at its place in the stream.
//!
//! # Limits
//! At the limit on connections, or without descriptors, nothing is accepted; clients wait in the backlog. At SIGTERM
//! the backlog is taken once more and the listeners end, so that the redirection's failure mode holds; open
//! connections have the drain grace, then they are reset. The second SIGTERM resets them at once. A listener that
//! another holder of its socket shuts down starts a drain too.
//!
//! # Why it is made so: measurements
//! Linux 6.18, AMD EPYC. A stream over loopback by a stand-in of 100 lines for each way to copy, sender, relay and receiver pinned
//! to one CPU of a machine busy with compilers; hence CPU time of all three and of that CPU's ksoftirqd, which works for them
//! when they send much at once, and is easily forgotten. Medians of 5 interleaved runs of 0.8 GB:
//!
//! | copying by | ms CPU per GB | throughput to be had |
//! | --- | --- | --- |
//! | no relay | 309 | 1 |
//! | read/write, 64 KiB | 558 | 0.57 |
//! | the same with `MSG_MORE` for full chunks | 535 | 0.61 |
//! | the same, 128 KiB / 256 KiB / 384 KiB | 638 / 593 / 549 | 0.51 / 0.54 / 0.57 |
//! | the same, 512 KiB (kept) | 509 | 0.61 |
//! | the same, 768 KiB / 1 MiB / 2 MiB | 502 / 513 / 638 | 0.62 / 0.60 / 0.51 |
//! | splice, pipe of 1 MiB (without ksoftirqd) | 725 | 0.43 |
//! | 512 KiB, and `SO_SNDBUF` of 256 KiB | 434 | 0.73 |
//! | 512 KiB, and `TCP_NOTSENT_LOWAT` of 128 KiB / 16 KiB | 466 / 456 | 0.66 / 0.66 |
//! | 512 KiB, and `TCP_NOTSENT_LOWAT` of 64 KiB (kept) | 445 | 0.69 |
//!
//! A fixed buffer would slow down long ways. What `TCP_NOTSENT_LOWAT` cuts short stays where it is: the slow side keeps the buffer (`buffers`).
//! By `pillion-bench relay` (`cargo xtask bench relay`, but not optimised), where the receiver is in another namespace and what counts is
//! the time that passes, in 4 to 5 rounds at a time on that machine, µs for 1 MiB (IPv4): 767 to 772 with 128 KiB, 705 to 734 with 512 KiB, 604 to 637
//! with `TCP_NOTSENT_LOWAT` too; without a relay, between 447 and 560. 64 bytes there and back took 30 to 32 µs with each, 12 to 13 without a relay.
//!
//! `MSG_MORE` helps because a chunk is a little more than one segment of loopback's largest size: without it the rest
//! is a packet of its own. Alignment and huge pages made no difference, nor did smaller receive buffers on the listener. A
//! connection with one byte each way takes 132 µs against 69 µs without a relay. Hence one thread and epoll without a runtime
//! on top: about 24 system calls for a short connection. The process, idle, has 5.1 MB resident, of which 0.6 MB are its own: the rest is the program, which it shares with the agent.

mod buffers;
mod config;
mod connection;
mod datagram;
mod engine;
mod metrics;
mod origin;
mod outq;
mod peer;
mod record;
mod slab;
mod socket;
mod surplus;
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
use datagram::{DatagramListener, FLOWS, QUIET};
use engine::{Limits, Relay};
use metrics::Metrics;
use origin::OriginalDestination;
use record::{Direction, Records};
use socket::Listener;

/// Descriptors that are not connections: standard streams, listeners, epoll, signals, metrics, and some to spare.
const OTHER_DESCRIPTORS: u64 = 32;
/// At the end, stdout gets this long to take the records that still wait.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// What `pillion companion` becomes for `builtin: relay`: relays until it is told to stop. To be called before any thread
/// exists, because it blocks SIGTERM for the process, and with SIGPIPE ignored.
///
/// `listening` is called when it can be connected to. Exits with 0 after a drain, 1 when it cannot start or fails (the cause is on stderr), 2 when `config` is invalid.
pub fn main(config: RelayConfig, listening: impl FnOnce()) -> ExitCode {
    match run(config, listening) {
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
fn run(config: RelayConfig, listening: impl FnOnce()) -> Result<(), RelayError> {
    config.validate()?;
    let stop = stop_requests().map_err(RelayError::system("receive signals"))?;
    let (connections, flows) = limits(config.max_connections, config.udp);
    let limits = Limits {
        connections,
        flows,
        quiet: QUIET,
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
    let mut datagrams = Vec::new();
    if config.udp {
        let outbound = listeners.iter().filter(|listener| listener.direction == Direction::Outbound);
        datagrams = DatagramListener::beside(outbound)
            .map_err(|(address, source)| RelayError::Listen { address, source: source.into() })?;
    }
    listening();
    let (metrics, registry) = Metrics::new();
    if let Some(path) = config.metrics_socket {
        metrics::serve(&path, registry).map_err(|source| RelayError::Metrics { path, source })?;
    }
    let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(RelayError::system("use stdout"))?;
    let records = Records::spawn(config.workload, File::from(stdout), metrics.records_dropped.clone())
        .map_err(RelayError::system("start a thread"))?;
    let relay =
        Relay::new((listeners, datagrams), OriginalDestination::Kernel, limits, (metrics, records), stop)
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

/// As many connections as are wanted and the descriptors allow, at least one; and as many flows of datagrams, for which a
/// quarter is set aside when there are too few.
fn limits(connections: u32, udp: bool) -> (usize, usize) {
    let flows = if udp { FLOWS as u64 } else { 0 };
    let wanted = u64::from(connections) + flows;
    let descriptors = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => {
            let enough = hard.min(2 * wanted + OTHER_DESCRIPTORS).max(soft);
            if setrlimit(Resource::RLIMIT_NOFILE, enough, hard).is_ok() { enough } else { soft }
        }
        Ok((soft, _)) => soft,
        Err(_) => 1_024,
    };
    let allowed = descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2;
    let flows = if allowed < wanted { flows.min(allowed / 4).max(u64::from(udp)) } else { flows };
    let connections = u64::from(connections).min(allowed.saturating_sub(flows)).max(1);
    let size = |count| usize::try_from(count).unwrap_or(usize::MAX);
    (size(connections), size(flows))
}
