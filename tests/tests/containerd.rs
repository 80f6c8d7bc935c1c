//! The agent with a real containerd and runc: what becomes of containers, of their connections, and of the agent's word on them,
//! while everything around them is changed, killed and started again.

use std::{
    collections::BTreeSet, fs, os::unix::fs::symlink, path::Path, process::Stdio, thread, time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    EchoServer, End, Held, Inventory, Machine, NetNs, Puppet,
    containerd::Container,
    on_machine, programs,
    scene::{FAR, KIND, Load, NEAR, Scene, companion_pid, connected, id, source_is, still_answers, web},
    wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

#[test]
fn containers_of_before_and_after_the_agent_go_through_the_relay() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        let mut early = scene.puppet("early", &[("app", "web")])?;
        scene.agent.policy("web.yaml", &web("closed", ""))?;
        scene.agent.run()?;
        let attached = scene.agent.until_verdict(&id("early"), "attached")?;
        assert_eq!(attached["firstInstruction"], "after");
        assert_eq!(attached["policy"], "web");
        assert_eq!(attached["onFailure"], "closed");
        assert_eq!(attached["pid"], scene.containerd.pid("early")?);
        let mut late = scene.puppet("late", &[("app", "web")])?;
        scene.agent.until_verdict(&id("late"), "attached")?;
        for (puppet, name) in [(&mut early, "early"), (&mut late, "late")] {
            scene.says_through_relay(puppet)?;
            let record = scene.agent.record(&id(name), scene.echo.address())?;
            assert_eq!(record["direction"], "outbound");
            assert_eq!(record["outcome"], "ok");
            assert_eq!((&record["bytes_sent"], &record["bytes_received"]), (&7.into(), &7.into()));
            // What the application sees is not the relay.
            let socket = connected(puppet, scene.echo.address())?;
            let names = puppet.names(socket)??;
            assert_eq!((names.local.ip().to_string(), names.peer), (NEAR.into(), Some(scene.echo.address())));
            puppet.close(socket)??;
        }
        drop((early, late));
        scene.agent.until_forgotten(&id("early"))?;
        scene.agent.until_forgotten(&id("late"))?;
        scene.end()
    })
}

/// A fake: gVisor is not to be had here, so runc's shim bears the name of gVisor's. What is tested is what is said of it.
#[test]
fn a_container_in_a_kernel_of_its_own_is_not_passed_over_in_silence() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let shim = machine.directory().join("containerd-shim-runsc-v1");
        symlink(programs::system("containerd-shim-runc-v2")?, &shim)?;
        let labels: &[(&str, &str)] = &[("app", "web")];
        let container =
            Container { id: "sandboxed", labels, netns: Some(&scene.near), command: &["sleep", "99"] };
        scene.containerd.run_by(&shim, &container)?;
        let told = scene.agent.until_verdict(&id("sandboxed"), "cannotAttach")?;
        ensure!(told["reason"].as_str().is_some_and(|reason| reason.contains("runsc")), "{told}");
        assert_eq!((&told["policy"], &told["instance"]), (&"web".into(), &Value::Null));
        scene.agent.until_status("degraded", |status| status["health"] == "degraded")?;
        assert_eq!(scene.kinds_of_events("sandboxed")?, ["cannotAttach"]);
        scene.containerd.remove("sandboxed")?;
        scene.agent.until_forgotten(&id("sandboxed"))?;
        scene.end()
    })
}

