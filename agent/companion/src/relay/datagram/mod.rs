//! Datagrams: outbound UDP, on the same port as outbound TCP. Owns the listeners and the flows.
//!
//! # The walk of a datagram
//! The first of a source arrives at a listener (`sockets`). It becomes a flow (`flow`) in the table (`table`): a socket
//! connected to the source, which is asked for the original destination, and one that dials that. Later ones arrive at the
//! flow's own socket, answers at the other. On kernels before 6.13 all go on to arrive at the listener, and are passed to
//! their flow by their source.
//!
//! # What is kept of UDP
//! - *Whose it is*: the source is looked at for each datagram, and the original destination asked for. Without an answer to
//!   the first question nothing is sent anywhere; it is counted.
//! - *Bounds of datagrams*: one in, one out, empty ones too. The order within a flow: its own socket is not read before the
//!   listener has been found empty.
//! - *Ends*: an answer that meets no socket ends the flow, so that its destination meets none either. What the application
//!   had sent before it closed is passed on.
//! - *Refusals* end nothing, as they would not end the application's socket; but a connected one is not told of them
//!   (`ECONNREFUSED`): only a kernel can. A record says it when nothing was answered at all.
//!
//! # Limits
//! A flow ends when it was quiet for a minute; 10 s after the answer of a resolver; a second while the relay drains. Beyond the
//! limit on flows the one that was quiet for longest ends. A source that sends again begins a flow anew.

mod flow;
mod sockets;
mod table;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    io::{Errno, Result},
};

use super::{
    connection::Side,
    metrics::Metrics,
    origin::{OriginalDestination, own_address, source},
    record::{Direction, Outcome, Record, Records},
    slab::Token,
    socket::outcome_of,
};
use flow::{Flow, Passed, Progress};
pub(super) use sockets::DatagramListener;
use sockets::{LARGEST, receive};
use table::{Limits, Table};

/// Flows at once, when the descriptors allow: the kernel looks at all sockets of a port for each new one.
pub(super) const FLOWS: usize = 4_096;
/// How long a flow may be quiet: in general, and after the answer of a resolver.
pub(super) const QUIET: Limits = [Duration::from_secs(60), Duration::from_secs(10)];
/// The same while the relay drains: for answers that are on their way.
const QUIET_AT_END: Limits = [Duration::from_secs(1); 2];
/// Datagrams taken from one listener before others have their turn.
const BURST: usize = 256;
/// Bursts taken from each listener before it is closed: more than its buffer holds.
const DRAIN_BURSTS: usize = 64;
/// Set in the event of a flow, where that of a connection has its place, which never reaches that high.
const FLOW: u64 = 1 << 31;

const _: () = assert!(2 * LARGEST <= super::connection::CHUNK, "two datagrams fit where bytes stay");

/// What the relay's loop lends.
pub(super) struct Tools<'a> {
    pub(super) epoll: &'a OwnedFd,
    pub(super) metrics: &'a Metrics,
    pub(super) records: &'a Records,
}

/// A listener, and whether datagrams may be waiting there.
struct Waiting {
    listener: DatagramListener,
    ready: bool,
    /// Flows that were made since it was last found empty.
    fresh: Vec<Token>,
}

/// A datagram that arrived where it does not belong.
struct Stray {
    listener: SocketAddr,
    peer: SocketAddr,
    datagram: Vec<u8>,
}

/// The datagram side of a relay.
pub(super) struct Datagrams {
    listeners: Vec<Waiting>,
    origin: OriginalDestination,
    limit: usize,
    quiet: Limits,
    flows: Table<Flow>,
    /// Have work left.
    turns: VecDeque<Token>,
    strays: Vec<Stray>,
}

impl Datagrams {
    /// Watches `listeners` by the events `first`, `first + 1`, and so on.
    ///
    /// # Errors
    /// No room in epoll.
    pub(super) fn new(
        listeners: Vec<DatagramListener>,
        origin: OriginalDestination,
        (limit, quiet): (usize, Limits),
        epoll: &OwnedFd,
        first: u64,
    ) -> Result<Self> {
        for (event, listener) in (first..).zip(&listeners) {
            epoll::add(
                epoll,
                &listener.socket,
                EventData::new_u64(event),
                EventFlags::IN | EventFlags::RDHUP | EventFlags::ET,
            )?;
        }
        Ok(Self {
            listeners: listeners
                .into_iter()
                .map(|listener| Waiting { listener, ready: false, fresh: Vec::new() })
                .collect(),
            origin,
            limit,
            quiet,
            flows: Table::default(),
            turns: VecDeque::new(),
            strays: Vec::new(),
        })
    }

    /// Something happened at a listener; true when another holder of its socket has ended it.
    pub(super) fn note_listener(&mut self, number: usize, flags: EventFlags) -> bool {
        // One that is gone had its last event in the same batch.
        let Some(waiting) = self.listeners.get_mut(number) else { return false };
        waiting.ready = true;
        flags.intersects(EventFlags::RDHUP | EventFlags::HUP)
    }

