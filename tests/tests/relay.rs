//! The embedded relay between a real application and real servers, in both directions: bytes, records, and what happens
//! when it is not there.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    EchoServer, Machine, NetNs, PillionRun, Place, Puppet, on_machine,
    puppet::{Answer, Domain},
    run::{Record, Way, dial},
    wait_until,
};

const SOON: Duration = Duration::from_secs(20);
const OUTBOUND: &str = "127.0.0.1:15001";
const INBOUND: &str = "127.0.0.1:15006";

fn policy(machine: &Machine, on_failure: &str) -> Result<PathBuf> {
    machine.file(
        "relay.yaml",
        &format!(
            "spec:\n  select: {{ runtimes: [process] }}\n  companions: [{{ name: r, builtin: relay }}]\n  \
             redirect:\n    outbound: [{{ to: \"r:15001\" }}]\n    \
             inbound: [{{ ports: [8080], to: \"r:15006\" }}]\n  onFailure: {on_failure}\n"
        ),
    )
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        std::net::IpAddr::V4(ip) => (ip.to_ipv6_mapped(), address.port()).into(),
        std::net::IpAddr::V6(_) => address,
    }
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(pid.try_into()?), signal)?)
}

fn finish(run: PillionRun) -> Result<()> {
    let (status, stderr) = run.finish()?;
    ensure!(status.success(), "{stderr}");
    Ok(())
}

/// Nothing of the redirection is held for connections that are over.
fn expect_nothing_held(run: &PillionRun) -> Result<()> {
    let mut held = None;
    wait_until("all slots and destinations given back", SOON, || {
        held = run.counters().ok().map(|now| (now.slots_busy, now.by_source, now.connections));
        held == Some((0, 0, 0))
    })
    .with_context(|| format!("slots, by source, sockets: {held:?}"))
}

#[test]
fn a_thousand_connections_are_byte_exact_and_have_a_record_each() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let v4 = EchoServer::start(&far, "10.77.0.2:0")?;
        let v6 = EchoServer::start(&far, "[fd77::2]:0")?;
        let mut run = PillionRun::start(&near, &policy(machine, "closed")?)?;
        let mut bytes = 0;
        for (to, count) in [(v4.address(), 400), (v6.address(), 400), (mapped(v4.address()), 199)] {
            let done = run.app.exchange(to, count, 200_000)??;
            assert_eq!((done.exact, done.faults), (count, vec![]), "{to}");
            bytes += done.bytes;
        }
        // One whose socket cannot be dialled from a mapped address.
        let only = run.app.socket(Domain::V6)??;
        run.app.v6_only(only, true)??;
        run.app.connect(only, v6.address())??;
        let own = run.app.names(only)??;
        assert_eq!((own.local.ip(), own.peer), (address("[fd77::1]:0").ip(), Some(v6.address())));
        run.app.send(only, "only IPv6")??;
        run.app.shutdown(only)??;
        assert_eq!(run.app.receive_all(only)??, "only IPv6");
        run.app.close(only)??;
        bytes += 9;

        let records = run.wait_for_records(1000)?;
        for record in &records {
            assert_eq!(
                (record.direction.as_str(), record.protocol.as_str(), record.outcome.as_str()),
                ("outbound", "tcp", "ok"),
                "{record:?}"
            );
            assert_eq!(record.workload, records[0].workload);
            assert_eq!(record.bytes_sent, record.bytes_received, "an echo: {record:?}");
            let own = if record.destination == Some(v4.address()) { "10.77.0.1:0" } else { "[fd77::1]:0" };
            assert_eq!(record.source.ip(), address(own).ip(), "{record:?}");
            ensure!(record.connect_ms.is_some_and(|connect| connect <= record.duration_ms), "{record:?}");
        }
        let to = |server: &EchoServer| {
            records.iter().filter(|record| record.destination == Some(server.address())).count()
        };
        assert_eq!((to(&v4), to(&v6)), (599, 401));
        assert_eq!((v4.peers().len(), v6.peers().len()), (599, 401));
        assert_eq!(records.iter().map(|record| record.bytes_sent).sum::<u64>(), bytes);
        ensure!(records.iter().any(|record| record.source == own.local), "no record of {own:?}");
        expect_nothing_held(&run)?;
        finish(run)
    })
}

