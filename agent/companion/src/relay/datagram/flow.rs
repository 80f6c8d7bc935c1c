//! One flow: an application's socket on one side, one destination on the other, and a socket of the relay's for each. Passes
//! datagrams when it is told which socket is ready; never waits, never touches another flow.
//!
//! Readiness is edge-triggered, as for connections. A side is not read while the other one does not take what was read.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    time::{Instant, SystemTime},
};

use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{SendFlags, send, sendto},
};

use super::{
    super::{
        connection::Side,
        origin::OriginalDestination,
        record::{Direction, Outcome, Protocol, Record},
        socket::outcome_of,
    },
    sockets::{self, receive},
    table::Patience,
};

/// Datagrams that one flow may pass in each direction before others have their turn.
pub(super) const TURN: usize = 64;
/// Datagrams that may wait for a socket that does not take them; further ones are lost.
const PENDING: usize = 16;
/// A socket tells one earlier error instead of sending; more than a few in a row are the datagram's own.
const ATTEMPTS: usize = 3;
/// Where questions to resolvers go (RFC 1035).
const DNS: u16 = 53;

/// What a flow needs next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// An event.
    Waiting,
    /// Another turn: it has work left.
    Yielded,
    /// Its source is now another socket of the application's, which sent this datagram there.
    Elsewhere(Vec<u8>),
    /// To be closed: the application's socket is.
    Gone,
}

/// What passed in a turn.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// Datagrams and bytes from the application.
    pub(super) sent: (u64, u64),
    /// Datagrams and bytes to the application.
    pub(super) received: (u64, u64),
    /// One for each datagram that was lost.
    pub(super) lost: Vec<Outcome>,
    /// Of another source: they came before the socket was the flow's own.
    pub(super) strays: Vec<(SocketAddr, Vec<u8>)>,
}

#[derive(Debug)]
struct End {
    socket: OwnedFd,
    readable: bool,
    writable: bool,
    /// Not yet taken by this side. Empty unless it is slow.
    pending: VecDeque<Vec<u8>>,
    /// The peer, where it must be named although the socket has it: redirection's programs are asked about the source of such
    /// an answer only.
    named: Option<SocketAddr>,
}

impl End {
    fn new(socket: OwnedFd, named: Option<SocketAddr>) -> Self {
        Self { socket, readable: false, writable: true, pending: VecDeque::new(), named }
    }

    fn send(&self, datagram: &[u8]) -> Result<usize, Errno> {
        match &self.named {
            Some(peer) => sendto(&self.socket, datagram, SendFlags::NOSIGNAL, peer),
            None => send(&self.socket, datagram, SendFlags::NOSIGNAL),
        }
    }

    fn note(&mut self, flags: EventFlags) {
        self.writable |= flags.contains(EventFlags::OUT);
        self.readable |= flags.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP);
    }

    /// Sends `datagram`, or keeps it, or says why it is lost. Errors of earlier datagrams are told to `note`.
    fn give(&mut self, datagram: &[u8], mut note: impl FnMut(Errno)) -> Result<(), Outcome> {
        if self.pending.is_empty() && self.writable {
            let mut last = Errno::AGAIN;
            for _ in 0..ATTEMPTS {
                match self.send(datagram) {
                    Ok(_) => return Ok(()),
                    Err(Errno::AGAIN) => {
                        self.writable = false;
                        return self.keep(datagram);
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => {
                        note(error);
                        last = error;
                    }
                }
            }
            return Err(outcome_of(last));
        }
        self.keep(datagram)
    }

    fn keep(&mut self, datagram: &[u8]) -> Result<(), Outcome> {
        if self.pending.len() >= PENDING {
            return Err(Outcome::Limit);
        }
        self.pending.push_back(datagram.to_vec());
        Ok(())
    }

    /// Sends what was kept, as far as the socket takes it; true when nothing is left.
    fn give_pending(&mut self, mut note: impl FnMut(Errno), lost: &mut Vec<Outcome>) -> bool {
        while self.writable {
            let mut waiting = std::mem::take(&mut self.pending);
            let Some(datagram) = waiting.pop_front() else { return true };
            let given = self.give(&datagram, &mut note);
            // Kept again, it is still the first.
            self.pending.append(&mut waiting);
            lost.extend(given.err());
        }
        self.pending.is_empty()
    }
}

