//! Pods on real containerd 1.7 and 2.x, held by its NRI: what becomes of their very first connections, of pods whose
//! companions fail or hang, and of everything when agent or containerd go away meanwhile.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use pillion_tests::{
    Agent, EchoServer, Lab, Machine, Pod, PodSpec, Pods, on_machine,
    pods::{GATEWAY, workload},
    scene::KIND,
    wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
/// containerd's own timeout for a plug-in's answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
const WEB: &[(&str, &str)] = &[("app", "web")];
const SLEEP: &[&str] = &["sleep", "1000"];

/// A containerd, an agent that does not run yet, and a listener that every pod reaches.
struct Stage {
    // In this order they are dropped.
    agent: Agent,
    echo: EchoServer,
    pods: Pods,
    lab: Lab,
}

impl Stage {
    fn new(machine: &Machine, version: &'static str) -> Result<Self> {
        let lab = Lab::up("containerd", Some(version), &[])?;
        let pods = Pods::of(&lab)?;
        let echo = EchoServer::start(&pods.netns()?, "0.0.0.0:8080")?;
        let agent = Agent::beside(machine, lab.value("CONTAINERD_ADDRESS")?, lab.value("NRI_SOCKET")?)?;
        Ok(Self { agent, echo, pods, lab })
    }

    /// The same, and the agent runs and is registered.
    fn with_agent(machine: &Machine, version: &'static str, policies: &[(&str, String)]) -> Result<Self> {
        let mut stage = Self::new(machine, version)?;
        for (name, policy) in policies {
            stage.agent.policy(name, policy)?;
        }
        stage.agent.run()?;
        stage.until_registered()?;
        Ok(stage)
    }

    fn until_registered(&self) -> Result<()> {
        self.agent.until_status("a registered gate", |status| source(status, "nri") == "up")?;
        self.agent.until_status("containerd", |status| source(status, "containerd") == "up").map(drop)
    }

    /// How many connections the relay of a workload has recorded, to a port of the listener's namespace.
    fn recorded(&self, workload: &str) -> Result<usize> {
        let records = self.agent.records()?;
        Ok(records.iter().filter(|record| record["workload"] == workload).count())
    }

    fn until_recorded(&self, workload: &str, count: usize) -> Result<()> {
        let found = wait_until("records of the first connections", SOON, || {
            self.recorded(workload).is_ok_and(|recorded| recorded >= count)
        });
        found.with_context(|| format!("{workload} has {:?} of {count}", self.recorded(workload)))
    }

    fn end(self) -> Result<()> {
        let Self { agent, echo, pods, lab } = self;
        agent.end()?;
        drop((echo, pods));
        lab.down()
    }
}

/// Waits until the gate holds a container at its start.
fn until_held(agent: &Agent, container: &str) -> Result<()> {
    wait_until("a container that is held", SOON, || {
        let told = |line: &str| line.contains("held before its start") && line.contains(container);
        agent.log().is_ok_and(|log| log.lines().any(told))
    })
}

fn source<'a>(status: &'a Value, name: &str) -> &'a str {
    let sources = status["sources"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = sources.iter().find(|source| source["name"] == name);
    found.and_then(|source| source["state"].as_str()).unwrap_or("absent")
}

/// Its first instruction connects; it ends when it has heard the end of the answer.
fn connect() -> [&'static str; 4] {
    ["/bin/nc", GATEWAY, "8080", "-w5"]
}

