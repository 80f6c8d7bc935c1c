//! The loop that runs a relay: one thread, one epoll. Owns the listeners, the open connections and their deadlines.
//!
//! Nothing here blocks but `epoll_wait`, and that with the nearest deadline. Accepting pauses while the limit on
//! connections is reached or descriptors have run out; what then waits, waits in the kernel's backlog.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, EventData, EventFlags},
    },
    io::{Errno, Result},
    net::{SocketFlags, acceptfrom_with},
};

use super::{
    buffers::Buffers,
    connection::{Connection, Progress, Side},
    datagram::{DatagramListener, Datagrams, Tools},
    metrics::Metrics,
    origin::{OriginalDestination, own_address, plain, source},
    record::{Direction, Outcome, Protocol, Record, Records},
    slab::{Slab, Token},
    socket::{self, Listener},
    surplus::{SURPLUS, Surplus},
};

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;
/// Connections accepted on one listener before the others have their turn.
const BURST: usize = 64;
/// Bursts taken from each listener before it is closed: as many as empty the backlog.
const DRAIN_BURSTS: usize = 64;
/// Without descriptors or memory, accepting is tried again after this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often a connection that only waits for acknowledgements before its reset is looked at.
const FLUSH_CHECK: Duration = Duration::from_millis(5);
/// A connection that is to be reset gets this long for what came before the reset.
const FLUSH: Duration = Duration::from_secs(30);

/// Events of the file descriptor that asks the relay to stop.
const STOP: u64 = u64::MAX;
/// Events of listener `n` are `LISTENER + n`; the places of connections never reach that high.
const LISTENER: u64 = u64::MAX - 16;
/// The same for datagrams.
const DATAGRAMS: u64 = u64::MAX - 8;

/// What bounds a relay.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) connections: usize,
    pub(super) flows: usize,
    /// How long a flow of datagrams may be quiet: in general, and after the answer of a resolver.
    pub(super) quiet: [Duration; 2],
    pub(super) connect_timeout: Duration,
    pub(super) drain_grace: Duration,
}

/// Where a drain stands.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Serving,
    /// No new connections; at the deadline the open ones are reset.
    Draining(Instant),
}

/// A listener, and whether connections may be waiting in its backlog.
struct Waiting {
    listener: Listener,
    ready: bool,
}

/// A relay that listens.
pub(super) struct Relay {
    epoll: OwnedFd,
    /// Readable once for each request to stop; a read consumes one.
    stop: OwnedFd,
    listeners: Vec<Waiting>,
    origin: OriginalDestination,
    limits: Limits,
    metrics: Metrics,
    records: Records,
    phase: Phase,
    connections: Slab<Connection>,
    datagrams: Datagrams,
    surplus: Surplus,
    /// Being dialled, by deadline.
    dialling: VecDeque<(Instant, Token)>,
    dialling_count: usize,
    /// Waiting to be reset, with their deadlines.
    flushing: Vec<(Instant, Token)>,
    flush_check: Instant,
    /// Have work left from their last turn.
    turns: VecDeque<Token>,
    accept_after: Option<Instant>,
    buffers: Buffers,
}

