//! Docker 20.10 and 28, with the runtime that `pillion install-hooks` gives it: what becomes of containers' very first
//! connections, of containers whose companions fail or hang, and of everything when agent or dockerd go away meanwhile.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{Engine, engines::policies, on_machine, wait_until};

const SOON: Duration = Duration::from_secs(30);
const HELD: &[&str] = &["--runtime", "pillion"];

fn with_agent(machine: &pillion_tests::Machine, version: &'static str) -> Result<Engine> {
    let mut engine = Engine::docker(machine, version)?;
    for (name, policy) in policies("docker") {
        engine.agent.policy(name, &policy)?;
    }
    engine.agent.run()?;
    engine.until_watched()?;
    Ok(engine)
}

fn first_connections(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let mut engine = Engine::docker(machine, version)?;
        for (name, policy) in policies("docker") {
            engine.agent.policy(name, &policy)?;
        }
        // Without an agent that ever was, everything starts; what runs is attached when one comes.
        engine.passes("early", "web", HELD)?;
        engine.agent.run()?;
        engine.until_watched()?;
        let early = engine.agent.until_verdict("docker/early", "attached")?;
        ensure!(early["firstInstruction"] == "after", "{early}");

        let known = engine.captures("first", "wrapper", HELD)?;
        // What the gate told and what the source told are one workload: nothing was seen to change.
        let events = known["events"].as_array().context("events")?;
        let attached = events.iter().filter(|event| event["kind"] == "attached").count();
        ensure!(attached == 1, "{events:?}");
        // Labels select.
        engine.passes("other", "nothing", HELD)?;
        engine.agent.until_verdict("docker/other", "notMatched")?;
        // Through another runtime it is seen, late.
        engine.passes("late", "web", &[])?;
        let late = engine.agent.until_verdict("docker/late", "attached")?;
        ensure!(late["firstInstruction"] == "after", "{late}");
        // A name is the workload's.
        engine.tool(&["rename", "late", "later"])?.success()?;
        engine.agent.until_verdict("docker/later", "attached")?;
        engine.agent.until_forgotten("docker/late")?;

        // As the default runtime.
        let before = fs::read_to_string(engine.config())?;
        let installed = engine.install(&["--default"])?.success()?;
        ensure!(
            installed.stdout.contains('+') && installed.stdout.contains("default-runtime"),
            "{}",
            installed.stdout
        );
        engine.reload("pillion {")?;
        engine.captures("default", "wrapper", &[])?;
        let again = engine.install(&["--default"])?.success()?;
        ensure!(again.stdout.is_empty(), "a second time: {}", again.stdout);
        ensure!(fs::read_to_string(engine.config())? != before);

        // dockerd goes away and comes back; by default it takes its containers with it.
        engine.restart()?;
        engine.until_watched()?;
        for name in ["first", "later", "default"] {
            engine.agent.until_forgotten(&engine.id(name))?;
            engine.remove(name)?;
        }
        engine.captures("after-restart", "wrapper", HELD)?;

        // Taken out while a container runs that was started through it: it can still be stopped.
        engine.pillion(&["uninstall-hooks"])?.success()?;
        let now: serde_json::Value = serde_json::from_str(&fs::read_to_string(engine.config())?)?;
        ensure!(now.get("default-runtime").is_none() && now["runtimes"].get("pillion").is_none(), "{now}");
        engine.remove("after-restart")?;
        engine.agent.until_forgotten("docker/after-restart")?;
        engine.end()
    })
}

#[test]
fn first_connections_are_captured_by_docker_20_10() -> Result<()> {
    first_connections("bookworm")
}

#[test]
fn first_connections_are_captured_by_docker_28() -> Result<()> {
    first_connections("sid")
}

fn failures(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let mut engine = with_agent(machine, version)?;
        for app in ["failing-open", "hanging-open"] {
            engine.passes(app, app, HELD)?;
            let known = engine.agent.workload(&engine.id(app))?.context("it is known")?;
            ensure!(known["gate"] == "wrapper" && known["verdict"] != "attached", "{known}");
            engine.remove(app)?;
        }
        for app in ["failing-closed", "hanging-closed"] {
            engine.refuses(app, app, HELD)?;
        }

        // Killed while it is held: nothing waits for the companion any more.
        thread::scope(|scope| -> Result<()> {
            let starting = scope.spawn(|| engine.start("killed", "hanging-closed", HELD));
            let known = engine.agent.until("docker/killed", "held", |it| it["gate"] == "wrapper")?;
            let pid = known["pid"].as_i64().context("a pid")?;
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
            let started = starting.join().expect("no panic")?;
            ensure!(!started.status.success(), "it was started");
            Ok(())
        })?;
        engine.remove("killed")?;
        engine.agent.until_forgotten("docker/killed")?;

        // The agent is killed: closed policies refuse, by name, and others have nothing to do with it.
        engine.captures("adopted", "wrapper", HELD)?;
        engine.agent.stop(Signal::SIGKILL)?;
        engine.passes("absent", "web", HELD)?;
        engine.passes("unmatched", "nothing", HELD)?;
        engine.refuses("refused", "failing-closed", HELD)?;
        // And again there, it knows all.
        engine.agent.run()?;
        engine.until_watched()?;
        let known = engine.agent.until_verdict("docker/absent", "attached")?;
        ensure!(known["firstInstruction"] == "after", "{known}");
        let known = engine.agent.until_verdict("docker/adopted", "attached")?;
        ensure!(known["firstInstruction"] == "before", "{known}");
        engine.captures("again", "wrapper", HELD)?;
        engine.end()
    })
}

