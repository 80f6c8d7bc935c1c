//! The agent by itself: its start and end, its answers, its policies, and what it costs when there is nothing to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use pillion_tests::{
    Agent, ProcessGuard, on_machine, programs,
    scene::{Scene, id, web},
    wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

fn generation(wanted: u64) -> impl Fn(&Value) -> bool {
    move |status| status["policies"]["generation"] == wanted
}

fn names(status: &Value) -> Vec<&str> {
    let policies = status["policies"]["policies"].as_array().into_iter().flatten();
    policies.filter_map(|policy| policy["name"].as_str()).collect()
}

/// The policy of the scene under another name, for containers of that label.
fn policy(name: &str) -> String {
    web("open", "").replace("web", name)
}

fn yaml(text: &str) -> Result<Value> {
    serde_saphyr::from_str(text).with_context(|| format!("not YAML: {text}"))
}

fn mode(path: &Path) -> Result<u32> {
    Ok(fs::metadata(path).with_context(|| path.display().to_string())?.mode() & 0o7777)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

#[test]
fn it_starts_answers_and_ends() -> Result<()> {
    on_machine(|machine| {
        let mut agent = Agent::new(machine, None)?;
        let absent = agent.cli(&["status"])?.code(4)?;
        ensure!(absent.stderr.contains("no agent runs here"), "{}", absent.stderr);
        ensure!(absent.stdout.is_empty());
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
            agent.run()?;
            let status = agent.status()?;
            assert_eq!(status["health"], "ok");
            assert_eq!(status["pid"], agent.process()?.pid());
            assert_eq!(status["problems"], Value::Array(vec![]));
            assert_eq!(status["policies"]["directory"], agent.policy_dir().display().to_string());
            let table = agent.cli(&["status"])?.success()?;
            ensure!(table.stdout.starts_with("Health"), "{}", table.stdout);
            assert_eq!(table.stderr, "", "data goes to stdout alone");
            // Uptime is in the table only.
            assert_eq!(yaml(&agent.cli(&["status", "-o", "yaml"])?.success()?.stdout)?, status);
            let list = agent.cli(&["list", "-o", "json"])?.success()?;
            assert_eq!(serde_json::from_str::<Value>(&list.stdout)?["workloads"], Value::Array(vec![]));
            assert_eq!(agent.cli(&["list", "-o", "name"])?.success()?.stdout, "");
            agent.cli(&["describe", "containerd/default/nobody"])?.code(1)?;
            agent.cli(&["describe", "no id"])?.code(2)?;
            agent.cli(&["status", "-o", "xml"])?.code(2)?;
            let versions = agent.json(&["version"])?;
            assert_eq!(versions["agent"], versions["client"]);

            let mut follower = ProcessGuard::spawn(
                "pillion events",
                &mut agent.cli_command(&["events", "-f", "-o", "json"])?,
            )?;
            follower.stdout_line(SOON, |line| line.contains("agentStarted"))?;
            agent.stop(signal)?;
            assert_eq!(follower.exit(SOON)?.code(), Some(4), "a follower whose agent has ended");
            let left = agent.run_dir().join("admin.sock").exists();
            assert_eq!(left, signal == Signal::SIGKILL, "the admin socket after {signal}");
            let absent = agent.cli(&["list"])?.code(4)?;
            let told = if left { "has died" } else { "no agent runs here" };
            ensure!(absent.stderr.contains(told), "{}", absent.stderr);
        }
        agent.end()
    })
}

