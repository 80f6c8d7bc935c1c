//! `pillion-hook` with a real containerd, also beneath its CRI, and with runc alone: a container whose very first instruction is a
//! connection is held until its relay is there, and what becomes of it when that does not come, when there is no agent, and when
//! one of the two ends.

use std::{
    fs,
    net::SocketAddr,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    Agent, EchoServer, Finished, Hooks, Lab, Machine, PodSpec, Pods, ProcessGuard, Way,
    containerd::Container,
    first,
    hooked::FIRST,
    on_machine,
    pods::{GATEWAY, PROGRAM, WRAPPED, workload},
    scene::{FAR, KIND, Scene, id, source_is, web},
    wait_for, wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
/// Its first instruction connects.
const CONNECT: [&str; 1] = [FIRST];

/// The program is selected by its container's label where containerd runs it, and by its path where runc does alone.
fn policy(companion: &str, on_failure: &str) -> String {
    // The relay takes any port, and many of them share a namespace here.
    let to = if companion == RELAY { "side" } else { "side:15001" };
    format!(
        "{KIND}\nmetadata: {{ name: gated }}\nspec:\n  \
         select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
         companions:\n    - name: side\n      {companion}\n  \
         redirect: {{ outbound: [{{ to: '{to}' }}] }}\n  onFailure: {on_failure}\n---\n\
         {KIND}\nmetadata: {{ name: gated-plain }}\nspec:\n  \
         select: {{ runtimes: [process], executables: [{FIRST}] }}\n  \
         companions:\n    - name: side\n      {companion}\n  \
         redirect: {{ outbound: [{{ to: '{to}' }}] }}\n  onFailure: {on_failure}\n"
    )
}

const RELAY: &str = "builtin: relay\n      stopGrace: 1s";
/// It ends at once.
const FAILING: &str =
    "exec: { command: [/usr/bin/false] }\n      ready: { timeout: 2s, tcp: { port: 15001 } }";
/// It never listens, and may try for longer than any hold lasts.
const HANGING: &str = "exec: { command: [/bin/sleep, '999'] }\n      ready: { timeout: 60s, tcp: { port: 15001 } }\n      stopGrace: 1s";

struct Stage {
    scene: Scene,
    hooks: Hooks,
}

impl Stage {
    /// No agent runs yet, and there is no policy.
    fn new(machine: &Machine) -> Result<Self> {
        let scene = Scene::new(machine)?;
        let SocketAddr::V4(server) = scene.echo.address() else {
            bail!("the echo server has an IPv4 address")
        };
        let hooks = Hooks::new(machine, &scene.agent, server)?;
        Ok(Self { scene, hooks })
    }

    fn with_agent(machine: &Machine, policy: &str) -> Result<Self> {
        let mut stage = Self::new(machine)?;
        stage.scene.agent.policy("gated.yaml", policy)?;
        stage.run_agent()?;
        Ok(stage)
    }

    fn run_agent(&mut self) -> Result<()> {
        self.scene.agent.run()?;
        self.scene.agent.until_status("containerd", source_is("up"))?;
        self.scene.agent.until_status("policies", |status| status["policies"]["generation"] != 0).map(drop)
    }

    fn container<'a>(&'a self, name: &'a str, command: &'a [&'a str]) -> Container<'a> {
        Container { id: name, labels: &[("app", "web")], netns: Some(&self.scene.near), command }
    }

    /// Runs the container that connects.
    fn connect(&self, way: Way, name: &str) -> Result<Finished> {
        self.hooks.finish(way, &self.scene.containerd, &self.container(name, &CONNECT))
    }

    /// How many connections came to the echo server.
    fn arrived(&self) -> usize {
        self.scene.echo.peers().len()
    }

    /// Runs the container that connects, and demands that it ran and whether its connection was redirected.
    fn connects(&self, way: Way, name: &str, redirected: u64) -> Result<Finished> {
        let before = (self.scene.redirected()?, self.arrived());
        let done = self.connect(way, name)?;
        ensure!(done.status.success(), "{way:?} {name}: {}", done.stderr);
        wait_until("its connection", SOON, || self.arrived() > before.1)?;
        let now = (self.scene.redirected()?, self.arrived());
        ensure!(now == (before.0 + redirected, before.1 + 1), "{way:?} {name}: {before:?}, then {now:?}");
        Ok(done)
    }

    /// Runs it, and demands that it did not, and that what is said names Pillion, the policy and `words`.
    fn is_refused(&self, way: Way, name: &str, words: &str) -> Result<()> {
        let before = self.arrived();
        let done = self.connect(way, name)?;
        ensure!(!done.status.success(), "{way:?} {name} ran");
        for part in ["pillion: ", "gated", words] {
            ensure!(done.stderr.contains(part), "{way:?} {name}: no {part:?} in: {}", done.stderr);
        }
        assert_eq!(self.arrived(), before, "{way:?} {name} was refused, and connected");
        self.forget(name)
    }

    /// Removes what `ctr run` leaves of a container that did not start, as engines do by themselves.
    fn forget(&self, name: &str) -> Result<()> {
        let containers = self.scene.containerd.ctr(&["container", "ls", "--quiet"])?.success()?.stdout;
        if containers.lines().any(|known| known == name) {
            // Of a container that was not created there is no task.
            self.scene.containerd.ctr(&["task", "rm", "--force", name])?;
            self.scene.containerd.ctr(&["container", "rm", name])?.success()?;
        }
        Ok(())
    }

    /// Starts it, without waiting for anything.
    fn begin(&self, way: Way, name: &str) -> Result<ProcessGuard> {
        let mut command = self.hooks.run(way, &self.scene.containerd, &self.container(name, &CONNECT))?;
        ProcessGuard::spawn(name, &mut command)
    }

    /// Waits until the agent holds some workload at the way's gate; returns its id.
    fn until_held(&self, way: Way) -> Result<String> {
        wait_for("a held workload", SOON, || {
            let list = self.scene.agent.json(&["list"]).ok()?;
            let held =
                |workload: &Value| workload["verdict"] == "attaching" && workload["gate"] == way.gate();
            let found = list["workloads"].as_array()?.iter().find(|workload| held(workload))?.clone();
            found["id"].as_str().map(str::to_owned)
        })
    }

    /// Waits until the agent knows no workload.
    fn until_empty(&self) -> Result<()> {
        wait_until("an agent that knows no workload", SOON, || {
            self.scene
                .agent
                .json(&["list"])
                .is_ok_and(|list| list["workloads"].as_array().is_some_and(Vec::is_empty))
        })
    }

    fn end(self) -> Result<()> {
        let Self { scene, hooks } = self;
        drop(hooks);
        scene.end()
    }
}

#[test]
fn the_first_instruction_is_captured_by_every_way() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, &policy(RELAY, "closed"))?;
        for way in Way::ALL {
            for number in 0..5 {
                stage.connects(way, &format!("{}-{number}", way.gate()), 1)?;
            }
            stage.until_empty()?;
        }
        let events = stage.scene.agent.cli(&["events", "-o", "json"])?.success()?.stdout;
        let events: Vec<Value> = events.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let attached: Vec<&Value> = events.iter().filter(|event| event["kind"] == "admitted").collect();
        assert_eq!(attached.len(), 5 * Way::ALL.len());
        for gate in ["wrapper", "hook"] {
            assert_eq!(attached.iter().filter(|event| event["gate"] == gate).count(), 10, "{attached:?}");
        }
        let (_, metrics) = stage.scene.agent.get("/metrics")?;
        ensure!(metrics.contains("pillion_gate_seconds"), "{metrics}");
        stage.end()
    })
}

