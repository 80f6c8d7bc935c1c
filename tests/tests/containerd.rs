//! The agent with a real containerd and runc: what becomes of containers, of their connections, and of the agent's word on them,
//! while everything around them is changed, killed and started again.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    Agent, Containerd, EchoServer, End, Inventory, Machine, NetNs, Puppet,
    containerd::Container,
    image, on_machine, programs,
    puppet::{Domain, Socket},
    wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
const NEAR: &str = "10.77.0.1";
const FAR: &str = "10.77.0.2";
const KIND: &str = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy";

/// containerd, an agent that does not run yet, and a namespace for containers, on a cable to an echo server.
struct Stage {
    agent: Agent,
    containerd: Containerd,
    echo: EchoServer,
    near: NetNs,
    far: NetNs,
}

fn id(name: &str) -> String {
    format!("containerd/pillion-test/{name}")
}

/// Containers with the label `app=web` get a relay.
fn web(on_failure: &str, exclude: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: web }}\nspec:\n  \
         select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
         companions: [{{ name: relay, builtin: relay, stopGrace: 2s }}]\n  \
         redirect: {{ outbound: [{{ to: relay{exclude} }}] }}\n  onFailure: {on_failure}\n"
    )
}

impl Stage {
    fn new(machine: &Machine) -> Result<Self> {
        let (near, far) = (NetNs::new()?, NetNs::new()?);
        NetNs::join(
            End { netns: &near, device: "far", addresses: &[&format!("{NEAR}/24")] },
            End { netns: &far, device: "near", addresses: &[&format!("{FAR}/24")] },
        )?;
        let echo = EchoServer::start(&far, &format!("{FAR}:8080"))?;
        let containerd = Containerd::start(machine)?;
        let agent = Agent::new(machine, Some(&containerd))?;
        Ok(Self { agent, containerd, echo, near, far })
    }

    /// The same with a running agent that has the policy `web`, failing closed.
    fn with_agent(machine: &Machine) -> Result<Self> {
        let mut stage = Self::new(machine)?;
        stage.agent.policy("web.yaml", &web("closed", ""))?;
        stage.agent.run()?;
        stage.agent.until_status("containerd", source_is("up"))?;
        Ok(stage)
    }

    /// A container that is a puppet.
    fn puppet(&self, name: &str, labels: &[(&str, &str)]) -> Result<Puppet> {
        self.puppet_in(name, labels, &self.near)
    }

    fn puppet_in(&self, name: &str, labels: &[(&str, &str)], netns: &NetNs) -> Result<Puppet> {
        Puppet::under(&mut self.containerd.run_attached(&Container {
            id: name,
            labels,
            netns: Some(netns),
            command: &[image::PUPPET],
        })?)
    }

    /// A container with the label `app=web`, attached.
    fn web(&self, name: &str) -> Result<Puppet> {
        let puppet = self.puppet(name, &[("app", "web")])?;
        self.agent.until_verdict(&id(name), "attached")?;
        Ok(puppet)
    }

    /// Another process in a running container.
    fn another(&self, name: &str) -> Result<Puppet> {
        let mut command = self.containerd.ctr_command()?;
        Puppet::under(command.args(["task", "exec", "--exec-id", "another", name, image::PUPPET]))
    }

    /// Says something to the echo server and demands that it went through the relay, and not otherwise.
    fn says_through_relay(&self, puppet: &mut Puppet) -> Result<()> {
        let before = self.redirected()?;
        assert_eq!(puppet.converse(self.echo.address(), "through")?, Ok("through".to_owned()));
        assert_eq!(self.redirected()?, before + 1, "a connection that was not redirected");
        Ok(())
    }

    fn says_directly(&self, puppet: &mut Puppet) -> Result<()> {
        let before = self.redirected()?;
        assert_eq!(puppet.converse(self.echo.address(), "directly")?, Ok("directly".to_owned()));
        assert_eq!(self.redirected()?, before, "a connection that was redirected");
        Ok(())
    }

