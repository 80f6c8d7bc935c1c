//! Units of a real systemd, with the agent as one of them: each is held before its first instruction, whatever it does first, and
//! what becomes of it is what its policy says, with the agent, without it, and while it is killed.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use pillion_tests::{
    ProcessGuard, on_machine,
    systemd::{Booted, FAR, NEAR, policy},
    wait_until,
};

const SOON: Duration = Duration::from_secs(30);
const RELAY: &str = "builtin: relay";
/// Ends at once, and so is never ready.
const FAILING: &str =
    "exec: { command: [/bin/sh, -c, 'exit 1 # {{ outboundPort }}'] }, ready: { timeout: 1s }";
/// Runs, and is never ready within the test's time.
const HANGING: &str =
    "exec: { command: [/bin/sh, -c, 'exec sleep 600 # {{ outboundPort }}'] }, ready: { timeout: 60s }";

/// A program whose first act is a connection; it ends when the far end has closed.
fn connects(to: SocketAddr) -> String {
    format!("/usr/bin/busybox nc {} {}", to.ip(), to.port())
}

#[test]
fn the_very_first_connection_of_a_unit_is_captured_each_time_it_starts() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::with_agent()?;
        let far = booted.echo.address();
        let connect = connects(far);
        // Its own conditions and preparations are instructions of the workload, too.
        booted.unit(
            "pay-a.service",
            &format!("Type=oneshot\nRemainAfterExit=yes\nExecStartPre={connect}\nExecStart={connect}"),
        )?;
        // Runs on, in the systemd's own network namespace.
        booted.unit("pay-b.service", &format!("ExecStart=/bin/sh -c '{connect}; exec sleep 600'"))?;
        booted.unit("pay-t@.service", &format!("ExecStart=/bin/sh -c '{connect}; exec sleep 600'"))?;
        booted.unit("other.service", &format!("Type=oneshot\nExecStart={connect}"))?;
        booted.policy("pay.yaml", &policy("pay", "units: ['pay-*.service']", RELAY, "closed"))?;
        booted.until_drop_ins(&["pay-.service", "pay-a.service", "pay-b.service", "pay-t@.service"])?;

        booted.start(&["pay-a.service"])?;
        booted.until_records("pay-a.service", far, 2)?;
        // Recreated under the same name: held and attached again.
        for start in 1..=3 {
            booted.systemctl(&["restart", "pay-b.service"])?;
            booted.until_records("pay-b.service", far, start)?;
            let unit = booted.until("pay-b.service", "attached", |unit| unit["verdict"] == "attached")?;
            ensure!(unit["firstInstruction"] == "before" && unit["gate"] == "systemd", "{unit}");
        }
        booted.start(&[r"pay-t@x\x2d1:2.service"])?;
        booted.until_records(r"pay-t@x\x2d1:2.service", far, 1)?;
        // A unit that did not exist when the policy came.
        let transient = format!("systemd-run --unit pay-run -- {connect}");
        booted.sh(&transient)?;
        booted.until_records("pay-run.service", far, 1)?;
        // Nobody selects it.
        let before = booted.echo.peers().len();
        booted.start(&["other.service"])?;
        wait_until("the other unit's connection", SOON, || booted.echo.peers().len() > before)?;
        ensure!(booted.records("other.service", far)? == 0);
        // All arrived, each by way of the relay.
        ensure!(booted.echo.peers().len() == 2 + 3 + 1 + 1 + 1, "{:?}", booted.echo.peers());
        ensure!(booted.echo.peers().iter().all(|peer| peer.ip().to_string() == NEAR));

        booted.systemctl(&["stop", "pay-b.service"])?;
        booted.until_forgotten("pay-b.service")?;
        booted.end()
    })
}

#[test]
fn units_that_systemd_has_unloaded_are_forgotten_and_stay_unloaded() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::with_agent()?;
        let far = booted.echo.address();
        booted.unit("pay-t@.service", &format!("Type=oneshot\nExecStart={}", connects(far)))?;
        booted.policy("pay.yaml", &policy("pay", "units: ['pay-t@*.service']", RELAY, "closed"))?;
        booted.until_drop_ins(&["pay-t@.service"])?;
        // Each is unloaded when it has ended. More of them than the agent looks at at once.
        for number in 0..8 {
            let unit = format!("pay-t@{number}.service");
            booted.start(&[&unit])?;
            booted.until_records(&unit, far, 1)?;
            booted.until_forgotten(&unit)?;
        }
        // Whoever asks a unit for its properties makes systemd load it, and tell of that.
        let listen = "timeout 1 busctl monitor org.freedesktop.systemd1 | grep -c 'pay-t@' || true";
        wait_until("a systemd that has nothing to tell of them", SOON, || {
            booted.sh(listen).is_ok_and(|told| told.stdout.trim() == "0")
        })?;
        booted.end()
    })
}

