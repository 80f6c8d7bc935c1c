//! Datagrams in the kernel: sent to a companion by rule, answered from where they were meant to go.

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use pillion_tests::{
    Machine,
    duo::{Duo, address, to},
    on_machine,
    puppet::{Domain, Socket},
};
use pillion_workload::{FailureMode, OutboundRule, Protocol, RedirectSpec};
use std::net::SocketAddr;

fn udp() -> RedirectSpec {
    let rule = OutboundRule { protocols: [Protocol::Udp].into(), ..OutboundRule::all_tcp(to(0)) };
    RedirectSpec { outbound: vec![rule], ..RedirectSpec::default() }
}

fn dns() -> RedirectSpec {
    RedirectSpec { dns: Some(to(1)), ..RedirectSpec::default() }
}

fn stage(machine: &Machine, spec: &RedirectSpec, on_failure: FailureMode) -> Result<Duo> {
    let mut duo = Duo::new(machine)?;
    duo.attach(spec, on_failure)?;
    Ok(duo)
}

/// Takes the datagram that waits at a companion; its text, its source, and where it wanted to go, as the relay asks.
fn taken(duo: &mut Duo, which: usize, family: usize) -> Result<(String, SocketAddr, SocketAddr)> {
    let companion = &mut duo.companions[which];
    let (text, from) = companion.puppet.receive_from(companion.datagrams[family])??;
    let asking = companion.puppet.datagrams(Domain::of(from))??;
    companion.puppet.connect(asking, from)??;
    let first = companion.puppet.original_destination(asking, Domain::V6)??;
    assert_eq!(companion.puppet.original_destination(asking, Domain::V6)??, first, "a second question");
    companion.puppet.close(asking)??;
    Ok((text, from, SocketAddr::new(first.ip().to_canonical(), first.port())))
}

fn answered(duo: &mut Duo, which: usize, family: usize, to: SocketAddr, text: &str) -> Result<()> {
    let companion = &mut duo.companions[which];
    Ok(companion.puppet.send_to(companion.datagrams[family], to, text)??)
}

fn socket(duo: &mut Duo, domain: Domain, bound: Option<&str>) -> Result<Socket> {
    let socket = duo.app.datagrams(domain)??;
    if let Some(bound) = bound {
        duo.app.bind(socket, address(bound))??;
    }
    Ok(socket)
}

#[test]
fn one_socket_and_many_destinations() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &udp(), FailureMode::Closed)?;
        for (domain, bound, mapped) in [
            (Domain::V4, None, false),
            (Domain::V4, Some("10.77.0.1:0"), false),
            (Domain::V4, Some("0.0.0.0:4001"), false),
            (Domain::V4, Some("10.77.0.1:4002"), false),
            (Domain::V6, None, true),
            (Domain::V6, Some("[::ffff:10.77.0.1]:0"), true),
        ] {
            let socket = socket(&mut duo, domain, bound)?;
            let plain: Vec<_> =
                ["192.0.2.1:443", "192.0.2.2:443", "192.0.2.1:8443"].into_iter().map(address).collect();
            let seen = |address: SocketAddr| match address {
                SocketAddr::V4(four) if mapped => (four.ip().to_ipv6_mapped(), four.port()).into(),
                other => other,
            };
            let mut sources = Vec::new();
            for destination in &plain {
                duo.app.send_to(socket, seen(*destination), &destination.to_string())??;
                let (text, from, wanted) = taken(&mut duo, 0, 0)?;
                assert_eq!((text, wanted), (destination.to_string(), *destination), "{bound:?}");
                sources.push(from);
            }
            // Answered in another order: each comes from where it was sent.
            for (destination, from) in plain.iter().zip(&sources).rev() {
                answered(&mut duo, 0, 0, *from, &format!("from {destination}"))?;
                let (text, shown) = duo.app.receive_from(socket)??;
                assert_eq!((text, shown), (format!("from {destination}"), seen(*destination)), "{bound:?}");
            }
            duo.app.close(socket)??;
        }
        assert_eq!(duo.dataplane.counters()?.datagrams_redirected, 18);
        duo.end()
    })
}

#[test]
fn sockets_with_a_peer_keep_it() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &udp(), FailureMode::Closed)?;
        for (domain, bound, destination, source) in [
            (Domain::V4, None, "192.0.2.1:443", "10.77.0.1"),
            (Domain::V4, Some("0.0.0.0:4001"), "192.0.2.1:443", "10.77.0.1"),
            (Domain::V4, Some("10.77.0.1:4002"), "192.0.2.1:443", "10.77.0.1"),
            (Domain::V6, None, "[2001:db8::1]:443", "fd77::1"),
            (Domain::V6, None, "[::ffff:192.0.2.1]:443", "::ffff:10.77.0.1"),
        ] {
            let destination = address(destination);
            let wanted = SocketAddr::new(destination.ip().to_canonical(), destination.port());
            let socket = socket(&mut duo, domain, bound)?;
            duo.app.connect(socket, destination)?.with_context(|| format!("{bound:?} {destination}"))?;
            let names = duo.app.names(socket)??;
            assert_eq!(names.peer, Some(destination));
            assert_eq!(names.local.ip().to_string(), source, "{bound:?} {destination}");
            for turn in ["first", "second"] {
                duo.app.send(socket, turn)??;
                let (text, from, told) = taken(&mut duo, 0, 0)?;
                assert_eq!((text.as_str(), told), (turn, wanted), "asked for each");
                answered(&mut duo, 0, 0, from, "answer")?;
                let (text, shown) = duo.app.receive_from(socket)??;
                assert_eq!((text.as_str(), shown), ("answer", destination));
            }
            // Dissolved and connected to another.
            duo.app.disconnect(socket)??;
            let other = SocketAddr::new(destination.ip(), 8443);
            duo.app.connect(socket, other)??;
            duo.app.send(socket, "third")??;
            assert_eq!(taken(&mut duo, 0, 0)?.2.port(), 8443);
            duo.app.close(socket)??;
        }
        duo.end()
    })
}