    fn redirected(&self) -> Result<u64> {
        self.agent.counter("outboundRedirected")
    }

    fn kinds_of_events(&self, name: &str) -> Result<Vec<String>> {
        let detail = self.agent.workload(&id(name))?.context("the workload is known")?;
        let events = detail["events"].as_array().context("events")?;
        Ok(events.iter().map(|event| event["kind"].as_str().unwrap_or_default().to_owned()).collect())
    }

    fn end(self) -> Result<()> {
        let Self { agent, containerd, .. } = self;
        agent.end()?;
        drop(containerd);
        Ok(())
    }
}

fn source_is(state: &str) -> impl Fn(&Value) -> bool {
    move |status| status["sources"][0]["state"] == state
}

fn companion_pid(workload: &Value) -> Result<i64> {
    workload["companions"][0]["pid"].as_i64().with_context(|| format!("no companion in {workload}"))
}

fn connected(puppet: &mut Puppet, to: SocketAddr) -> Result<Socket> {
    let socket = puppet.socket(Domain::of(to))??;
    puppet.connect(socket, to)??;
    Ok(socket)
}

fn still_answers(puppet: &mut Puppet, socket: Socket, text: &str) -> Result<()> {
    puppet.send(socket, text)?.with_context(|| format!("sending {text:?}"))?;
    assert_eq!(puppet.receive(socket)?, Ok(text.to_owned()), "an open connection");
    Ok(())
}

/// Connections of a puppet, one after the other without a pause, until it is ended.
struct Load {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU32>,
    worker: JoinHandle<Result<Vec<String>>>,
}

impl Load {
    const BATCH: u32 = 20;

    fn start(mut puppet: Puppet, to: SocketAddr) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let worker = thread::spawn({
            let (stop, made) = (stop.clone(), made.clone());
            move || {
                let mut faults = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let done = puppet.exchange(to, Self::BATCH, 2_000)??;
                    made.fetch_add(Self::BATCH, Ordering::Relaxed);
                    faults.extend(done.faults);
                }
                Ok(faults)
            }
        });
        Self { stop, made, worker }
    }

    /// Returns when so many more connections have been made.
    fn goes_on(&self) -> Result<()> {
        let before = self.made.load(Ordering::Relaxed);
        wait_until("connections of the load", SOON, || {
            self.worker.is_finished() || self.made.load(Ordering::Relaxed) >= before + 5 * Self::BATCH
        })
    }

    /// Demands that none has failed; returns how many there were.
    fn end(self) -> Result<u32> {
        self.stop.store(true, Ordering::Relaxed);
        let faults = self.worker.join().expect("the worker does not panic")?;
        ensure!(faults.is_empty(), "connections failed: {faults:?}");
        Ok(self.made.load(Ordering::Relaxed))
    }
}

#[test]
fn containers_of_before_and_after_the_agent_go_through_the_relay() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        let mut early = stage.puppet("early", &[("app", "web")])?;
        stage.agent.policy("web.yaml", &web("closed", ""))?;
        stage.agent.run()?;
        let attached = stage.agent.until_verdict(&id("early"), "attached")?;
        assert_eq!(attached["firstInstruction"], "after");
        assert_eq!(attached["policy"], "web");
        assert_eq!(attached["onFailure"], "closed");
        assert_eq!(attached["pid"], stage.containerd.pid("early")?);
        let mut late = stage.puppet("late", &[("app", "web")])?;
        stage.agent.until_verdict(&id("late"), "attached")?;
        for (puppet, name) in [(&mut early, "early"), (&mut late, "late")] {
            stage.says_through_relay(puppet)?;
            let record = stage.agent.record(&id(name), stage.echo.address())?;
            assert_eq!(record["direction"], "outbound");
            assert_eq!(record["outcome"], "ok");
            assert_eq!((&record["bytes_sent"], &record["bytes_received"]), (&7.into(), &7.into()));
            // What the application sees is not the relay.
            let socket = connected(puppet, stage.echo.address())?;
            let names = puppet.names(socket)??;
            assert_eq!((names.local.ip().to_string(), names.peer), (NEAR.into(), Some(stage.echo.address())));
            puppet.close(socket)??;
        }
        drop((early, late));
        stage.agent.until_forgotten(&id("early"))?;
        stage.agent.until_forgotten(&id("late"))?;
        stage.end()
    })
}

