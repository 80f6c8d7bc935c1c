//! A whole relay in a thread, with real UDP sockets on loopback; a table says where a source's datagrams wanted to go.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{IpAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::event::Timespec;

use super::{
    super::tests::{LIMITS, PATIENCE, Running, noise, wait},
    *,
};

/// Where datagrams of a source want to go. Each test has sources that the kernel gave to it alone.
static DESTINATIONS: Mutex<BTreeMap<SocketAddr, SocketAddr>> = Mutex::new(BTreeMap::new());

fn destinations() -> MutexGuard<'static, BTreeMap<SocketAddr, SocketAddr>> {
    DESTINATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn destination(source: SocketAddr) -> Option<SocketAddr> {
    destinations().get(&source).copied()
}

fn relay(limits: super::super::Limits) -> Running {
    Running::start(limits, |_| OriginalDestination::BySource(destination))
}

/// An application's socket that talks to the relay and wanted to talk to `to`.
fn application(relay: &Running, to: Option<SocketAddr>) -> UdpSocket {
    application_on("127.64.0.9", relay, to)
}

fn application_on(own: &str, relay: &Running, to: Option<SocketAddr>) -> UdpSocket {
    let own: IpAddr = own.parse().unwrap();
    let socket = UdpSocket::bind((own, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let listener = if own.is_ipv6() { own } else { relay.address.ip() };
    socket.connect((listener, relay.address.port())).unwrap();
    want(&socket, to);
    socket
}

fn want(socket: &UdpSocket, to: Option<SocketAddr>) {
    let own = socket.local_addr().unwrap();
    match to {
        Some(to) => destinations().insert(own, to),
        None => destinations().remove(&own),
    };
}

fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Answers each datagram with itself and the server's port.
struct Echo {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start() -> Self {
        let (socket, address) = server();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let mut answer = buffer[..length].to_vec();
                    answer.extend_from_slice(&address.port().to_be_bytes());
                    // One whose flow has ended meanwhile: that is told by the test.
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self { address, stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.take().unwrap().join();
        assert!(result.is_ok() || thread::panicking());
    }
}

fn receive_one(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 16];
    let length = socket.recv(&mut buffer).unwrap();
    buffer.truncate(length);
    buffer
}

/// Nothing has arrived, and the relay has passed on all that it was to.
fn expect_nothing(socket: &UdpSocket) {
    socket.set_nonblocking(true).unwrap();
    assert_eq!(socket.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::WouldBlock);
    socket.set_nonblocking(false).unwrap();
}

fn lost(relay: &Running, reason: &str) -> u64 {
    relay.metric(&format!("pillion_relay_datagrams_lost_total{{reason=\"{reason}\"}}"))
}

fn wait_for_flows(relay: &Running, outcome: &str, wanted: u64) {
    relay.wait_for(&format!("pillion_relay_flows_total{{outcome=\"{outcome}\"}}"), wanted);
}

#[test]
fn thousands_of_datagrams_of_many_flows_are_answered_in_order_by_whom_they_were_for() {
    const WAVES: usize = 40;
    const FLOWS: usize = 50;
    const EACH: usize = 4;
    let servers: Vec<Echo> = (0..7).map(|_| Echo::start()).collect();
    let relay = relay(LIMITS);
    let mut flows = Vec::new();
    for wave in 0..WAVES {
        for flow in 0..FLOWS {
            let server = servers[(wave + flow) % servers.len()].address;
            let own = if flow % 3 == 0 { "::1" } else { "127.64.0.9" };
            flows.push((application_on(own, &relay, Some(server)), server));
        }
        // New flows and some of before; all of a flow's at once, so that some arrive while it is made.
        let some = flows.len() - FLOWS - wave.min(5)..flows.len();
        for (number, (socket, _)) in flows[some.clone()].iter().enumerate() {
            for index in 0..EACH {
                socket.send(&[u8::try_from(number).unwrap(), index.try_into().unwrap()]).unwrap();
            }
        }
        for (number, (socket, server)) in flows[some].iter().enumerate() {
            for index in 0..EACH {
                let [high, low] = server.port().to_be_bytes();
                let wanted = [u8::try_from(number).unwrap(), index.try_into().unwrap(), high, low];
                assert_eq!(receive_one(socket), wanted);
            }
        }
    }
    for (socket, _) in &flows {
        expect_nothing(socket);
    }
    assert_eq!(relay.metric("pillion_relay_open_flows"), (WAVES * FLOWS) as u64);
    let sent = relay.metric("pillion_relay_datagrams_total{way=\"sent\"}");
    relay.wait_for("pillion_relay_datagrams_total{way=\"received\"}", sent);
    let records = relay.drained();
    assert_eq!(records.len(), WAVES * FLOWS);
    let sum = |field: &str| records.iter().map(|record| record[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("bytes_sent"), sum("bytes_received")), (2 * sent, 4 * sent));
    assert!(records.iter().all(|record| record["protocol"] == "udp" && record["outcome"] == "ok"));
}

#[test]
fn datagrams_keep_their_bounds_and_bytes_whatever_their_size() {
    let echo = Echo::start();
    let relay = relay(LIMITS);
    let socket = application(&relay, Some(echo.address));
    for (seed, size) in (1..).zip([0, 1, 1_472, 0, 9_000, 65_505, 3]) {
        let sent = noise(size, seed);
        socket.send(&sent).unwrap();
        let got = receive_one(&socket);
        assert_eq!(got.len(), size + 2);
        assert!(got[..size] == sent, "{size}");
    }
    let records = relay.drained();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0]["destination"], echo.address.to_string());
    let own = SocketAddr::new(echo.address.ip(), socket.local_addr().unwrap().port());
    assert_eq!(records[0]["source"], own.to_string(), "not the mark that it came from");
}