#[test]
fn a_record_says_how_a_connection_ended() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let mut run = PillionRun::start(&near, &policy(machine, "closed")?)?;
        let mut server = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
        let to = address("10.77.0.2:80");
        let listener = server.listen(to)??;
        let mut told = 0;
        let mut ended = |run: &PillionRun, outcome: &str| -> Result<Record> {
            told += 1;
            let record = run.wait_for_records(told)?.pop().context("a record")?;
            assert_eq!(record.outcome, outcome, "{record:?}");
            Ok(record)
        };

        // Each by a socket whose own name the record must bear.
        let dial = |run: &mut PillionRun, to| -> Result<_> {
            let socket = run.app.socket(Domain::of(to))??;
            run.app.connect(socket, to)??;
            Ok((socket, run.app.names(socket)??.local))
        };
        let refused = address("10.77.0.2:9");
        let (socket, own) = dial(&mut run, refused)?;
        assert_eq!(run.app.receive(socket)?, Err(Errno::ECONNRESET));
        run.app.close(socket)??;
        let record = ended(&run, "connect_refused")?;
        assert_eq!((record.source, record.destination, record.connect_ms), (own, Some(refused), None));

        for (nowhere, unspecified) in [("192.0.2.9:80", "0.0.0.0:0"), ("[2001:db8::9]:80", "[::]:0")] {
            let (socket, own) = dial(&mut run, address(nowhere))?;
            assert_eq!(run.app.receive(socket)?, Err(Errno::ECONNRESET));
            run.app.close(socket)??;
            let record = ended(&run, "connect_unreachable")?;
            assert_eq!(record.destination, Some(address(nowhere)));
            // No route, no address; but the port tells which socket it was.
            assert_eq!(record.source, SocketAddr::new(address(unspecified).ip(), own.port()));
        }

        let (socket, own) = dial(&mut run, to)?;
        let accepted = server.accept(listener)??;
        run.app.send(socket, "question")??;
        assert_eq!(server.receive(accepted)??, "question");
        server.reset(accepted)??;
        assert_eq!(run.app.receive(socket)?, Err(Errno::ECONNRESET));
        run.app.close(socket)??;
        let record = ended(&run, "reset_by_upstream")?;
        assert_eq!((record.source, record.destination), (own, Some(to)));
        assert_eq!((record.bytes_sent, record.bytes_received), (8, 0));

        let (socket, own) = dial(&mut run, to)?;
        let accepted = server.accept(listener)??;
        server.send(accepted, "answer")??;
        assert_eq!(run.app.receive(socket)??, "answer");
        run.app.reset(socket)??;
        assert_eq!(server.receive(accepted)?, Err(Errno::ECONNRESET));
        let record = ended(&run, "reset_by_client")?;
        assert_eq!((record.source, record.destination), (own, Some(to)));
        assert_eq!((record.bytes_sent, record.bytes_received), (0, 6));

        // Whoever dials the relay itself has no original destination.
        let (socket, own) = dial(&mut run, address(OUTBOUND))?;
        assert_eq!(run.app.receive(socket)?, Err(Errno::ECONNRESET));
        let record = ended(&run, "no_original_destination")?;
        assert_eq!((record.source, record.destination), (own, None));
        run.app.close(socket)??;
        expect_nothing_held(&run)?;
        finish(run)
    })
}

#[test]
fn ten_thousand_connections_use_up_neither_ports_nor_slots() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        // The relay has one address and port: with this few ports, connections from one source address would run out.
        near.run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 41499"))?;
        let servers: Vec<EchoServer> =
            (0..10).map(|_| EchoServer::start(&far, "10.77.0.2:0")).collect::<Result<_>>()?;
        let mut run = PillionRun::start(&near, &policy(machine, "closed")?)?;
        expect_nothing_held(&run)?;
        for server in &servers {
            let done = run.app.exchange(server.address(), 1000, 2_000)??;
            assert_eq!((done.exact, done.faults), (1000, vec![]));
        }
        let records = run.wait_for_records(10_000)?;
        ensure!(records.iter().all(|record| record.outcome == "ok"));
        expect_nothing_held(&run)?;
        let counters = run.counters()?;
        assert_eq!((counters.outbound_redirected, counters.destinations_answered), (10_000, 10_000));
        assert_eq!(
            (counters.slots_exhausted, counters.slots_expired, counters.destinations_stale),
            (0, 0, 0)
        );
        finish(run)
    })
}

