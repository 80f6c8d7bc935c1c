//! A TCP echo server on threads of the test, inside a namespace: the far end of what workloads dial.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::NetNs;

/// A peer that is silent for as long is dropped.
const SILENCE: Duration = Duration::from_secs(30);
/// Between two looks at whether to stop.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Sends back what it receives, until the peer's end of stream, and then ends its own. Stops when dropped.
#[derive(Debug)]
pub struct EchoServer {
    address: SocketAddr,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl EchoServer {
    /// Listens on `address` inside `netns`; port 0 takes a free one.
    pub fn start(netns: &NetNs, address: &str) -> Result<Self> {
        Self::over(netns.run(|| TcpListener::bind(address)), address)
    }

    /// The same in this process's own namespace.
    pub fn start_here(address: &str) -> Result<Self> {
        Self::over(TcpListener::bind(address), address)
    }

    fn over(listener: io::Result<TcpListener>, address: &str) -> Result<Self> {
        let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (peers, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let acceptor = thread::spawn({
            let (peers, stop) = (Arc::clone(&peers), Arc::clone(&stop));
            move || accept(&listener, &peers, &stop)
        });
        Ok(Self { address, peers, stop, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The peers of all connections so far, as this end sees them.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(acceptor) = self.acceptor.take() {
            // It panics on nothing; and if it did, dropping must not.
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, peers: &Mutex<Vec<SocketAddr>>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // An interrupted or failed poll only means an earlier look.
        let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&TICK));
        while let Ok((stream, peer)) = listener.accept() {
            peers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(peer);
            thread::spawn(move || serve(stream));
        }
    }
}

/// Echoes one connection to its end. An error is the peer's doing, who sees it on its own side.
pub(crate) fn serve(mut stream: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    let ready = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(SILENCE)))
        .and_then(|()| stream.set_write_timeout(Some(SILENCE)));
    if ready.is_err() {
        return;
    }
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
