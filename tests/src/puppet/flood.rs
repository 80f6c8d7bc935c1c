//! Two puppets' parts in one experiment: many connections to destinations that are all different, each told in its own
//! bytes where it wanted to go, and a companion that asks late and compares.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketType, sockopt},
};
use serde::{Deserialize, Serialize};

/// Longest wait for one connect, send or receive.
const WAIT: Duration = Duration::from_secs(20);
/// A companion that has accepted this many asks for their destinations, or when nobody has come for [`IDLE`].
const IDLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 30_000_000 };

/// What became of the connections of a flood.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flooded {
    /// Connected, told where to, closed.
    pub sent: u32,
    /// The others, by error number.
    pub failed: BTreeMap<i32, u32>,
}

/// What a companion has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audited {
    /// Accepted in all.
    pub accepted: u32,
    /// The answer was where the connection itself says that it wanted to go.
    pub right: u32,
    /// It was another.
    pub wrong: u32,
    /// There was no answer.
    pub unanswered: u32,
    /// The connection did not say where it wanted to go.
    pub silent: u32,
}

impl Audited {
    pub(super) fn add(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.right += other.right;
        self.wrong += other.wrong;
        self.unanswered += other.unanswered;
        self.silent += other.silent;
    }
}

/// Where connection `number` of a flood goes: all of them are different.
fn destination(number: u32) -> SocketAddrV4 {
    let [_, high, middle, low] = number.to_be_bytes();
    let port = 1024 + u16::try_from(number % 60_000).unwrap_or(0);
    SocketAddrV4::new(Ipv4Addr::new(10, 100 + high, middle, low), port)
}

/// Makes `connections` connections on `threads` threads, writes and closes at once.
pub(super) fn flood(connections: u32, threads: u32) -> Flooded {
    let (next, sum) = (AtomicU32::new(0), Mutex::new(Flooded::default()));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut own = Flooded::default();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= connections {
                        break;
                    }
                    match one(number) {
                        Ok(()) => own.sent += 1,
                        Err(error) => *own.failed.entry(error.raw_os_error().unwrap_or(0)).or_default() += 1,
                    }
                }
                let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                sum.sent += own.sent;
                for (error, count) in own.failed {
                    *sum.failed.entry(error).or_default() += count;
                }
            });
        }
    });
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn one(number: u32) -> io::Result<()> {
    connect(number).map(drop)
}

/// Connection `number`, which has said where it wants to go.
pub(super) fn connect(number: u32) -> io::Result<TcpStream> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(WAIT))?;
    rustix::net::connect(&socket, &destination(number))?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(&number.to_be_bytes())?;
    Ok(stream)
}

/// A companion in the background.
#[derive(Debug)]
pub(super) struct Audit {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Audited>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Audit {
    /// Listens on `address`; each of `threads` threads accepts up to `batch` connections before it asks for any of
    /// them, and holds each batch for `stall`. With `asks` off it closes them without asking.
    pub(super) fn start(
        address: SocketAddr,
        threads: u32,
        batch: usize,
        stall: Duration,
        asks: bool,
    ) -> io::Result<(Self, SocketAddr)> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, 4096)?;
        let listener = Arc::new(TcpListener::from(socket));
        listener.set_nonblocking(true)?;
        let local = listener.local_addr()?;
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let threads = (0..threads)
            .map(|_| {
                let (listener, stop, seen) = (Arc::clone(&listener), Arc::clone(&stop), Arc::clone(&seen));
                thread::spawn(move || audit(&listener, batch, stall, asks, &stop, &seen))
            })
            .collect();
        Ok((Self { stop, seen, threads }, local))
    }

    pub(super) fn seen(&self) -> Audited {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stop(self) -> Audited {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            // A panic shows in the numbers, which then do not add up.
            let _ = thread.join();
        }
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn audit(
    listener: &TcpListener,
    batch: usize,
    stall: Duration,
    asks: bool,
    stop: &AtomicBool,
    seen: &Mutex<Audited>,
) {
    let mut held = Vec::with_capacity(batch);
    while !stop.load(Ordering::Relaxed) {
        while held.len() < batch {
            match listener.accept() {
                Ok((stream, _)) => held.push(stream),
                Err(_) if matches!(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&IDLE)), Ok(1)) => {
                }
                Err(_) => break,
            }
        }
        if held.is_empty() {
            continue;
        }
        let until = Instant::now() + stall;
        while Instant::now() < until && !stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(5).min(stall));
        }
        let mut own = Audited::default();
        for mut stream in held.drain(..) {
            own.accepted += 1;
            if asks {
                compare(&mut stream, &mut own);
            }
        }
        seen.lock().unwrap_or_else(PoisonError::into_inner).add(own);
    }
}

pub(super) fn compare(stream: &mut TcpStream, seen: &mut Audited) {
    let answer = sockopt::ip_original_dst(&*stream);
    let mut number = [0; 4];
    let told = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(WAIT)))
        .and_then(|()| stream.read_exact(&mut number));
    match (told, answer) {
        (Err(_), _) => seen.silent += 1,
        (Ok(()), Err(_)) => seen.unanswered += 1,
        (Ok(()), Ok(answer)) if answer == destination(u32::from_be_bytes(number)) => seen.right += 1,
        (Ok(()), Ok(_)) => seen.wrong += 1,
    }
}