#[test]
fn units_in_one_network_have_policies_of_their_own() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::with_agent()?;
        let far = booted.echo.address();
        let connect = connects(far);
        let (relayed, direct) = ("pay-relayed.service", "pay-direct.service");
        for unit in [relayed, direct] {
            booted.unit(unit, &format!("ExecStart=/bin/sh -c '{connect}; exec sleep 600'"))?;
        }
        booted.policy("a.yaml", &policy("a", &format!("units: [{relayed}]"), RELAY, "closed"))?;
        let but = policy("b", &format!("units: [{direct}]"), RELAY, "closed");
        let but = but.replace("{ to: c }", &format!("{{ to: c, exclude: {{ ports: [{}] }} }}", far.port()));
        booted.policy("b.yaml", &but)?;
        booted.until_drop_ins(&[direct, relayed])?;
        booted.start(&[relayed, direct])?;
        booted.until_records(relayed, far, 1)?;
        wait_until("both connections", SOON, || booted.echo.peers().len() == 2)?;
        let attached = |unit: &str| booted.until(unit, "attached", |it| it["verdict"] == "attached");
        let (one, other) = (attached(relayed)?, attached(direct)?);
        let port = |unit: &serde_json::Value| {
            Some(unit["ports"]["outbound"].to_string()).filter(|port| port != "null" && port != "[]")
        };
        ensure!(
            port(&one).is_some() && port(&other).is_some() && port(&one) != port(&other),
            "{one}\n{other}"
        );
        ensure!(booted.records(direct, far)? == 0, "its policy excludes that");
        // The one goes; the other stays as it is.
        booted.systemctl(&["stop", direct])?;
        booted.until_forgotten(direct)?;
        attached(relayed)?;
        booted.systemctl(&["restart", relayed])?;
        booted.until_records(relayed, far, 2)?;
        booted.systemctl(&["stop", relayed])?;
        booted.until_forgotten(relayed)?;
        booted.end()
    })
}

#[test]
fn a_unit_with_a_network_of_its_own_has_its_companion_there() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::with_agent()?;
        booted.policy("pay.yaml", &policy("pay", "units: ['pay-*.service']", RELAY, "closed"))?;
        booted.until_drop_ins(&["pay-.service"])?;
        // There is no way out of that namespace: what the relay says of it is the proof that it was asked.
        let far: SocketAddr = format!("{FAR}:4711").parse()?;
        let connect = connects(far);
        for (name, more) in [
            ("pay-private.service", "PrivateNetwork=yes\nUser=nobody"),
            ("pay-delegated.service", "PrivateNetwork=yes\nDelegate=yes\nExecStartPre=+/bin/true"),
        ] {
            booted.unit(name, &format!("{more}\nExecStart=-/bin/sh -c '{connect}; exec sleep 600'"))?;
            booted.start(&[name])?;
            booted.until_records(name, far, 1)?;
            let unit = booted.until(name, "attached", |unit| unit["verdict"] == "attached")?;
            ensure!(unit["firstInstruction"] == "before" && unit["gate"] == "systemd", "{unit}");
            booted.systemctl(&["restart", name])?;
            booted.until_records(name, far, 2)?;
            booted.systemctl(&["stop", name])?;
            booted.until_forgotten(name)?;
        }
        booted.end()
    })
}

#[test]
fn what_becomes_of_a_unit_without_its_companion_is_its_policys_word() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::with_agent()?;
        let far = booted.echo.address();
        for (name, companion, mode) in [
            ("fail-open", FAILING, "open"),
            ("fail-closed", FAILING, "closed"),
            ("hang-open", HANGING, "open"),
            ("hang-closed", HANGING, "closed"),
        ] {
            // Half of the limit is what a hold may take.
            booted.unit(
                &format!("{name}.service"),
                &format!("Type=oneshot\nTimeoutStartSec=6\nExecStart={}", connects(far)),
            )?;
            let before = booted.echo.peers().len();
            booted.policy("p.yaml", &policy(name, &format!("units: [{name}.service]"), companion, mode))?;
            booted.until_drop_ins(&[&format!("{name}.service")])?;
            let started = booted.try_systemctl(&["start", &format!("{name}.service")])?;
            let log = booted.log(&format!("{name}.service"))?;
            ensure!(started.status.success() == (mode == "open"), "{name}: {}\n{log}", started.stderr);
            ensure!(log.contains("pillion") && log.contains(&format!("policy {name}")), "{name}: {log}");
            let connections = booted.echo.peers().len() - before;
            ensure!(connections == usize::from(mode == "open"), "{name}: {connections} connections");
        }
        booted.end()
    })
}

