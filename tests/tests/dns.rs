//! Questions to resolvers are answered by a companion, an unmodified dnsmasq with the configuration that is shipped: asked by
//! the resolvers of several C libraries and languages, by UDP and TCP, one socket asking several; and its failure.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use pillion_tests::{
    PillionRun, Place, Puppet,
    dns::{
        ABSENT, FAR, FAR_SAYS, FORWARDED, FORWARDED_IS, LONG, MEDIUM, ONLY, ONLY_IS, Stage, addresses,
        expected, question,
    },
    on_machine, programs,
    puppet::{Answer, Domain},
    wait_until,
};

const SOON: Duration = Duration::from_secs(20);
/// A resolver that is not there is waited for longer, by everybody.
const AT_ONCE: Duration = Duration::from_secs(2);

fn to(resolver: &str) -> Result<SocketAddr> {
    Ok(SocketAddr::new(resolver.parse()?, 53))
}

/// What is answered to one question, on a socket of its own.
fn ask(app: &mut Puppet, resolver: &str, name: &str) -> Result<Answer<String>> {
    let resolver = to(resolver)?;
    let heard = app.ask_datagram(resolver, &question("ab", name))?;
    Ok(heard.map(|(text, from)| {
        assert_eq!(from, resolver, "who answered");
        text
    }))
}

/// Whether an answer bears an IPv4 address, which it ends with: all of its bytes are ASCII.
fn says(answer: &str, address: &str) -> bool {
    let bytes: Vec<u8> = address.split('.').filter_map(|part| part.parse().ok()).collect();
    answer.as_bytes().ends_with(&bytes)
}

fn finish(run: PillionRun) -> Result<()> {
    let (status, stderr) = run.finish()?;
    ensure!(status.success(), "{stderr}");
    Ok(())
}

#[test]
fn resolvers_of_all_kinds_get_what_only_the_companion_knows() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let run = stage.run(&[])?;
        let mut redirected = 0;
        for which in ["getent", "glibc", "musl", "Python", "Go", "Node", "Java"] {
            let client = stage.asking(which)?;
            for resolvers in [&ABSENT[..], &["127.0.0.53"], &[ABSENT[1]], &["127.0.0.53", "10.77.0.54", FAR]]
            {
                let said = stage.client(&run, resolvers, &client)?.success();
                let said = said.with_context(|| format!("{which} asks {resolvers:?}"))?.stdout;
                assert_eq!(addresses(&said), expected(&ONLY_IS), "{which} asks {resolvers:?}: {said}");
                if matches!(which, "Go" | "Node" | "Java") {
                    let text = format!("text {}", LONG.1);
                    ensure!(said.contains(&text), "{which} asks {resolvers:?}: {said}");
                }
                let counters = run.counters()?;
                let now = counters.datagrams_redirected + counters.outbound_redirected;
                ensure!(now > redirected, "{which} asks {resolvers:?}: not redirected");
                redirected = now;
            }
        }
        let counters = run.counters()?;
        // Sockets with a peer, and (musl) without.
        ensure!(counters.datagrams_redirected > 0 && counters.outbound_redirected > 0, "{counters:?}");
        assert_eq!((counters.slots_busy, counters.by_source), (0, 0), "{counters:?}");
        finish(run)
    })
}

