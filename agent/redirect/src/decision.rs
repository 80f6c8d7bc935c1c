//! One decision of the kernel side, parsed. Pure but for the wall clock.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use pillion_common::{
    AF_INET, AF_INET6, Destination, Route, TCP, UDP,
    trace::{COMMAND_BYTES, TraceEvent, program, verdict, why},
};
use pillion_workload::{Passes, Protocol, RedirectSpec};
use serde::{Deserialize, Serialize};

use crate::trace::now_ns;

/// Who decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DecidedBy {
    /// `connect()` to an IPv4 address.
    Connect4,
    /// `connect()` to an IPv6 address, v4-mapped ones among them.
    Connect6,
    /// `sendmsg()` of a socket without a peer, to an IPv4 address.
    Send4,
    /// `sendmsg()` of a socket without a peer, to an IPv6 address.
    Send6,
    /// An arriving connection.
    Steer,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It goes to the companion.
    Redirected,
    /// It passes, as the rules say.
    Passed,
    /// It passes, because it could not be redirected.
    FailedOpen,
    /// It is refused, because it could not be redirected.
    Refused,
}

/// Why it was not redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Because {
    /// No rule matches.
    NoRule,
    /// Excluded by its destination, as the rules that decided say.
    Excluded,
    /// For this host itself.
    Local,
    /// Multicast or broadcast.
    Multicast,
    /// Sent by a user that is left alone.
    User,
    /// Sent by a program that is left alone.
    Executable,
    /// The companion does not listen there.
    NoListener,
    /// All slots wait for their companions, or the maps are full.
    Exhausted,
    /// The socket cannot be bound so that its source carries the destination.
    Unbindable,
    /// A link-local destination, or a socket for one interface.
    Interface,
    /// An answer to a datagram that has come to this socket.
    Answer,
    /// The datagram socket has another destination already.
    OtherDestination,
    /// It comes from this host itself.
    Own,
    /// Sent from a cgroup within that is left alone: an inner workload's, whose own policy decides, or a companion's.
    Cgroup,
}

/// Which rule decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Questions to resolvers.
    Dns,
    /// An outbound rule, by its index.
    Outbound(usize),
    /// An inbound rule.
    Inbound,
    /// None.
    None,
}

/// The process that made the system call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Caller {
    /// In the machine's PID namespace.
    pub pid: u32,
    /// Real user id, as the host numbers it.
    pub user: u32,
    /// The process's name. It chooses that itself: anything may be in it.
    pub command: String,
}

/// One decision.
#[derive(Debug, Clone)]
pub struct Decision {
    /// When.
    pub at: SystemTime,
    /// Who decided.
    pub by: DecidedBy,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Absent for arriving connections.
    pub caller: Option<Caller>,
    /// The source's address, if the socket is bound to one.
    pub source_address: Option<IpAddr>,
    /// The source's port, if it is known yet.
    pub source_port: Option<u16>,
    /// Where it was to go.
    pub original: SocketAddr,
    /// Where it goes.
    pub effective: SocketAddr,
    /// Number of the table that decided.
    pub table: u32,
    /// Which rule.
    pub rule: Rule,
    /// What became of it.
    pub outcome: Outcome,
    /// Why it was not redirected.
    pub because: Option<Because>,
    /// The error number that the application gets.
    pub errno: Option<i32>,
    /// The rules that decided.
    pub spec: Option<Arc<RedirectSpec>>,
}

impl Decision {
    /// `None` for what this build's programs do not tell.
    pub(crate) fn new(event: &TraceEvent, spec: Option<Arc<RedirectSpec>>) -> Option<Self> {
        let by = match event.program {
            program::CONNECT4 => DecidedBy::Connect4,
            program::CONNECT6 => DecidedBy::Connect6,
            program::SEND4 => DecidedBy::Send4,
            program::SEND6 => DecidedBy::Send6,
            program::STEER => DecidedBy::Steer,
            _ => return None,
        };
        let outcome = match event.verdict {
            verdict::REDIRECTED => Outcome::Redirected,
            verdict::PASSED => Outcome::Passed,
            verdict::FAILED_OPEN => Outcome::FailedOpen,
            verdict::REFUSED => Outcome::Refused,
            _ => return None,
        };
        let source = address(&event.source)?;
        let rule = match (by, event.rule) {
            (DecidedBy::Steer, _) => Rule::Inbound,
            (_, Route::DNS_RULE) => Rule::Dns,
            (_, TraceEvent::NO_RULE) => Rule::None,
            (_, index) => Rule::Outbound(usize::try_from(index).ok()?),
        };
        let original = address(&event.original)?;
        let protocol = match event.protocol {
            TCP => Protocol::Tcp,
            UDP => Protocol::Udp,
            _ => return None,
        };
        let mut because = because(event.why)?;
        // The table has nothing for either.
        let meant = spec.as_ref().map(|spec| spec.route(protocol, original.ip(), original.port()));
        if because == Some(Because::NoRule) && meant == Some(pillion_workload::Route::Pass(Passes::Excluded))
        {
            because = Some(Because::Excluded);
        }
        let ago = Duration::from_nanos(now_ns().saturating_sub(event.time_ns));
        Some(Self {
            at: SystemTime::now().checked_sub(ago)?,
            by,
            protocol,
            caller: (by != DecidedBy::Steer).then(|| Caller {
                pid: event.pid,
                user: event.user,
                command: command(&event.command),
            }),
            source_address: Some(source.ip()).filter(|address| !address.is_unspecified()),
            source_port: Some(source.port()).filter(|port| *port != 0),
            original,
            effective: address(&event.effective)?,
            table: event.table,
            rule,
            outcome,
            because,
            errno: (outcome == Outcome::Refused).then_some(event.errno.into()),
            spec,
        })
    }
}