    /// Whether `event` is a flow's; then it is noted.
    pub(super) fn note(&mut self, event: u64, flags: EventFlags) -> bool {
        if event & FLOW == 0 {
            return false;
        }
        let (token, side) = Token::of_event(event & !FLOW);
        if let Some(flow) = self.flows.get(token) {
            flow.note(side, flags);
            self.give_turn(token);
        }
        true
    }

    fn give_turn(&mut self, token: Token) {
        if let Some(flow) = self.flows.get(token)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.turns.push_back(token);
        }
    }

    /// Passes what waits, as far as turns go, and ends what has expired.
    pub(super) fn work(&mut self, tools: &Tools<'_>, scratch: &mut [u8], now: Instant) {
        for number in 0..self.listeners.len() {
            self.take(number, tools, scratch, now);
        }
        for _ in 0..self.turns.len() {
            if let Some(token) = self.turns.pop_front() {
                self.advance(token, tools, scratch, now);
            }
        }
        while let Some(token) = self.flows.expired(self.quiet, now) {
            self.close(token, Outcome::Ok, tools, scratch, now);
        }
        for Stray { listener, peer, datagram } in std::mem::take(&mut self.strays) {
            self.route((listener, peer), &datagram, tools, scratch, now);
        }
    }

    /// Whether there is work that no event will tell of.
    pub(super) fn has_work(&self) -> bool {
        !self.turns.is_empty()
            || !self.strays.is_empty()
            || self.listeners.iter().any(|waiting| waiting.ready)
    }

    /// When a flow expires next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.flows.next_expiry(self.quiet)
    }

    pub(super) fn is_over(&self) -> bool {
        self.listeners.is_empty() && self.flows.len() == 0
    }

    /// Takes what waits at the listeners and ends them. Flows that wait for an answer get a little longer.
    pub(super) fn drain(&mut self, tools: &Tools<'_>, scratch: &mut [u8], now: Instant) {
        self.quiet = QUIET_AT_END;
        for number in 0..self.listeners.len() {
            // Fails only without memory. Then what is sent while the rest is taken may be lost.
            let _ = self.listeners[number].listener.end();
            self.listeners[number].ready = true;
            for _ in 0..DRAIN_BURSTS {
                self.take(number, tools, scratch, now);
            }
        }
        for token in self.listeners.drain(..).flat_map(|waiting| waiting.fresh).collect::<Vec<_>>() {
            self.let_go(token);
        }
    }

    /// Ends all flows.
    pub(super) fn close_all(&mut self, tools: &Tools<'_>, scratch: &mut [u8], now: Instant) {
        for token in self.flows.tokens() {
            self.close(token, Outcome::Drained, tools, scratch, now);
        }
        self.strays.clear();
    }

    fn take(&mut self, number: usize, tools: &Tools<'_>, scratch: &mut [u8], now: Instant) {
        let (into, scratch) = scratch.split_at_mut(LARGEST);
        for _ in 0..BURST {
            let Waiting { listener, ready, fresh } = &mut self.listeners[number];
            if !*ready {
                return;
            }
            match receive(listener.socket.as_fd(), into) {
                Ok((length, peer)) => {
                    let from = (listener.address, peer);
                    self.route(from, &into[..length], tools, scratch, now);
                }
                Err(Errno::AGAIN) => {
                    *ready = false;
                    // What their own sockets have is younger than all that was here.
                    for token in std::mem::take(fresh) {
                        self.let_go(token);
                    }
                }
                // Told once each.
                Err(_) => {}
            }
        }
    }

    /// The flow's own socket is not read before its listener has been found empty.
    fn hold(&mut self, token: Token, listener: SocketAddr) {
        match self.listeners.iter_mut().find(|waiting| waiting.listener.address == listener) {
            Some(waiting) => {
                waiting.fresh.push(token);
                waiting.ready = true;
            }
            None => self.let_go(token),
        }
    }

    fn let_go(&mut self, token: Token) {
        if let Some(flow) = self.flows.get(token) {
            flow.fresh = false;
            self.give_turn(token);
        }
    }

    /// Passes a datagram to the flow of its source, which is made if there is none.
    fn route(
        &mut self,
        (listener, peer): (SocketAddr, SocketAddr),
        datagram: &[u8],
        tools: &Tools<'_>,
        scratch: &mut [u8],
        now: Instant,
    ) {
        if let Some(token) = self.flows.find(peer) {
            let known = self.flows.get(token).is_some_and(|flow| flow.goes_on(self.origin));
            return if known {
                self.forward(token, datagram, tools, now);
            } else {
                self.replace(token, datagram, tools, now);
            };
        }
        if self.flows.len() >= self.limit
            && let Some(quietest) = self.flows.quietest()
        {
            self.close(quietest, Outcome::Limit, tools, scratch, now);
        }
        match self.begin(listener, peer, None, tools, now) {
            Ok(token) => {
                self.forward(token, datagram, tools, now);
                self.hold(token, listener);
            }
            Err(outcome) => {
                tools.metrics.lost(outcome).inc();
            }
        }
    }

    /// Begins a flow, by its socket `answering` if it has one already.
    fn begin(
        &mut self,
        listener: SocketAddr,
        peer: SocketAddr,
        answering: Option<OwnedFd>,
        tools: &Tools<'_>,
        now: Instant,
    ) -> std::result::Result<Token, Outcome> {
        // A socket connected to port 0 would be connected to every port.
        if peer.port() == 0 {
            return Err(Outcome::Error);
        }
        let known = answering.is_some();
        let answering = match answering {
            Some(answering) => answering,
            None => sockets::answering(listener, peer).map_err(outcome_of)?,
        };
        let destination = self.origin.of(Direction::Outbound, answering.as_fd(), listener);
        let destination = destination.ok_or(Outcome::NoOriginalDestination)?;
        if destination.ip().is_loopback() && destination.port() == listener.port() {
            return Err(Outcome::Loop);
        }
        let own = own_address(Direction::Outbound, peer, destination);
        let upstream = sockets::dial(destination, own).map_err(outcome_of)?;
        let seen = source(peer, Some(destination), Some(upstream.as_fd()));
        let token = self.flows.next();
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        let data = |side| EventData::new_u64(token.event(side) | FLOW);
        let watched = if known {
            epoll::modify(tools.epoll, &answering, data(Side::Client), flags)
        } else {
            epoll::add(tools.epoll, &answering, data(Side::Client), flags)
        };
        watched
            .and_then(|()| epoll::add(tools.epoll, &upstream, data(Side::Upstream), flags))
            .map_err(outcome_of)?;
        let sockets = [answering, upstream];
        let flow = Flow::new((listener, peer, seen), destination, (SystemTime::now(), now), sockets);
        tools.metrics.open_flows.inc();
        Ok(self.flows.insert(peer, flow, now))
    }

    fn forward(&mut self, token: Token, datagram: &[u8], tools: &Tools<'_>, now: Instant) {
        let Some(flow) = self.flows.get(token) else { return };
        let mut passed = Passed::default();
        flow.forward(datagram, &mut passed);
        let listener = flow.listener;
        self.account(token, listener, passed, tools, now);
    }

    fn advance(&mut self, token: Token, tools: &Tools<'_>, scratch: &mut [u8], now: Instant) {
        let Some(flow) = self.flows.get(token) else { return };
        flow.queued = false;
        let mut passed = Passed::default();
        let progress = flow.advance(self.origin, scratch, &mut passed);
        let listener = flow.listener;
        self.account(token, listener, passed, tools, now);
        match progress {
            Progress::Waiting => {}
            Progress::Yielded => self.give_turn(token),
            Progress::Elsewhere(datagram) => self.replace(token, &datagram, tools, now),
            Progress::Gone => self.close(token, Outcome::Ok, tools, scratch, now),
        }
    }

    /// The source of a flow is another socket of the application's now, with another destination.
    fn replace(&mut self, token: Token, datagram: &[u8], tools: &Tools<'_>, now: Instant) {
        let Some(flow) = self.flows.remove(token) else { return };
        let (listener, peer, fresh) = (flow.listener, flow.peer, flow.fresh);
        let (record, answering) = flow.leave(now);
        finished(record, tools);
        match self.begin(listener, peer, Some(answering), tools, now) {
            Ok(token) => {
                self.forward(token, datagram, tools, now);
                if let Some(flow) = self.flows.get(token) {
                    // That there is something to be read may have been told to its predecessor.
                    flow.note(Side::Client, EventFlags::IN);
                }
                if fresh { self.hold(token, listener) } else { self.let_go(token) }
            }
            Err(outcome) => {
                tools.metrics.lost(outcome).inc();
            }
        }
    }

    fn close(&mut self, token: Token, outcome: Outcome, tools: &Tools<'_>, scratch: &mut [u8], now: Instant) {
        let Some(flow) = self.flows.remove(token) else { return };
        let mut passed = Passed::default();
        let listener = flow.listener;
        let record = flow.close(outcome, now, scratch, &mut passed);
        self.account(token, listener, passed, tools, now);
        finished(record, tools);
    }

    /// Counts what has passed, and keeps the flow for longer.
    fn account(
        &mut self,
        token: Token,
        listener: SocketAddr,
        passed: Passed,
        tools: &Tools<'_>,
        now: Instant,
    ) {
        let ways = [(true, passed.sent), (false, passed.received)];
        for (sent, (datagrams, bytes)) in ways.into_iter().filter(|(_, (datagrams, _))| *datagrams > 0) {
            tools.metrics.datagrams(sent).inc_by(datagrams);
            tools.metrics.bytes(Direction::Outbound, sent).inc_by(bytes);
        }
        for outcome in &passed.lost {
            tools.metrics.lost(*outcome).inc();
        }
        if (passed.sent.0 > 0 || passed.received.0 > 0)
            && let Some(flow) = self.flows.get(token)
        {
            let patience = flow.patience(&passed);
            self.flows.touch(token, patience, now);
        }
        let strays = passed.strays.into_iter();
        self.strays.extend(strays.map(|(peer, datagram)| Stray { listener, peer, datagram }));
    }
}

fn finished(record: Record, tools: &Tools<'_>) {
    tools.metrics.open_flows.dec();
    tools.metrics.flows(record.outcome).inc();
    tools.records.push(record);
}