/// What the agent says about the first instruction is compared with the truth: a container whose first instruction connects.
#[test]
fn no_container_is_called_attached_in_time_when_its_first_instruction_was_missed() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine)?;
        let mut claims = Vec::new();
        for number in 0..12_u16 {
            let name = format!("first.{number}");
            let echo = EchoServer::start(&stage.far, &format!("{FAR}:{}", 9000 + number))?;
            let before = stage.redirected()?;
            let dial = ["nc", FAR, &echo.address().port().to_string()].map(str::to_owned);
            let command: Vec<&str> = dial.iter().map(String::as_str).collect();
            // Its input is empty, so it ends its stream at once and waits for the echo server to end its own.
            let mut running = stage.containerd.run_attached(&Container {
                id: &name,
                labels: &[("app", "web")],
                netns: Some(&stage.near),
                command: &command,
            })?;
            let hold = Arc::new(AtomicBool::new(false));
            let _ = hold;
            running.stdin(std::process::Stdio::piped());
            let mut running = running.spawn()?;
            let seen = wait_until("the container's connection", SOON, || !echo.peers().is_empty());
            // Nobody else connects: the kernel's count tells whether this connection was redirected.
            let redirected = stage.redirected()? - before;
            let workload = stage.agent.until_verdict(&id(&name), "attached");
            drop(running.stdin.take());
            running.wait()?;
            seen?;
            let claim = workload?["firstInstruction"].as_str().context("a claim")?.to_owned();
            ensure!(["before", "after", "unknown"].contains(&claim.as_str()), "claim {claim}");
            ensure!(
                claim != "before" || redirected == 1,
                "{name} is called `before`, and its connection was missed"
            );
            ensure!(
                claim != "after" || redirected == 0,
                "{name} is called `after`, and its connection was redirected"
            );
            claims.push((claim, redirected));
            stage.agent.until_forgotten(&id(&name))?;
        }
        println!("claims and redirected connections: {claims:?}");
        stage.end()
    })
}

#[test]
fn labels_images_and_namespaces_select() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
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
        stage.agent.policy("all.yaml", text.trim_end_matches("---\n"))?;
        stage.agent.run()?;
        for (name, _, failed) in cases {
            let mut puppet = stage.puppet(name, &[("pick", name)])?;
            match failed {
                None => {
                    let workload = stage.agent.until_verdict(&id(name), "attached")?;
                    assert_eq!(workload["policy"], name);
                    stage.says_through_relay(&mut puppet)?;
                }
                Some(field) => {
                    let workload = stage.agent.until_verdict(&id(name), "notMatched")?;
                    let reasons = workload["reasons"].as_array().context("reasons")?;
                    let reason =
                        reasons.iter().find(|reason| reason["policy"] == name).context("a reason")?;
                    let fields = reason["fields"].as_array().context("fields")?;
                    let failed: Vec<&Value> =
                        fields.iter().filter(|field| field["matched"] == false).collect();
                    ensure!(failed.len() == 1 && failed[0]["field"] == field, "{reason}");
                    stage.says_directly(&mut puppet)?;
                }
            }
        }
        let mut plain = stage.puppet("plain", &[])?;
        stage.agent.until_verdict(&id("plain"), "notMatched")?;
        stage.says_directly(&mut plain)?;
        drop(plain);
        stage.agent.until_forgotten(&id("plain"))?;
        stage.end()
    })
}