#[test]
fn the_agent_says_what_it_held_and_when() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, &policy(RELAY, "closed"))?;
        for way in [Way::Wrapper, Way::Hook] {
            let name = way.gate();
            let mut command = stage.hooks.run(
                way,
                &stage.scene.containerd,
                &stage.container(name, &["/bin/nc", FAR, "8080"]),
            )?;
            // Its input stays open, so it runs until it is told otherwise.
            let mut running = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
            let workload = stage.scene.agent.until_verdict(&id(name), "attached");
            drop(running.stdin.take());
            running.wait()?;
            let workload = workload?;
            assert_eq!(workload["firstInstruction"], "before", "{workload}");
            assert_eq!(workload["gate"], way.gate(), "{workload}");
            stage.scene.agent.until_forgotten(&id(name))?;
        }
        // What no policy selects passes, and is known all the same.
        let other = Container { labels: &[], ..stage.container("other", &CONNECT) };
        let before = stage.scene.redirected()?;
        stage.hooks.finish(Way::Wrapper, &stage.scene.containerd, &other)?.success()?;
        assert_eq!(stage.scene.redirected()?, before);
        stage.end()
    })
}

fn failing_and_hanging(machine: &Machine, ways: [Way; 2]) -> Result<()> {
    let mut stage = Stage::new(machine)?;
    for (companion, words) in [(FAILING, "side"), (HANGING, "not attached within the time")] {
        for (on_failure, refused) in [("open", false), ("closed", true)] {
            stage.scene.agent.policy("gated.yaml", &policy(companion, on_failure))?;
            let mut command = stage.scene.agent.command()?;
            command.args(["--hold-limit", "4s"]);
            stage.scene.agent.run_command(command)?;
            stage.scene.agent.until_status("containerd", source_is("up"))?;
            stage.scene.agent.until_status("policies", |status| status["policies"]["generation"] != 0)?;
            for way in ways {
                let name = format!("{on_failure}-{}-{}", way.gate(), words.len());
                if refused {
                    stage.is_refused(way, &name, words)?;
                } else {
                    stage.connects(way, &name, 0)?;
                }
            }
            stage.until_empty()?;
            stage.scene.agent.stop(Signal::SIGTERM)?;
        }
    }
    stage.end()
}