/// A flow whose destination is known.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is independent of the others")]
pub(super) struct Flow {
    /// The listener's address, which is the answering socket's.
    pub(super) listener: SocketAddr,
    /// Where its datagrams come from.
    pub(super) peer: SocketAddr,
    /// The same as the workload sees it.
    source: SocketAddr,
    pub(super) destination: SocketAddr,
    began_at: SystemTime,
    began: Instant,
    /// Datagrams of this flow may wait at the listener, which are older than those at its own socket.
    pub(super) fresh: bool,
    /// Waits for a turn.
    pub(super) queued: bool,
    answered: bool,
    failure: Option<Outcome>,
    gone: bool,
    bytes: [u64; 2],
    ends: [End; 2],
}

impl Flow {
    /// From `peer`, by sockets for application and destination. `source` as [`Record::source`].
    pub(super) fn new(
        (listener, peer, source): (SocketAddr, SocketAddr, SocketAddr),
        destination: SocketAddr,
        (began_at, began): (SystemTime, Instant),
        [answering, upstream]: [OwnedFd; 2],
    ) -> Self {
        let named = rustix::net::getpeername(&answering)
            .ok()
            .flatten()
            .and_then(|peer| SocketAddr::try_from(peer).ok())
            .filter(|peer| peer.ip().to_canonical().is_loopback());
        Self {
            listener,
            peer,
            source,
            destination,
            began_at,
            began,
            fresh: true,
            queued: false,
            answered: false,
            failure: None,
            gone: false,
            bytes: [0; 2],
            ends: [End::new(answering, named), End::new(upstream, None)],
        }
    }

    pub(super) fn note(&mut self, side: Side, flags: EventFlags) {
        self.ends[side as usize].note(flags);
    }

    /// How long it may be quiet after what has passed last.
    pub(super) fn patience(&self, passed: &Passed) -> Patience {
        let answered = passed.received.0 > 0 && self.destination.port() == DNS;
        if answered { Patience::Answered } else { Patience::Open }
    }

    /// A datagram of the application's that came by the listener.
    pub(super) fn forward(&mut self, datagram: &[u8], passed: &mut Passed) {
        let Self { ends: [_, upstream], failure, .. } = self;
        match upstream.give(datagram, |error| note(failure, error)) {
            Ok(()) => self.count(Side::Upstream, datagram.len(), passed),
            Err(outcome) => passed.lost.push(outcome),
        }
    }

    /// Whether what its source sends now still goes to its destination: the application may have given its address to another
    /// socket since. Without an answer the socket is closed, and there is no other.
    pub(super) fn goes_on(&self, origin: OriginalDestination) -> bool {
        let asked = origin.of(Direction::Outbound, self.ends[0].socket.as_fd(), self.listener);
        asked.is_none_or(|asked| asked == self.destination)
    }

    /// Passes what can be passed, both ways.
    pub(super) fn advance(
        &mut self,
        origin: OriginalDestination,
        scratch: &mut [u8],
        passed: &mut Passed,
    ) -> Progress {
        let mut yielded = match self.send(origin, scratch, passed) {
            Ok(yielded) => yielded,
            Err(elsewhere) => return elsewhere,
        };
        yielded |= self.answer(scratch, passed);
        let [answering, upstream] = &self.ends;
        if self.gone && !self.fresh && !answering.readable && upstream.pending.is_empty() {
            Progress::Gone
        } else if yielded {
            Progress::Yielded
        } else {
            Progress::Waiting
        }
    }

    /// From the application; true when only the turn is over.
    fn send(
        &mut self,
        origin: OriginalDestination,
        scratch: &mut [u8],
        passed: &mut Passed,
    ) -> Result<bool, Progress> {
        for _ in 0..TURN {
            let Self { ends: [answering, upstream], failure, .. } = self;
            if !upstream.give_pending(|error| note(failure, error), &mut passed.lost)
                || self.fresh
                || !answering.readable
            {
                return Ok(false);
            }
            match receive(answering.socket.as_fd(), scratch) {
                Ok((length, from)) if from != self.peer => {
                    passed.strays.push((from, scratch[..length].to_vec()));
                }
                Ok((length, _)) => {
                    if !self.goes_on(origin) {
                        return Err(Progress::Elsewhere(scratch[..length].to_vec()));
                    }
                    self.forward(&scratch[..length], passed);
                }
                Err(Errno::AGAIN) => answering.readable = false,
                Err(Errno::INTR) => {}
                // The answer before met no socket.
                Err(_) => self.gone = true,
            }
        }
        Ok(true)
    }