#[test]
fn a_policy_is_changed_and_removed_under_a_running_container() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine)?;
        let other = EchoServer::start(&stage.far, &format!("{FAR}:8081"))?;
        let mut puppet = stage.web("live")?;
        let pid = companion_pid(&stage.agent.until_verdict(&id("live"), "attached")?)?;
        let open = connected(&mut puppet, stage.echo.address())?;
        still_answers(&mut puppet, open, "before the change")?;

        stage.agent.policy("web.yaml", &web("closed", ", exclude: { ports: [8080] }"))?;
        wait_until("a changed plan", SOON, || {
            stage.kinds_of_events("live").is_ok_and(|kinds| kinds.contains(&"planChanged".to_owned()))
        })?;
        still_answers(&mut puppet, open, "after the change")?;
        stage.says_directly(&mut puppet)?;
        let before = stage.redirected()?;
        assert_eq!(puppet.converse(other.address(), "not excluded")?, Ok("not excluded".to_owned()));
        assert_eq!(stage.redirected()?, before + 1);
        let workload = stage.agent.until_verdict(&id("live"), "attached")?;
        assert_eq!(companion_pid(&workload)?, pid, "the companion has nothing to do with an exclusion");

        // Back, and in a new file: the name of the policy counts.
        fs::remove_file(stage.agent.policy_dir().join("web.yaml"))?;
        stage.agent.policy("again.yaml", &web("closed", "").replace("name: web", "name: again"))?;
        stage.agent.until(&id("live"), "the policy `again`", |workload| {
            workload["policy"] == "again" && workload["verdict"] == "attached"
        })?;
        wait_until("redirection again", SOON, || stage.says_through_relay(&mut puppet).is_ok())?;

        fs::remove_file(stage.agent.policy_dir().join("again.yaml"))?;
        stage.agent.until_verdict(&id("live"), "notMatched")?;
        stage.says_directly(&mut puppet)?;
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "the companion of a removed policy runs on");
        assert_eq!(stage.kinds_of_events("live")?.last().map(String::as_str), Some("detached"));
        drop(puppet);
        stage.agent.until_forgotten(&id("live"))?;
        stage.end()
    })
}

#[test]
fn an_operator_detaches_and_attaches() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::with_agent(machine)?;
        let mut puppet = stage.web("held")?;
        stage.agent.cli(&["detach", &id("held")])?.success()?;
        let workload = stage.agent.workload(&id("held"))?.context("it is known")?;
        assert_eq!(workload["verdict"], "held");
        stage.says_directly(&mut puppet)?;
        // Again, and across a restart of the agent.
        stage.agent.cli(&["detach", &id("held")])?.success()?;
        stage.agent.stop(Signal::SIGKILL)?;
        stage.agent.run()?;
        stage.agent.until_verdict(&id("held"), "held")?;
        stage.says_directly(&mut puppet)?;
        let attached = stage.agent.cli(&["attach", &id("held")])?.success()?;
        ensure!(attached.stdout.contains("attached"), "{}", attached.stdout);
        stage.says_through_relay(&mut puppet)?;

        let other = stage.puppet("other", &[])?;
        stage.agent.until_verdict(&id("other"), "notMatched")?;
        let refused = stage.agent.cli(&["attach", &id("other")])?.code(1)?;
        ensure!(refused.stderr.contains("no policy selects"), "{}", refused.stderr);
        let refused = stage.agent.cli(&["detach", &id("nobody")])?.code(1)?;
        ensure!(refused.stderr.contains("no workload"), "{}", refused.stderr);
        drop((puppet, other));
        stage.agent.until_forgotten(&id("held"))?;
        stage.end()
    })
}