/// What `dig` is asked, which resolver and protocol it tells of, at least how many bytes, and the addresses.
const DIG: &[(&str, &str, usize, &[&str])] = &[
    ("only.test A", "10.77.0.53 UDP", 0, &[ONLY_IS[0]]),
    ("only.test AAAA", "10.77.0.53 UDP", 0, &[ONLY_IS[1]]),
    ("+tcp only.test A", "10.77.0.53 TCP", 0, &[ONLY_IS[0]]),
    ("-b 10.77.0.1 only.test A", "10.77.0.53 UDP", 0, &[ONLY_IS[0]]),
    ("-b 10.77.0.1 +tcp only.test A", "10.77.0.53 TCP", 0, &[ONLY_IS[0]]),
    ("@fd77::53 only.test A", "fd77::53 UDP", 0, &[ONLY_IS[0]]),
    ("@fd77::53 +tcp only.test AAAA", "fd77::53 TCP", 0, &[ONLY_IS[1]]),
    ("-b fd77::1 @fd77::53 only.test A", "fd77::53 UDP", 0, &[ONLY_IS[0]]),
    ("-b fd77::1 @fd77::53 +tcp only.test A", "fd77::53 TCP", 0, &[ONLY_IS[0]]),
    ("@127.0.0.53 only.test A", "127.0.0.53 UDP", 0, &[ONLY_IS[0]]),
    ("@127.0.0.53 +tcp only.test A", "127.0.0.53 TCP", 0, &[ONLY_IS[0]]),
    ("@::1 only.test A", "::1 UDP", 0, &[ONLY_IS[0]]),
    ("@fe80::53%far only.test A", "fe80::53 UDP", 0, &[ONLY_IS[0]]),
    ("@fe80::53%far +tcp only.test A", "fe80::53 TCP", 0, &[ONLY_IS[0]]),
    ("@10.77.0.2 only.test A", "10.77.0.2 UDP", 0, &[ONLY_IS[0]]),
    ("@10.77.0.2 +tcp only.test A", "10.77.0.2 TCP", 0, &[ONLY_IS[0]]),
    ("forwarded.test A", "10.77.0.53 UDP", 0, &[FORWARDED_IS]),
    ("+tcp forwarded.test A", "10.77.0.53 TCP", 0, &[FORWARDED_IS]),
    ("+bufsize=1232 medium.test TXT", "10.77.0.53 UDP", MEDIUM.1, &[]),
    ("+noedns medium.test TXT", "10.77.0.53 TCP", MEDIUM.1, &[]),
    ("+bufsize=4096 long.test TXT", "10.77.0.53 TCP", LONG.1, &[]),
    ("@fd77::53 long.test TXT", "fd77::53 TCP", LONG.1, &[]),
];

#[test]
fn dig_by_udp_and_tcp_and_what_a_datagram_does_not_hold() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let run = stage.run(&[])?;
        let program = programs::system("dig")?;
        for (arguments, by, least, wanted) in DIG {
            let mut dig = std::process::Command::new(&program);
            dig.args(["+tries=1", "+time=5", "+nocookie"]).args(arguments.split_whitespace());
            let said = stage.client(&run, &ABSENT, &dig)?.success().context(*arguments)?.stdout;
            ensure!(said.contains("status: NOERROR"), "dig {arguments}: {said}");
            let (resolver, protocol) = by.split_once(' ').context("a resolver and a protocol")?;
            let told = said.lines().find_map(|line| line.strip_prefix(";; SERVER: ")?.split_once("#53("));
            let (server, told) = told.context("no server")?;
            assert_eq!(server.split('%').next(), Some(resolver), "dig {arguments}: {said}");
            ensure!(told.ends_with(&format!(" ({protocol})")), "dig {arguments}: {said}");
            let truncated = *protocol == *"TCP" && !arguments.contains("+tcp");
            assert_eq!(
                said.contains("Truncated, retrying in TCP mode"),
                truncated,
                "dig {arguments}: {said}"
            );
            let size = said.lines().find_map(|line| line.strip_prefix(";; MSG SIZE  rcvd: "));
            let size: usize = size.context("no size")?.trim().parse()?;
            ensure!(size > *least, "dig {arguments}: {size} bytes: {said}");
            assert_eq!(addresses(&said), expected(wanted), "dig {arguments}: {said}");
        }
        finish(run)
    })
}