fn policy(name: &str, app: &str, companion: &str, port: &str, on_failure: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: {name} }}\nspec:\n  \
         select: {{ runtimes: [containerd], namespaces: [shop], labels: {{ app: {app} }} }}\n  \
         companions: [{companion}]\n  redirect: {{ outbound: [{{ to: \"r{port}\" }}] }}\n  onFailure: {on_failure}\n"
    )
}

/// A relay; connections that were missed would not be refused, but lack a record.
fn relay() -> (&'static str, String) {
    ("web.yaml", policy("web", "web", "{ name: r, builtin: relay, stopGrace: 1s }", "", "open"))
}

fn until_gone(path: &Path) -> Result<()> {
    wait_until(&format!("the end of {}", path.display()), SOON, || !path.exists())
}

fn first_connections(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, version, &[relay()])?;
        let pod = stage.pods.run(&PodSpec { name: "web-1", labels: WEB, ..PodSpec::default() })?;
        // An init container, to its end; then the application.
        let init = pod.run("init", &connect())?;
        assert_eq!(pod.exit_code(&init)?, 0);
        stage.until_recorded(&pod.id(), 1)?;
        let app = pod.run("app", &connect())?;
        assert_eq!(pod.exit_code(&app)?, 0);
        stage.until_recorded(&pod.id(), 2)?;

        let known = stage.agent.workload(&pod.id())?.context("the pod is a workload")?;
        assert_eq!(known["verdict"], "attached", "{known}");
        assert_eq!(known["firstInstruction"], "before", "{known}");
        assert_eq!(known["gate"], "nri", "{known}");
        let subject = &known["subject"];
        assert_eq!((&subject["name"], &subject["namespace"]), (&"web-1".into(), &"shop".into()));
        assert_eq!(subject["labels"]["app"], "web");
        assert_eq!(subject["labels"]["io.kubernetes.pod.name"], "web-1");
        assert_eq!(subject["annotations"]["example.org/team"], "a");
        // What the gate told and what containerd's source told are one workload: nothing was seen to change.
        let events = known["events"].as_array().context("events")?;
        let kinds: Vec<_> = events.iter().filter_map(|event| event["kind"].as_str()).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == "attached").count(), 1, "{kinds:?}");
        for container in [&init, &app] {
            assert_eq!(stage.agent.workload(&workload(container))?, None, "a part of its pod");
        }

        let host = PodSpec { name: "host", labels: WEB, host_network: true, ..PodSpec::default() };
        let privileged = PodSpec { name: "privileged", privileged: true, ..host };
        let mut close_to_the_host = Vec::new();
        for spec in
            [host, privileged, PodSpec { name: "privileged-alone", host_network: false, ..privileged }]
        {
            let pod = stage.pods.run(&spec)?;
            let container = pod.run("app", &connect())?;
            assert_eq!(pod.exit_code(&container)?, 0, "{}", spec.name);
            stage.until_recorded(&pod.id(), 1)?;
            let known = stage.agent.workload(&pod.id())?.context("the pod is a workload")?;
            assert_eq!((&known["verdict"], &known["gate"]), (&"attached".into(), &"nri".into()), "{known}");
            assert_eq!(known["firstInstruction"], "before", "{known}");
            close_to_the_host.push(pod);
        }

        // Without a cgroup of its own a pod is no workload, but its containers are, each for itself.
        let shared = stage.pods.run(&PodSpec {
            name: "shared",
            labels: WEB,
            shared_cgroup: true,
            ..PodSpec::default()
        })?;
        let one = shared.run("one", &connect())?;
        assert_eq!(shared.exit_code(&one)?, 0);
        stage.until_recorded(&workload(&one), 1)?;
        assert_eq!(stage.agent.workload(&shared.id())?, None);

        // What is not CRI's is not held: NRI does not tell of it.
        let plain = [
            "ctr",
            "run",
            "-d",
            "--snapshotter",
            "native",
            "localhost/busybox:1",
            "plain",
            "/bin/sleep",
            "1000",
        ];
        stage.lab.run(&plain)?.success()?;
        let known = stage.agent.until("containerd/default/plain", "known", |_| true)?;
        assert_eq!(known["gate"], Value::Null, "{known}");
        stage.lab.run(&["ctr", "task", "rm", "-f", "plain"])?.success()?;
        stage.lab.run(&["ctr", "container", "rm", "plain"])?.success()?;

        // Whom no policy selects has nothing to do with it.
        let other = stage.pods.run(&PodSpec { name: "other", ..PodSpec::default() })?;
        let container = other.run("app", &connect())?;
        assert_eq!(other.exit_code(&container)?, 0);
        assert_eq!(stage.recorded(&other.id())?, 0);

        let cgroup = known["instance"]["cgroup"]["path"].as_str().context("a path")?.to_owned();
        let mut ids = vec![pod.id(), other.id()];
        ids.extend(close_to_the_host.iter().map(Pod::id));
        for pod in [pod, shared, other].into_iter().chain(close_to_the_host) {
            pod.delete()?;
        }
        for id in ids {
            stage.agent.until_forgotten(&id)?;
        }
        stage.end()?;
        until_gone(Path::new(&cgroup))
    })
}