#[test]
fn workloads_and_events_in_every_format() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let agent = &scene.agent;
        let mut follower =
            ProcessGuard::spawn("pillion events", &mut agent.cli_command(&["events", "-f", "-o", "name"])?)?;
        let puppets = [scene.web("shown")?, scene.puppet("other", &[])?];
        agent.until_verdict(&id("other"), "notMatched")?;
        follower.stdout_line(SOON, |line| line == id("shown"))?;
        drop(follower);

        let listed = agent.json(&["list"])?;
        let workloads = listed["workloads"].as_array().context("workloads")?;
        let verdicts: Vec<_> =
            workloads.iter().map(|it| (it["id"].as_str(), it["verdict"].as_str())).collect();
        let (shown, other) = (id("shown"), id("other"));
        assert_eq!(verdicts, [(Some(&*other), Some("notMatched")), (Some(&*shown), Some("attached"))]);
        assert_eq!(yaml(&agent.cli(&["list", "-o", "yaml"])?.success()?.stdout)?, listed);
        assert_eq!(agent.cli(&["list", "-o", "name"])?.success()?.stdout, format!("{other}\n{shown}\n"));
        for (format, head) in [("table", "WORKLOAD"), ("wide", "WORKLOAD")] {
            let table = agent.cli(&["list", "-o", format])?.success()?.stdout;
            let lines: Vec<&str> = table.lines().collect();
            ensure!(lines.len() == 3 && lines[0].starts_with(head), "{table}");
            ensure!(lines[2].starts_with(&shown) && lines[2].contains("attached"), "{table}");
        }

        let described = agent.json(&["describe", &shown])?;
        assert_eq!(described["companions"][0]["state"], "ready");
        assert_eq!(described["subject"]["labels"]["app"], "web");
        assert_eq!(described["subject"]["image"], "localhost/pillion-test:1");
        assert_eq!(yaml(&agent.cli(&["describe", &shown, "-o", "yaml"])?.success()?.stdout)?, described);
        assert_eq!(agent.cli(&["describe", &shown, "-o", "name"])?.success()?.stdout, format!("{shown}\n"));
        let text = agent.cli(&["describe", &shown])?.success()?.stdout;
        for part in [&*shown, "app=web", "relay", "15001", "redirection is in force"] {
            ensure!(text.contains(part), "no {part} in {text}");
        }

        let events = agent.cli(&["events", "-o", "json"])?.success()?.stdout;
        let events: Vec<Value> = events.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let numbers: Vec<_> = events.iter().filter_map(|event| event["sequence"].as_u64()).collect();
        assert_eq!(numbers, (1..=u64::try_from(events.len())?).collect::<Vec<_>>(), "a gap");
        let of_shown: Vec<_> = events
            .iter()
            .filter(|event| event["workload"] == *shown)
            .filter_map(|event| event["kind"].as_str())
            .collect();
        let steps: Vec<_> = of_shown.iter().filter(|kind| **kind != "companionReady").collect();
        assert_eq!(steps, [&"attaching", &"attached"]);
        let table = agent.cli(&["events"])?.success()?.stdout;
        assert_eq!(table.lines().count(), events.len(), "{table}");
        let documents = agent.cli(&["events", "-o", "yaml"])?.success()?.stdout;
        assert_eq!(documents.lines().filter(|line| *line == "---").count(), events.len());

        let explained = agent.cli(&["explain", &other, "-o", "json"])?.success()?;
        assert_eq!(serde_json::from_str::<Value>(&explained.stdout)?["plan"], Value::Null);
        drop(puppets);
        agent.until_forgotten(&shown)?;
        agent.until_forgotten(&other)?;
        scene.end()
    })
}