#[test]
fn one_socket_asks_several_resolvers_and_each_answers() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let mut run = stage.run(&[])?;
        for (domain, bound, resolvers) in [
            (Domain::V4, None, vec![ABSENT[0], "10.77.0.54", "127.0.0.53", FAR, "192.0.2.1"]),
            (Domain::V4, Some("10.77.0.1:0"), vec![ABSENT[0], "10.77.0.54", FAR]),
            (Domain::V6, None, vec!["::ffff:10.77.0.53", "::ffff:10.77.0.54", ABSENT[1]]),
            (Domain::V6, Some("[fd77::1]:0"), vec![ABSENT[1]]),
            (Domain::V6, Some("[::ffff:10.77.0.1]:0"), vec!["::ffff:10.77.0.53", "::ffff:10.77.0.54"]),
        ] {
            let socket = run.app.datagrams(domain)??;
            if let Some(bound) = bound {
                run.app.bind(socket, bound.parse()?)??;
            }
            for round in 0..3 {
                // All are asked before any answer is looked at. The id tells which question it was.
                for (number, resolver) in resolvers.iter().enumerate() {
                    let id = format!("{round}{number}");
                    run.app.send_to(socket, to(resolver)?, &question(&id, ONLY))??;
                }
                for _ in &resolvers {
                    let (answer, from) = run.app.receive_from(socket)??;
                    ensure!(says(&answer, ONLY_IS[0]), "{answer:?}");
                    let number = answer.strip_prefix(&round.to_string()).and_then(|rest| rest.get(..1));
                    let number: usize = number.with_context(|| format!("{answer:?}"))?.parse()?;
                    assert_eq!(from, to(resolvers[number])?, "question {number} of round {round}");
                }
            }
            run.app.close(socket)??;
        }
        // On IPv6's loopback there is one address: answers show the resolver that was asked last.
        let socket = run.app.datagrams(Domain::V6)??;
        for resolver in [ABSENT[1], "fd77::54"] {
            run.app.send_to(socket, to(resolver)?, &question("ab", ONLY))??;
        }
        for _ in 0..2 {
            let (answer, from) = run.app.receive_from(socket)??;
            ensure!(says(&answer, ONLY_IS[0]) && from == to("fd77::54")?, "{from}: {answer:?}");
        }
        run.app.close(socket)??;
        // Sockets with a peer, which are asked again and dissolved.
        let socket = run.app.datagrams(Domain::V4)??;
        for resolver in [ABSENT[0], FAR] {
            run.app.connect(socket, to(resolver)?)??;
            assert_eq!(run.app.names(socket)??.peer, Some(to(resolver)?));
            run.app.send(socket, &question("ab", ONLY))??;
            let (answer, from) = run.app.receive_from(socket)??;
            ensure!(says(&answer, ONLY_IS[0]) && from == to(resolver)?, "{from}: {answer:?}");
        }
        run.app.disconnect(socket)??;
        run.app.close(socket)??;
        let counters = run.counters()?;
        assert_eq!((counters.slots_busy, counters.by_source, counters.connections), (0, 0, 0));
        finish(run)
    })
}

#[test]
fn what_others_send_on_loopback_is_not_taken_for_an_answer() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let mut run = stage.run(&[])?;
        let mut neighbour = Puppet::start(Place { netns: Some(&stage.near), cgroup: None })?;
        for (domain, resolver, loopback, connected) in [
            (Domain::V6, ABSENT[1], "::1", false),
            (Domain::V4, ABSENT[0], "127.0.0.1", false),
            (Domain::V4, ABSENT[0], "127.0.0.1", true),
        ] {
            let socket = run.app.datagrams(domain)??;
            let question = question("ab", ONLY);
            if connected {
                run.app.connect(socket, to(resolver)?)??;
                run.app.send(socket, &question)??;
            } else {
                run.app.send_to(socket, to(resolver)?, &question)??;
            }
            assert_eq!(run.app.receive_from(socket)??.1, to(resolver)?);
            if connected {
                run.app.disconnect(socket)??;
                run.app.send_to(socket, to(resolver)?, &question)??;
                assert_eq!(run.app.receive_from(socket)??.1, to(resolver)?);
            }
            let other = neighbour.datagrams(domain)??;
            neighbour.bind(other, SocketAddr::new(loopback.parse()?, 0))??;
            let from = neighbour.names(other)??.local;
            let port = run.app.names(socket)??.local.port();
            neighbour.send_to(other, SocketAddr::new(loopback.parse()?, port), "hello")??;
            assert_eq!(run.app.receive_from(socket)??, ("hello".to_owned(), from), "{domain:?}, {connected}");
            run.app.send_to(socket, from, "and back")??;
            assert_eq!(neighbour.receive_from(other)??.0, "and back");
            run.app.close(socket)??;
        }
        drop(neighbour);
        finish(run)
    })
}