#[test]
fn of_a_container_that_ends_nothing_is_left_and_its_name_can_be_used_again() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine)?;
        // The first one makes what is shared by all and stays with the agent.
        drop(stage.web("warm")?);
        stage.agent.until_forgotten(&id("warm"))?;
        let before = Inventory::take()?;
        let mut pids = Vec::new();
        for _ in 0..3 {
            let mut puppet = stage.web("again")?;
            pids.push(companion_pid(&stage.agent.until_verdict(&id("again"), "attached")?)?);
            stage.says_through_relay(&mut puppet)?;
            drop(puppet);
            stage.agent.until_forgotten(&id("again"))?;
            before.expect_nothing_added(SOON)?;
        }
        ensure!(pids[0] != pids[1] && pids[1] != pids[2], "one companion for several containers: {pids:?}");

        // Killed and removed at once, with a connection open, and made again before the agent can be done with it.
        let run = |stage: &Stage| {
            stage.containerd.run(&Container {
                id: "again",
                labels: &[("app", "web")],
                netns: Some(&stage.near),
                command: &["sleep", "1000"],
            })
        };
        let first = run(&stage)?;
        stage.agent.until_verdict(&id("again"), "attached")?;
        stage.containerd.remove("again")?;
        let second = run(&stage)?;
        ensure!(first != second);
        stage.agent.until(&id("again"), "attached to the second", |workload| {
            workload["verdict"] == "attached" && workload["pid"] == second
        })?;
        let mut puppet = stage.another("again")?;
        stage.says_through_relay(&mut puppet)?;
        drop(puppet);
        stage.containerd.remove("again")?;
        stage.agent.until_forgotten(&id("again"))?;
        before.expect_nothing_added(SOON)?;
        stage.end()
    })
}

#[test]
fn twenty_containers_at_once() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine)?;
        let names: Vec<String> = (0..20).map(|number| format!("many.{number}")).collect();
        // Every other one shares a namespace with the rest of its half, so that ports must be allocated.
        let own: Vec<NetNs> = (0..10)
            .map(|number| {
                let netns = NetNs::new()?;
                let (device, near, far) =
                    (format!("n{number}"), format!("10.78.{number}.1/24"), format!("10.78.{number}.2/24"));
                NetNs::join(
                    End { netns: &netns, device: "far", addresses: &[&near] },
                    End { netns: &stage.far, device: &device, addresses: &[&far] },
                )?;
                netns.ip(&format!("route add 10.77.0.0/24 via 10.78.{number}.2"))?;
                Ok(netns)
            })
            .collect::<Result<_>>()?;
        let mut puppets = thread::scope(|scope| {
            let run = |(number, name): (usize, &String)| {
                let (stage, netns, name) = (&stage, own.get(number / 2), name.clone());
                let netns = if number % 2 == 0 { netns } else { None };
                scope.spawn(move || stage.puppet_in(&name, &[("app", "web")], netns.unwrap_or(&stage.near)))
            };
            let running: Vec<_> = names.iter().enumerate().map(run).collect();
            running
                .into_iter()
                .map(|thread| thread.join().expect("the thread does not panic"))
                .collect::<Result<Vec<Puppet>>>()
        })?;
        let mut ports = std::collections::BTreeSet::new();
        for (number, (puppet, name)) in puppets.iter_mut().zip(&names).enumerate() {
            let workload = stage.agent.until_verdict(&id(name), "attached")?;
            let port = workload["ports"]["outbound"].as_u64().context("a port")?;
            if number % 2 == 1 {
                ensure!(ports.insert(port), "{name} shares port {port} in one namespace");
            } else {
                assert_eq!(port, 15001, "{name} is alone in its namespace");
            }
            stage.says_through_relay(puppet)?;
            let record = stage.agent.record(&id(name), stage.echo.address())?;
            let source = record["source"].as_str().context("a source")?;
            let wanted =
                if number % 2 == 1 { format!("{NEAR}:") } else { format!("10.78.{}.1:", number / 2) };
            ensure!(source.starts_with(&wanted), "{name} comes from {source}");
        }
        let status = stage.agent.status()?;
        assert_eq!(status["workloads"]["attached"], 20);
        drop(puppets);
        for name in &names {
            stage.agent.until_forgotten(&id(name))?;
        }
        stage.end()
    })
}