#[test]
fn what_dials_the_workload_is_relayed_with_its_real_address() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let mut run = PillionRun::start(&near, &policy(machine, "closed")?)?;
        let mut client = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
        let listener = run.app.listen(address("[::]:8080"))??;

        let mut sources = BTreeSet::new();
        for to in ["10.77.0.1:8080", "[fd77::1]:8080"].map(address) {
            let socket = client.socket(Domain::of(to))??;
            client.connect(socket, to)??;
            let names = client.names(socket)??;
            assert_eq!(names.peer, Some(to));
            client.send(socket, "question")??;
            let accepted = run.app.accept(listener)??;
            assert_eq!(run.app.receive(accepted)??, "question");
            // The application is dialled from within its own host, on the address that was dialled from outside.
            let seen = run.app.names(accepted)??;
            let plain = |address: SocketAddr| address.ip().to_canonical();
            assert_eq!((plain(seen.local), seen.peer.map(plain)), (to.ip(), Some(to.ip())));
            run.app.send(accepted, "the answer")??;
            run.app.close(accepted)??;
            assert_eq!(client.receive_all(socket)??, "the answer");
            client.close(socket)??;
            sources.insert((names.local, Some(to), 8, 10));
        }
        let records = run.wait_for_records(2)?;
        ensure!(records.iter().all(|record| record.direction == "inbound" && record.outcome == "ok"));
        let told = records
            .iter()
            .map(|record| (record.source, record.destination, record.bytes_sent, record.bytes_received));
        assert_eq!(told.collect::<BTreeSet<_>>(), sources);

        // From within the namespace the application is reached as if nothing were there.
        let mut neighbour = Puppet::start(Place { netns: Some(&near), cgroup: None })?;
        for to in ["127.0.0.1:8080", "[::1]:8080", "10.77.0.1:8080", "[fd77::1]:8080"].map(address) {
            let socket = neighbour.socket(Domain::of(to))??;
            neighbour.connect(socket, to)??;
            let accepted = run.app.accept(listener)??;
            let (own, seen) = (neighbour.names(socket)??.local, run.app.names(accepted)??.peer);
            assert_eq!(seen.map(|peer| peer.port()), Some(own.port()), "{to}");
            run.app.close(accepted)??;
            neighbour.close(socket)??;
        }
        run.app.close(listener)??;

        // Many, byte for byte, by an echo in the application.
        run.app.echo(address("[::]:8080"))??;
        for to in ["10.77.0.1:8080", "[fd77::1]:8080"].map(address) {
            let done = client.exchange(to, 200, 100_000)??;
            assert_eq!((done.exact, done.faults), (200, vec![]), "{to}");
        }
        assert_eq!(run.wait_for_records(402)?.len(), 402, "none of those from within");
        assert_eq!(run.counters()?.inbound_redirected, 402);
        finish(run)
    })
}