#[test]
fn init_containers_and_applications_are_captured_from_their_first_instruction_by_containerd_1_7() -> Result<()>
{
    first_connections("trixie")
}

#[test]
fn init_containers_and_applications_are_captured_from_their_first_instruction_by_containerd_2() -> Result<()>
{
    first_connections("sid")
}

#[test]
fn a_container_of_the_pod_is_its_companion() -> Result<()> {
    on_machine(|machine| {
        let mesh = policy("web", "web", "{ name: r, external: { container: mesh } }", ":15001", "closed");
        let stage = Stage::with_agent(machine, "sid", &[("web.yaml", mesh)])?;
        let pod = stage.pods.run(&PodSpec { name: "web-1", labels: WEB, ..PodSpec::default() })?;
        // One with another name is not the companion. It could not start if the companion were waited for.
        let other = ["/bin/nc", "-ll", "-p", "15001", "-e", "/bin/cat"];
        let other = pod.run("other", &other)?;
        let told = stage.agent.until(&pod.id(), "a stranger", |it| {
            it["reason"].as_str().is_some_and(|reason| reason.contains("it is in no container named mesh"))
        })?;
        ensure!(told["verdict"] == "degraded", "{told}");
        let ask = format!("echo hello | /bin/nc -w5 {GATEWAY} 8080 | grep hello");
        let ask = ["/bin/sh", "-c", &ask];
        let refused = pod.run("refused", &ask)?;
        ensure!(pod.exit_code(&refused)? != 0, "nothing is to pass");
        pod.kill(&other)?;

        let answer = ["/bin/nc", "-ll", "-p", "15001", "-e", "/bin/cat"];
        pod.run("mesh", &answer)?;
        let attached = stage.agent.until_verdict(&pod.id(), "attached")?;
        ensure!(attached["companions"][0]["external"] == true, "{attached}");
        let app = pod.run("app", &ask)?;
        assert_eq!(pod.exit_code(&app)?, 0);
        ensure!(stage.echo.peers().is_empty(), "the companion has answered, not {:?}", stage.echo.peers());
        let id = pod.id();
        pod.delete()?;
        stage.agent.until_forgotten(&id)?;
        stage.end()
    })
}

/// A companion that ends at once, and one that is never ready, under both failure modes.
fn failing_policies() -> Vec<(&'static str, String)> {
    let ready = "ready: { tcp: { port: 15001 }, timeout: 60s }";
    let failing = format!("{{ name: r, exec: {{ command: [/bin/false] }}, {ready} }}");
    let hanging = format!("{{ name: r, exec: {{ command: [/bin/sleep, \"1000\"] }}, {ready} }}");
    vec![
        ("a.yaml", policy("failing-open", "failing-open", &failing, ":15001", "open")),
        ("b.yaml", policy("failing-closed", "failing-closed", &failing, ":15001", "closed")),
        ("c.yaml", policy("hanging-open", "hanging-open", &hanging, ":15001", "open")),
        ("d.yaml", policy("hanging-closed", "hanging-closed", &hanging, ":15001", "closed")),
    ]
}