#[test]
fn without_the_companion_questions_are_refused_at_once_and_served_again() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let mut run = stage.run(&[("dns: { to: dnsmasq }", "dns: { to: \"dnsmasq:5353\" }")])?;
        let getent = stage.asking("getent")?;
        let open = run.app.datagrams(Domain::V4)??;
        run.app.connect(open, to(ABSENT[0])?)??;
        stage.end_companion(&run)?;
        // A socket that was connected before is told by the kernel.
        run.app.send(open, &question("ab", ONLY))??;
        assert_eq!(run.app.receive_from(open)?, Err(Errno::ECONNREFUSED));
        for resolver in [ABSENT[0], FAR, "127.0.0.53", ABSENT[1]] {
            let begun = std::time::Instant::now();
            let said = ask(&mut run.app, resolver, ONLY)?;
            let by_tcp = run.app.converse(to(resolver)?, "")?;
            assert_eq!((said, by_tcp), (Err(Errno::ECONNREFUSED), Err(Errno::ECONNREFUSED)), "{resolver}");
            ensure!(begun.elapsed() < AT_ONCE, "{resolver}: {:?}", begun.elapsed());
        }
        stage.let_companion_start()?;
        wait_until("another dnsmasq", SOON, || {
            ask(&mut run.app, ABSENT[0], ONLY)
                .is_ok_and(|said| said.is_ok_and(|said| says(&said, ONLY_IS[0])))
        })?;
        let said = stage.client(&run, &ABSENT, &getent)?.success()?.stdout;
        assert_eq!(addresses(&said), expected(&ONLY_IS), "{said}");
        // It has the new companion.
        run.app.send(open, &question("ab", ONLY))??;
        ensure!(says(&run.app.receive_from(open)??.0, ONLY_IS[0]));
        run.app.close(open)??;
        ensure!(run.counters()?.outbound_failed_closed >= 4);
        finish(run)
    })
}

#[test]
fn open_lets_questions_go_to_whom_they_ask() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let mut run = stage.run(&[("onFailure: closed", "onFailure: open")])?;
        let said = ask(&mut run.app, FAR, ONLY)??;
        ensure!(says(&said, ONLY_IS[0]), "{said:?}");
        ensure!(says(&ask(&mut run.app, FAR, FORWARDED)??, FORWARDED_IS));
        stage.end_companion(&run)?;
        let said = ask(&mut run.app, FAR, ONLY)??;
        ensure!(says(&said, FAR_SAYS), "the far resolver's own answer: {said:?}");
        stage.let_companion_start()?;
        wait_until("another dnsmasq", SOON, || {
            ask(&mut run.app, FAR, ONLY).is_ok_and(|said| said.is_ok_and(|said| says(&said, ONLY_IS[0])))
        })?;
        ensure!(run.counters()?.outbound_failed_open > 0);
        finish(run)
    })
}

#[test]
fn five_thousand_questions_from_fifty_sockets_are_all_answered() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let run = stage.run(&[])?;
        let before = run.counters()?;
        let flood = stage.flood(50, 100, &[ABSENT[0], "127.0.0.53", "192.0.2.1", ABSENT[1], "fd77::54"])?;
        let said = stage.client(&run, &ABSENT, &flood)?.success()?.stdout;
        assert_eq!(said.trim(), "5000 answered");
        let counters = run.counters()?;
        // Half of the sockets have a peer: one decision each. The others have one for each question.
        assert_eq!(counters.outbound_redirected - before.outbound_redirected, 25, "{counters:?}");
        assert_eq!(counters.datagrams_redirected - before.datagrams_redirected, 2500, "{counters:?}");
        let left = (counters.slots_busy, counters.by_source, counters.connections, counters.slots_exhausted);
        assert_eq!(left, (0, 0, 0, 0), "{counters:?}");
        finish(run)
    })
}
