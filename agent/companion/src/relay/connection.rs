//! One relayed connection: two sockets and what is known of them. Copies bytes when it is told which socket is ready;
//! never waits, never looks at a clock, never touches another connection.
//!
//! Readiness is edge-triggered: a flag is set by an event and cleared only by a call that says "not now". Each
//! direction ends independently: the end of one side's stream is passed on when everything before it has been, by
//! shutting the other side for writing. A side that fails is *broken*: what it had sent before is still read and
//! passed on, and then the other side is reset.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    event::epoll::EventFlags,
    net::{Shutdown, shutdown},
};

use super::{
    buffers::Buffers,
    outq::unacknowledged,
    peer::Peer,
    record::{Direction, Outcome, Protocol, Record},
    socket::reset,
};

/// Bytes copied at a time, at most, and so the most that waits for a slow side; see the measurements in `relay`.
pub(super) const CHUNK: usize = 512 << 10;
/// The same while slow sides hold much; see `surplus`.
pub(super) const SMALL_CHUNK: usize = 128 << 10;
/// Chunks, and bytes, that one connection may copy in each direction before others have their turn.
const TURN: usize = 16;
const TURN_BYTES: usize = 2 << 20;

/// Which of the two sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The one that was accepted.
    Client = 0,
    /// The one that was dialled.
    Upstream = 1,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Client => Self::Upstream,
            Self::Upstream => Self::Client,
        }
    }
}

/// What a connection needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// An event.
    Waiting,
    /// Another turn: it has work left.
    Yielded,
    /// To be asked again a little later: the peer has not yet acknowledged what came before the reset.
    Flushing,
    /// To be closed.
    Ended(Outcome),
}

/// The bytes that passed in a turn.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moved {
    pub(super) sent: u64,
    pub(super) received: u64,
}

/// A connection whose upstream is being dialled or has been reached.
#[derive(Debug)]
pub(super) struct Connection {
    direction: Direction,
    source: SocketAddr,
    destination: SocketAddr,
    accepted_at: SystemTime,
    accepted: Instant,
    connect: Option<Duration>,
    failure: Option<Outcome>,
    flushing: bool,
    /// What its owner was told last of [`Connection::surplus`].
    counted: usize,
    peers: [Peer; 2],
}

impl Connection {
    pub(super) fn new(
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        accepted: (SystemTime, Instant),
        sockets: [OwnedFd; 2],
    ) -> Self {
        let peers = sockets.map(Peer::new);
        let (accepted_at, accepted) = accepted;
        Self {
            direction,
            source,
            destination,
            accepted_at,
            accepted,
            connect: None,
            failure: None,
            flushing: false,
            counted: 0,
            peers,
        }
    }

    /// Memory beyond a small chunk that it holds for each slow side. Also what this said when it was asked last.
    pub(super) fn surplus(&mut self) -> (usize, usize) {
        let of = |peer: &Peer| peer.pending.capacity().saturating_sub(SMALL_CHUNK);
        let now = self.peers.iter().map(of).sum();
        (std::mem::replace(&mut self.counted, now), now)
    }

    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    pub(super) fn socket(&self, side: Side) -> &OwnedFd {
        &self.peers[side as usize].socket
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connect.is_some()
    }

    /// What broke it first, if something did.
    pub(super) fn failure(&self) -> Option<Outcome> {
        self.failure
    }

    /// True when it is asked for the first time.
    pub(super) fn begin_flush(&mut self) -> bool {
        !std::mem::replace(&mut self.flushing, true)
    }

    /// Whether one side has sent something that is not yet read.
    pub(super) fn has_unread(&self, side: Side) -> bool {
        self.peers[side as usize].has_unread()
    }

    /// The upstream answered.
    pub(super) fn connected(&mut self, now: Instant) {
        self.connect = Some(now.saturating_duration_since(self.accepted));
    }

