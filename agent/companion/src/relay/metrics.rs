//! The relay's counters and the small HTTP server that shows them. Never touches a relayed connection.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{Arc, atomic::AtomicI64},
    thread,
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::record::{Direction, Outcome};

/// A scrape that takes longer is abandoned.
const SCRAPE: Duration = Duration::from_secs(2);
/// A request that is longer is abandoned.
const LONGEST_REQUEST: usize = 4_096;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    direction: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlowLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DatagramLabels {
    way: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByteLabels {
    direction: &'static str,
    way: &'static str,
}

/// Handles to every counter, looked up once: the copying loop only adds.
pub(super) struct Metrics {
    connections: Vec<Counter>,
    bytes: Vec<Counter>,
    flows: Vec<Counter>,
    datagrams: Vec<Counter>,
    lost: Vec<Counter>,
    pub(super) open: Gauge<i64, AtomicI64>,
    pub(super) open_flows: Gauge<i64, AtomicI64>,
    pub(super) records_dropped: Counter,
}

impl Metrics {
    /// The counters, and the registry that shows them.
    pub(super) fn new() -> (Self, Registry) {
        let mut registry = Registry::with_prefix("pillion_relay");
        let connections = Family::<ConnectionLabels, Counter>::default();
        let bytes = Family::<ByteLabels, Counter>::default();
        let flows = Family::<FlowLabels, Counter>::default();
        let datagrams = Family::<DatagramLabels, Counter>::default();
        let lost = Family::<LostLabels, Counter>::default();
        let metrics = Self {
            connections: Direction::ALL
                .iter()
                .flat_map(|direction| Outcome::ALL.iter().map(move |outcome| (direction, outcome)))
                .map(|(direction, outcome)| {
                    let labels =
                        ConnectionLabels { direction: direction.as_str(), outcome: outcome.as_str() };
                    connections.get_or_create(&labels).clone()
                })
                .collect(),
            bytes: Direction::ALL
                .iter()
                .flat_map(|direction| ["sent", "received"].map(|way| (direction, way)))
                .map(|(direction, way)| {
                    bytes.get_or_create(&ByteLabels { direction: direction.as_str(), way }).clone()
                })
                .collect(),
            flows: Outcome::ALL
                .map(|outcome| flows.get_or_create(&FlowLabels { outcome: outcome.as_str() }).clone())
                .into(),
            datagrams: ["sent", "received"]
                .map(|way| datagrams.get_or_create(&DatagramLabels { way }).clone())
                .into(),
            lost: Outcome::ALL
                .map(|outcome| lost.get_or_create(&LostLabels { reason: outcome.as_str() }).clone())
                .into(),
            open: Gauge::default(),
            open_flows: Gauge::default(),
            records_dropped: Counter::default(),
        };
        registry.register("connections", "Connections that ended, by outcome", connections);
        registry.register("bytes", "Bytes relayed; sent is from client to upstream", bytes);
        registry.register("flows", "Flows of datagrams that ended, by outcome", flows);
        registry.register("datagrams", "Datagrams relayed; sent is from client to upstream", datagrams);
        registry.register("datagrams_lost", "Datagrams that could not be passed on, by reason", lost);
        registry.register("open_flows", "Flows of datagrams that may go on", metrics.open_flows.clone());
        registry.register("open_connections", "Connections being relayed", metrics.open.clone());
        registry.register(
            "records_dropped",
            "Connection records that stdout did not take",
            metrics.records_dropped.clone(),
        );
        (metrics, registry)
    }

    /// The counter of connections that ended so.
    pub(super) fn connections(&self, direction: Direction, outcome: Outcome) -> &Counter {
        &self.connections[direction as usize * Outcome::ALL.len() + outcome as usize]
    }

    /// The counter of flows that ended so.
    pub(super) fn flows(&self, outcome: Outcome) -> &Counter {
        &self.flows[outcome as usize]
    }

    /// The counter of datagrams from client to upstream (`sent`) or back.
    pub(super) fn datagrams(&self, sent: bool) -> &Counter {
        &self.datagrams[usize::from(!sent)]
    }

    /// The counter of datagrams that were lost for this reason.
    pub(super) fn lost(&self, reason: Outcome) -> &Counter {
        &self.lost[reason as usize]
    }

    /// The counter of bytes from client to upstream (`sent`) or back.
    pub(super) fn bytes(&self, direction: Direction, sent: bool) -> &Counter {
        &self.bytes[direction as usize * 2 + usize::from(!sent)]
    }
}

/// Serves `registry` on a unix socket at `path` from a thread of its own, for as long as the process lives.
///
/// # Errors
/// The path is taken by something that is not a socket, or cannot be bound.
pub(super) fn serve(path: &Path, registry: Registry) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        // The relay's predecessor was killed; two relays never share a directory.
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    let registry = Arc::new(registry);
    thread::Builder::new().name("metrics".to_owned()).stack_size(128 << 10).spawn(move || {
        for stream in listener.incoming() {
            match stream {
                // A scraper that goes away early harms only itself.
                Ok(stream) => drop(answer(stream, &registry)),
                // No descriptor: the relayed connections have them all.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    })?;
    Ok(())
}

/// Reads one request and answers it: HTTP/1.0, `GET` of any path.
fn answer(mut stream: UnixStream, registry: &Registry) -> io::Result<()> {
    let deadline = Instant::now() + SCRAPE;
    let mut request = Vec::with_capacity(512);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() >= LONGEST_REQUEST {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 512];
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            length => request.extend_from_slice(&chunk[..length]),
        }
    }
    let mut body = String::new();
    let status = if !request.starts_with(b"GET ") {
        "405 Method Not Allowed"
    } else if encode(&mut body, registry).is_err() {
        "500 Internal Server Error"
    } else {
        "200 OK"
    };
    stream.set_write_timeout(Some(SCRAPE))?;
    write!(
        stream,
        "HTTP/1.0 {status}\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn every_series_has_its_own_counter_and_is_served() {
        let (metrics, registry) = Metrics::new();
        let mut wanted = Vec::new();
        let mut value = 0;
        for direction in Direction::ALL {
            for outcome in Outcome::ALL {
                value += 1;
                metrics.connections(direction, outcome).inc_by(value);
                wanted.push(format!(
                    "pillion_relay_connections_total{{direction=\"{}\",outcome=\"{}\"}} {value}\n",
                    direction.as_str(),
                    outcome.as_str()
                ));
            }
            for (way, sent) in [("sent", true), ("received", false)] {
                value += 1;
                metrics.bytes(direction, sent).inc_by(value);
                wanted.push(format!(
                    "pillion_relay_bytes_total{{direction=\"{}\",way=\"{way}\"}} {value}\n",
                    direction.as_str()
                ));
            }
        }
        for outcome in Outcome::ALL {
            value += 2;
            metrics.flows(outcome).inc_by(value);
            metrics.lost(outcome).inc_by(value + 1);
            let (outcome, more) = (outcome.as_str(), value + 1);
            wanted.push(format!("pillion_relay_flows_total{{outcome=\"{outcome}\"}} {value}\n"));
            wanted.push(format!("pillion_relay_datagrams_lost_total{{reason=\"{outcome}\"}} {more}\n"));
        }
        for (way, sent) in [("sent", true), ("received", false)] {
            value += 2;
            metrics.datagrams(sent).inc_by(value);
            wanted.push(format!("pillion_relay_datagrams_total{{way=\"{way}\"}} {value}\n"));
        }
        metrics.open_flows.set(4);
        wanted.push("pillion_relay_open_flows 4\n".to_owned());
        metrics.open.set(3);
        wanted.push("pillion_relay_open_connections 3\n".to_owned());
        metrics.records_dropped.inc();
        wanted.push("pillion_relay_records_dropped_total 1\n".to_owned());

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        serve(&path, registry).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let answer = scrape(&path, "GET /metrics HTTP/1.1\r\nHost: relay\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
        for line in wanted {
            assert!(answer.contains(&line), "{line} is not in {answer}");
        }
        assert!(scrape(&path, "POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.0 405"));
        assert_eq!(scrape(&path, &"x".repeat(LONGEST_REQUEST)), "");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        drop(UnixListener::bind(&path).unwrap());
        serve(&path, Metrics::new().1).unwrap();
        assert!(scrape(&path, "GET / HTTP/1.0\r\n\r\n").contains("# EOF"));
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(serve(&file, Metrics::new().1).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