#[test]
fn a_closed_socket_leaves_no_slot_and_its_last_datagram_arrives() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &udp(), FailureMode::Closed)?;
        for turn in 0..50 {
            let socket = socket(&mut duo, Domain::V4, None)?;
            let destination = SocketAddr::new([192, 0, 2, 1].into(), 4000 + turn);
            duo.app.connect(socket, destination)??;
            duo.app.send(socket, "last words")??;
            duo.app.close(socket)??;
            assert_eq!(duo.dataplane.counters()?.slots_busy, 0, "given back at close");
            let (text, _, wanted) = taken(&mut duo, 0, 0)?;
            assert_eq!((text.as_str(), wanted), ("last words", destination), "asked after the close");
        }
        // Open ones keep theirs; a detach need not wait for them.
        let open = socket(&mut duo, Domain::V4, None)?;
        duo.app.connect(open, address("192.0.2.1:443"))??;
        assert_eq!(duo.dataplane.counters()?.slots_busy, 1);
        assert_eq!(duo.guard.as_mut().context("attached")?.drain()?, 0);
        duo.app.close(open)??;
        duo.end()
    })
}

#[test]
fn an_ipv6_socket_without_a_peer_has_one_destination() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &udp(), FailureMode::Closed)?;
        let (one, two) = (address("[2001:db8::1]:443"), address("[2001:db8::2]:443"));
        for bound in [None, Some("[fd77::1]:0"), Some("[::]:4001")] {
            let socket = socket(&mut duo, Domain::V6, bound)?;
            duo.app.send_to(socket, one, "one")??;
            let (text, from, wanted) = taken(&mut duo, 0, 1)?;
            assert_eq!((text.as_str(), wanted), ("one", one));
            answered(&mut duo, 0, 1, from, "answer")?;
            assert_eq!(duo.app.receive_from(socket)??, ("answer".to_owned(), one));
            assert_eq!(duo.app.send_to(socket, two, "two")?, Err(Errno::EADDRNOTAVAIL), "{bound:?}");
            duo.app.send_to(socket, one, "again")??;
            assert_eq!(taken(&mut duo, 0, 1)?.0, "again");
            duo.app.close(socket)??;
        }
        duo.end()
    })
}

#[test]
fn questions_to_resolvers_go_to_the_companion() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &dns(), FailureMode::Closed)?;
        // One socket, two resolvers; one on loopback, as systemd-resolved's is.
        let socket = duo.app.datagrams(Domain::V4)??;
        for resolver in ["10.9.9.9:53", "127.0.0.53:53"] {
            duo.app.send_to(socket, address(resolver), resolver)??;
        }
        let mut questions = Vec::new();
        for _ in 0..2 {
            let companion = &mut duo.companions[1];
            questions.push(companion.puppet.receive_from(companion.datagrams[0])??);
        }
        for (text, from) in questions.into_iter().rev() {
            answered(&mut duo, 1, 0, from, &format!("answer of {text}"))?;
            assert_eq!(duo.app.receive_from(socket)??, (format!("answer of {text}"), address(&text)));
        }
        // By IPv6, without a peer, any number.
        let six = duo.app.datagrams(Domain::V6)??;
        for resolver in ["[2001:db8::53]:53", "[2001:db8::54]:53"] {
            duo.app.send_to(six, address(resolver), resolver)??;
            let companion = &mut duo.companions[1];
            let (text, from) = companion.puppet.receive_from(companion.datagrams[1])??;
            answered(&mut duo, 1, 1, from, &text)?;
            assert_eq!(duo.app.receive_from(six)??, (resolver.to_owned(), address(resolver)));
        }
        // With a peer, and by TCP: neither takes a slot, since nobody will ask.
        for resolver in ["10.9.9.9:53", "127.0.0.53:53", "[2001:db8::53]:53"] {
            let resolver = address(resolver);
            let connected = duo.app.datagrams(Domain::of(resolver))??;
            duo.app.connect(connected, resolver)??;
            assert_eq!(duo.app.names(connected)??.peer, Some(resolver));
            // By IPv6 to the companion's own IPv6 socket, for which nothing is bound.
            let family = usize::from(resolver.is_ipv6());
            duo.app.send(connected, "question")??;
            let companion = &mut duo.companions[1];
            let (_, from) = companion.puppet.receive_from(companion.datagrams[family])??;
            answered(&mut duo, 1, family, from, "answer")?;
            assert_eq!(duo.app.receive_from(connected)??, ("answer".to_owned(), resolver));
            // Dissolved, it asks another without a peer.
            duo.app.disconnect(connected)??;
            let other = SocketAddr::new(resolver.ip(), 53);
            duo.app.send_to(connected, other, "again")??;
            let companion = &mut duo.companions[1];
            let (text, from) = companion.puppet.receive_from(companion.datagrams[family])??;
            answered(&mut duo, 1, family, from, &text)?;
            assert_eq!(duo.app.receive_from(connected)??, ("again".to_owned(), other));
            duo.app.close(connected)??;
            let stream = duo.app.socket(Domain::of(resolver))??;
            duo.app.connect(stream, resolver)??;
            assert_eq!(duo.app.names(stream)??.peer, Some(resolver));
            duo.app.send(stream, "by stream")??;
            let companion = &mut duo.companions[1];
            let accepted = companion.puppet.accept(companion.listeners[family])??;
            assert_eq!(companion.puppet.receive(accepted)??, "by stream");
            companion.puppet.close(accepted)??;
            duo.app.close(stream)??;
        }
        assert_eq!(duo.dataplane.counters()?.slots_busy, 0);
        // Another port is not a resolver's.
        let direct = duo.remote.answer(address("10.77.0.2:5353"), "far ")??;
        assert_eq!(duo.app.ask_datagram(direct, "x")?, Ok(("far x".to_owned(), direct)));
        for socket in [socket, six] {
            duo.app.close(socket)??;
        }
        duo.end()
    })
}