    /// To the application; true when only the turn is over.
    fn answer(&mut self, scratch: &mut [u8], passed: &mut Passed) -> bool {
        for _ in 0..TURN {
            let Self { ends: [answering, upstream], gone, failure, .. } = self;
            if !answering.give_pending(|_| *gone = true, &mut passed.lost) || !upstream.readable {
                return false;
            }
            match receive(upstream.socket.as_fd(), scratch) {
                Ok((length, _)) => {
                    self.answered = true;
                    match answering.give(&scratch[..length], |_| *gone = true) {
                        Ok(()) => self.count(Side::Client, length, passed),
                        Err(outcome) => passed.lost.push(outcome),
                    }
                }
                Err(Errno::AGAIN) => upstream.readable = false,
                Err(Errno::INTR) => {}
                // An unconnected application would not hear of it, and a connected one cannot be told.
                Err(error) => note(failure, error),
            }
        }
        true
    }

    fn count(&mut self, to: Side, length: usize, passed: &mut Passed) {
        self.bytes[to as usize] += length as u64;
        let passed = match to {
            Side::Client => &mut passed.received,
            Side::Upstream => &mut passed.sent,
        };
        passed.0 += 1;
        passed.1 += length as u64;
    }

    /// Ends it: what the application had sent to this socket is passed on, and what it sends from now on arrives at the
    /// listener. Its record, and the socket that answered.
    pub(super) fn close(
        mut self,
        outcome: Outcome,
        now: Instant,
        scratch: &mut [u8],
        passed: &mut Passed,
    ) -> Record {
        // Fails only without memory; then what arrives meanwhile is lost.
        let _ = sockets::retire(self.ends[0].socket.as_fd(), self.listener);
        loop {
            match receive(self.ends[0].socket.as_fd(), scratch) {
                Ok((length, from)) if from == self.peer => self.forward(&scratch[..length], passed),
                Ok((length, from)) => passed.strays.push((from, scratch[..length].to_vec())),
                Err(Errno::AGAIN) => break,
                // Told once each.
                Err(_) => {}
            }
        }
        passed.lost.extend(self.ends[1].pending.iter().map(|_| Outcome::Limit));
        self.record(outcome, now)
    }

    /// As [`Flow::close`] for a source that goes on to another destination: gives its socket back as it is.
    pub(super) fn leave(self, now: Instant) -> (Record, OwnedFd) {
        let record = self.record(Outcome::Ok, now);
        let [answering, _] = self.ends;
        (record, answering.socket)
    }

    fn record(&self, outcome: Outcome, now: Instant) -> Record {
        let unheard = self.failure.filter(|_| outcome == Outcome::Ok && !self.answered);
        Record {
            accepted: self.began_at,
            direction: Direction::Outbound,
            protocol: Protocol::Udp,
            source: self.source,
            destination: Some(self.destination),
            bytes_sent: self.bytes[Side::Upstream as usize],
            bytes_received: self.bytes[Side::Client as usize],
            connect: None,
            duration: now.saturating_duration_since(self.began),
            outcome: unheard.unwrap_or(outcome),
        }
    }
}

fn note(failure: &mut Option<Outcome>, error: Errno) {
    failure.get_or_insert(outcome_of(error));
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn what_a_slow_side_does_not_take_is_kept_in_order_and_bounded() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut end = End::new(ours.into(), None);
        let never = |error| panic!("{error}");
        let (mut given, mut lost) = (0_u32, vec![]);
        while end.pending.len() < PENDING {
            assert_eq!(end.give(&given.to_ne_bytes(), never), Ok(()));
            given += 1;
            assert!(given < 100_000, "it takes everything");
        }
        assert_eq!(end.give(b"too many", never), Err(Outcome::Limit));
        assert!(!end.give_pending(never, &mut lost), "not writable");
        let mut got = 0_u32;
        let mut buffer = [0; 9];
        while got < given {
            while let Ok(length) = theirs.recv(&mut buffer) {
                assert_eq!(buffer[..length], got.to_ne_bytes());
                got += 1;
            }
            end.note(EventFlags::OUT);
            end.give_pending(never, &mut lost);
        }
        assert!(end.pending.is_empty() && lost.is_empty());
    }

    #[test]
    fn a_resolvers_answer_is_the_end_of_what_was_asked() {
        let now = (SystemTime::now(), Instant::now());
        for (destination, wanted) in [("192.0.2.1:53", Patience::Answered), ("192.0.2.1:443", Patience::Open)]
        {
            let own = "127.64.0.1:1".parse().unwrap();
            let sockets = [(); 2].map(|()| UnixDatagram::unbound().unwrap().into());
            let flow = Flow::new((own, own, own), destination.parse().unwrap(), now, sockets);
            let answered = Passed { received: (1, 9), ..Passed::default() };
            assert_eq!(flow.patience(&answered), wanted);
            let asked = Passed { sent: (1, 9), ..Passed::default() };
            assert_eq!(flow.patience(&asked), Patience::Open);
        }
    }
}