fn failures(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, version, &failing_policies())?;
        for app in ["failing-open", "failing-closed", "hanging-open", "hanging-closed"] {
            let pod =
                stage.pods.run(&PodSpec { name: app, labels: &[("app", app)], ..PodSpec::default() })?;
            let container = pod.create("app", &connect())?;
            let begun = Instant::now();
            let started = pod.start(&container);
            let took = begun.elapsed();
            ensure!(took < REQUEST_TIMEOUT, "{app}: an answer after {took:?} comes too late");
            match (app.ends_with("open"), started) {
                (true, Ok(())) => {
                    assert_eq!(pod.exit_code(&container)?, 0, "{app}: it goes on as if nothing were");
                }
                (false, Err(error)) => {
                    let error = error.to_string();
                    ensure!(error.contains("pillion") && error.contains(app), "{app}: {error}");
                }
                (_, started) => anyhow::bail!("{app}: {started:?}"),
            }
            let known = stage.agent.workload(&pod.id())?.context("the pod is a workload")?;
            assert_eq!(known["gate"], "nri", "{known}");
            if app.ends_with("closed") {
                assert_eq!(known["verdict"], "refused", "{known}");
            }
            pod.delete()?;
        }
        // The gate is still there: no hold was too late.
        assert_eq!(source(&stage.agent.status()?, "nri"), "up");

        // While one is held, another is started.
        let held = stage.pods.run(&PodSpec {
            name: "held",
            labels: &[("app", "hanging-open")],
            ..PodSpec::default()
        })?;
        let other = stage.pods.run(&PodSpec { name: "other", ..PodSpec::default() })?;
        let (one, two) = (held.create("app", SLEEP)?, other.create("app", SLEEP)?);
        thread::scope(|scope| -> Result<()> {
            let starting = scope.spawn(|| held.start(&one));
            until_held(&stage.agent, &one)?;
            other.start(&two)?;
            starting.join().expect("no panic")
        })?;
        held.delete()?;
        other.delete()?;

        // A pod that is deleted while a container of it is held.
        let pod = stage.pods.run(&PodSpec {
            name: "deleted",
            labels: &[("app", "hanging-closed")],
            ..PodSpec::default()
        })?;
        let container = pod.create("app", SLEEP)?;
        let id = pod.id();
        thread::scope(|scope| -> Result<()> {
            let starting = scope.spawn(|| pod.start(&container));
            until_held(&stage.agent, &container)?;
            pod.stop()?;
            let started = starting.join().expect("no panic");
            ensure!(started.is_err(), "it was not started");
            Ok(())
        })?;
        pod.delete()?;
        stage.agent.until_forgotten(&id)?;
        stage.end()
    })
}

#[test]
fn a_pod_whose_companions_fail_or_hang_is_answered_in_time_as_its_policy_says_by_containerd_1_7() -> Result<()>
{
    failures("trixie")
}

#[test]
fn a_pod_whose_companions_fail_or_hang_is_answered_in_time_as_its_policy_says_by_containerd_2() -> Result<()>
{
    failures("sid")
}