#[test]
fn two_agents_do_not_share_anything() -> Result<()> {
    on_machine(|machine| {
        let mut first = Agent::start(machine, None)?;
        let mut second = Agent::new(machine, None)?;
        let pid = first.process()?.pid();
        let refused = |command: &mut Command, told: &[&str]| {
            let done = ProcessGuard::finish("the second agent", command, SOON)?.code(1)?;
            for part in told {
                ensure!(done.stderr.contains(part), "no {part:?} in {}", done.stderr);
            }
            Ok(())
        };
        let holder = format!("pid {pid}");
        refused(&mut first.command()?, &["another agent runs", &holder])?;
        // One of the things that they would fight over is enough.
        for (flag, path, held) in [
            ("--run-dir", first.run_dir(), first.run_dir().join("agent.lock")),
            ("--state-dir", first.state_dir(), first.state_dir()),
            ("--pin-root", first.pin_root().to_owned(), first.pin_root().to_owned()),
        ] {
            // A flag is given once only.
            let arguments: Vec<_> = second.command()?.get_args().map(std::ffi::OsStr::to_owned).collect();
            let place = arguments.iter().position(|argument| *argument == *flag).context("the flag")?;
            let mut command = Command::new(programs::pillion()?);
            command.args(&arguments[..=place]).arg(&path).args(&arguments[place + 2..]);
            refused(&mut command, &["another agent", &held.display().to_string()])
                .with_context(|| format!("a second agent with the first one's {flag}"))?;
        }
        assert_eq!(first.status()?["pid"], pid, "the first goes on");
        // With nothing in common they live side by side.
        second.run()?;
        ensure!(second.status()?["pid"] != pid);
        assert_eq!(first.status()?["health"], "ok");
        second.end()?;
        assert_eq!(first.status()?["health"], "ok");
        // The lock goes with its holder, however that ends.
        first.stop(Signal::SIGKILL)?;
        first.run()?;
        first.end()
    })
}

#[test]
fn policies_are_reloaded_when_files_change_and_on_sighup() -> Result<()> {
    on_machine(|machine| {
        let mut agent = Agent::start(machine, None)?;
        agent.until_status("no policies", generation(1))?;
        let file = agent.policy("a.yaml", &policy("a"))?;
        let status = agent.until_status("a", generation(2))?;
        assert_eq!(names(&status), ["a"]);
        // Written in place, as an editor may do.
        fs::write(&file, policy("b"))?;
        assert_eq!(names(&agent.until_status("b", generation(3))?), ["b"]);
        // What is not a policy file is not read.
        fs::write(agent.policy_dir().join("notes.txt"), "nonsense")?;
        fs::write(agent.policy_dir().join(".hidden.yaml"), "nonsense")?;
        // Behind a link to elsewhere nobody watches: that is what SIGHUP is for.
        let elsewhere = machine.file("elsewhere.yaml", &policy("c"))?;
        symlink(&elsewhere, agent.policy_dir().join("linked.yaml"))?;
        assert_eq!(names(&agent.until_status("b and c", generation(4))?), ["b", "c"]);
        fs::write(&elsewhere, policy("d"))?;
        agent.process()?.signal(Signal::SIGHUP)?;
        assert_eq!(names(&agent.until_status("b and d", generation(5))?), ["b", "d"]);
        // Loaded again without a change: nothing happens.
        let reloads = metric(&agent, "pillion_policy_reloads_total")?;
        agent.process()?.signal(Signal::SIGHUP)?;
        wait_until("a reload", SOON, || {
            metric(&agent, "pillion_policy_reloads_total").is_ok_and(|now| now > reloads)
        })?;
        assert_eq!(agent.status()?["policies"]["generation"], 5);
        for name in ["a.yaml", "linked.yaml"] {
            fs::remove_file(agent.policy_dir().join(name))?;
        }
        agent.until_status("no policies", |status| names(status).is_empty())?;
        // The whole directory is replaced, as a deployment does, and watched again.
        let aside = machine.directory().join("aside");
        fs::rename(agent.policy_dir(), &aside)?;
        fs::create_dir(agent.policy_dir())?;
        set_mode(&agent.policy_dir(), 0o755)?;
        agent.process()?.signal(Signal::SIGHUP)?;
        agent.until_status("an empty directory", |status| status["policies"]["refused"].is_null())?;
        agent.policy("e.yaml", &policy("e"))?;
        agent.until_status("e", |status| names(status) == ["e"])?;
        agent.end()
    })
}

