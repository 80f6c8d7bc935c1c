//! A whole relay in a thread, with real sockets on loopback and a fixed original destination.

use std::{
    collections::BTreeSet,
    io::{self, ErrorKind, Read, Write},
    mem::MaybeUninit,
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};

use super::{connection::CHUNK, *};

pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const LIMITS: Limits = Limits {
    connections: 2_000,
    flows: 4_096,
    quiet: QUIET,
    connect_timeout: Duration::from_millis(300),
    drain_grace: PATIENCE,
};

/// A relay that runs; stopped when dropped.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    stop: Arc<OwnedFd>,
    registry: Registry,
    output: tempfile::NamedTempFile,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn to(destination: SocketAddr, limits: Limits) -> Self {
        Self::start(limits, |_| OriginalDestination::Fixed(destination))
    }

    pub(super) fn start(limits: Limits, origin: impl FnOnce(SocketAddr) -> OriginalDestination) -> Self {
        let free = || {
            let listeners = Listener::on_free_port();
            // Another program's, perhaps.
            let datagrams = DatagramListener::beside(&listeners).ok()?;
            Some((listeners, datagrams))
        };
        let (listeners, datagrams) = (0..50).find_map(|_| free()).expect("a port that is free");
        let address = listeners[0].address;
        let stop = Arc::new(eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::NONBLOCK).unwrap());
        let (metrics, registry) = Metrics::new();
        let output = tempfile::NamedTempFile::new().unwrap();
        let file = output.reopen().unwrap();
        let records =
            Records::spawn("process/1-2".parse().unwrap(), file, metrics.records_dropped.clone()).unwrap();
        let stop_fd = stop.as_fd().try_clone_to_owned().unwrap();
        let relay =
            Relay::new((listeners, datagrams), origin(address), limits, (metrics, records), stop_fd).unwrap();
        let thread = thread::spawn(move || relay.run().unwrap().finish(PATIENCE));
        Self { address, stop, registry, output, thread: Some(thread) }
    }

    fn dial(&self) -> TcpStream {
        patient(TcpStream::connect_timeout(&self.address, PATIENCE).unwrap())
    }

    /// Dials, and expects a reset without a byte; it may come before the dial has returned.
    fn dial_to_reset(&self) {
        match TcpStream::connect_timeout(&self.address, PATIENCE) {
            Ok(stream) => assert_eq!(read_to_reset(&patient(stream)), b""),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }

    pub(super) fn request_stop(&self) {
        rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()).unwrap();
    }

    pub(super) fn metric(&self, series: &str) -> u64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series)).expect("a known series");
        value.trim().parse().unwrap()
    }

    pub(super) fn wait_for(&self, series: &str, wanted: u64) {
        wait(&format!("{series} {wanted}"), || self.metric(series) == wanted);
    }

    fn wait_for_outcome(&self, outcome: &str, wanted: u64) {
        self.wait_for(
            &format!("pillion_relay_connections_total{{direction=\"outbound\",outcome=\"{outcome}\"}}"),
            wanted,
        );
    }

    /// Waits for the relay to end by itself, and returns its records.
    pub(super) fn ended(mut self) -> Vec<Value> {
        let thread = self.thread.take().unwrap();
        wait("the relay to end", || thread.is_finished());
        thread.join().unwrap();
        let text = std::fs::read_to_string(self.output.path()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(super) fn drained(self) -> Vec<Value> {
        self.request_stop();
        self.ended()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.request_stop();
            self.request_stop();
            let result = thread.join();
            assert!(result.is_ok() || thread::panicking());
        }
    }
}

pub(super) fn wait(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn server() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Accepts within [`PATIENCE`].
fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                return patient(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "nobody dialled");
                thread::sleep(Duration::from_micros(100));
            }
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Bytes that differ everywhere: xorshift.
pub(super) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn read_all(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map(|_| bytes)
}