#[test]
fn units_keep_their_policys_word_while_no_agent_runs_or_it_is_killed() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::with_agent()?;
        let far = booted.echo.address();
        let both = policy("guarded", "units: ['guarded*.service']", RELAY, "closed")
            + "\n---\n"
            + &policy("free", "units: [free.service]", RELAY, "open")
            + "\n---\n"
            + &policy("slow", "units: [slow.service]", HANGING, "closed");
        for name in ["guarded", "free", "slow"] {
            booted.unit(&format!("{name}.service"), &format!("Type=oneshot\nExecStart={}", connects(far)))?;
        }
        booted.policy("p.yaml", &both)?;
        booted.until_drop_ins(&["free.service", "guarded.service", "slow.service"])?;

        // Killed while it holds: the hook sees that at once and does not wait for its deadline.
        let mut start = booted.lab.command(&["exec", "systemctl", "start", "slow.service"])?;
        let mut start = ProcessGuard::spawn("systemctl start", &mut start)?;
        booted.until("slow.service", "held", |unit| unit["verdict"] == "attaching")?;
        booted.systemctl(&["kill", "--signal", "KILL", "pillion.service"])?;
        ensure!(!start.exit(SOON)?.success(), "a closed unit started without its companion");
        ensure!(booted.log("slow.service")?.contains("policy slow"), "{}", booted.log("slow.service")?);
        // systemd has started it again, and it goes on as before.
        booted.until_up()?;
        booted.start(&["guarded.service"])?;
        booted.until_records("guarded.service", far, 1)?;

        booted.systemctl(&["stop", "pillion.service"])?;
        let before = booted.echo.peers().len();
        ensure!(!booted.try_systemctl(&["start", "guarded.service"])?.status.success());
        let log = booted.log("guarded.service")?;
        ensure!(log.contains("pillion") && log.contains("policy guarded") && log.contains("closed"), "{log}");
        ensure!(booted.echo.peers().len() == before, "a refused unit has connected");
        booted.start(&["free.service"])?;
        wait_until("the open unit's connection", SOON, || booted.echo.peers().len() == before + 1)?;

        booted.start(&["pillion.service"])?;
        booted.until_up()?;
        booted.systemctl(&["reset-failed", "guarded.service"])?;
        booted.start(&["guarded.service"])?;
        booted.until_records("guarded.service", far, 2)?;
        booted.end()
    })
}

#[test]
fn many_units_at_once_and_policies_that_come_and_go() -> Result<()> {
    on_machine(|_| {
        const MANY: usize = 24;
        let booted = Booted::with_agent()?;
        let far = booted.echo.address();
        booted.unit("pay@.service", &format!("ExecStart=/bin/sh -c '{}; exec sleep 600'", connects(far)))?;
        booted.policy("pay.yaml", &policy("pay", "units: ['pay@*.service']", RELAY, "closed"))?;
        booted.until_drop_ins(&["pay@.service"])?;
        let units: Vec<String> = (1..=MANY).map(|number| format!("pay@{number}.service")).collect();
        let units: Vec<&str> = units.iter().map(String::as_str).collect();
        booted.start(&units)?;
        wait_until("all connections", SOON * 2, || booted.echo.peers().len() == MANY)?;
        for unit in &units {
            booted.until_records(unit, far, 1)?;
        }

        // The agent is killed: systemd starts it again, and it takes all of them up.
        booted.systemctl(&["kill", "--signal", "KILL", "pillion.service"])?;
        booted.until_up()?;
        for unit in &units {
            let unit = booted.until(unit, "attached", |unit| unit["verdict"] == "attached")?;
            ensure!(unit["firstInstruction"] == "before", "{unit}");
        }
        // An instance that runs when its policy comes is attached live, and said to be.
        booted.unit("late.service", "ExecStart=/bin/sleep 600")?;
        booted.start(&["late.service"])?;
        booted.policy("late.yaml", &policy("late", "units: [late.service]", RELAY, "closed"))?;
        let late = booted.until("late.service", "attached", |unit| unit["verdict"] == "attached")?;
        ensure!(late["firstInstruction"] == "after", "{late}");
        let has = |name: &str| booted.drop_ins().is_ok_and(|names| names.iter().any(|it| it == name));
        wait_until("its drop-in", SOON, || has("late.service"))?;

        // A policy that goes takes its drop-in along; a reload is done when systemctl says so.
        booted.sh("rm /etc/pillion/policy.d/late.yaml")?;
        booted.systemctl(&["reload", "pillion.service"])?;
        booted.until("late.service", "not matched", |unit| unit["verdict"] == "notMatched")?;
        wait_until("no drop-in of it", SOON, || !has("late.service"))?;
        ensure!(has("pay@.service"), "the other policy's drop-in is gone");
        booted.systemctl(&[&["stop"], &units[..]].concat())?;
        for unit in &units {
            booted.until_forgotten(unit)?;
        }
        booted.end()
    })
}
