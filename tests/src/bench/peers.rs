//! The processes that talk: one that serves, blocking and one connection at a time, and one that measures.

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    getsockopt,
    sockopt::{Ip6tOriginalDst, OriginalDst},
};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use super::Kind;

/// First byte of a connection: what the client wants. An echo comes back byte for byte, a stream is answered at its end.
const ECHO: u8 = b'e';
const STREAM: u8 = b's';
const MIB: usize = 1 << 20;
/// A stream's sample: enough that it does not matter where the scheduler switches between sender and receiver.
const MIBS_PER_SAMPLE: usize = 16;
const WAIT: Duration = Duration::from_secs(20);

/// What the measuring process is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) kind: Kind,
    pub(super) destination: SocketAddr,
    pub(super) batch: u32,
}

/// Serves on all `addresses`. Asks every connection for its original destination, as a companion does, whether there is
/// one or not. Prints one line when it listens; ends with its input.
pub(super) fn serve(addresses: &[&str]) -> Result<()> {
    let mut listeners = Vec::new();
    for address in addresses {
        listeners.push(TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?);
    }
    println!("ready");
    let stdin = io::stdin();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let mut ready = vec![PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        ready.extend(listeners.iter().map(|l| PollFd::new(l, PollFlags::IN)));
        poll(&mut ready, None)?;
        if !ready[0].revents().is_empty() {
            return Ok(());
        }
        let arrived: Vec<bool> = ready[1..].iter().map(|r| !r.revents().is_empty()).collect();
        for (listener, _) in listeners.iter().zip(arrived).filter(|(_, arrived)| *arrived) {
            let (stream, _) = listener.accept()?;
            // A client that goes away in the middle is its own loss.
            let _ = serve_one(stream, &mut buffer);
        }
    }
}

fn serve_one(mut stream: TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    if stream.local_addr()?.is_ipv4() {
        let _ = getsockopt(&stream, OriginalDst);
    } else {
        let _ = getsockopt(&stream, Ip6tOriginalDst);
    }
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut first = [0];
    stream.read_exact(&mut first)?;
    if first[0] == ECHO {
        stream.write_all(&first)?;
        loop {
            match stream.read(buffer)? {
                0 => return Ok(()),
                length => stream.write_all(&buffer[..length])?,
            }
        }
    }
    let mut received = 0;
    loop {
        match stream.read(buffer)? {
            0 => return Ok(()),
            length => received += length,
        }
        while received >= MIB {
            received -= MIB;
            stream.write_all(&[STREAM])?;
        }
    }
}

/// Carries out orders from stdin, a line each; answers with a line of samples in nanoseconds.
pub(super) fn measure() -> Result<()> {
    let mut stdout = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?)?;
        let samples = match order.kind {
            Kind::Connection => connections(&order),
            Kind::Connect => connects(&order),
            Kind::Message64 => messages(&order, 64),
            Kind::Message16K => messages(&order, 16 * 1024),
            Kind::Stream => stream(&order),
        }
        .with_context(|| format!("{order:?}"))?;
        serde_json::to_writer(&mut stdout, &samples)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
    }
    Ok(())
}

fn dial(destination: SocketAddr, first: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(destination)?;
    stream.write_all(&[first])?;
    Ok(stream)
}

fn connections(order: &Order) -> io::Result<Vec<u64>> {
    let mut samples = Vec::new();
    for _ in 0..order.batch {
        let begun = Instant::now();
        let mut stream = dial(order.destination, ECHO)?;
        stream.read_exact(&mut [0])?;
        drop(stream);
        samples.push(nanoseconds(begun));
    }
    Ok(samples)
}

fn connects(order: &Order) -> io::Result<Vec<u64>> {
    let mut samples = Vec::new();
    for _ in 0..order.batch {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(order.destination)?;
        let connected = nanoseconds(begun);
        stream.write_all(&[ECHO])?;
        stream.read_exact(&mut [0])?;
        let begun = Instant::now();
        drop(stream);
        samples.push(connected + nanoseconds(begun));
    }
    Ok(samples)
}

fn messages(order: &Order, size: usize) -> io::Result<Vec<u64>> {
    let mut stream = dial(order.destination, ECHO)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.read_exact(&mut [0])?;
    let mut message = vec![7; size];
    let mut samples = Vec::new();
    for _ in 0..order.batch {
        let begun = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        samples.push(nanoseconds(begun));
    }
    Ok(samples)
}

fn stream(order: &Order) -> io::Result<Vec<u64>> {
    let mut stream = dial(order.destination, STREAM)?;
    stream.set_read_timeout(Some(WAIT))?;
    let chunk = vec![7; 64 * 1024];
    let mut acknowledged = [0; MIBS_PER_SAMPLE];
    let mut samples = Vec::new();
    for _ in 0..order.batch {
        let begun = Instant::now();
        for _ in 0..MIBS_PER_SAMPLE * MIB / chunk.len() {
            stream.write_all(&chunk)?;
        }
        stream.read_exact(&mut acknowledged)?;
        samples.push(nanoseconds(begun) / MIBS_PER_SAMPLE as u64);
    }
    Ok(samples)
}

fn nanoseconds(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