fn interruptions(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine, version)?;
        stage.agent.policy("web.yaml", &relay().1)?;
        for (name, policy) in failing_policies() {
            stage.agent.policy(name, &policy)?;
        }
        // Without an agent containerd starts what it is told to; the agent finds it and says that it came late.
        let early = stage.pods.run(&PodSpec { name: "early", labels: WEB, ..PodSpec::default() })?;
        early.run("app", SLEEP)?;
        stage.agent.run()?;
        stage.until_registered()?;
        let known = stage.agent.until_verdict(&early.id(), "attached")?;
        assert_eq!(known["firstInstruction"], "after", "{known}");

        // Told to end while it holds: what it holds is answered as its policy says.
        for (app, runs) in [("hanging-closed", false), ("hanging-open", true)] {
            let pod =
                stage.pods.run(&PodSpec { name: app, labels: &[("app", app)], ..PodSpec::default() })?;
            let container = pod.create("app", SLEEP)?;
            let started = thread::scope(|scope| -> Result<_> {
                let starting = scope.spawn(|| pod.start(&container));
                until_held(&stage.agent, &container)?;
                stage.agent.stop(Signal::SIGTERM)?;
                Ok(starting.join().expect("no panic"))
            })?;
            match (runs, started) {
                (true, Ok(())) => {}
                (false, Err(error)) => ensure!(error.to_string().contains("the agent ends"), "{error}"),
                (_, started) => anyhow::bail!("{app}: {started:?}"),
            }
            pod.delete()?;
            stage.agent.run()?;
            stage.until_registered()?;
        }

        // Killed while it holds: containerd goes on, as with any plug-in that is gone.
        let held = stage.pods.run(&PodSpec {
            name: "held",
            labels: &[("app", "hanging-closed")],
            ..PodSpec::default()
        })?;
        let container = held.create("app", SLEEP)?;
        thread::scope(|scope| -> Result<()> {
            let starting = scope.spawn(|| held.start(&container));
            until_held(&stage.agent, &container)?;
            stage.agent.stop(Signal::SIGKILL)?;
            starting.join().expect("no panic").context("containerd does not wait for the dead")
        })?;
        let absent = stage.pods.run(&PodSpec { name: "absent", labels: WEB, ..PodSpec::default() })?;
        absent.run("app", SLEEP)?;

        // Started again, it adopts, registers, holds, and knows what it has missed.
        stage.agent.run()?;
        stage.until_registered()?;
        stage.agent.until_verdict(&early.id(), "attached")?;
        let known = stage.agent.until_verdict(&absent.id(), "attached")?;
        assert_eq!(known["firstInstruction"], "after", "{known}");
        captured(&stage, "again")?;

        // containerd is killed beneath its pods, and comes back.
        stage.pods.restart()?;
        stage.until_registered()?;
        captured(&stage, "after-restart")?;
        stage.agent.until_verdict(&early.id(), "attached")?;
        for pod in [early, held, absent] {
            pod.delete()?;
        }
        stage.end()
    })
}

/// A new pod is held, and its first connection captured.
fn captured(stage: &Stage, name: &str) -> Result<()> {
    let pod = stage.pods.run(&PodSpec { name, labels: WEB, ..PodSpec::default() })?;
    let container = pod.run("app", &connect())?;
    assert_eq!(pod.exit_code(&container)?, 0);
    stage.until_recorded(&pod.id(), 1)?;
    let known = stage.agent.workload(&pod.id())?.context("the pod is a workload")?;
    assert_eq!((&known["firstInstruction"], &known["gate"]), (&"before".into(), &"nri".into()), "{known}");
    pod.delete()
}

#[test]
fn pods_outlive_the_ends_of_agent_and_containerd_and_new_ones_are_held_again_by_containerd_1_7() -> Result<()>
{
    interruptions("trixie")
}

#[test]
fn pods_outlive_the_ends_of_agent_and_containerd_and_new_ones_are_held_again_by_containerd_2() -> Result<()> {
    interruptions("sid")
}

/// As many at once as a drained node's pods come to another.
const MANY: usize = 50;
/// Of those, so many are in the making at a time, as a kubelet does it.
const AT_ONCE: usize = 10;

fn many(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::with_agent(machine, version, &[relay()])?;
        let numbers: Vec<usize> = (0..MANY).collect();
        thread::scope(|scope| -> Result<()> {
            let workers: Vec<_> = numbers
                .chunks(MANY / AT_ONCE)
                .map(|numbers| {
                    scope.spawn(|| numbers.iter().try_for_each(|number| one_of_many(&stage, *number)))
                })
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
        })?;
        assert_eq!(source(&stage.agent.status()?, "nri"), "up");
        ensure!(stage.echo.peers().len() == MANY, "{} connections", stage.echo.peers().len());
        stage.end()
    })
}