/// Ends the relay and takes its port for another before it is started again.
fn usurp(netns: &NetNs, run: &PillionRun, port: &str) -> Result<Puppet> {
    let mut other = Puppet::start(Place { netns: Some(netns), cgroup: None })?;
    let end = Instant::now() + SOON;
    loop {
        match kill(Pid::from_raw(run.companion("r")?.try_into()?), Signal::SIGKILL) {
            // ESRCH: it could not listen, and has ended by itself.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
        // A restart takes at least 100 ms, an attempt a fraction of one.
        let until = Instant::now() + Duration::from_millis(90);
        while Instant::now() < until {
            match other.listen(address(port))? {
                Ok(_) => return Ok(other),
                Err(errno) => ensure!(errno == Errno::EADDRINUSE, "{errno}"),
            }
        }
        ensure!(Instant::now() < end, "{port} is never free");
    }
}

#[test]
fn without_a_relay_the_policy_decides_even_when_another_has_its_port() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let v4 = EchoServer::start(&far, "10.77.0.2:0")?;
        let v6 = EchoServer::start(&far, "[fd77::2]:0")?;
        for on_failure in ["open", "closed"] {
            let mut run = PillionRun::start(&near, &policy(machine, on_failure)?)?;
            let other = usurp(&near, &run, OUTBOUND)?;
            let expected = match on_failure {
                "open" => Ok(Way::Direct),
                _ => Err(Errno::ECONNREFUSED),
            };
            for (server, to) in [(&v4, v4.address()), (&v6, v6.address()), (&v4, mapped(v4.address()))] {
                assert_eq!(dial(&mut run.app, server, to)?, expected, "{on_failure}, {to}");
            }
            assert_eq!(run.records()?, vec![]);
            // Once the port is given back, the relay is too.
            drop(other);
            wait_until("the relay", SOON, || {
                dial(&mut run.app, &v4, v4.address()).is_ok_and(|way| way == Ok(Way::Relayed))
            })?;
            assert_eq!(run.wait_for_records(1)?[0].outcome, "ok");
            expect_nothing_held(&run)?;
            finish(run)?;
        }
        Ok(())
    })
}

#[test]
fn without_a_relay_the_policy_decides_for_inbound_connections_too() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        for on_failure in ["open", "closed"] {
            let mut run = PillionRun::start(&near, &policy(machine, on_failure)?)?;
            let mut client = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
            let listener = run.app.listen(address("[::]:8080"))??;
            let other = usurp(&near, &run, INBOUND)?;
            for to in ["10.77.0.1:8080", "[fd77::1]:8080"].map(address) {
                let socket = client.socket(Domain::of(to))??;
                let said: Answer<()> = client.connect(socket, to)?;
                if on_failure == "open" {
                    assert_eq!(said, Ok(()), "{to}");
                    let accepted = run.app.accept(listener)??;
                    let (own, seen) = (client.names(socket)??.local, run.app.names(accepted)??.peer);
                    assert_eq!(
                        seen.map(|peer| (peer.ip().to_canonical(), peer.port())),
                        Some((own.ip(), own.port()))
                    );
                    run.app.close(accepted)??;
                } else {
                    assert_eq!(said, Err(Errno::ECONNREFUSED), "{to}");
                }
                client.close(socket)??;
            }
            assert_eq!(run.records()?, vec![]);
            drop(other);
            run.app.close(listener)??;
            run.app.echo(address("[::]:8080"))??;
            wait_until("the relay", SOON, || {
                let said = client.converse(address("10.77.0.1:8080"), "again");
                let records = run.records().map_or(0, |records| records.len());
                said.is_ok_and(|said| said == Ok("again".to_owned())) && records > 0
            })?;
            finish(run)?;
        }
        Ok(())
    })
}

#[test]
fn a_stopped_relay_keeps_connections_waiting_and_loses_none() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        for on_failure in ["open", "closed"] {
            let before = server.peers().len();
            let mut run = PillionRun::start(&near, &policy(machine, on_failure)?)?;
            let relay = run.companion("r")?;
            signal(relay, Signal::SIGSTOP)?;
            wait_until("a stopped relay", SOON, || {
                fs::read_to_string(format!("/proc/{relay}/stat")).is_ok_and(|stat| stat.contains(") T "))
            })?;
            let mut waiting = Vec::new();
            for number in 0..20 {
                let socket = run.app.socket(Domain::V4)??;
                run.app.connect(socket, server.address())??;
                run.app.send(socket, &number.to_string())??;
                run.app.shutdown(socket)??;
                waiting.push(socket);
            }
            assert_eq!(server.peers().len(), before, "nothing passes by a relay that only sleeps");
            assert_eq!(run.counters()?.slots_busy, 20);
            signal(relay, Signal::SIGCONT)?;
            for (number, socket) in (0..).zip(waiting) {
                assert_eq!(run.app.receive_all(socket)??, i32::to_string(&number));
                run.app.close(socket)??;
            }
            assert_eq!(run.wait_for_records(20)?.len(), 20);
            expect_nothing_held(&run)?;
            finish(run)?;
        }
        Ok(())
    })
}