#[test]
fn a_bad_file_keeps_the_last_good_policies_and_is_told() -> Result<()> {
    on_machine(|machine| {
        let mut agent = Agent::new(machine, None)?;
        // From the beginning: it is up, it is not ready, and it says why.
        agent.policy("bad.yaml", "kind: Nonsense\n")?;
        agent.spawn()?;
        agent.until_status("a refusal", |status| !status["policies"]["refused"].is_null())?;
        assert_eq!((agent.get("/livez")?.0, agent.get("/readyz")?.0), (200, 503));
        let told = agent.cli(&["status"])?.code(5)?;
        ensure!(
            told.stdout.contains("bad.yaml") && told.stdout.contains("none are in force"),
            "{}",
            told.stdout
        );
        agent.policy("bad.yaml", &policy("good"))?;
        agent.until_status("good", generation(1))?;
        assert_eq!(agent.get("/readyz")?.0, 200);
        agent.cli(&["status"])?.success()?;

        for (bad, line) in [
            (policy("good").replace("onFailure: open", "onFailure: maybe"), "bad.yaml:8"),
            (policy("good") + "surprise: 1\n", "bad.yaml:9"),
            (policy("good").replace("to: relay", "to: nobody"), "bad.yaml:7"),
            ("{ not yaml".to_owned(), "bad.yaml:1"),
        ] {
            agent.policy("bad.yaml", &bad)?;
            let status = agent.until_status(line, |status| {
                status["policies"]["refused"]["message"].as_str().is_some_and(|text| text.contains(line))
            })?;
            assert_eq!((names(&status), &status["policies"]["generation"]), (vec!["good"], &1.into()));
            assert_eq!(status["health"], "degraded");
            let told = agent.cli(&["status"])?.code(5)?;
            ensure!(told.stdout.contains(line), "no {line} in {}", told.stdout);
            assert_eq!(agent.get("/readyz")?.0, 200, "those of before are in force");
        }
        let events = agent.cli(&["events", "-o", "json"])?.success()?.stdout;
        ensure!(events.contains("policyRefused"), "{events}");
        let log = agent.log()?;
        let warned = log.lines().any(|line| line.contains("\"WARN\"") && line.contains("were refused"));
        ensure!(warned, "a refusal is not a warning in {log}");
        ensure!(metric(&agent, "pillion_policy_reload_failures_total")? >= 5.0);
        // Two files, each of them good, that contradict each other.
        agent.policy("bad.yaml", &policy("good"))?;
        agent.until_status("good", |status| status["policies"]["refused"].is_null())?;
        agent.policy("twin.yaml", &policy("good"))?;
        let status = agent.until_status("twins", |status| !status["policies"]["refused"].is_null())?;
        let message = status["policies"]["refused"]["message"].as_str().context("a message")?;
        ensure!(message.contains("twin.yaml"), "{message}");
        fs::remove_file(agent.policy_dir().join("twin.yaml"))?;
        agent.until_status("good", |status| status["health"] == "ok")?;
        agent.cli(&["status"])?.success()?;
        agent.end()
    })
}

#[test]
fn files_that_others_may_write_are_refused_by_name() -> Result<()> {
    on_machine(|machine| {
        let agent = Agent::start(machine, None)?;
        let file = agent.policy("mine.yaml", &policy("mine"))?;
        agent.until_status("mine", |status| names(status) == ["mine"])?;
        let directory = agent.policy_dir();
        for (path, bad, good) in [
            (&file, 0o664, 0o644),
            (&file, 0o646, 0o600),
            (&directory, 0o775, 0o755),
            (&directory, 0o757, 0o755),
        ] {
            set_mode(path, bad)?;
            let told = format!("{}: may be written by others (mode {bad:04o})", path.display());
            refused(&agent, &told)?;
            set_mode(path, good)?;
            agent.until_status("trust", |status| status["health"] == "ok")?;
        }
        chown(&file, Some(65534), None)?;
        refused(&agent, &format!("{}: belongs to uid 65534", file.display()))?;
        chown(&file, Some(0), None)?;
        agent.until_status("trust", |status| status["health"] == "ok")?;
        // What a link leads to counts.
        let elsewhere = machine.file("elsewhere.yaml", &policy("elsewhere"))?;
        chown(&elsewhere, Some(65534), None)?;
        symlink(&elsewhere, directory.join("link.yaml"))?;
        refused(&agent, "link.yaml: belongs to uid 65534")?;
        agent.end()
    })
}