    /// Notes an epoll event of one side.
    pub(super) fn note(&mut self, side: Side, flags: EventFlags) {
        let peer = &mut self.peers[side as usize];
        peer.note(flags);
        if flags.contains(EventFlags::ERR) && (peer.ended || (self.connect.is_none() && !peer.has_unread())) {
            // No read will come across it. What a client sent before its reset is read when the dial is over.
            self.break_off(side);
        }
    }

    /// Copies what can be copied, both ways, `chunk` bytes at a time.
    pub(super) fn advance(&mut self, buffers: &mut Buffers, chunk: usize) -> (Progress, Moved) {
        if self.connect.is_none() {
            let ended = self.failure.map_or(Progress::Waiting, Progress::Ended);
            return (ended, Moved::default());
        }
        let before = (self.peers[1].taken, self.peers[0].taken);
        let broken = self.broken();
        let mut yielded = self.pump(Side::Client, buffers, chunk);
        yielded |= self.pump(Side::Upstream, buffers, chunk);
        // What broke just now may leave something to be read that had no reason to be read before.
        yielded |= broken != self.broken();
        let moved = Moved { sent: self.peers[1].taken - before.0, received: self.peers[0].taken - before.1 };
        (self.judge(yielded), moved)
    }

    fn broken(&self) -> [bool; 2] {
        [self.peers[0].broken, self.peers[1].broken]
    }

    fn judge(&self, yielded: bool) -> Progress {
        let [client, upstream] = &self.peers;
        let failure = self.failure.unwrap_or(Outcome::Ok);
        let (broken, healthy) = match (client.broken, upstream.broken) {
            (true, true) => return Progress::Ended(failure),
            (true, false) => (client, upstream),
            (false, true) => (upstream, client),
            (false, false) if client.shut && upstream.shut => return Progress::Ended(failure),
            (false, false) => return if yielded { Progress::Yielded } else { Progress::Waiting },
        };
        if yielded {
            Progress::Yielded
        } else if !broken.ended || !healthy.pending.is_empty() || unacknowledged(healthy.socket.as_fd()) > 0 {
            Progress::Flushing
        } else {
            Progress::Ended(failure)
        }
    }

    /// Copies from one side to the other until either has had enough; true when only the turn is over.
    fn pump(&mut self, from: Side, buffers: &mut Buffers, chunk: usize) -> bool {
        let mut copied = 0;
        for _ in 0..TURN {
            if copied >= TURN_BYTES {
                break;
            }
            let [client, upstream] = &mut self.peers;
            let (source, sink) = match from {
                Side::Client => (client, upstream),
                Side::Upstream => (upstream, client),
            };
            if sink.broken {
                return false;
            }
            let step = if sink.pending.is_empty() {
                if source.ended {
                    if source.broken {
                        // There is no end to pass on.
                        sink.release();
                    } else if !sink.shut {
                        sink.shut = true;
                        // When the other direction has ended before, both sockets are closed now, which says it too.
                        if !source.shut && shutdown(&sink.socket, Shutdown::Write).is_err() {
                            self.break_off(from.other());
                        }
                    }
                    return false;
                }
                if !source.readable {
                    sink.release();
                    return false;
                }
                if !sink.writable {
                    return false;
                }
                if let Some(byte) = source.urgent_byte() {
                    sink.send_urgent(byte).map_err(|()| from.other())
                } else {
                    let mut scratch = buffers.take();
                    let read = source.read(&mut scratch[..chunk]).map_err(|()| from);
                    let step = read.and_then(|length| {
                        copied += length;
                        // What filled the buffer is most probably followed by more.
                        let more = length == chunk;
                        sink.send(&mut scratch, length, more).map_err(|()| from.other())
                    });
                    buffers.give(scratch);
                    step
                }
            } else if sink.writable {
                sink.send_pending(buffers).map_err(|()| from.other())
            } else {
                return false;
            };
            if let Err(side) = step {
                self.break_off(side);
            }
        }
        true
    }

    fn break_off(&mut self, side: Side) {
        self.peers[side as usize].break_off();
        self.failure.get_or_insert(match side {
            Side::Client => Outcome::ResetByClient,
            Side::Upstream => Outcome::ResetByUpstream,
        });
    }

