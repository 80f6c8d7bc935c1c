//! What the kernel side tells of its decisions: each outcome with all that is told of it, what is left out of a flood, and
//! that nothing is told once nobody listens.

use std::{net::SocketAddr, num::NonZeroU32, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{errno::Errno, sys::signal::Signal};
use pillion_redirect::{
    Because, Caller, DecidedBy, Decision, Outcome, RedirectError, Rule, TraceSession, TraceSettings,
};
use pillion_tests::{
    Agent, ProcessGuard,
    duo::{Duo, address, to},
    on_machine, programs,
    puppet::Domain,
    scene::{Scene, id, web},
    wait_until,
};
use pillion_workload::{FailureMode, InboundRule, OutboundRule, Protocol, RedirectSpec};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

fn settings(rate: u32, sample: u32) -> TraceSettings {
    let number = |number| NonZeroU32::new(number).expect("not zero");
    TraceSettings { rate: number(rate), sample: number(sample) }
}

fn spec() -> RedirectSpec {
    let mut first = OutboundRule::all_tcp(to(0));
    first.cidrs =
        vec!["192.0.2.0/24".parse().expect("a network"), "2001:db8::/32".parse().expect("a network")];
    first.protocols = [Protocol::Tcp, Protocol::Udp].into();
    let mut second = OutboundRule::all_tcp(to(1));
    second.ports = [8443].into();
    let mut spec = RedirectSpec {
        outbound: vec![first, second],
        inbound: vec![InboundRule { ports: [8080].into(), to: to(1) }],
        ..RedirectSpec::default()
    };
    spec.exclude.destinations.ports = [22].into();
    spec
}

fn trace(duo: &Duo) -> Result<TraceSession> {
    let cgroup = pillion_tests::ready::identity(&duo.workload)?.id;
    Ok(duo.dataplane.trace(cgroup, settings(1000, 1))?)
}

/// The next decision, which must be the only one.
fn one(session: &mut TraceSession) -> Result<Decision> {
    let mut told = Vec::new();
    wait_until("a decision is told", Duration::from_secs(5), || {
        let batch = session.read().expect("the maps can be read");
        assert!(batch.left_out == 0 && !batch.ended, "{batch:?}");
        told.extend(batch.decisions);
        !told.is_empty()
    })?;
    ensure!(told.len() == 1, "{told:#?}");
    told.pop().context("looked at above")
}

struct Wanted<'a> {
    by: DecidedBy,
    protocol: Protocol,
    original: &'a str,
    effective: &'a str,
    rule: Rule,
    outcome: Outcome,
    because: Option<Because>,
    errno: Option<i32>,
}

fn check(duo: &Duo, decision: &Decision, wanted: &Wanted<'_>) {
    let Wanted { by, protocol, original, effective, rule, outcome, because, errno } = *wanted;
    assert_eq!((decision.by, decision.protocol), (by, protocol), "{original}");
    assert_eq!((decision.original, decision.effective), (address(original), address(effective)));
    assert_eq!((decision.rule, decision.outcome, decision.because), (rule, outcome, because), "{original}");
    assert_eq!(decision.errno, errno, "{original}");
    let caller = decision.caller.as_ref().map(|Caller { pid, user, command }| (*pid, *user, command.clone()));
    assert_eq!(caller, Some((duo.app.pid(), 0, "pillion-puppet".to_owned())), "{original}");
    let late = decision.at.elapsed().expect("in the past");
    assert!(late < Duration::from_secs(10), "{late:?}");
}

fn redirected<'a>(by: DecidedBy, original: &'a str, effective: &'a str, rule: usize) -> Wanted<'a> {
    Wanted {
        by,
        protocol: Protocol::Tcp,
        original,
        effective,
        rule: Rule::Outbound(rule),
        outcome: Outcome::Redirected,
        because: None,
        errno: None,
    }
}

fn passed(by: DecidedBy, original: &str, because: Because) -> Wanted<'_> {
    Wanted {
        by,
        protocol: Protocol::Tcp,
        original,
        effective: original,
        rule: Rule::None,
        outcome: Outcome::Passed,
        because: Some(because),
        errno: None,
    }
}

fn connect(duo: &mut Duo, destination: SocketAddr) -> Result<std::result::Result<(), Errno>> {
    let socket = duo.app.socket(Domain::of(destination))??;
    let outcome = duo.app.connect(socket, destination)?;
    duo.app.close(socket)??;
    Ok(outcome)
}

