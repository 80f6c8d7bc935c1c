//! Two puppets' parts in an experiment with many connections that stay open: each is told in its own bytes where it wanted
//! to go, and the companion asks at once, compares, and keeps it.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketType, sockopt},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use super::{
    flood::{self, Flooded},
    protocol::Audited,
};

/// Between two looks at whether to stop.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 30_000_000 };

/// As many descriptors as this process may have.
fn make_room() -> io::Result<()> {
    let may = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: may, maximum: may })?)
}

/// Makes `connections` connections and returns those that came about.
pub(super) fn open(connections: u32) -> io::Result<(Vec<TcpStream>, Flooded)> {
    make_room()?;
    let (mut held, mut told) = (Vec::new(), Flooded::default());
    for number in 0..connections {
        match flood::connect(number) {
            Ok(stream) => {
                told.sent += 1;
                held.push(stream);
            }
            Err(error) => *told.failed.entry(error.raw_os_error().unwrap_or(0)).or_default() += 1,
        }
    }
    Ok((held, told))
}

/// A companion in the background that keeps what it accepts.
#[derive(Debug)]
pub(super) struct Keeper {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Audited>>,
    thread: thread::JoinHandle<()>,
}

impl Keeper {
    /// Listens on `address`.
    pub(super) fn start(address: SocketAddr) -> io::Result<(Self, SocketAddr)> {
        make_room()?;
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, 4096)?;
        let listener = TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        let local = listener.local_addr()?;
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let thread = thread::spawn({
            let (stop, seen) = (Arc::clone(&stop), Arc::clone(&seen));
            move || keep(&listener, &stop, &seen)
        });
        Ok((Self { stop, seen, thread }, local))
    }

    pub(super) fn seen(&self) -> Audited {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes everything.
    pub(super) fn stop(self) -> Audited {
        self.stop.store(true, Ordering::Relaxed);
        // A panic shows in the numbers, which then do not add up.
        let _ = self.thread.join();
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keep(listener: &TcpListener, stop: &AtomicBool, seen: &Mutex<Audited>) {
    let mut kept = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        // An interrupted or failed poll only means an earlier look.
        let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&TICK));
        while let Ok((mut stream, _)) = listener.accept() {
            let mut own = Audited { accepted: 1, ..Audited::default() };
            flood::compare(&mut stream, &mut own);
            kept.push(stream);
            seen.lock().unwrap_or_else(PoisonError::into_inner).add(own);
        }
    }
}