    /// Closes both sockets: in an orderly way when both streams have ended, else by a reset.
    pub(super) fn close(self, outcome: Outcome, now: Instant) -> Record {
        let [client, upstream] = self.peers;
        let record = Record {
            accepted: self.accepted_at,
            direction: self.direction,
            protocol: Protocol::Tcp,
            source: self.source,
            destination: Some(self.destination),
            bytes_sent: upstream.taken,
            bytes_received: client.taken,
            connect: self.connect,
            duration: now.saturating_duration_since(self.accepted),
            outcome,
        };
        if outcome == Outcome::Ok {
            drop((client.socket, upstream.socket));
        } else {
            reset(client.socket);
            reset(upstream.socket);
        }
        record
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A connection, driven by hand, and the two ends that its peers hold.
    pub(in super::super) fn connection() -> (Connection, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let [(ours, client), (theirs, upstream)] = [(); 2].map(|()| {
            let outer = TcpStream::connect(address).unwrap();
            outer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let inner = listener.accept().unwrap().0;
            inner.set_nonblocking(true).unwrap();
            (outer, OwnedFd::from(inner))
        });
        let accepted = (SystemTime::now(), Instant::now());
        let sockets = [client, upstream];
        let mut connection = Connection::new(Direction::Outbound, address, address, accepted, sockets);
        connection.connected(Instant::now());
        (connection, ours, theirs)
    }

    pub(in super::super) fn advance(connection: &mut Connection, chunk: usize) -> Progress {
        for side in [Side::Client, Side::Upstream] {
            connection.note(side, EventFlags::IN | EventFlags::OUT);
        }
        connection.advance(&mut Buffers::default(), chunk).0
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::Shutdown as End,
    };

    use super::{
        testing::{advance, connection},
        *,
    };

    #[test]
    fn memory_is_held_only_for_a_slow_side_and_is_bounded() {
        let (mut connection, ours, mut theirs) = connection();
        ours.set_nonblocking(true).unwrap();
        let block = vec![7; 1 << 20];
        let (mut written, mut stalled) = (0, 0);
        while stalled < 3 {
            match (&ours).write(&block) {
                Ok(length) => (written, stalled) = (written + length, 0),
                Err(_) => stalled += 1,
            }
            while advance(&mut connection, CHUNK) == Progress::Yielded {}
        }
        assert_eq!(connection.peers[0].pending.capacity(), 0);
        let pending = &connection.peers[1].pending;
        assert!(!pending.is_empty() && pending.capacity() <= CHUNK, "{}", pending.capacity());
        let surplus = pending.capacity().saturating_sub(SMALL_CHUNK);
        assert_eq!(connection.surplus(), (0, surplus));

        ours.shutdown(End::Write).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (mut got, mut buffer) = (0, vec![0; 1 << 20]);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline);
            advance(&mut connection, CHUNK);
            match theirs.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => got += length,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
        assert_eq!(got, written);
        assert_eq!(connection.peers[1].pending.capacity(), 0);
        assert_eq!(connection.surplus(), (surplus, 0));
    }

    #[test]
    fn what_fills_the_buffer_exactly_is_not_held_back() {
        let (mut connection, mut ours, mut theirs) = connection();
        ours.write_all(&[3; 32]).unwrap();
        assert_eq!(advance(&mut connection, 16), Progress::Waiting);
        assert!(!connection.peers[1].held);
        theirs.read_exact(&mut [0; 32]).unwrap();
    }

    #[test]
    fn one_connection_cannot_keep_the_thread() {
        let (mut connection, mut ours, _theirs) = connection();
        ours.write_all(&[1; 16 * (TURN + 1)]).unwrap();
        connection.note(Side::Client, EventFlags::IN);
        connection.note(Side::Upstream, EventFlags::OUT);
        let (progress, moved) = connection.advance(&mut Buffers::default(), 16);
        assert_eq!((progress, moved.sent), (Progress::Yielded, 16 * TURN as u64));
    }
}