#[test]
fn failing_and_hanging_companions_with_containerd() -> Result<()> {
    on_machine(|machine| failing_and_hanging(machine, [Way::Wrapper, Way::Hook]))
}

#[test]
fn failing_and_hanging_companions_with_runc_alone() -> Result<()> {
    on_machine(|machine| failing_and_hanging(machine, [Way::PlainWrapper, Way::PlainHook]))
}

#[test]
fn without_an_agent_the_policies_that_were_in_force_decide() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        let runs = |stage: &Stage, way: Way, name: &str| -> Result<Finished> {
            let before = stage.arrived();
            let done = stage.connect(way, name)?;
            ensure!(done.status.success(), "{way:?} {name}: {}", done.stderr);
            wait_until("its connection", SOON, || stage.arrived() == before + 1)?;
            Ok(done)
        };
        // There never was one.
        for way in Way::ALL {
            let done = runs(&stage, way, &format!("never-{}", way.gate()))?;
            ensure!(!done.stderr.contains("pillion"), "{way:?}: {}", done.stderr);
        }
        for (on_failure, signal) in
            [("open", Signal::SIGTERM), ("closed", Signal::SIGTERM), ("closed", Signal::SIGKILL)]
        {
            stage.scene.agent.policy("gated.yaml", &policy(RELAY, on_failure))?;
            stage.run_agent()?;
            stage.scene.agent.stop(signal)?;
            for way in Way::ALL {
                let name = format!("{on_failure}-{signal}-{}", way.gate());
                match on_failure {
                    "open" => _ = runs(&stage, way, &name)?,
                    _ => stage.is_refused(way, &name, "no agent is running; refused, as policy gated")?,
                }
            }
            // What no closed policy selects is told apart exactly.
            let other = Container { labels: &[], ..stage.container("other", &CONNECT) };
            let before = stage.arrived();
            stage.hooks.finish(Way::Wrapper, &stage.scene.containerd, &other)?.success()?;
            wait_until("its connection", SOON, || stage.arrived() == before + 1)?;
        }
        // The copy is lost: refused as long as that is not known to be open.
        fs::remove_file(stage.scene.agent.state_dir().join("policies.json"))?;
        stage.is_refused(Way::Wrapper, "no-copy", "admit --offline")?;
        // And again with an agent.
        stage.run_agent()?;
        stage.connects(Way::Wrapper, "again", 1)?;
        // Cleaned up, it is as if there never was one.
        stage.scene.agent.stop(Signal::SIGTERM)?;
        stage.scene.agent.cleanup(&["--yes"])?.success()?;
        runs(&stage, Way::Wrapper, "clean")?;
        stage.end()
    })
}