/// What the agent says about the first instruction is compared with the truth: a container that connects at once.
#[test]
fn no_container_is_called_attached_in_time_when_its_first_connection_was_missed() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        // Failing open, a connection that comes too early is not refused but missed.
        scene.agent.policy("web.yaml", &web("open", ""))?;
        scene.agent.until_status("the policy", |status| status["policies"]["generation"] == 2)?;
        let mut missed = 0;
        for number in 0..12_u16 {
            let name = format!("first.{number}");
            let echo = EchoServer::start(&scene.far, &format!("{FAR}:{}", 9000 + number))?;
            let before = scene.redirected()?;
            // Its input stays open, so it runs until it is told otherwise.
            let mut command = scene.containerd.run_attached(&Container {
                id: &name,
                labels: &[("app", "web")],
                netns: Some(&scene.near),
                command: &["nc", FAR, &echo.address().port().to_string()],
            })?;
            let mut running = command.stdin(Stdio::piped()).spawn()?;
            let seen = wait_until("the container's connection", SOON, || !echo.peers().is_empty());
            let workload = scene.agent.until_verdict(&id(&name), "attached");
            // Nobody else connects: the kernel's count tells whether this connection was redirected.
            let redirected = scene.redirected()? - before;
            drop(running.stdin.take());
            running.wait()?;
            seen?;
            let claim = workload?["firstInstruction"].clone();
            match (claim.as_str(), redirected) {
                (Some("before"), 1) | (Some("after" | "unknown"), 0 | 1) => missed += 1 - redirected,
                (claim, redirected) => {
                    bail!("{name} is called {claim:?}, with {redirected} connections redirected")
                }
            }
            scene.agent.until_forgotten(&id(&name))?;
        }
        ensure!(missed > 0, "no connection was early enough to be missed: this has shown nothing");
        scene.end()
    })
}

#[test]
fn a_container_that_is_attached_before_its_start_is_called_so() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let held = Held::create(
            &scene.containerd,
            &Container {
                id: "held",
                labels: &[("app", "web")],
                netns: Some(&scene.near),
                command: &["nc", FAR, "8080"],
            },
        )?;
        let workload = scene.agent.until_verdict(&id("held"), "attached")?;
        assert_eq!(workload["firstInstruction"], "before");
        assert_eq!(workload["pid"], held.pid());
        assert_eq!(scene.echo.peers().len(), 0);
        held.start()?;
        wait_until("its connection", SOON, || !scene.echo.peers().is_empty())?;
        assert_eq!(scene.redirected()?, 1, "its first connection went by the relay");
        let record = scene.agent.record(&id("held"), scene.echo.address())?;
        assert_eq!(record["outcome"], "ok");
        scene.containerd.remove("held")?;
        scene.agent.until_forgotten(&id("held"))?;
        scene.end()
    })
}

#[test]
fn labels_images_and_namespaces_select() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        let policy = |name: &str, select: &str| {
            format!(
                "{KIND}\nmetadata: {{ name: {name} }}\nspec:\n  \
                 select: {{ runtimes: [containerd], labels: {{ pick: {name} }}{select} }}\n  \
                 companions: [{{ name: relay, builtin: relay, stopGrace: 1s }}]\n  \
                 redirect: {{ outbound: [{{ to: relay }}] }}\n  onFailure: open\n---\n"
            )
        };
        let cases = [
            ("label", "", None),
            ("image", ", images: ['localhost/pillion-test:*']", None),
            ("space", ", namespaces: [default, pillion-test]", None),
            ("other-image", ", images: ['localhost/other:*']", Some("images")),
            ("other-space", ", namespaces: [default]", Some("namespaces")),
        ];
        let text: String = cases.iter().map(|(name, select, _)| policy(name, select)).collect();
        scene.agent.policy("all.yaml", text.trim_end_matches("---\n"))?;
        scene.agent.run()?;
        for (name, _, failed) in cases {
            let mut puppet = scene.puppet(name, &[("pick", name)])?;
            match failed {
                None => {
                    let workload = scene.agent.until_verdict(&id(name), "attached")?;
                    assert_eq!(workload["policy"], name);
                    scene.says_through_relay(&mut puppet)?;
                }
                Some(field) => {
                    let workload = scene.agent.until_verdict(&id(name), "notMatched")?;
                    let reasons = workload["reasons"].as_array().context("reasons")?;
                    let reason =
                        reasons.iter().find(|reason| reason["policy"] == name).context("a reason")?;
                    let fields = reason["fields"].as_array().context("fields")?;
                    let failed: Vec<&Value> =
                        fields.iter().filter(|field| field["matched"] == false).collect();
                    ensure!(failed.len() == 1 && failed[0]["field"] == field, "{reason}");
                    scene.says_directly(&mut puppet)?;
                }
            }
        }
        let mut plain = scene.puppet("plain", &[])?;
        scene.agent.until_verdict(&id("plain"), "notMatched")?;
        scene.says_directly(&mut plain)?;
        drop(plain);
        scene.agent.until_forgotten(&id("plain"))?;
        scene.end()
    })
}