fn reset_by(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Reads to the reset; what came before it.
fn read_to_reset(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).expect_err("a reset, not an end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    bytes
}

#[test]
fn every_byte_arrives_whichever_side_ends_first() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let sizes = [0, 1, 4_095, CHUNK - 1, CHUNK, CHUNK + 1, 1_000_003, 9_000_001];
    let mut connections = 0;
    for (number, size) in (0..).zip(sizes) {
        for (first_is_client, answer) in [(true, size), (false, size), (true, 17), (false, 17)] {
            connections += 1;
            let client = relay.dial();
            let server = accept(&listener);
            let (first, second) = if first_is_client { (client, server) } else { (server, client) };
            let (there, back) = (noise(size, 2 * number + 1), noise(answer, 2 * number + 2));
            let sent = there.clone();
            let answering = thread::spawn(move || {
                // The second side has seen the end of the first one's stream, and its own is still open.
                let got = read_all(&second).unwrap();
                (&second).write_all(&back).unwrap();
                second.shutdown(Shutdown::Write).unwrap();
                (got, back)
            });
            (&first).write_all(&sent).unwrap();
            first.shutdown(Shutdown::Write).unwrap();
            let received = read_all(&first).unwrap();
            let (got, back) = answering.join().unwrap();
            assert!(got == there && received == back, "{size} bytes, client first: {first_is_client}");
        }
    }
    relay.wait_for_outcome("ok", connections);
    assert_eq!(relay.metric("pillion_relay_open_connections"), 0);
}

#[test]
fn an_urgent_byte_is_passed_on_at_its_place() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    for _ in 0..20 {
        let client = relay.dial();
        let server = accept(&listener);
        (&client).write_all(b"before").unwrap();
        SockRef::from(&client).send_out_of_band(b"!").unwrap();
        (&client).write_all(b" after").unwrap();
        let socket = SockRef::from(&server);
        socket.set_out_of_band_inline(true).unwrap();
        let mut got = [0; 13];
        (&server).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"before! after");

        // Where it is, and that it is urgent, without which a read would not stop there.
        SockRef::from(&server).send_out_of_band(b"?").unwrap();
        wait("the urgent byte", || {
            SockRef::from(&client).recv_out_of_band(&mut [MaybeUninit::uninit()]).is_ok()
        });
    }
}

#[test]
fn both_ways_at_once() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let ends = [relay.dial(), accept(&listener)].map(Arc::new);
    let threads: Vec<_> = (0..2)
        .flat_map(|end| {
            let (writing, reading) = (Arc::clone(&ends[end]), Arc::clone(&ends[1 - end]));
            let writer = thread::spawn(move || {
                (&*writing).write_all(&noise(20_000_000, end as u64)).unwrap();
                writing.shutdown(Shutdown::Write).unwrap();
            });
            let reader = thread::spawn(move || {
                assert!(read_all(&reading).unwrap() == noise(20_000_000, end as u64));
            });
            [writer, reader]
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let records = relay.drained();
    assert_eq!(records[0]["bytes_sent"], 20_000_000);
    assert_eq!(records[0]["bytes_received"], 20_000_000);
}

#[test]
fn a_thousand_connections_at_once_stay_apart() {
    let wanted = 1_000;
    assert!(limits(3 * wanted, false).0 >= 2 * wanted as usize, "the test itself needs descriptors");
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let pairs: Vec<_> = (0..wanted).map(|_| (relay.dial(), accept(&listener))).collect();
    assert_eq!(relay.metric("pillion_relay_open_connections"), u64::from(wanted));
    let size = |number: u64| usize::try_from(number * 7_919 % 30_000).unwrap();
    for (number, (client, server)) in (0..).zip(&pairs) {
        let (mut client, mut server) = (client, server);
        client.write_all(&noise(size(number), number)).unwrap();
        server.write_all(&noise(size(number + 1), !number)).unwrap();
        if number % 2 == 0 { client } else { server }.shutdown(Shutdown::Write).unwrap();
    }
    for (number, (client, server)) in (0..).zip(&pairs) {
        if number % 2 == 0 { server } else { client }.shutdown(Shutdown::Write).unwrap();
        assert!(read_all(server).unwrap() == noise(size(number), number));
        assert!(read_all(client).unwrap() == noise(size(number + 1), !number));
    }
    relay.wait_for_outcome("ok", u64::from(wanted));
    drop(pairs);
    let records = relay.drained();
    assert_eq!(records.len(), wanted as usize);
    let sources: BTreeSet<_> = records.iter().map(|record| record["source"].as_str().unwrap()).collect();
    assert_eq!(sources.len(), wanted as usize);
}

#[test]
fn a_slow_reader_stops_the_sender_and_loses_nothing() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let client = relay.dial();
    let server = accept(&listener);
    client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let block = noise(1 << 20, 5);
    let mut written = 0;
    while let Ok(length) = (&client).write(&block[written % block.len()..]) {
        written += length;
        assert!(written < 256 << 20, "nothing stops the sender");
    }
    client.shutdown(Shutdown::Write).unwrap();
    let got = read_all(&server).unwrap();
    assert_eq!(got.len(), written);
    assert!(got.chunks(block.len()).all(|chunk| *chunk == block[..chunk.len()]));
}