#[test]
fn each_outcome_is_told_with_all_its_fields() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        // What passes ends at once instead of in a time limit.
        duo.near.ip("route add unreachable 198.51.100.0/24")?;
        duo.near.ip("route add unreachable 192.0.2.0/24")?;
        duo.attach(&spec(), FailureMode::Closed)?;
        let mut session = trace(&duo)?;
        for wanted in [
            redirected(DecidedBy::Connect4, "192.0.2.1:80", "127.0.0.1:15001", 0),
            redirected(DecidedBy::Connect4, "10.77.0.2:8443", "127.0.0.1:15002", 1),
            redirected(DecidedBy::Connect6, "[2001:db8::1]:80", "127.0.0.1:15001", 0),
            passed(DecidedBy::Connect4, "192.0.2.1:22", Because::Excluded),
            passed(DecidedBy::Connect4, "198.51.100.1:80", Because::NoRule),
            passed(DecidedBy::Connect4, "127.0.0.1:9", Because::Local),
            passed(DecidedBy::Connect6, "[::1]:9", Because::Local),
            passed(DecidedBy::Connect4, "224.0.0.1:80", Because::Multicast),
        ] {
            let _ = connect(&mut duo, address(wanted.original))?;
            let decision = one(&mut session)?;
            check(&duo, &decision, &wanted);
            ensure!(decision.spec.as_deref() == Some(&spec()), "the rules that decided");
        }

        // Datagrams of a socket without a peer.
        let socket = duo.app.datagrams(Domain::V4)??;
        duo.app.send_to(socket, address("192.0.2.1:123"), "?")??;
        let datagram = one(&mut session)?;
        let wanted = redirected(DecidedBy::Send4, "192.0.2.1:123", "127.0.0.1:15001", 0);
        check(&duo, &datagram, &Wanted { protocol: Protocol::Udp, ..wanted });
        duo.app.close(socket)??;

        // A bound socket's source is known.
        let socket = duo.app.socket(Domain::V4)??;
        duo.app.bind(socket, address("10.77.0.1:40404"))??;
        duo.app.connect(socket, address("192.0.2.1:80"))??;
        let bound = one(&mut session)?;
        assert_eq!(
            (bound.source_address, bound.source_port),
            (Some([10, 77, 0, 1].into()), Some(40404)),
            "{bound:?}"
        );
        duo.app.close(socket)??;

        // Arriving.
        let listener = duo.app.listen(address("10.77.0.1:8080"))??;
        let peer = duo.remote.socket(Domain::V4)??;
        let _ = duo.remote.connect(peer, address("10.77.0.1:8080"))?;
        let arrived = one(&mut session)?;
        assert_eq!((arrived.by, arrived.rule), (DecidedBy::Steer, Rule::Inbound));
        assert_eq!(arrived.original, address("10.77.0.1:8080"));
        assert_eq!(arrived.effective, address("10.77.0.1:15002"));
        assert_eq!((arrived.outcome, arrived.because), (Outcome::Redirected, None));
        assert_eq!(arrived.source_address, Some([10, 77, 0, 2].into()));
        assert_eq!(arrived.caller, None);
        duo.remote.close(peer)??;
        duo.app.close(listener)??;

        drop(session);
        duo.end()
    })
}

#[test]
fn who_is_left_alone_and_what_fails_is_told() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        // What passes ends at once instead of in a time limit.
        duo.near.ip("route add unreachable 192.0.2.0/24")?;
        duo.attach(&spec(), FailureMode::Closed)?;
        let mut session = trace(&duo)?;
        let mut alone = spec();
        alone.exclude.users = [0].into();
        duo.update(&alone, FailureMode::Closed)?;
        let _ = connect(&mut duo, address("192.0.2.1:80"))?;
        check(&duo, &one(&mut session)?, &passed(DecidedBy::Connect4, "192.0.2.1:80", Because::User));
        alone.exclude.users.clear();
        alone.exclude.executables = [programs::puppet()?].into();
        duo.update(&alone, FailureMode::Closed)?;
        let _ = connect(&mut duo, address("192.0.2.1:80"))?;
        check(&duo, &one(&mut session)?, &passed(DecidedBy::Connect4, "192.0.2.1:80", Because::Executable));

        // The failure mode.
        for (mode, outcome, errno) in [
            (FailureMode::Closed, Outcome::Refused, Some(111)),
            (FailureMode::Open, Outcome::FailedOpen, None),
        ] {
            duo.update(&spec(), mode)?;
            let gone = "two".parse()?;
            duo.guard.as_mut().context("attached")?.companion_gone(&gone)?;
            let answer = connect(&mut duo, address("10.77.0.2:8443"))?;
            assert_eq!(answer, Err(Errno::ECONNREFUSED));
            let wanted = Wanted {
                outcome,
                because: Some(Because::NoListener),
                errno,
                effective: "10.77.0.2:8443",
                ..redirected(DecidedBy::Connect4, "10.77.0.2:8443", "", 1)
            };
            check(&duo, &one(&mut session)?, &wanted);
        }
        drop(session);
        duo.end()
    })
}