/// A companion that echoes by itself, and can be kept from starting again: what comes back tells whether it is there.
fn guarded(machine: &Machine, on_failure: &str) -> Result<(String, std::path::PathBuf)> {
    let broken = machine.directory().join("broken");
    let busybox = programs::system("busybox")?;
    let script = format!(
        "test ! -e {} && exec {} nc -lk -p {{{{ outboundPort }}}} -s 127.0.0.1 -e {} sed -u s/^/companion:/",
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
        let mut stage = Stage::new(machine)?;
        for mode in ["open", "closed"] {
            let (text, broken) = guarded(machine, mode)?;
            stage.agent.policy("web.yaml", &text)?;
            if stage.agent.process().is_err() {
                stage.agent.run()?;
            }
            stage.agent.until_status(mode, |status| {
                status["policies"]["generation"] == if mode == "open" { 1 } else { 2 }
            })?;
            let name = format!("guarded.{mode}");
            let mut puppet = stage.web(&name)?;
            let to = stage.echo.address();
            assert_eq!(puppet.converse(to, "hello\n")?, Ok("companion:hello\n".to_owned()), "{mode}");
            fs::write(&broken, "")?;
            let pid = companion_pid(&stage.agent.until_verdict(&id(&name), "attached")?)?;
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
            // At once and for as long as it stays away, whatever the agent has noticed.
            wait_until("the companion's end", SOON, || !is_running(pid))?;
            let without = if mode == "open" { Ok("hello\n".to_owned()) } else { Err(Errno::ECONNREFUSED) };
            assert_eq!(puppet.converse(to, "hello\n")?, without, "{mode}, at once");
            let degraded = stage.agent.until_verdict(&id(&name), "degraded")?;
            ensure!(degraded["reason"].as_str().is_some_and(|why| why.contains("guard")), "{degraded}");
            let status = stage.agent.cli(&["status"])?.code(5)?;
            ensure!(status.stdout.contains(&id(&name)), "{}", status.stdout);
            assert_eq!(puppet.converse(to, "hello\n")?, without, "{mode}, later");
            fs::remove_file(&broken)?;
            let back = stage.agent.until_verdict(&id(&name), "attached")?;
            ensure!(companion_pid(&back)? != pid);
            assert_eq!(puppet.converse(to, "hello\n")?, Ok("companion:hello\n".to_owned()), "{mode}, back");
            stage.agent.cli(&["status"])?.success()?;
            drop(puppet);
            stage.agent.until_forgotten(&id(&name))?;
        }
        stage.end()
    })
}

fn is_running(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie listens to nothing any more.
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// The agent ends by this signal and is started again, under load.
fn restart_under_load(machine: &Machine, signal: Signal) -> Result<()> {
    let mut stage = Stage::with_agent(machine)?;
    let mut puppet = stage.web("steady")?;
    let pid = companion_pid(&stage.agent.until_verdict(&id("steady"), "attached")?)?;
    let before = stage.redirected()?;
    let open = connected(&mut puppet, stage.echo.address())?;
    still_answers(&mut puppet, open, "before")?;
    let load = Load::start(stage.another("steady")?, stage.echo.address());
    for round in 0..3 {
        load.goes_on()?;
        stage.agent.stop(signal)?;
        // Nobody is there; the kernel and the companion go on.
        still_answers(&mut puppet, open, "without an agent")?;
        load.goes_on()?;
        stage.agent.run()?;
        let workload = stage.agent.until_verdict(&id("steady"), "attached")?;
        assert_eq!(companion_pid(&workload)?, pid, "another companion after restart {round}");
        assert_eq!(workload["companions"][0]["restarts"], 0);
        ensure!(stage.kinds_of_events("steady")?.contains(&"adopted".to_owned()), "it was not adopted");
        stage.agent.until_status("containerd", source_is("up"))?;
        still_answers(&mut puppet, open, "with the next agent")?;
        load.goes_on()?;
    }
    let made = load.end()?;
    still_answers(&mut puppet, open, "after")?;
    assert_eq!(stage.redirected()? - before, u64::from(made) + 1, "connections that went by the relay");
    drop(puppet);
    stage.agent.until_forgotten(&id("steady"))?;
    stage.end()
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
        let mut stage = Stage::with_agent(machine)?;
        // One that ends, one that is made again under its name, one that is new, and one whose companion dies.
        let ends = stage.web("ends")?;
        let again = stage.web("again")?;
        let mut stays = stage.web("stays")?;
        let orphan = companion_pid(&stage.agent.until_verdict(&id("ends"), "attached")?)?;
        let dies = companion_pid(&stage.agent.until_verdict(&id("stays"), "attached")?)?;
        stage.agent.stop(Signal::SIGKILL)?;
        drop((ends, again));
        kill(Pid::from_raw(i32::try_from(dies)?), Signal::SIGKILL)?;
        let mut again = stage.puppet("again", &[("app", "web")])?;
        let mut new = stage.puppet("new", &[("app", "web")])?;
        wait_until("the companion's end", SOON, || !is_running(dies))?;
        assert_eq!(
            stays.converse(stage.echo.address(), "x")?,
            Err(Errno::ECONNREFUSED),
            "closed without an agent"
        );
        stage.agent.run()?;
        for (name, puppet) in [("again", &mut again), ("new", &mut new), ("stays", &mut stays)] {
            let pid = stage.containerd.pid(name)?;
            stage.agent.until(&id(name), "attached", |workload| {
                workload["verdict"] == "attached" && workload["pid"] == pid
            })?;
            stage.says_through_relay(puppet)?;
        }
        stage.agent.until_forgotten(&id("ends"))?;
        wait_until("the end of an orphaned companion", SOON, || !is_running(orphan))?;
        drop((again, new, stays));
        for name in ["again", "new", "stays"] {
            stage.agent.until_forgotten(&id(name))?;
        }
        stage.end()
    })
}