#[test]
fn a_reset_follows_what_was_sent_before_it() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let data = noise(100_000, 9);

    let client = relay.dial();
    let server = accept(&listener);
    (&client).write_all(&data).unwrap();
    relay.wait_for("pillion_relay_bytes_total{direction=\"outbound\",way=\"sent\"}", 100_000);
    reset_by(client);
    assert!(read_to_reset(&server) == data);
    relay.wait_for_outcome("reset_by_client", 1);

    let client = relay.dial();
    let server = accept(&listener);
    (&server).write_all(&data).unwrap();
    reset_by(server);
    let got = read_to_reset(&client);
    assert!(got == data[..got.len()]);
    relay.wait_for_outcome("reset_by_upstream", 1);
    assert_eq!(relay.metric("pillion_relay_open_connections"), 0);
}

#[test]
fn an_answer_before_a_reset_for_unread_data_arrives() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    for _ in 0..50 {
        let client = relay.dial();
        let server = accept(&listener);
        (&client).write_all(&noise(200_000, 1)).unwrap();
        (&server).write_all(b"413 too large").unwrap();
        // Unread data makes this a reset.
        server.peek(&mut [0]).unwrap();
        drop(server);
        assert_eq!(read_to_reset(&client), b"413 too large");
    }
    relay.wait_for_outcome("reset_by_upstream", 50);
}

#[test]
fn a_client_that_is_gone_is_noticed_by_the_data_it_does_not_want() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let client = relay.dial();
    let mut server = accept(&listener);
    drop(client);
    assert_eq!(read_all(&server).unwrap(), b"");
    let deadline = Instant::now() + PATIENCE;
    while server.write(&[0; 1_000]).is_ok() {
        assert!(Instant::now() < deadline, "no reset arrived");
    }
    relay.wait_for_outcome("reset_by_client", 1);
}

#[test]
fn a_failed_dial_is_a_reset_with_its_reason() {
    let (listener, refused) = server();
    drop(listener);
    let relay = Running::to(refused, LIMITS);
    relay.dial_to_reset();
    relay.wait_for_outcome("connect_refused", 1);
    let records = relay.drained();
    assert_eq!(records[0]["outcome"], "connect_refused");
    assert!(records[0]["connect_ms"].is_null());

    // A listener whose backlog is full answers no SYN.
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut held = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        held.push(stream);
        assert!(held.len() < 16, "the backlog does not fill up");
    }
    let relay = Running::to(address, LIMITS);
    let clients = [relay.dial(), relay.dial()];
    let begun = Instant::now();
    for client in &clients {
        assert_eq!(read_to_reset(client), b"");
    }
    assert!(begun.elapsed() < PATIENCE / 2);
    relay.wait_for_outcome("connect_timeout", 2);

    // A client that gives up while its destination is being dialled.
    let limits = Limits { connect_timeout: PATIENCE, ..LIMITS };
    let relay = Running::to(address, limits);
    let client = relay.dial();
    relay.wait_for("pillion_relay_open_connections", 1);
    reset_by(client);
    relay.wait_for_outcome("reset_by_client", 1);
}

#[test]
fn a_connection_that_was_not_redirected_is_reset() {
    let relay = Running::start(LIMITS, OriginalDestination::Fixed);
    relay.dial_to_reset();
    relay.wait_for_outcome("loop", 1);

    let relay = Running::start(LIMITS, |_| OriginalDestination::Kernel);
    relay.dial_to_reset();
    let records = relay.drained();
    // With connection tracking the kernel answers with the listener itself.
    assert!(["no_original_destination", "loop"].contains(&records[0]["outcome"].as_str().unwrap()));
}