#[test]
fn failing_and_hanging_companions_and_absent_agents_follow_the_policy_on_docker_20_10() -> Result<()> {
    failures("bookworm")
}

#[test]
fn failing_and_hanging_companions_and_absent_agents_follow_the_policy_on_docker_28() -> Result<()> {
    failures("sid")
}

#[test]
fn fifty_containers_at_once() -> Result<()> {
    on_machine(|machine| {
        let engine = with_agent(machine, "bookworm")?;
        let begun = Instant::now();
        thread::scope(|scope| -> Result<()> {
            let start = |number: usize| engine.start(&format!("many-{number}"), "web", HELD);
            let starting: Vec<_> = (0..50).map(|number| scope.spawn(move || start(number))).collect();
            for one in starting {
                one.join().expect("no panic")?.success()?;
            }
            Ok(())
        })?;
        let took = begun.elapsed();
        wait_until("fifty connections", SOON, || engine.echo.peers().len() >= 50)?;
        let redirected = engine.agent.counter("outboundRedirected")?;
        ensure!(redirected == 50, "{redirected} of 50 first connections were redirected");
        ensure!(took < Duration::from_secs(60), "fifty starts took {took:?}");
        engine.end()
    })
}

fn close_to_the_host(version: &'static str, privileged: &[&[&str]]) -> Result<()> {
    on_machine(|machine| {
        let mut engine = with_agent(machine, version)?;
        for flags in privileged {
            engine.captures("privileged", "wrapper", flags)?;
            engine.refuses("privileged-closed", "failing-closed", flags)?;
            engine.remove("privileged")?;
            engine.agent.until_forgotten(&engine.id("privileged"))?;
        }
        let host = ["--network=host", "--runtime=pillion"];
        engine.captures("host", "wrapper", &host)?;
        engine.refuses("host-closed", "failing-closed", &host)?;
        engine.remove("host")?;
        engine.agent.until_forgotten(&engine.id("host"))?;

        // All of its containers in a user namespace.
        engine
            .shell("for ids in subuid subgid; do echo daemon:3000000:65536 >>/etc/$ids; done")?
            .success()?;
        let settings = fs::read_to_string(engine.config())?;
        let mut value: serde_json::Value = serde_json::from_str(&settings)?;
        value["userns-remap"] = "daemon".into();
        fs::write(engine.config(), value.to_string())?;
        engine.restart()?;
        engine.until_watched()?;
        engine.load_image()?;
        engine.captures("mapped", "wrapper", HELD)?;
        let map = engine.tool(&["exec", "mapped", "cat", "/proc/self/uid_map"])?.success()?.stdout;
        ensure!(map.contains("3000000"), "{map}");
        engine.refuses("mapped-closed", "failing-closed", HELD)?;
        let host = ["--userns=host", "--network=host", "--runtime=pillion"];
        engine.captures("host-again", "wrapper", &host)?;
        engine.end()
    })
}

/// Docker 20.10 wants capabilities for `--privileged` that a test machine may lack.
#[test]
fn host_networked_and_user_namespaced_containers_are_captured_by_docker_20_10() -> Result<()> {
    close_to_the_host("bookworm", &[])
}

#[test]
fn privileged_host_networked_and_user_namespaced_containers_are_captured_by_docker_28() -> Result<()> {
    let privileged = ["--privileged", "--runtime=pillion"];
    let both = ["--privileged", "--network=host", "--runtime=pillion"];
    close_to_the_host("sid", &[&privileged, &both])
}

#[test]
fn neighbours_in_the_hosts_network_have_companions_of_their_own() -> Result<()> {
    on_machine(|machine| {
        let engine = with_agent(machine, "bookworm")?;
        let host = ["--network=host", "--runtime=pillion"];
        let one = engine.captures("one", "wrapper", &host)?;
        let two = engine.captures("two", "wrapper", &host)?;
        let port = |known: &serde_json::Value| {
            Some(known["ports"]["outbound"].to_string()).filter(|port| port != "null" && port != "[]")
        };
        ensure!(port(&one).is_some() && port(&two).is_some() && port(&one) != port(&two), "{one}\n{two}");
        engine.remove("one")?;
        engine.agent.until_forgotten("docker/one")?;
        // The other one is where it was, and a third takes the place of the first.
        let (redirected, peers) = (engine.agent.counter("outboundRedirected")?, engine.echo.peers().len());
        let again = format!("echo again | /bin/nc -w5 {} 8080", engine.gateway());
        let said = engine.tool(&["exec", "two", "/bin/sh", "-c", &again])?.success()?.stdout;
        ensure!(said.trim() == "again" && engine.echo.peers().len() == peers + 1, "{said:?}");
        ensure!(engine.agent.counter("outboundRedirected")? == redirected + 1, "it was not redirected");
        let three = engine.captures("three", "wrapper", &host)?;
        ensure!(port(&three) != port(&two), "{three}\n{two}");
        for name in ["two", "three"] {
            engine.remove(name)?;
        }
        engine.end()
    })
}