#[test]
fn a_flood_is_told_at_the_rate_and_the_rest_counted() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        duo.attach(&spec(), FailureMode::Closed)?;
        let cgroup = pillion_tests::ready::identity(&duo.workload)?.id;
        for (settings, most) in [(settings(5, 1), 5 + 2), (settings(1000, 10), 20)] {
            let mut session = duo.dataplane.trace(cgroup, settings)?;
            assert!(matches!(duo.dataplane.trace(cgroup, settings), Err(RedirectError::Traced)));
            let begun = std::time::Instant::now();
            for _ in 0..200 {
                let _ = connect(&mut duo, address("127.0.0.1:9"))?;
            }
            let seconds = begun.elapsed().as_secs() + 1;
            let (mut told, mut left_out) = (0_u64, 0_u64);
            wait_until("all are told or counted", Duration::from_secs(5), || {
                let batch = session.read().expect("the maps can be read");
                told += batch.decisions.len() as u64;
                left_out += batch.left_out;
                told + left_out >= 200
            })?;
            assert_eq!(told + left_out, 200);
            let most = if settings.sample.get() > 1 { most } else { most + 5 * seconds };
            assert!(told > 0 && told <= most, "{told} of at most {most}");
        }
        duo.end()
    })
}

#[test]
fn nothing_is_told_once_nobody_listens() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        let cgroup = pillion_tests::ready::identity(&duo.workload)?.id;
        let refused = duo.dataplane.trace(cgroup, settings(1, 1)).map(drop);
        assert!(matches!(refused, Err(RedirectError::NotInForce)), "{refused:?}");
        duo.attach(&spec(), FailureMode::Closed)?;
        let first = trace(&duo)?;
        drop(first);
        let _ = connect(&mut duo, address("127.0.0.1:9"))?;
        let mut second = trace(&duo)?;
        let _ = connect(&mut duo, address("127.0.0.1:10"))?;
        assert_eq!(one(&mut second)?.original, address("127.0.0.1:10"));
        // The end of redirection is the trace's, too.
        duo.guard.take().context("attached")?.detach()?;
        let _ = connect(&mut duo, address("127.0.0.1:9"))?;
        let batch = second.read()?;
        assert!(batch.ended && batch.decisions.is_empty(), "{batch:?}");
        drop(second);
        duo.end()
    })
}

fn traced(agent: &Agent, workload: &str, more: &[&str]) -> Result<ProcessGuard> {
    let mut arguments = vec!["trace", workload, "-o", "json"];
    arguments.extend(more);
    let mut client = ProcessGuard::spawn("pillion trace", &mut agent.cli_command(&arguments)?)?;
    client.stderr_line(SOON, |line| line.starts_with("tracing "))?;
    Ok(client)
}