#[test]
fn what_has_no_destination_goes_nowhere_and_is_counted() {
    let echo = Echo::start();
    let relay = relay(LIMITS);
    let direct = application(&relay, None);
    let looping = application(&relay, Some(relay.address));
    for _ in 0..3 {
        direct.send(b"x").unwrap();
        looping.send(b"x").unwrap();
    }
    wait("the count", || (lost(&relay, "no_original_destination"), lost(&relay, "loop")) == (3, 3));
    // Not for ever.
    want(&direct, Some(echo.address));
    direct.send(b"x").unwrap();
    assert_eq!(receive_one(&direct)[..1], *b"x");
    assert_eq!(relay.metric("pillion_relay_open_flows"), 1);
    assert_eq!(relay.drained().len(), 1);
}

#[test]
fn a_quiet_flow_ends_and_its_source_may_begin_another() {
    let echo = Echo::start();
    let quiet = [Duration::from_millis(400), Duration::ZERO];
    let relay = relay(super::super::Limits { quiet, ..LIMITS });
    let socket = application(&relay, Some(echo.address));
    for round in 1..4 {
        socket.send(b"x").unwrap();
        assert_eq!(receive_one(&socket).len(), 3);
        wait_for_flows(&relay, "ok", round);
        assert_eq!(relay.metric("pillion_relay_open_flows"), 0);
    }
    assert_eq!(relay.drained().len(), 3);
}

#[test]
fn beyond_the_limit_the_quietest_flow_ends() {
    let echo = Echo::start();
    let relay = relay(super::super::Limits { flows: 4, ..LIMITS });
    let sockets: Vec<_> = (0..9).map(|_| application(&relay, Some(echo.address))).collect();
    for (number, socket) in (1..).zip(&sockets) {
        // The first one is never the quietest.
        for socket in [socket, &sockets[0]] {
            socket.send(b"x").unwrap();
            assert_eq!(receive_one(socket).len(), 3);
        }
        assert_eq!(relay.metric("pillion_relay_open_flows"), number.min(4));
    }
    wait_for_flows(&relay, "limit", 5);
    sockets[1].send(b"y").unwrap();
    assert_eq!(receive_one(&sockets[1])[..1], *b"y");
    let first = SocketAddr::new(echo.address.ip(), sockets[0].local_addr().unwrap().port());
    let records = relay.drained();
    let of_first: Vec<_> = records.iter().filter(|r| r["source"] == first.to_string()).collect();
    assert_eq!((of_first.len(), of_first[0]["bytes_sent"].as_u64()), (1, Some(10)));
}

#[test]
fn an_answer_to_a_closed_socket_ends_the_flow_and_is_refused() {
    let (server, address) = server();
    let relay = relay(LIMITS);
    let socket = application(&relay, Some(address));
    socket.send(b"one").unwrap();
    socket.send(b"two").unwrap();
    drop(socket);
    let mut buffer = [0; 9];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"one");
    assert_eq!(receive_one(&server), b"two", "sent before the close");
    server.connect(from).unwrap();
    server.send(b"who").unwrap();
    wait_for_flows(&relay, "ok", 1);
    let error = (0..2).find_map(|_| server.send(b"who").err()).expect("nobody is there");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_refusal_ends_nothing_and_is_told_by_the_record() {
    let (gone, address) = server();
    drop(gone);
    let relay = relay(LIMITS);
    let socket = application(&relay, Some(address));
    for _ in 0..3 {
        socket.send(b"x").unwrap();
    }
    relay.wait_for("pillion_relay_datagrams_total{way=\"sent\"}", 3);
    let late = UdpSocket::bind(address).unwrap();
    late.set_read_timeout(Some(PATIENCE)).unwrap();
    // Not lost, though the refusal of one before it waits to be told.
    socket.send(b"y").unwrap();
    assert_eq!(receive_one(&late), b"y");
    let records = relay.drained();
    assert_eq!((records.len(), &records[0]["outcome"]), (1, &"connect_refused".into()));
    assert_eq!(records[0]["bytes_sent"], 4);
}