#[test]
fn an_agent_that_is_killed_or_stopped_while_it_holds() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        for (on_failure, signal) in
            [("open", Signal::SIGKILL), ("closed", Signal::SIGKILL), ("closed", Signal::SIGTERM)]
        {
            stage.scene.agent.policy("gated.yaml", &policy(HANGING, on_failure))?;
            stage.run_agent()?;
            for way in [Way::Wrapper, Way::Hook, Way::PlainWrapper] {
                if stage.scene.agent.process().is_err() {
                    stage.run_agent()?;
                }
                let before = stage.arrived();
                let name = format!("{on_failure}-{signal}-{way:?}").to_lowercase();
                let mut running = stage.begin(way, &name)?;
                stage.until_held(way)?;
                stage.scene.agent.stop(signal)?;
                let status = running.exit(SOON)?;
                let said = running.stderr()?;
                if on_failure == "open" {
                    ensure!(status.success(), "{way:?}: {said}");
                    wait_until("its connection", SOON, || stage.arrived() == before + 1)?;
                } else {
                    ensure!(!status.success(), "{way:?} ran");
                    ensure!(said.contains("pillion: ") && said.contains("policy gated"), "{way:?}: {said}");
                    assert_eq!(stage.arrived(), before);
                }
                stage.forget(&name)?;
            }
            // Nothing stays of what was being attached.
            stage.run_agent()?;
            stage.until_empty()?;
            stage.scene.agent.stop(Signal::SIGTERM)?;
        }
        stage.end()
    })
}

#[test]
fn an_agent_that_is_replaced_while_it_holds_is_followed_by_the_next_one() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            for way in [Way::Wrapper, Way::Hook, Way::PlainWrapper] {
                stage.scene.agent.policy("gated.yaml", &policy(HANGING, "closed"))?;
                stage.run_agent()?;
                let before = (stage.scene.redirected()?, stage.arrived());
                let name = format!("followed-{signal}-{way:?}").to_lowercase();
                let mut running = stage.begin(way, &name)?;
                stage.until_held(way)?;
                stage.scene.agent.stop(signal)?;
                // What it waits for can be had now.
                stage.scene.agent.policy("gated.yaml", &policy(RELAY, "closed"))?;
                stage.run_agent()?;
                let status = running.exit(SOON)?;
                ensure!(status.success(), "{signal} {way:?}: {}", running.stderr()?);
                wait_until("its connection", SOON, || stage.arrived() > before.1)?;
                let now = (stage.scene.redirected()?, stage.arrived());
                ensure!(now == (before.0 + 1, before.1 + 1), "{signal} {way:?}: {before:?}, then {now:?}");
                stage.until_empty()?;
                stage.scene.agent.stop(Signal::SIGTERM)?;
            }
        }
        stage.end()
    })
}

#[test]
fn an_agent_that_hangs_is_not_waited_for_without_end() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        stage.scene.agent.policy("gated.yaml", &policy(RELAY, "closed"))?;
        let mut command = stage.scene.agent.command()?;
        command.args(["--hold-limit", "2s"]);
        stage.scene.agent.run_command(command)?;
        stage.scene.agent.until_status("policies", |status| status["policies"]["generation"] != 0)?;
        stage.scene.agent.process()?.signal(Signal::SIGSTOP)?;
        let since = Instant::now();
        let refused = stage.is_refused(Way::PlainWrapper, "hanging", "the agent gave no answer in time");
        let took = since.elapsed();
        stage.scene.agent.process()?.signal(Signal::SIGCONT)?;
        refused?;
        ensure!(took > Duration::from_secs(2) && took < Duration::from_secs(20), "{took:?}");
        stage.end()
    })
}

#[test]
fn a_container_that_is_killed_while_it_is_held() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, &policy(HANGING, "closed"))?;
        for way in Way::ALL {
            let name = format!("killed-{way:?}").to_lowercase();
            let mut running = stage.begin(way, &name)?;
            stage.until_held(way)?;
            let pid = wait_for("its process", SOON, || stage.hooks.pid(&name))?;
            let since = Instant::now();
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            let status = running.exit(SOON)?;
            ensure!(!status.success(), "{way:?} {name} ran");
            ensure!(since.elapsed() < Duration::from_secs(10), "{way:?}: held on for {:?}", since.elapsed());
            stage.forget(&name)?;
            stage.until_empty()?;
        }
        assert_eq!(stage.arrived(), 0);
        stage.end()
    })
}

#[test]
fn fifty_at_once() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, &policy(RELAY, "closed"))?;
        let faults: Vec<String> = thread::scope(|scope| {
            let run = |number: usize| {
                let stage = &stage;
                scope.spawn(move || -> Result<()> {
                    let way = if number.is_multiple_of(2) { Way::Wrapper } else { Way::Hook };
                    stage.connect(way, &format!("many-{number}"))?.success().map(drop)
                })
            };
            let running: Vec<_> = (0..50).map(run).collect();
            let results = running.into_iter().map(|it| it.join().expect("no panic"));
            results.filter_map(|result| Some(format!("{:#}", result.err()?))).collect()
        });
        ensure!(faults.is_empty(), "{faults:?}");
        assert_eq!(stage.arrived(), 50);
        assert_eq!(stage.scene.redirected()?, 50);
        stage.until_empty()?;
        stage.end()
    })
}