#[test]
fn a_servers_answers_pass() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &udp(), FailureMode::Closed)?;
        for (domain, server, client) in [
            (Domain::V4, "10.77.0.1:9000", "10.77.0.2:9001"),
            (Domain::V6, "[fd77::1]:9000", "[fd77::2]:9001"),
        ] {
            let (server, client) = (address(server), address(client));
            let any = if domain == Domain::V4 { "0.0.0.0:9000" } else { "[::]:9000" };
            let serving = socket(&mut duo, domain, Some(any))?;
            let asking = duo.remote.datagrams(domain)??;
            duo.remote.bind(asking, client)??;
            duo.remote.send_to(asking, server, "question")??;
            assert_eq!(duo.app.receive_from(serving)??, ("question".to_owned(), client));
            duo.app.send_to(serving, client, "answer")??;
            assert_eq!(duo.remote.receive_from(asking)??, ("answer".to_owned(), server));
            duo.app.close(serving)??;
            duo.remote.close(asking)??;
        }
        assert_eq!(duo.dataplane.counters()?.datagrams_redirected, 0);
        duo.end()
    })
}

#[test]
fn without_a_companion_the_failure_mode_decides() -> Result<()> {
    on_machine(|machine| {
        let mut duo = stage(machine, &udp(), FailureMode::Closed)?;
        let far = duo.remote.answer(address("10.77.0.2:5000"), "far ")??;
        let far6 = duo.remote.answer(address("[fd77::2]:5000"), "far ")??;
        let companion = &mut duo.companions[0];
        for socket in companion.datagrams {
            companion.puppet.close(socket)??;
        }
        for destination in [far, far6] {
            let refused = duo.app.ask_datagram(destination, "x")?;
            assert_eq!(refused, Err(Errno::ECONNREFUSED), "{destination}");
            let connected = duo.app.datagrams(Domain::of(destination))??;
            assert_eq!(duo.app.connect(connected, destination)?, Err(Errno::ECONNREFUSED));
            duo.app.close(connected)??;
        }
        let companion = &mut duo.companions[0];
        companion.datagrams =
            [companion.puppet.datagrams(Domain::V4)??, companion.puppet.datagrams(Domain::V6)??];
        companion.puppet.bind(companion.datagrams[0], address("127.0.0.1:15001"))??;
        companion.puppet.bind(companion.datagrams[1], address("[::1]:15001"))??;
        duo.update(&udp(), FailureMode::Open)?;
        let socket = duo.app.datagrams(Domain::V4)??;
        duo.app.send_to(socket, far, "back")??;
        assert_eq!(taken(&mut duo, 0, 0)?.0, "back");
        duo.app.close(socket)??;
        let companion = &mut duo.companions[0];
        for socket in companion.datagrams {
            companion.puppet.close(socket)??;
        }
        for destination in [far, far6] {
            let passed = duo.app.ask_datagram(destination, "x")?;
            assert_eq!(passed, Ok(("far x".to_owned(), destination)));
        }
        // Rules for TCP alone take the programs for datagrams off again.
        let tcp = RedirectSpec { outbound: vec![OutboundRule::all_tcp(to(0))], ..RedirectSpec::default() };
        duo.update(&tcp, FailureMode::Closed)?;
        assert_eq!(duo.app.ask_datagram(far, "x")?, Ok(("far x".to_owned(), far)));
        duo.end()
    })
}