#[test]
fn another_socket_with_the_same_source_has_its_own_destination() {
    let servers = [Echo::start(), Echo::start()];
    let relay = relay(LIMITS);
    let socket = application(&relay, None);
    for round in 0..20 {
        let server = servers[round % 2].address;
        want(&socket, Some(server));
        for _ in 0..3 {
            socket.send(b"x").unwrap();
            assert_eq!(receive_one(&socket)[1..], server.port().to_be_bytes());
        }
    }
    // Its socket is closed, and no other has its source: what it had sent is passed on.
    want(&socket, None);
    socket.send(b"x").unwrap();
    assert_eq!(receive_one(&socket)[1..], servers[1].address.port().to_be_bytes());
    let records = relay.drained();
    assert_eq!(records.len(), 20);
    assert!(records[..19].iter().all(|record| record["bytes_sent"] == 3));
}

#[test]
fn a_drain_takes_what_waits_lets_answers_come_and_refuses_what_is_new() {
    let (server, address) = server();
    let relay = relay(LIMITS);
    let socket = application(&relay, Some(address));
    socket.send(b"question").unwrap();
    let mut buffer = [0; 9];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    relay.request_stop();
    wait("the listener to end", || {
        // One that was heard is a flow, which may go on.
        let other = application(&relay, Some(address));
        let _ = other.send(b"new");
        other.send(b"new").is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    server.send_to(b"answer", from).unwrap();
    assert_eq!(receive_one(&socket), b"answer");
    let begun = Instant::now();
    let records = relay.ended();
    assert!(begun.elapsed() < PATIENCE / 2, "flows end by themselves");
    assert!(records.iter().any(|record| record["bytes_received"] == 6));
}

#[test]
fn the_second_request_ends_open_flows() {
    let echo = Echo::start();
    let relay = relay(LIMITS);
    let socket = application(&relay, Some(echo.address));
    socket.send(b"x").unwrap();
    assert_eq!(receive_one(&socket).len(), 3);
    relay.request_stop();
    relay.request_stop();
    let records = relay.ended();
    assert_eq!((records.len(), &records[0]["outcome"]), (1, &"drained".into()));
}

/// What a relay listens with, driven by hand.
fn by_hand(origin: OriginalDestination) -> (Datagrams, OwnedFd, SocketAddr, OwnedFd) {
    let free = || DatagramListener::beside(&super::super::Listener::on_free_port()).ok();
    let listeners = (0..50).find_map(|_| free()).expect("a port that is free");
    let (address, duplicate) = (listeners[0].address, listeners[0].socket.try_clone().unwrap());
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let datagrams = Datagrams::new(listeners, origin, (100, QUIET), &epoll, DATAGRAMS).unwrap();
    (datagrams, epoll, address, duplicate)
}

const DATAGRAMS: u64 = u64::MAX - 8;

#[test]
fn what_waits_at_the_listener_goes_before_what_came_after_to_the_flows_own_socket() {
    let (server, to) = server();
    let (mut datagrams, epoll, address, _) = by_hand(OriginalDestination::BySource(destination));
    let [socket, filler] = [Some(to), None].map(|to| {
        let socket = UdpSocket::bind("127.64.0.9:0").unwrap();
        socket.connect(address).unwrap();
        want(&socket, to);
        socket
    });
    let metrics = Metrics::new().0;
    let output = tempfile::tempfile().unwrap();
    let dropped = metrics.records_dropped.clone();
    let records = Records::spawn("process/1-2".parse().unwrap(), output, dropped).unwrap();
    let mut scratch = vec![0; 2 * LARGEST];
    let mut work = || {
        let mut events = Vec::with_capacity(16);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)).unwrap();
        for event in &events {
            if event.data.u64() >= DATAGRAMS {
                datagrams.note_listener(usize::try_from(event.data.u64() - DATAGRAMS).unwrap(), event.flags);
            } else {
                assert!(datagrams.note(event.data.u64(), event.flags));
            }
        }
        let tools = Tools { epoll: &epoll, metrics: &metrics, records: &records };
        datagrams.work(&tools, &mut scratch, Instant::now());
        datagrams.has_work()
    };
    socket.send(b"1").unwrap();
    // The second one is beyond what is taken in two turns.
    for _ in 0..2 * BURST {
        filler.send(b"x").unwrap();
    }
    socket.send(b"2").unwrap();
    assert!(work());
    socket.send(b"3").unwrap();
    while work() {}
    for wanted in [b"1", b"2", b"3"] {
        assert_eq!(receive_one(&server), wanted);
    }
    assert_eq!(metrics.lost(Outcome::NoOriginalDestination).get(), 2 * BURST as u64);
}

#[test]
fn a_listener_that_another_holder_ends_starts_a_drain() {
    let (mut datagrams, epoll, _, duplicate) = by_hand(OriginalDestination::Kernel);
    // Not connected, it says so, and ends nevertheless.
    let result = rustix::net::shutdown(&duplicate, rustix::net::Shutdown::Both);
    assert_eq!(result, Err(Errno::NOTCONN));
    let mut events = Vec::with_capacity(4);
    epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None).unwrap();
    let event: &epoll::Event = events.first().expect("an event");
    assert!(datagrams.note_listener(0, event.flags));
    assert!(!datagrams.note_listener(7, event.flags), "one that is gone");
}