#[test]
fn a_policy_is_changed_and_removed_under_a_running_container() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let other = EchoServer::start(&scene.far, &format!("{FAR}:8081"))?;
        let mut puppet = scene.web("live")?;
        let pid = companion_pid(&scene.agent.until_verdict(&id("live"), "attached")?)?;
        let open = connected(&mut puppet, scene.echo.address())?;
        still_answers(&mut puppet, open, "before the change")?;

        scene.agent.policy("web.yaml", &web("closed", ", exclude: { ports: [8080] }"))?;
        wait_until("a changed plan", SOON, || {
            scene.kinds_of_events("live").is_ok_and(|kinds| kinds.contains(&"planChanged".to_owned()))
        })?;
        still_answers(&mut puppet, open, "after the change")?;
        scene.says_directly(&mut puppet)?;
        let before = scene.redirected()?;
        assert_eq!(puppet.converse(other.address(), "not excluded")?, Ok("not excluded".to_owned()));
        assert_eq!(scene.redirected()?, before + 1);
        let workload = scene.agent.until_verdict(&id("live"), "attached")?;
        assert_eq!(companion_pid(&workload)?, pid, "the companion has nothing to do with an exclusion");

        // Back, and in a new file: the name of the policy counts.
        fs::remove_file(scene.agent.policy_dir().join("web.yaml"))?;
        scene.agent.policy("again.yaml", &web("closed", "").replace("name: web", "name: again"))?;
        scene.agent.until(&id("live"), "the policy `again`", |workload| {
            workload["policy"] == "again" && workload["verdict"] == "attached"
        })?;
        wait_until("redirection again", SOON, || scene.says_through_relay(&mut puppet).is_ok())?;

        fs::remove_file(scene.agent.policy_dir().join("again.yaml"))?;
        scene.agent.until_verdict(&id("live"), "notMatched")?;
        scene.says_directly(&mut puppet)?;
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "the companion of a removed policy runs on");
        assert_eq!(scene.kinds_of_events("live")?.last().map(String::as_str), Some("detached"));
        drop(puppet);
        scene.agent.until_forgotten(&id("live"))?;
        scene.end()
    })
}

#[test]
fn an_operator_detaches_and_attaches() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::with_agent(machine)?;
        let mut puppet = scene.web("held")?;
        scene.agent.cli(&["detach", &id("held")])?.success()?;
        let workload = scene.agent.workload(&id("held"))?.context("it is known")?;
        assert_eq!(workload["verdict"], "held");
        scene.says_directly(&mut puppet)?;
        // Again, and across a restart of the agent.
        scene.agent.cli(&["detach", &id("held")])?.success()?;
        scene.agent.stop(Signal::SIGKILL)?;
        scene.agent.run()?;
        scene.agent.until_verdict(&id("held"), "held")?;
        scene.says_directly(&mut puppet)?;
        let attached = scene.agent.cli(&["attach", &id("held")])?.success()?;
        ensure!(attached.stdout.contains("attached"), "{}", attached.stdout);
        scene.says_through_relay(&mut puppet)?;

        let other = scene.puppet("other", &[])?;
        scene.agent.until_verdict(&id("other"), "notMatched")?;
        let refused = scene.agent.cli(&["attach", &id("other")])?.code(1)?;
        ensure!(refused.stderr.contains("no policy selects"), "{}", refused.stderr);
        let refused = scene.agent.cli(&["detach", &id("nobody")])?.code(1)?;
        ensure!(refused.stderr.contains("no workload"), "{}", refused.stderr);
        drop((puppet, other));
        scene.agent.until_forgotten(&id("held"))?;
        scene.end()
    })
}