fn one_of_many(stage: &Stage, number: usize) -> Result<()> {
    let name = format!("pod-{number}");
    let pod: Pod<'_> = stage.pods.run(&PodSpec { name: &name, labels: WEB, ..PodSpec::default() })?;
    let container = pod.run("app", &connect())?;
    assert_eq!(pod.exit_code(&container)?, 0);
    stage.until_recorded(&pod.id(), 1)?;
    pod.delete()
}

#[test]
fn fifty_pods_at_once_are_all_captured_by_containerd_1_7() -> Result<()> {
    many("trixie")
}

#[test]
fn fifty_pods_at_once_are_all_captured_by_containerd_2() -> Result<()> {
    many("sid")
}

/// Nobody tells the agent which workload a container is whose pod has no cgroup of its own.
fn unanswered(version: &'static str) -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine, version)?;
        let nowhere = machine.directory().join("no-containerd.sock");
        let nowhere = nowhere.to_str().context("UTF-8")?;
        stage.agent = Agent::beside(machine, nowhere, stage.lab.value("NRI_SOCKET")?)?;
        for app in ["open", "closed"] {
            let relay = "{ name: r, builtin: relay, stopGrace: 1s }";
            stage.agent.policy(&format!("{app}.yaml"), &policy(app, app, relay, "", app))?;
        }
        stage.agent.run()?;
        stage.agent.until_status("a registered gate", |status| source(status, "nri") == "up")?;
        stage.agent.until_status("policies", |status| status["policies"]["generation"] != 0)?;
        for (app, kind) in [("open", Some("admittedOpen")), ("closed", Some("refused")), ("other", None)] {
            let labels = [("app", app)];
            let spec = PodSpec { name: app, labels: &labels, shared_cgroup: true, ..PodSpec::default() };
            let pod = stage.pods.run(&spec)?;
            let container = pod.create("app", &connect())?;
            let begun = Instant::now();
            let started = pod.start(&container);
            let took = begun.elapsed();
            ensure!(took < REQUEST_TIMEOUT, "{app}: an answer after {took:?} comes too late");
            match (app, started) {
                ("closed", Err(error)) => {
                    let error = error.to_string();
                    for word in ["pillion: ", "policy closed", &container, "containerd did not tell in time"]
                    {
                        ensure!(error.contains(word), "no {word:?} in: {error}");
                    }
                }
                ("open" | "other", Ok(())) => assert_eq!(pod.exit_code(&container)?, 0, "{app}"),
                (_, started) => anyhow::bail!("{app}: {started:?}"),
            }
            let events = stage.agent.cli(&["events", "-o", "json"])?.success()?.stdout;
            let told = events.lines().filter(|line| line.contains(&container));
            let told: Vec<Value> = told.map(serde_json::from_str).collect::<Result<_, _>>()?;
            let kinds: Vec<&str> = told.iter().filter_map(|event| event["kind"].as_str()).collect();
            assert_eq!(kinds, kind.into_iter().collect::<Vec<_>>(), "{app}: {events}");
            assert!(told.iter().all(|event| event["gate"] == "nri" && event["policy"] == app), "{told:?}");
            pod.delete()?;
        }
        // The gate is still there: no answer was too late.
        assert_eq!(source(&stage.agent.status()?, "nri"), "up");
        stage.end()
    })
}

#[test]
fn a_container_that_cannot_be_identified_is_refused_where_a_closed_policy_may_select_it_by_containerd_1_7()
-> Result<()> {
    unanswered("trixie")
}

#[test]
fn a_container_that_cannot_be_identified_is_refused_where_a_closed_policy_may_select_it_by_containerd_2()
-> Result<()> {
    unanswered("sid")
}
