//! One JSON line on stdout for each connection. Never blocks the thread that copies bytes: a writer thread does the
//! waiting, and when its bounded queue is full a record is counted as dropped.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    net::SocketAddr,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pillion_workload::WorkloadId;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

/// Records that may wait for stdout.
const QUEUE: usize = 4_096;
/// The writer lets records gather for this long, so that a busy relay is not interrupted for each of them.
const GATHER: Duration = Duration::from_millis(20);
/// `PIPE_BUF`: a write of at most this size to a pipe is never mixed with another's (pipe(7)).
const WRITE: usize = 4_096;

/// Which of the workload's connections a relay port serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Direction {
    /// The workload dialled.
    Outbound,
    /// The workload is dialled.
    Inbound,
}

/// What was relayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Protocol {
    /// A connection.
    Tcp,
    /// The datagrams of one socket to one destination.
    Udp,
}

/// How a connection or flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Both sides ended in an orderly way. A flow: the application closed it, or it was quiet for long.
    Ok,
    /// The client reset the connection, or was lost (keepalive, retransmission timeout).
    ResetByClient,
    /// The upstream reset the connection, or was lost.
    ResetByUpstream,
    /// Nobody listens at the original destination.
    ConnectRefused,
    /// The original destination did not answer in time.
    ConnectTimeout,
    /// No route to the original destination.
    ConnectUnreachable,
    /// The connection was not redirected here: somebody dialled the relay itself.
    NoOriginalDestination,
    /// The original destination is the relay itself.
    Loop,
    /// The relay ran out of descriptors, ports or memory to dial with. A flow: another one needed its place.
    Limit,
    /// Reset by the relay at the end of its drain.
    Drained,
    /// Dialling failed for another reason.
    Error,
}

impl Direction {
    pub(super) const ALL: [Self; 2] = [Self::Outbound, Self::Inbound];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl Outcome {
    pub(super) const ALL: [Self; 11] = [
        Self::Ok,
        Self::ResetByClient,
        Self::ResetByUpstream,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectUnreachable,
        Self::NoOriginalDestination,
        Self::Loop,
        Self::Limit,
        Self::Drained,
        Self::Error,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ResetByClient => "reset_by_client",
            Self::ResetByUpstream => "reset_by_upstream",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectUnreachable => "connect_unreachable",
            Self::NoOriginalDestination => "no_original_destination",
            Self::Loop => "loop",
            Self::Limit => "limit",
            Self::Drained => "drained",
            Self::Error => "error",
        }
    }
}

/// What is known of a connection or flow when it has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    pub(super) accepted: SystemTime,
    pub(super) direction: Direction,
    pub(super) protocol: Protocol,
    /// As the workload sees it: no address of the redirection's.
    pub(super) source: SocketAddr,
    pub(super) destination: Option<SocketAddr>,
    /// Client to upstream.
    pub(super) bytes_sent: u64,
    /// Upstream to client.
    pub(super) bytes_received: u64,
    pub(super) connect: Option<Duration>,
    pub(super) duration: Duration,
    pub(super) outcome: Outcome,
}

/// The line's form. `ts` is when the connection was accepted.
#[derive(Serialize)]
struct Line<'a> {
    ts: String,
    workload: &'a str,
    direction: Direction,
    protocol: Protocol,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    bytes_sent: u64,
    bytes_received: u64,
    connect_ms: Option<f64>,
    duration_ms: f64,
    outcome: Outcome,
}

impl Record {
    fn line(&self, workload: &WorkloadId) -> String {
        let line = Line {
            ts: humantime::format_rfc3339_millis(self.accepted).to_string(),
            workload: workload.as_str(),
            direction: self.direction,
            protocol: self.protocol,
            source: self.source,
            destination: self.destination,
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            connect_ms: self.connect.map(milliseconds),
            duration_ms: milliseconds(self.duration),
            outcome: self.outcome,
        };
        let mut text = serde_json::to_string(&line).expect("a record has only plain fields");
        text.push('\n');
        text
    }
}

/// Milliseconds with three decimals: whole microseconds.
fn milliseconds(duration: Duration) -> f64 {
    let micros = u32::try_from(duration.as_micros());
    micros.map_or_else(|_| (duration.as_secs_f64() * 1e6).round() / 1e3, |micros| f64::from(micros) / 1e3)
}

/// The way to the writer thread.
pub(super) struct Records {
    shared: Arc<Shared>,
    dropped: Counter,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

struct Queue {
    records: VecDeque<Record>,
    closed: bool,
    finished: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A queue of plain records is never half-changed, whatever its other user died of.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Records {
    /// Starts the writer thread.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub(super) fn spawn(workload: WorkloadId, output: File, dropped: Counter) -> io::Result<Self> {
        let queue = Mutex::new(Queue { records: VecDeque::new(), closed: false, finished: false });
        let shared = Arc::new(Shared { queue, changed: Condvar::new() });
        let writer = Writer { shared: Arc::clone(&shared), workload, output, dropped: dropped.clone() };
        thread::Builder::new()
            .name("records".to_owned())
            .stack_size(128 << 10)
            .spawn(move || writer.run())?;
        Ok(Self { shared, dropped })
    }

    /// Queues `record`, or counts it as dropped.
    pub(super) fn push(&self, record: Record) {
        let mut queue = self.shared.lock();
        if queue.records.len() >= QUEUE {
            self.dropped.inc();
            return;
        }
        let was_empty = queue.records.is_empty();
        queue.records.push_back(record);
        drop(queue);
        if was_empty {
            self.shared.changed.notify_all();
        }
    }