/// The outer `None`: not known.
#[expect(clippy::option_option, reason = "no reason is a value of its own")]
fn because(number: u8) -> Option<Option<Because>> {
    Some(Some(match number {
        why::NOTHING => return Some(None),
        why::NO_RULE => Because::NoRule,
        why::LOCAL => Because::Local,
        why::MULTICAST => Because::Multicast,
        why::USER => Because::User,
        why::EXECUTABLE => Because::Executable,
        why::NO_LISTENER => Because::NoListener,
        why::EXHAUSTED => Because::Exhausted,
        why::UNBINDABLE => Because::Unbindable,
        why::INTERFACE => Because::Interface,
        why::ANSWER => Because::Answer,
        why::OTHER_DESTINATION => Because::OtherDestination,
        why::OWN => Because::Own,
        why::CGROUP => Because::Cgroup,
        _ => return None,
    }))
}

fn command(bytes: &[u8; COMMAND_BYTES]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn address(destination: &Destination) -> Option<SocketAddr> {
    let words = destination.address.map(u32::to_ne_bytes);
    let ip = match destination.family {
        AF_INET => Ipv4Addr::from(words[0]).into(),
        AF_INET6 => {
            let mut octets = [0; 16];
            for (to, word) in octets.chunks_exact_mut(4).zip(words) {
                to.copy_from_slice(&word);
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be(destination.port_be)))
}

/// An item of the ring buffer; `None` if it is none of ours.
pub(crate) fn event_of(bytes: &[u8]) -> Option<TraceEvent> {
    let mut rest = Fields(<&[u8; size_of::<TraceEvent>()]>::try_from(bytes).ok()?);
    Some(TraceEvent {
        time_ns: u64::from_ne_bytes(rest.take()?),
        session: rest.word()?,
        workload: rest.word()?,
        table: rest.word()?,
        rule: rest.word()?,
        pid: rest.word()?,
        user: rest.word()?,
        source: rest.destination()?,
        original: rest.destination()?,
        effective: rest.destination()?,
        errno: rest.half()?,
        program: u8::from_ne_bytes(rest.take()?),
        protocol: u8::from_ne_bytes(rest.take()?),
        verdict: u8::from_ne_bytes(rest.take()?),
        why: u8::from_ne_bytes(rest.take()?),
        pad: rest.half()?,
        command: rest.take()?,
        pad2: rest.word()?,
    })
}

/// Bytes that are taken field by field, in the order of the layout, which has no holes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn half(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    fn destination(&mut self) -> Option<Destination> {
        let address = [self.word()?, self.word()?, self.word()?, self.word()?];
        Some(Destination { address, port_be: self.half()?, family: self.half()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(7_u64.to_ne_bytes());
        for word in [1_u32, 2, 5, 3, 4242, 1000] {
            bytes.extend(word.to_ne_bytes());
        }
        let mut destination = |octets: [u8; 16], port: u16, family: u16| {
            bytes.extend(octets);
            bytes.extend(port.to_be_bytes());
            bytes.extend(family.to_ne_bytes());
        };
        let four = |octets: [u8; 4]| {
            let mut all = [0; 16];
            all[..4].copy_from_slice(&octets);
            all
        };
        destination(four([0; 4]), 43210, AF_INET);
        destination(Ipv6Addr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]).octets(), 443, AF_INET6);
        destination(four([127, 0, 0, 1]), 15001, AF_INET);
        bytes.extend(111_u16.to_ne_bytes());
        bytes.extend([program::CONNECT6, TCP, verdict::REFUSED, why::NO_LISTENER]);
        bytes.extend(0_u16.to_ne_bytes());
        bytes.extend(*b"\x1b[31mcurl\0\0\0\0\0\0\0");
        bytes.extend(0_u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn an_event_is_parsed_field_by_field() {
        let event = event_of(&bytes()).unwrap();
        assert_eq!((event.session, event.workload, event.table, event.rule), (1, 2, 5, 3));
        let decision = Decision::new(&event, None).unwrap();
        assert_eq!(decision.by, DecidedBy::Connect6);
        assert_eq!(decision.original, "[fd00::1]:443".parse().unwrap());
        assert_eq!(decision.effective, "127.0.0.1:15001".parse().unwrap());
        assert_eq!((decision.source_address, decision.source_port), (None, Some(43210)));
        assert_eq!(decision.rule, Rule::Outbound(3));
        assert_eq!((decision.outcome, decision.because), (Outcome::Refused, Some(Because::NoListener)));
        assert_eq!(decision.errno, Some(111));
        let caller = decision.caller.unwrap();
        assert_eq!((caller.pid, caller.user, &*caller.command), (4242, 1000, "\x1b[31mcurl"));
    }

    #[test]
    fn what_is_not_ours_is_none() {
        let good = bytes();
        assert!(event_of(&good[1..]).is_none());
        assert!(event_of(&[&good[..], &[0]].concat()).is_none());
        for (at, value) in [(94, 99), (95, 1), (96, 0), (97, 99)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Decision::new(&event_of(&bad).unwrap(), None).is_none(), "{at}");
        }
    }
}