#[test]
fn a_drain_lets_open_connections_end() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let client = relay.dial();
    let mut server = accept(&listener);
    // What dials the relay until its listener is closed is refused.
    drop(listener);
    relay.request_stop();
    wait("the listener to close", || TcpStream::connect(relay.address).is_err());
    (&client).write_all(b"still").unwrap();
    let mut got = [0; 5];
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still");
    drop((client, server));
    let records = relay.ended();
    assert_eq!(records.last().unwrap()["outcome"], "ok");
}

#[test]
fn a_drain_ends_at_its_deadline_and_at_the_second_request() {
    for requests in [1, 2] {
        let (listener, address) = server();
        let grace = if requests == 1 { Duration::from_millis(100) } else { PATIENCE };
        let relay = Running::to(address, Limits { drain_grace: grace, ..LIMITS });
        let ends = [relay.dial(), accept(&listener)];
        for _ in 0..requests {
            relay.request_stop();
        }
        for end in &ends {
            assert_eq!(read_to_reset(end), b"");
        }
        let records = relay.ended();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0]["outcome"], "drained");
    }
}

#[test]
fn a_duplicate_of_the_listener_does_not_keep_it_listening() {
    let listeners = Listener::on_free_port();
    let duplicate = listeners[0].socket.try_clone().unwrap();
    for listener in listeners {
        listener.close();
    }
    assert!(!SockRef::from(&duplicate).is_listener().unwrap());
}

#[test]
fn beyond_the_limit_connections_wait_for_their_turn() {
    let (listener, address) = server();
    let relay = Running::to(address, Limits { connections: 2, ..LIMITS });
    let mut clients: Vec<_> = (0..5).map(|_| relay.dial()).collect();
    for (number, client) in (0..).zip(&mut clients) {
        client.write_all(&[number]).unwrap();
    }
    let mut servers = vec![accept(&listener), accept(&listener)];
    assert_eq!(relay.metric("pillion_relay_open_connections"), 2);
    for number in 0..5 {
        let mut server = servers.remove(0);
        let mut got = [9];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, [number]);
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "more than two were let in");
        drop((clients.remove(0), server));
        if number < 3 {
            servers.push(accept(&listener));
        }
    }
    relay.wait_for_outcome("ok", 5);
}

#[test]
fn a_record_says_what_happened() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let client = relay.dial();
    let source = client.local_addr().unwrap();
    let server = accept(&listener);
    (&client).write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&server).unwrap(), b"question");
    (&server).write_all(b"answer").unwrap();
    drop(server);
    assert_eq!(read_all(&client).unwrap(), b"answer");
    let records = relay.drained();
    assert_eq!(records.len(), 1);
    let record = records[0].as_object().unwrap();
    for (field, value) in [
        ("workload", Value::from("process/1-2")),
        ("direction", "outbound".into()),
        ("protocol", "tcp".into()),
        ("source", source.to_string().into()),
        ("destination", address.to_string().into()),
        ("bytes_sent", 8.into()),
        ("bytes_received", 6.into()),
        ("outcome", "ok".into()),
    ] {
        assert_eq!(record[field], value, "{field}");
    }
    let (connect, duration) =
        (record["connect_ms"].as_f64().unwrap(), record["duration_ms"].as_f64().unwrap());
    assert!(0.0 < connect && connect <= duration && duration < 20_000.0);
    assert!(record["ts"].as_str().unwrap().ends_with('Z'));
    assert_eq!(record.len(), 11);
}

#[test]
fn a_record_names_the_workload_and_not_the_mark_of_its_connection() {
    let (listener, address) = server();
    let relay = Running::to(address, LIMITS);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 64, 0, 9], 0)).into()).unwrap();
    socket.connect(&relay.address.into()).unwrap();
    let client = patient(socket.into());
    let port = client.local_addr().unwrap().port();
    drop(accept(&listener));
    assert_eq!(read_all(&client).unwrap(), b"");
    drop(client);
    let records = relay.drained();
    assert_eq!(records[0]["source"], SocketAddr::new(address.ip(), port).to_string());
}