fn refused(agent: &Agent, told: &str) -> Result<()> {
    let status = agent.until_status(told, |status| {
        status["policies"]["refused"]["message"].as_str().is_some_and(|message| message.contains(told))
    })?;
    assert_eq!(names(&status), ["mine"], "the last good policies stay");
    agent.cli(&["status"])?.code(5).map(drop)
}

#[test]
fn health_and_metrics() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let agent = &scene.agent;
        for (path, code) in
            [("/livez", 200), ("/readyz", 200), ("/metrics", 200), ("/", 404), ("/v1/status", 404)]
        {
            assert_eq!(agent.get(path)?.0, code, "{path}");
        }
        let mut puppet = scene.web("counted")?;
        scene.says_through_relay(&mut puppet)?;
        let families = open_metrics(&agent.get("/metrics")?.1)?;
        for (name, wanted) in [
            ("pillion_workloads{verdict=\"attached\",gate=\"none\"}", 1.0),
            ("pillion_workloads{verdict=\"failed\",gate=\"none\"}", 0.0),
            ("pillion_source_up{source=\"containerd\"}", 1.0),
            ("pillion_attach_seconds_count", 1.0),
            ("pillion_companion_exits_total", 0.0),
            ("pillion_redirect_outbound_redirected_total", 1.0),
        ] {
            assert_eq!(families.get(name), Some(&wanted), "{name} in {families:#?}");
        }
        ensure!(families.keys().all(|name| !name.contains("counted")), "a workload is a label");
        drop(puppet);
        agent.until_forgotten(&id("counted"))?;
        scene.end()
    })
}

fn metric(agent: &Agent, name: &str) -> Result<f64> {
    let metrics = open_metrics(&agent.get("/metrics")?.1)?;
    metrics.get(name).copied().with_context(|| format!("no {name} in {metrics:#?}"))
}

/// Reads the text format of `OpenMetrics` 1.0 strictly: order, names, suffixes, labels, numbers, the end. Series and values.
fn open_metrics(text: &str) -> Result<BTreeMap<String, f64>> {
    let mut samples = BTreeMap::new();
    let mut families: BTreeMap<String, String> = BTreeMap::new();
    let (mut family, mut described) = (String::new(), BTreeSet::new());
    let body = text.strip_suffix("# EOF\n").context("it must end with # EOF and a line break")?;
    let is_name = |name: &str| {
        !name.is_empty()
            && !name.starts_with(|first: char| first.is_ascii_digit())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':')
    };
    for line in body.lines() {
        let line_is_bad = || format!("line {line:?}");
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (kind, name, rest) = (words.next(), words.next(), words.next());
            let (Some(kind), Some(name), Some(rest)) = (kind, name, rest) else { bail!(line_is_bad()) };
            ensure!(is_name(name) && name.starts_with("pillion_"), line_is_bad());
            ensure!(described.insert(format!("{kind} {name}")), "twice: {line}");
            match kind {
                "HELP" => ensure!(!rest.trim().is_empty(), line_is_bad()),
                "TYPE" => {
                    ensure!(["counter", "gauge", "histogram", "info"].contains(&rest), line_is_bad());
                    families.insert(name.to_owned(), rest.to_owned());
                }
                "UNIT" => ensure!(name.ends_with(&format!("_{rest}")), line_is_bad()),
                _ => bail!(line_is_bad()),
            }
            name.clone_into(&mut family);
            continue;
        }
        let (series, value) = line.rsplit_once(' ').with_context(line_is_bad)?;
        let value: f64 = value.parse().with_context(line_is_bad)?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').with_context(line_is_bad)?),
            None => (series, ""),
        };
        ensure!(is_name(name), line_is_bad());
        for label in labels.split(',').filter(|label| !label.is_empty()) {
            let (label, quoted) = label.split_once('=').with_context(line_is_bad)?;
            ensure!(is_name(label) && quoted.len() >= 2, line_is_bad());
            ensure!(quoted.starts_with('"') && quoted.ends_with('"'), line_is_bad());
        }
        let suffix = name.strip_prefix(&*family).with_context(|| format!("{line:?} is not of {family}"))?;
        let suffixes: &[&str] = match families.get(&family).map(String::as_str) {
            Some("counter") => &["_total"],
            Some("gauge") => &[""],
            Some("histogram") => &["_bucket", "_sum", "_count"],
            Some("info") => &["_info"],
            _ => bail!("{line:?} has no type"),
        };
        ensure!(suffixes.contains(&suffix), "{line:?} is not a sample of its type");
        ensure!(value.is_finite() && value >= 0.0, line_is_bad());
        ensure!(samples.insert(series.to_owned(), value).is_none(), "twice: {series}");
    }
    ensure!(families.keys().all(|name| described.contains(&format!("HELP {name}"))), "without help");
    Ok(samples)
}