#[test]
fn containerd_may_be_absent_and_may_come_back() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        let mut puppet = stage.puppet("kept", &[("app", "web")])?;
        stage.containerd.stop_daemon(Signal::SIGKILL)?;
        stage.agent.policy("web.yaml", &web("closed", ""))?;
        // Absent at the start: the agent is up, and says what is missing.
        stage.agent.run()?;
        let status = stage.agent.until_status("containerd down", source_is("down"))?;
        assert_eq!(status["health"], "degraded");
        let told = stage.agent.cli(&["status"])?.code(5)?;
        ensure!(told.stdout.contains("containerd does not answer"), "{}", told.stdout);
        stage.containerd.start_daemon()?;
        let attached = stage.agent.until_verdict(&id("kept"), "attached")?;
        assert_eq!(attached["firstInstruction"], "after");
        let pid = companion_pid(&attached)?;
        stage.agent.cli(&["status"])?.success()?;
        stage.says_through_relay(&mut puppet)?;

        // Killed: nothing changes for the workload, not even across a restart of the agent.
        let open = connected(&mut puppet, stage.echo.address())?;
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            stage.containerd.stop_daemon(signal)?;
            stage.agent.until_status("containerd down", source_is("down"))?;
            stage.says_through_relay(&mut puppet)?;
            if signal == Signal::SIGTERM {
                stage.agent.stop(Signal::SIGKILL)?;
                stage.agent.run()?;
                stage.agent.until_status("containerd down", source_is("down"))?;
                stage.agent.until_verdict(&id("kept"), "attached")?;
                stage.says_through_relay(&mut puppet)?;
            }
            stage.containerd.start_daemon()?;
            stage.agent.until_status("containerd up", source_is("up"))?;
            let workload = stage.agent.until_verdict(&id("kept"), "attached")?;
            assert_eq!(companion_pid(&workload)?, pid, "attached again for no reason");
            still_answers(&mut puppet, open, "all the time")?;
        }
        // A new container is noticed, so the event stream is there again; and the end of one.
        let mut new = stage.web("new")?;
        stage.says_through_relay(&mut new)?;
        drop(new);
        stage.agent.until_forgotten(&id("new"))?;
        stage.containerd.remove("kept")?;
        stage.agent.until_forgotten(&id("kept"))?;
        drop(puppet);
        stage.end()
    })
}