/// The next line of a type, as JSON.
fn line(client: &mut ProcessGuard, kind: &str) -> Result<Value> {
    let prefix = format!(r#"{{"type":"{kind}""#);
    Ok(serde_json::from_str(&client.stdout_line(SOON, |line| line.starts_with(&prefix))?)?)
}

#[test]
fn the_agent_traces_for_a_client_and_no_longer() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::with_agent(machine)?;
        let mut puppet = scene.web("traced")?;
        let workload = id("traced");

        let unknown = scene.agent.cli(&["trace", "containerd/default/nobody"])?.code(1)?;
        ensure!(unknown.stderr.contains("containerd/default/nobody"), "{}", unknown.stderr);
        scene.agent.cli(&["trace", "no id"])?.code(2)?;
        scene.agent.cli(&["trace", &workload, "--rate", "0"])?.code(2)?;
        let other = scene.puppet("other", &[])?;
        scene.agent.until_verdict(&id("other"), "notMatched")?;
        let untraceable = scene.agent.cli(&["trace", &id("other")])?.code(1)?;
        ensure!(untraceable.stderr.contains("see: pillion describe"), "{}", untraceable.stderr);
        drop(other);

        let mut client = traced(&scene.agent, &workload, &[])?;
        let second = scene.agent.cli(&["trace", &workload])?.code(1)?;
        ensure!(second.stderr.contains("is being traced already"), "{}", second.stderr);
        scene.says_through_relay(&mut puppet)?;
        let told = line(&mut client, "decision")?;
        for (field, value) in [
            ("direction", "out"),
            ("by", "connect4"),
            ("protocol", "tcp"),
            ("rule", "outbound"),
            ("companion", "relay"),
            ("effective", "127.0.0.1:15001"),
            ("verdict", "redirected"),
        ] {
            assert_eq!(told[field], value, "{field} in {told}");
        }
        assert_eq!(told["ruleNumber"], 1);
        assert_eq!(told["original"], scene.echo.address().to_string());
        assert_eq!(told["process"]["user"], 0);
        assert_eq!(told["because"], Value::Null);

        // A client that is killed has no word to say: the next trace can begin.
        client.signal(Signal::SIGKILL)?;
        client.exit(SOON)?;
        let ended = |agent: &Agent| agent.log().is_ok_and(|log| log.contains("its client is gone"));
        wait_until("the end of the trace", SOON, || ended(&scene.agent))?;
        let mut short = traced(&scene.agent, &workload, &["--for", "1s"])?;
        assert_eq!(short.exit(SOON)?.code(), Some(0), "the time is over");

        // Nor has an agent that is killed: the next one has turned it off.
        let mut client = traced(&scene.agent, &workload, &[])?;
        scene.agent.stop(Signal::SIGKILL)?;
        assert_eq!(client.exit(SOON)?.code(), Some(4));
        scene.agent.run()?;
        scene.agent.until_verdict(&workload, "attached")?;
        scene.says_through_relay(&mut puppet)?;
        let mut client = traced(&scene.agent, &workload, &[])?;
        scene.says_through_relay(&mut puppet)?;
        line(&mut client, "decision")?;

        // The end of redirection is its end.
        scene.agent.cli(&["detach", &workload])?.success()?;
        assert_eq!(client.exit(SOON)?.code(), Some(1));
        drop(puppet);
        scene.agent.until_forgotten(&workload)?;
        scene.end()
    })
}

#[test]
fn a_connection_is_explained_as_the_kernel_decides() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        scene.agent.policy("web.yaml", &web("closed", ", exclude: { ports: [22] }"))?;
        scene.agent.run()?;
        let puppet = scene.web("explained")?;
        let workload = id("explained");
        let explained = scene.agent.json(&[
            "explain",
            &workload,
            "--connection",
            "tcp:192.0.2.1:443",
            "--connection",
            "tcp:192.0.2.1:22",
            "--connection",
            "udp:192.0.2.1:443",
        ])?;
        let all = explained["connections"].as_array().context("connections")?;
        assert_eq!(all.len(), 3);
        assert_eq!(all[0]["companion"], "relay");
        assert_eq!(all[0]["effective"], "127.0.0.1:15001");
        assert_eq!(all[0]["listening"], true);
        assert_eq!(all[0]["onFailure"], "closed");
        assert_eq!(all[0]["kernel"]["rule"], "rule 1");
        assert_eq!(all[1]["redirected"], false);
        let steps = all[1]["steps"].as_array().context("steps")?;
        assert_eq!(
            (&steps[0]["field"], &steps[0]["why"]),
            (&"outbound[0]".into(), &"it excludes port 22".into())
        );
        assert_eq!(all[1]["effective"], "192.0.2.1:22");
        assert_eq!(all[2]["redirected"], false);
        for one in all {
            assert_eq!(one["kernel"]["agrees"], true, "{one:#}");
        }
        let text =
            scene.agent.cli(&["explain", &workload, "--connection", "tcp:192.0.2.1:443"])?.success()?.stdout;
        for part in ["It goes to companion relay:15001", "The kernel's tables say the same: rule 1"] {
            ensure!(text.contains(part), "no {part:?} in {text}");
        }
        scene.agent.cli(&["explain", &workload, "--connection", "tcp:example.org:443"])?.code(2)?;
        drop(puppet);
        scene.agent.until_forgotten(&workload)?;
        scene.end()
    })
}