#[test]
fn only_root_and_its_group_reach_the_admin_socket() -> Result<()> {
    on_machine(|machine| {
        let agent = Agent::start(machine, None)?;
        for (path, wanted) in [
            (agent.run_dir(), 0o755),
            (agent.run_dir().join("admin.sock"), 0o660),
            (agent.run_dir().join("agent.lock"), 0o644),
            (agent.state_dir(), 0o711),
            (agent.state_dir().join("attachments"), 0o700),
        ] {
            assert_eq!(mode(&path)?, wanted, "{} has mode {:o}", path.display(), mode(&path)?);
            let metadata = fs::metadata(&path)?;
            assert_eq!((metadata.uid(), metadata.gid()), (0, 0), "{}", path.display());
        }
        let pillion = programs::for_everybody(&programs::pillion()?, machine.directory())?;
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(pillion);
        command.args(["status", "--run-dir"]).arg(agent.run_dir());
        let refused = ProcessGuard::finish("a stranger's pillion", &mut command, SOON)?.code(4)?;
        ensure!(refused.stderr.contains("use sudo"), "{}", refused.stderr);
        agent.end()
    })
}

#[test]
fn an_idle_agent_costs_next_to_nothing() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::with_agent(machine)?;
        let puppet = scene.web("quiet")?;
        let pid = scene.agent.process()?.pid();
        // Threads of the attach that have nothing to do any more go away.
        let mut ticks = 0;
        wait_until("threads that are quiet", SOON, || {
            let now = cpu_time(pid).map_or(0, |time| time.as_nanos());
            let still = now == ticks;
            ticks = now;
            if !still {
                thread::sleep(Duration::from_secs(2));
            }
            still
        })?;
        let before = cpu_time(pid)?;
        // Not for something to happen: this is the time in which nothing may.
        let (begin, period) = (Instant::now(), Duration::from_secs(5));
        thread::sleep(period);
        let (used, period) = (cpu_time(pid)?.saturating_sub(before), begin.elapsed());
        ensure!(used < period / 1000, "an idle agent used {used:?} of CPU in {period:?}");

        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = |field: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).context("the field")?;
            Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse()?)
        };
        let (rss, own) = (kib("VmRSS")?, kib("RssAnon")?);
        // The rest is the program itself, which without link-time optimization is larger than what is shipped.
        let released = programs::pillion()?.components().any(|part| part.as_os_str() == "release");
        let limit = if released { 15 } else { 24 };
        ensure!(
            rss < limit * 1024 && own < 6 * 1024,
            "an idle agent takes {rss} KiB, {own} KiB of them its own; at most {limit} MiB and 6 MiB"
        );
        drop(puppet);
        scene.agent.until_forgotten(&id("quiet"))?;
        scene.end()
    })
}

/// What all threads of a process have run.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        nanos += text.split_whitespace().next().context("a time")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}