#[test]
fn of_a_container_that_ends_nothing_is_left_and_its_name_can_be_used_again() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        // The first one makes what is shared by all and stays with the agent.
        drop(scene.web("warm")?);
        scene.agent.until_forgotten(&id("warm"))?;
        let before = Inventory::take()?;
        let mut pids = Vec::new();
        for _ in 0..3 {
            let mut puppet = scene.web("again")?;
            pids.push(companion_pid(&scene.agent.until_verdict(&id("again"), "attached")?)?);
            scene.says_through_relay(&mut puppet)?;
            drop(puppet);
            scene.agent.until_forgotten(&id("again"))?;
            before.expect_nothing_added(SOON)?;
        }
        ensure!(pids[0] != pids[1] && pids[1] != pids[2], "one companion for several containers: {pids:?}");

        // Killed and removed at once, with a connection open, and made again before the agent can be done with it.
        let run = |scene: &Scene| {
            scene.containerd.run(&Container {
                id: "again",
                labels: &[("app", "web")],
                netns: Some(&scene.near),
                command: &["sleep", "1000"],
            })
        };
        let first = run(&scene)?;
        scene.agent.until_verdict(&id("again"), "attached")?;
        scene.containerd.remove("again")?;
        let second = run(&scene)?;
        ensure!(first != second);
        scene.agent.until(&id("again"), "attached to the second", |workload| {
            workload["verdict"] == "attached" && workload["pid"] == second
        })?;
        let mut puppet = scene.another("again")?;
        scene.says_through_relay(&mut puppet)?;
        drop(puppet);
        scene.containerd.remove("again")?;
        scene.agent.until_forgotten(&id("again"))?;
        before.expect_nothing_added(SOON)?;
        scene.end()
    })
}

#[test]
fn twenty_containers_at_once() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let names: Vec<String> = (0..20).map(|number| format!("many.{number}")).collect();
        // Every other one shares a namespace with the rest of its half, so that ports must be allocated.
        let own: Vec<NetNs> = (0..10)
            .map(|number| {
                let netns = NetNs::new()?;
                let (device, near, far) =
                    (format!("n{number}"), format!("10.78.{number}.1/24"), format!("10.78.{number}.2/24"));
                NetNs::join(
                    End { netns: &netns, device: "far", addresses: &[&near] },
                    End { netns: &scene.far, device: &device, addresses: &[&far] },
                )?;
                netns.ip(&format!("route add 10.77.0.0/24 via 10.78.{number}.2"))?;
                Ok(netns)
            })
            .collect::<Result<_>>()?;
        let mut puppets = thread::scope(|scope| {
            let run = |(number, name): (usize, &String)| {
                let (scene, netns, name) = (&scene, own.get(number / 2), name.clone());
                let netns = if number % 2 == 0 { netns } else { None };
                scope.spawn(move || scene.puppet_in(&name, &[("app", "web")], netns.unwrap_or(&scene.near)))
            };
            let running: Vec<_> = names.iter().enumerate().map(run).collect();
            running
                .into_iter()
                .map(|thread| thread.join().expect("the thread does not panic"))
                .collect::<Result<Vec<Puppet>>>()
        })?;
        let mut ports = BTreeSet::new();
        for (number, (puppet, name)) in puppets.iter_mut().zip(&names).enumerate() {
            let workload = scene.agent.until_verdict(&id(name), "attached")?;
            let port = workload["ports"]["outbound"][0].as_u64().context("a port")?;
            if number % 2 == 1 {
                ensure!(ports.insert(port), "{name} shares port {port} in one namespace");
            } else {
                assert_eq!(port, 15001, "{name} is alone in its namespace");
            }
            let said = scene.says_through_relay(puppet);
            said.with_context(|| format!("{name}: {workload}"))?;
            let record = scene.agent.record(&id(name), scene.echo.address())?;
            let source = record["source"].as_str().context("a source")?;
            let wanted =
                if number % 2 == 1 { format!("{NEAR}:") } else { format!("10.78.{}.1:", number / 2) };
            ensure!(source.starts_with(&wanted), "{name} comes from {source}");
        }
        let status = scene.agent.status()?;
        assert_eq!(status["workloads"]["attached"], 20);
        drop(puppets);
        for name in &names {
            scene.agent.until_forgotten(&id(name))?;
        }
        scene.end()
    })
}

/// A companion that echoes by itself, and can be kept from starting again: what comes back tells whether it is there.
fn guarded(machine: &Machine, on_failure: &str) -> Result<(String, std::path::PathBuf)> {
    let broken = machine.directory().join("broken");
    let busybox = programs::system("busybox")?;
    let script = format!(
        "test ! -e {} && exec {} nc -ll -p {{{{ outboundPort }}}} -e {} sed s/^/companion:/",
        broken.display(),
        busybox.display(),
        busybox.display()
    );
    let text = format!(
        "{KIND}\nmetadata: {{ name: web }}\nspec:\n  \
         select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
         companions:\n    - name: guard\n      exec: {{ command: [/bin/sh, -c, '{script}'] }}\n      \
         ready: {{ timeout: 5s }}\n      stopGrace: 1s\n  \
         redirect: {{ outbound: [{{ to: guard }}] }}\n  onFailure: {on_failure}\n"
    );
    Ok((text, broken))
}

