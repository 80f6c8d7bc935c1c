//! Podman 4.3, with the hooks that `pillion install-hooks` gives it and without its API service.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{Engine, Machine, engines::policies, on_machine, wait_until};

const SOON: Duration = Duration::from_secs(30);

fn stage(machine: &Machine) -> Result<Engine> {
    let engine = Engine::podman(machine)?;
    for (name, policy) in policies("podman") {
        engine.agent.policy(name, &policy)?;
    }
    Ok(engine)
}

#[test]
fn first_connections_are_captured_by_hooks() -> Result<()> {
    on_machine(|machine| {
        let mut engine = stage(machine)?;
        engine.passes("early", "web", &[])?;
        engine.agent.run()?;
        engine.until_watched()?;
        let early = engine.agent.until_verdict("podman/early", "attached")?;
        ensure!(early["firstInstruction"] == "after", "{early}");
        ensure!(early["subject"]["labels"]["app"] == "web", "{early}");

        let known = engine.captures("first", "hook", &[])?;
        let events = known["events"].as_array().context("events")?;
        ensure!(events.iter().filter(|event| event["kind"] == "attached").count() == 1, "{events:?}");
        engine.passes("other", "nothing", &[])?;
        engine.agent.until_verdict("podman/other", "notMatched")?;
        // Its events are all that Podman has written of its labels; it is started again.
        engine.tool(&["stop", "-t", "0", "first"])?.success()?;
        engine.agent.until_forgotten("podman/first")?;
        let peers = engine.echo.peers().len();
        engine.tool(&["start", "first"])?.success()?;
        wait_until("its connection", SOON, || engine.echo.peers().len() > peers)?;
        let known = engine.agent.until_verdict("podman/first", "attached")?;
        ensure!(known["firstInstruction"] == "before" && known["gate"] == "hook", "{known}");

        // Hooks are taken out: containers start as before.
        let again = engine.install(&[])?.success()?;
        ensure!(again.stdout.is_empty(), "a second time: {}", again.stdout);
        engine.pillion(&["uninstall-hooks"])?.success()?;
        engine.passes("unhooked", "web", &[])?;
        let known = engine.agent.until_verdict("podman/unhooked", "attached")?;
        ensure!(known["firstInstruction"] == "after", "{known}");
        engine.end()
    })
}

#[test]
fn failing_and_hanging_companions_and_absent_agents_follow_the_policy() -> Result<()> {
    on_machine(|machine| {
        let mut engine = stage(machine)?;
        engine.agent.run()?;
        engine.until_watched()?;
        for app in ["failing-open", "hanging-open"] {
            engine.passes(app, app, &[])?;
            let known = engine.agent.workload(&engine.id(app))?.context("it is known")?;
            ensure!(known["gate"] == "hook" && known["verdict"] != "attached", "{known}");
            engine.remove(app)?;
        }
        for app in ["failing-closed", "hanging-closed"] {
            engine.refuses(app, app, &[])?;
        }
        // Killed while it is held.
        thread::scope(|scope| -> Result<()> {
            let starting = scope.spawn(|| engine.start("killed", "hanging-closed", &[]));
            let known = engine.agent.until("podman/killed", "held", |it| it["gate"] == "hook")?;
            let pid = known["pid"].as_i64().context("a pid")?;
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
            let started = starting.join().expect("no panic")?;
            ensure!(!started.status.success(), "it was started");
            Ok(())
        })?;
        engine.remove("killed")?;
        engine.agent.until_forgotten("podman/killed")?;

        engine.captures("adopted", "hook", &[])?;
        engine.agent.stop(Signal::SIGKILL)?;
        engine.passes("absent", "web", &[])?;
        engine.passes("unmatched", "nothing", &[])?;
        engine.refuses("refused", "failing-closed", &[])?;
        engine.agent.run()?;
        engine.until_watched()?;
        let known = engine.agent.until_verdict("podman/absent", "attached")?;
        ensure!(known["firstInstruction"] == "after", "{known}");
        let known = engine.agent.until_verdict("podman/adopted", "attached")?;
        ensure!(known["firstInstruction"] == "before", "{known}");
        engine.end()
    })
}

#[test]
fn privileged_user_namespaced_and_host_networked_containers_are_captured() -> Result<()> {
    on_machine(|machine| {
        let mut engine = stage(machine)?;
        // Whose user and group ids `--userns=auto` takes.
        engine
            .shell("for ids in subuid subgid; do echo containers:2000000:131072 >>/etc/$ids; done")?
            .success()?;
        engine.agent.run()?;
        engine.until_watched()?;
        // Without a container on it there is no bridge, and nobody at its address.
        engine.passes("anchor", "nothing", &[])?;
        for (name, flags) in [
            ("privileged", ["--privileged", "--network=bridge"]),
            ("host", ["--network=host", "--privileged"]),
            ("mapped", ["--uidmap=0:1000000:65536", "--gidmap=0:1000000:65536"]),
            ("automatic", ["--userns=auto", "--network=bridge"]),
        ] {
            engine.captures(name, "hook", &flags).with_context(|| name.to_owned())?;
            engine.refuses("closed", "failing-closed", &flags)?;
            engine.remove(name)?;
            engine.agent.until_forgotten(&engine.id(name))?;
        }
        engine.end()
    })
}