impl Relay {
    /// # Errors
    /// No descriptor for epoll.
    pub(super) fn new(
        (listeners, datagrams): (Vec<Listener>, Vec<DatagramListener>),
        origin: OriginalDestination,
        limits: Limits,
        (metrics, records): (Metrics, Records),
        stop: OwnedFd,
    ) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
        for (number, listener) in (0..).zip(&listeners) {
            let data = EventData::new_u64(LISTENER + number);
            epoll::add(&epoll, &listener.socket, data, EventFlags::IN | EventFlags::ET)?;
        }
        let bounds = (limits.flows, limits.quiet);
        let datagrams = Datagrams::new(datagrams, origin, bounds, &epoll, DATAGRAMS)?;
        Ok(Self {
            epoll,
            stop,
            listeners: listeners.into_iter().map(|listener| Waiting { listener, ready: false }).collect(),
            origin,
            limits,
            metrics,
            records,
            phase: Phase::Serving,
            connections: Slab::default(),
            datagrams,
            surplus: Surplus::up_to(SURPLUS),
            dialling: VecDeque::new(),
            dialling_count: 0,
            flushing: Vec::new(),
            flush_check: Instant::now(),
            turns: VecDeque::new(),
            accept_after: None,
            buffers: Buffers::default(),
        })
    }

    /// Relays until a drain has ended.
    ///
    /// # Errors
    /// epoll failed, which it has no reason to.
    pub(super) fn run(mut self) -> Result<Records> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            if let Phase::Draining(_) = self.phase
                && self.connections.len() == 0
                && self.datagrams.is_over()
            {
                return Ok(self.records);
            }
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            let now = Instant::now();
            for event in events.drain(..) {
                self.handle(event.data.u64(), event.flags, now);
            }
            for number in 0..self.listeners.len() {
                self.accept(number, now);
            }
            for _ in 0..self.turns.len() {
                if let Some(token) = self.turns.pop_front() {
                    self.advance(token, now);
                }
            }
            self.with_datagrams(|datagrams, tools, scratch| datagrams.work(tools, scratch, now));
            self.check_deadlines(now);
        }
    }

    fn with_datagrams(&mut self, work: impl FnOnce(&mut Datagrams, &Tools<'_>, &mut [u8])) {
        if self.datagrams.is_over() {
            return;
        }
        let tools = Tools { epoll: &self.epoll, metrics: &self.metrics, records: &self.records };
        let mut scratch = self.buffers.take();
        work(&mut self.datagrams, &tools, &mut scratch);
        self.buffers.give(scratch);
    }

    fn handle(&mut self, event: u64, flags: EventFlags, now: Instant) {
        if event == STOP {
            return self.stop_requested(now);
        }
        if event >= DATAGRAMS {
            let number = usize::try_from(event - DATAGRAMS).expect("at most 8");
            if self.datagrams.note_listener(number, flags) {
                self.drain(now);
            }
            return;
        }
        if event >= LISTENER {
            let number = usize::try_from(event - LISTENER).expect("at most 8");
            // A listener that is gone had its last event in the same batch.
            if let Some(waiting) = self.listeners.get_mut(number) {
                waiting.ready = true;
            }
            return;
        }
        if self.datagrams.note(event, flags) {
            return;
        }
        let (token, side) = Token::of_event(event);
        let Some(connection) = self.connections.get(token) else { return };
        if side == Side::Upstream && !connection.is_connected() {
            // One that has sent something was reached, though it may have reset the connection since.
            let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP) && !connection.has_unread(side);
            let result =
                if failed { socket::connect_result(connection.socket(side).as_fd()) } else { Ok(()) };
            match result {
                Ok(()) => {
                    connection.connected(now);
                    self.dialling_count -= 1;
                }
                Err(outcome) => return self.end(token, outcome, now),
            }
        }
        if let Some(connection) = self.connections.get(token) {
            connection.note(side, flags);
            self.advance(token, now);
        }
    }

    fn advance(&mut self, token: Token, now: Instant) {
        let Some(connection) = self.connections.get(token) else { return };
        let (progress, moved) = connection.advance(&mut self.buffers, self.surplus.chunk());
        self.surplus.settle(connection);
        let direction = connection.direction();
        if moved.sent > 0 {
            self.metrics.bytes(direction, true).inc_by(moved.sent);
        }
        if moved.received > 0 {
            self.metrics.bytes(direction, false).inc_by(moved.received);
        }
        match progress {
            Progress::Waiting => {}
            Progress::Yielded => self.turns.push_back(token),
            Progress::Flushing => {
                if connection.begin_flush() {
                    if self.flushing.is_empty() {
                        self.flush_check = now + FLUSH_CHECK;
                    }
                    self.flushing.push((now + FLUSH, token));
                }
            }
            Progress::Ended(outcome) => self.end(token, outcome, now),
        }
    }

    fn end(&mut self, token: Token, outcome: Outcome, now: Instant) {
        let Some(mut connection) = self.connections.remove(token) else { return };
        self.surplus.release(&mut connection);
        if !connection.is_connected() {
            self.dialling_count -= 1;
        }
        // Its descriptors are what an exhausted process waits for.
        self.accept_after = None;
        self.metrics.open.dec();
        self.finished(connection.close(outcome, now));
    }

    fn finished(&self, record: Record) {
        self.metrics.connections(record.direction, record.outcome).inc();
        self.records.push(record);
    }

    fn has_room(&self) -> bool {
        self.connections.len() < self.limits.connections && self.accept_after.is_none()
    }

    /// Takes what waits on one listener, as far as there is room.
    fn accept(&mut self, number: usize, now: Instant) {
        for _ in 0..BURST {
            if !self.has_room() || !self.listeners.get(number).is_some_and(|waiting| waiting.ready) {
                return;
            }
            let listener = &self.listeners[number].listener;
            let (direction, address) = (listener.direction, listener.address);
            match acceptfrom_with(&listener.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((client, source)) => {
                    if let Some(source) = source.and_then(|source| SocketAddr::try_from(source).ok()) {
                        self.begin(direction, address, client, plain(source), now);
                    }
                }
                Err(Errno::AGAIN) => self.listeners[number].ready = false,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.accept_after = Some(now + ACCEPT_PAUSE);
                }
                // Somebody who holds a duplicate ended the listening: there is nothing more to come.
                Err(Errno::INVAL | Errno::BADF | Errno::NOTSOCK) => return self.drain(now),
                // The connection in question failed before it was accepted (accept(2)).
                Err(_) => {}
            }
        }
    }

    /// Begins to relay a connection that was just accepted.
    fn begin(
        &mut self,
        direction: Direction,
        listener: SocketAddr,
        client: OwnedFd,
        peer: SocketAddr,
        now: Instant,
    ) {
        let accepted_at = SystemTime::now();
        let destination = self.origin.of(direction, client.as_fd(), listener);
        let dialled = match destination {
            None => Err(Outcome::NoOriginalDestination),
            Some(destination) if self.is_own(destination) => Err(Outcome::Loop),
            Some(destination) => socket::dial(destination, own_address(direction, peer, destination))
                .map(|upstream| (destination, upstream)),
        };
        // Asked now: a dial that fails later may take its address with it.
        let upstream = dialled.as_ref().ok().map(|(_, upstream)| upstream.as_fd());
        let source = source(peer, destination, upstream);
        let dialled = dialled.and_then(|(destination, upstream)| {
            let token = self.connections.next();
            let watched = self
                .watch(&client, token.event(Side::Client))
                .and_then(|()| self.watch(&upstream, token.event(Side::Upstream)));
            match watched {
                Ok(()) => Ok((destination, upstream)),
                Err(error) => Err(socket::outcome_of(error)),
            }
        });
        match dialled {
            Ok((destination, upstream)) => {
                let accepted = (accepted_at, now);
                let sockets = [client, upstream];
                let connection = Connection::new(direction, source, destination, accepted, sockets);
                let token = self.connections.insert(connection);
                self.dialling.push_back((now + self.limits.connect_timeout, token));
                self.dialling_count += 1;
                self.metrics.open.inc();
            }
            Err(outcome) => {
                socket::reset(client);
                self.finished(Record {
                    accepted: accepted_at,
                    direction,
                    protocol: Protocol::Tcp,
                    source,
                    destination,
                    bytes_sent: 0,
                    bytes_received: 0,
                    connect: None,
                    duration: now.elapsed(),
                    outcome,
                });
            }
        }
    }

    fn watch(&self, socket: &OwnedFd, event: u64) -> Result<()> {
        // RDHUP and PRI, because a short read must not be taken for an empty socket then.
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::PRI | EventFlags::ET;
        epoll::add(&self.epoll, socket, EventData::new_u64(event), flags)
    }

    fn is_own(&self, destination: SocketAddr) -> bool {
        destination.ip().is_loopback()
            && self.listeners.iter().any(|waiting| waiting.listener.address.port() == destination.port())
    }

    fn stop_requested(&mut self, now: Instant) {
        // A signalfd yields one siginfo of 128 bytes a read, so that every request counts.
        let mut request = [0; 128];
        if !matches!(rustix::io::read(&self.stop, &mut request), Ok(length) if length > 0) {
            return;
        }
        match self.phase {
            Phase::Serving => self.drain(now),
            Phase::Draining(_) => self.phase = Phase::Draining(now),
        }
    }

    /// Takes what has already been queued for the relay, then ends the listening.
    fn drain(&mut self, now: Instant) {
        if let Phase::Draining(_) = self.phase {
            return;
        }
        self.phase = Phase::Draining(now + self.limits.drain_grace);
        for number in 0..self.listeners.len() {
            self.listeners[number].ready = true;
            for _ in 0..DRAIN_BURSTS {
                self.accept(number, now);
            }
        }
        for waiting in self.listeners.drain(..) {
            waiting.listener.close();
        }
        self.with_datagrams(|datagrams, tools, scratch| datagrams.drain(tools, scratch, now));
    }

    fn check_deadlines(&mut self, now: Instant) {
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept_after = None;
        }
        self.check_dialling(now);
        self.check_flushing(now);
        if let Phase::Draining(deadline) = self.phase
            && deadline <= now
        {
            for token in self.connections.tokens() {
                self.end(token, Outcome::Drained, now);
            }
            self.with_datagrams(|datagrams, tools, scratch| datagrams.close_all(tools, scratch, now));
        }
    }

    fn check_dialling(&mut self, now: Instant) {
        while let Some(&(deadline, token)) = self.dialling.front() {
            if self.is_dialling(token) {
                if deadline > now {
                    break;
                }
                self.end(token, Outcome::ConnectTimeout, now);
            }
            self.dialling.pop_front();
        }
        // One slow dial at the front must not keep the finished ones behind it in memory.
        if self.dialling.len() > 2 * self.dialling_count + 64 {
            let dialling = std::mem::take(&mut self.dialling);
            self.dialling = dialling.into_iter().filter(|(_, token)| self.is_dialling(*token)).collect();
        }
    }

    fn is_dialling(&mut self, token: Token) -> bool {
        self.connections.get(token).is_some_and(|connection| !connection.is_connected())
    }

    fn check_flushing(&mut self, now: Instant) {
        if self.flushing.is_empty() || self.flush_check > now {
            return;
        }
        self.flush_check = now + FLUSH_CHECK;
        for (deadline, token) in std::mem::take(&mut self.flushing) {
            self.advance(token, now);
            let Some(connection) = self.connections.get(token) else { continue };
            if deadline > now {
                self.flushing.push((deadline, token));
            } else {
                let outcome = connection.failure().unwrap_or(Outcome::Error);
                self.end(token, outcome, now);
            }
        }
    }

    /// How long the kernel may wait; for ever when nothing is due.
    fn timeout(&self) -> Option<Timespec> {
        let backlog = self.has_room() && self.listeners.iter().any(|waiting| waiting.ready);
        if backlog || !self.turns.is_empty() || self.datagrams.has_work() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let drain = match self.phase {
            Phase::Serving => None,
            Phase::Draining(deadline) => Some(deadline),
        };
        let flush = (!self.flushing.is_empty()).then_some(self.flush_check);
        let dial = self.dialling.front().map(|(deadline, _)| *deadline);
        let due =
            [self.accept_after, drain, flush, dial, self.datagrams.due()].into_iter().flatten().min()?;
        let left = due.saturating_duration_since(Instant::now());
        // Every wait is bounded by a day in the configuration, far below what either type holds.
        Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }))
    }
}