#[test]
fn a_killed_companion_leaves_the_failure_mode_and_comes_back() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        for mode in ["open", "closed"] {
            let (text, broken) = guarded(machine, mode)?;
            scene.agent.policy("web.yaml", &text)?;
            if scene.agent.process().is_err() {
                scene.agent.run()?;
            }
            scene.agent.until_status(mode, |status| {
                status["policies"]["generation"] == if mode == "open" { 1 } else { 2 }
            })?;
            let name = format!("guarded.{mode}");
            let mut puppet = scene.web(&name)?;
            let to = scene.echo.address();
            assert_eq!(puppet.converse(to, "hello\n")?, Ok("companion:hello\n".to_owned()), "{mode}");
            fs::write(&broken, "")?;
            let pid = companion_pid(&scene.agent.until_verdict(&id(&name), "attached")?)?;
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
            // At once and for as long as it stays away, whatever the agent has noticed.
            wait_until("the companion's end", SOON, || !is_running(pid))?;
            let without = if mode == "open" { Ok("hello\n".to_owned()) } else { Err(Errno::ECONNREFUSED) };
            assert_eq!(puppet.converse(to, "hello\n")?, without, "{mode}, at once");
            let degraded = scene.agent.until_verdict(&id(&name), "degraded")?;
            ensure!(degraded["reason"].as_str().is_some_and(|why| why.contains("guard")), "{degraded}");
            let status = scene.agent.cli(&["status"])?.code(5)?;
            ensure!(status.stdout.contains(&id(&name)), "{}", status.stdout);
            assert_eq!(puppet.converse(to, "hello\n")?, without, "{mode}, later");
            fs::remove_file(&broken)?;
            let back = scene.agent.until_verdict(&id(&name), "attached")?;
            ensure!(companion_pid(&back)? != pid);
            assert_eq!(puppet.converse(to, "hello\n")?, Ok("companion:hello\n".to_owned()), "{mode}, back");
            scene.agent.cli(&["status"])?.success()?;
            drop(puppet);
            scene.agent.until_forgotten(&id(&name))?;
        }
        scene.end()
    })
}

fn is_running(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie listens to nothing any more.
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// The agent ends by this signal and is started again, under load.
fn restart_under_load(machine: &Machine, signal: Signal) -> Result<()> {
    let mut scene = Scene::with_agent(machine)?;
    let mut puppet = scene.web("steady")?;
    let pid = companion_pid(&scene.agent.until_verdict(&id("steady"), "attached")?)?;
    let before = scene.redirected()?;
    let open = connected(&mut puppet, scene.echo.address())?;
    still_answers(&mut puppet, open, "before")?;
    let load = Load::start(scene.another("steady")?, scene.echo.address());
    for round in 0..3 {
        load.goes_on()?;
        scene.agent.stop(signal)?;
        // Nobody is there; the kernel and the companion go on.
        still_answers(&mut puppet, open, "without an agent")?;
        load.goes_on()?;
        scene.agent.run()?;
        let workload = scene.agent.until_verdict(&id("steady"), "attached")?;
        assert_eq!(companion_pid(&workload)?, pid, "another companion after restart {round}");
        assert_eq!(workload["companions"][0]["restarts"], 0);
        ensure!(scene.kinds_of_events("steady")?.contains(&"adopted".to_owned()), "it was not adopted");
        scene.agent.until_status("containerd", source_is("up"))?;
        still_answers(&mut puppet, open, "with the next agent")?;
        load.goes_on()?;
    }
    let made = load.end()?;
    still_answers(&mut puppet, open, "after")?;
    assert_eq!(scene.redirected()? - before, u64::from(made) + 1, "connections that went by the relay");
    drop(puppet);
    scene.agent.until_forgotten(&id("steady"))?;
    scene.end()
}

#[test]
fn an_agent_that_is_killed_and_started_again_loses_no_connection() -> Result<()> {
    on_machine(|machine| restart_under_load(machine, Signal::SIGKILL))
}

#[test]
fn an_agent_that_is_stopped_and_started_again_loses_no_connection() -> Result<()> {
    on_machine(|machine| restart_under_load(machine, Signal::SIGTERM))
}

#[test]
fn what_happens_while_no_agent_runs_is_made_good() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::with_agent(machine)?;
        // One that ends, one that is made again under its name, one that is new, and one whose companion dies.
        let ends = scene.web("ends")?;
        let again = scene.web("again")?;
        let mut stays = scene.web("stays")?;
        let orphan = companion_pid(&scene.agent.until_verdict(&id("ends"), "attached")?)?;
        let dies = companion_pid(&scene.agent.until_verdict(&id("stays"), "attached")?)?;
        scene.agent.stop(Signal::SIGKILL)?;
        drop((ends, again));
        kill(Pid::from_raw(i32::try_from(dies)?), Signal::SIGKILL)?;
        let mut again = scene.puppet("again", &[("app", "web")])?;
        let mut new = scene.puppet("new", &[("app", "web")])?;
        wait_until("the companion's end", SOON, || !is_running(dies))?;
        assert_eq!(
            stays.converse(scene.echo.address(), "x")?,
            Err(Errno::ECONNREFUSED),
            "closed without an agent"
        );
        scene.agent.run()?;
        for (name, puppet) in [("again", &mut again), ("new", &mut new), ("stays", &mut stays)] {
            let pid = scene.containerd.pid(name)?;
            scene.agent.until(&id(name), "attached", |workload| {
                workload["verdict"] == "attached" && workload["pid"] == pid
            })?;
            scene.says_through_relay(puppet)?;
        }
        scene.agent.until_forgotten(&id("ends"))?;
        wait_until("the end of an orphaned companion", SOON, || !is_running(orphan))?;
        drop((again, new, stays));
        for name in ["again", "new", "stays"] {
            scene.agent.until_forgotten(&id(name))?;
        }
        scene.end()
    })
}