    /// Waits at most `patience` until everything queued is written.
    pub(super) fn finish(self, patience: Duration) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        self.shared.changed.notify_all();
        let waited = self.shared.changed.wait_timeout_while(queue, patience, |queue| !queue.finished);
        drop(waited);
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

struct Writer {
    shared: Arc<Shared>,
    workload: WorkloadId,
    output: File,
    dropped: Counter,
}

impl Writer {
    fn run(mut self) {
        let mut taken = VecDeque::new();
        let mut text = String::with_capacity(WRITE);
        while self.take(&mut taken) {
            for record in taken.drain(..) {
                let line = record.line(&self.workload);
                if text.len() + line.len() > WRITE {
                    self.write(&text);
                    text.clear();
                }
                text.push_str(&line);
            }
            self.write(&text);
            text.clear();
        }
        self.shared.lock().finished = true;
        self.shared.changed.notify_all();
    }

    /// Swaps what is queued with the empty `into`; false when the queue is closed and empty.
    fn take(&self, into: &mut VecDeque<Record>) -> bool {
        let mut queue = self.shared.lock();
        while queue.records.is_empty() && !queue.closed {
            queue = self.shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        // Only `finish` cuts this wait short: while the queue is not empty nobody else notifies.
        let gathered = self.shared.changed.wait_timeout_while(queue, GATHER, |queue| !queue.closed);
        queue = gathered.unwrap_or_else(PoisonError::into_inner).0;
        std::mem::swap(&mut queue.records, into);
        !into.is_empty()
    }

    /// One write(2) for whole lines; the rest of a short write follows, and a failure counts the lines as dropped.
    fn write(&mut self, lines: &str) {
        let mut rest = lines.as_bytes();
        while !rest.is_empty() {
            match self.output.write(rest) {
                Ok(written) if written > 0 => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Somebody who shares the descriptor made it non-blocking.
                    let mut waiting = [PollFd::new(self.output.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut waiting, PollTimeout::from(1_000_u16));
                }
                Ok(_) | Err(_) => {
                    self.dropped.inc_by(rest.split(|byte| *byte == b'\n').count() as u64 - 1);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::fd::OwnedFd,
    };

    use super::*;

    fn record(bytes_sent: u64) -> Record {
        Record {
            accepted: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            direction: Direction::Outbound,
            protocol: Protocol::Tcp,
            source: "[2001:db8::9]:40000".parse().unwrap(),
            destination: Some("[2001:db8::1]:443".parse().unwrap()),
            bytes_sent,
            bytes_received: 7,
            connect: Some(Duration::from_nanos(1_234_999)),
            duration: Duration::from_secs(7_200),
            outcome: Outcome::ResetByUpstream,
        }
    }

    fn spawn(output: impl Into<OwnedFd>) -> (Records, Counter) {
        let dropped = Counter::default();
        let output = File::from(output.into());
        (Records::spawn("process/1-2".parse().unwrap(), output, dropped.clone()).unwrap(), dropped)
    }

    #[test]
    fn the_line_has_this_form() {
        assert_eq!(
            record(5).line(&"process/1-2".parse().unwrap()),
            "{\"ts\":\"2023-11-14T22:13:20.123Z\",\"workload\":\"process/1-2\",\"direction\":\"outbound\",\
             \"protocol\":\"tcp\",\"source\":\"[2001:db8::9]:40000\",\"destination\":\"[2001:db8::1]:443\",\"bytes_sent\":5,\
             \"bytes_received\":7,\"connect_ms\":1.234,\"duration_ms\":7200000.0,\
             \"outcome\":\"reset_by_upstream\"}\n"
        );
        let none = Record { destination: None, connect: None, ..record(0) };
        let line: serde_json::Value =
            serde_json::from_str(&none.line(&"process/1-2".parse().unwrap())).unwrap();
        assert!(line["destination"].is_null() && line["connect_ms"].is_null());
    }

    #[test]
    fn labels_and_records_use_the_same_words() {
        for outcome in Outcome::ALL {
            assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.as_str());
        }
        for direction in Direction::ALL {
            assert_eq!(serde_json::to_value(direction).unwrap(), direction.as_str());
        }
    }

    #[test]
    fn a_blocked_output_drops_and_counts_but_never_blocks_the_pusher() {
        let (reader, writer) = io::pipe().unwrap();
        let (records, dropped) = spawn(writer);
        let pushed = 3 * QUEUE as u64;
        for number in 0..pushed {
            records.push(record(number));
        }
        assert!(dropped.get() >= QUEUE as u64, "{}", dropped.get());
        let reading = thread::spawn(move || BufReader::new(reader).lines().map(Result::unwrap).collect());
        records.finish(Duration::from_secs(10));
        let lines: Vec<String> = reading.join().unwrap();
        assert_eq!(lines.len() as u64 + dropped.get(), pushed);
        let mut last = None;
        for line in lines {
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            let number = line["bytes_sent"].as_u64();
            assert!(number > last || last.is_none());
            last = number;
        }
    }

    #[test]
    fn an_output_that_is_gone_counts_every_line() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let (records, dropped) = spawn(writer);
        for number in 0..100 {
            records.push(record(number));
        }
        records.finish(Duration::from_secs(10));
        assert_eq!(dropped.get(), 100);
    }
}