#[test]
fn policies_that_went_bad_are_stood_in_for_by_the_last_good_ones() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::with_agent(machine, &policy(RELAY, "closed"))?;
        stage.scene.agent.stop(Signal::SIGKILL)?;
        stage.scene.agent.policy("gated.yaml", "kind: Nonsense\n")?;
        stage.run_agent()?;
        let status = stage.scene.agent.status()?;
        assert_eq!(status["policies"]["ofEarlierAgent"], true, "{status}");
        assert_eq!(status["policies"]["policies"].as_array().map(Vec::len), Some(2), "{status}");
        ensure!(status.to_string().contains("an earlier agent had last"), "{status}");
        stage.connects(Way::Wrapper, "by-the-copy", 1)?;
        stage.scene.agent.policy("gated.yaml", &web("open", ""))?;
        stage.scene.agent.until_status("the new ones", |status| {
            status["policies"]["ofEarlierAgent"] == false && status["policies"]["refused"].is_null()
        })?;
        stage.end()
    })
}

#[test]
fn pods_of_a_containerd_without_nri_are_captured_from_their_init_containers_on() -> Result<()> {
    on_machine(|machine| {
        let mut agent = Agent::new(machine, None)?;
        let lab = Lab::wrapped_containerd(machine, "bookworm", &agent)?;
        agent.serve(lab.value("CONTAINERD_ADDRESS")?, "none");
        let pods = Pods::of(&lab)?;
        let echo = EchoServer::start(&pods.netns()?, "0.0.0.0:8080")?;
        let program = first::build(machine.directory(), "first", format!("{GATEWAY}:8080").parse()?)?;
        agent.policy("web.yaml", &web("closed", ""))?;
        agent.run()?;
        agent.until_status("containerd", source_is("up"))?;
        let spec = |name, labels| PodSpec {
            name,
            labels,
            runtime: WRAPPED,
            program: Some(&program),
            ..PodSpec::default()
        };
        // An init container, to its end; then the application.
        let pod = pods.run(&spec("web-1", &[("app", "web")]))?;
        for (number, name) in ["init", "app"].into_iter().enumerate() {
            let container = pod.run(name, &[PROGRAM])?;
            assert_eq!(pod.exit_code(&container)?, first::exit::ANSWERED, "{name}");
            assert_eq!(agent.counter("outboundRedirected")?, number as u64 + 1, "{name}");
            assert_eq!(echo.peers().len(), number + 1, "{name}");
            assert_eq!(agent.workload(&workload(&container))?, None, "{name} is a part of its pod");
        }
        let known = agent.workload(&pod.id())?.context("the pod is a workload")?;
        for (field, wanted) in [("verdict", "attached"), ("firstInstruction", "before"), ("gate", "wrapper")]
        {
            assert_eq!(known[field], wanted, "{known}");
        }
        let subject = &known["subject"];
        assert_eq!((&subject["name"], &subject["namespace"]), (&"web-1".into(), &"shop".into()));

        // Of the same runtime class, and no policy selects it.
        let other = pods.run(&spec("other", &[]))?;
        let container = other.run("app", &[PROGRAM])?;
        assert_eq!(other.exit_code(&container)?, first::exit::ANSWERED);
        assert_eq!((agent.counter("outboundRedirected")?, echo.peers().len()), (2, 3));

        // Without an agent the policies of before decide.
        agent.stop(Signal::SIGTERM)?;
        let refused = pods.run(&spec("refused", &[("app", "web")]))?;
        let error = refused.run("app", &[PROGRAM]).map(drop).expect_err("a closed policy refuses it");
        let error = format!("{error:#}");
        ensure!(error.contains("pillion") && error.contains("web"), "{error}");
        let open = pods.run(&spec("unselected", &[]))?;
        let container = open.run("app", &[PROGRAM])?;
        assert_eq!((open.exit_code(&container)?, echo.peers().len()), (first::exit::ANSWERED, 4));

        for pod in [pod, other, refused, open] {
            pod.delete()?;
        }
        agent.end()?;
        drop((echo, pods));
        lab.down()
    })
}