#[test]
fn containerd_may_be_absent_and_may_come_back() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        scene.containerd.run(&Container {
            id: "kept",
            labels: &[("app", "web")],
            netns: Some(&scene.near),
            command: &["sleep", "1000"],
        })?;
        let mut puppet = scene.insider("kept")?;
        scene.containerd.stop_daemon(Signal::SIGKILL)?;
        scene.agent.policy("web.yaml", &web("closed", ""))?;
        // Absent at the start: the agent is up, and says what is missing.
        scene.agent.run()?;
        let status = scene.agent.until_status("containerd down", source_is("down"))?;
        assert_eq!(status["health"], "degraded");
        let told = scene.agent.cli(&["status"])?.code(5)?;
        ensure!(told.stdout.contains("containerd does not answer"), "{}", told.stdout);
        scene.containerd.start_daemon()?;
        let attached = scene.agent.until_verdict(&id("kept"), "attached")?;
        assert_eq!(attached["firstInstruction"], "after");
        let pid = companion_pid(&attached)?;
        scene.agent.cli(&["status"])?.success()?;
        scene.says_through_relay(&mut puppet)?;

        // Killed: nothing changes for the workload, not even across a restart of the agent.
        let open = connected(&mut puppet, scene.echo.address())?;
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            scene.containerd.stop_daemon(signal)?;
            scene.agent.until_status("containerd down", source_is("down"))?;
            scene.says_through_relay(&mut puppet)?;
            if signal == Signal::SIGTERM {
                scene.agent.stop(Signal::SIGKILL)?;
                scene.agent.run()?;
                scene.agent.until_status("containerd down", source_is("down"))?;
                scene.agent.until_verdict(&id("kept"), "attached")?;
                scene.says_through_relay(&mut puppet)?;
            }
            scene.containerd.start_daemon()?;
            scene.agent.until_status("containerd up", source_is("up"))?;
            let workload = scene.agent.until_verdict(&id("kept"), "attached")?;
            assert_eq!(companion_pid(&workload)?, pid, "attached again for no reason");
            still_answers(&mut puppet, open, "all the time")?;
        }
        // A new container is noticed, so the event stream is there again; and the end of one.
        let mut new = scene.web("new")?;
        scene.says_through_relay(&mut new)?;
        drop(new);
        scene.agent.until_forgotten(&id("new"))?;
        drop(puppet);
        scene.containerd.remove("kept")?;
        scene.agent.until_forgotten(&id("kept"))?;
        scene.end()
    })
}
