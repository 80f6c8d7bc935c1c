//! The way back: detaching loses no connection, an agent finds its way after a broken journal, and `pillion cleanup` leaves the
//! machine as it was, whatever was killed or lost before.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    Agent, Inventory, Machine, ProcessGuard, Puppet,
    containerd::Container,
    on_machine, programs,
    scene::{Load, Scene, companion_pid, connected, id, still_answers, web},
    wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

/// The machine with two attached containers, one of them with a connection open, as it was before the agent and now.
struct Attached {
    before: Inventory,
    scene: Scene,
    puppets: Vec<Puppet>,
    companions: Vec<i64>,
}

impl Attached {
    fn new(machine: &Machine) -> Result<Self> {
        let mut scene = Scene::new(machine)?;
        scene.agent.policy("web.yaml", &web("closed", ""))?;
        let mut puppets = Vec::new();
        for name in ["one", "two"] {
            scene.containerd.run(&Container {
                id: name,
                labels: &[("app", "web")],
                netns: Some(&scene.near),
                command: &["sleep", "1000"],
            })?;
            puppets.push(scene.insider(name)?);
        }
        let before = Inventory::take()?;
        scene.agent.run()?;
        let mut companions = Vec::new();
        for name in ["one", "two"] {
            companions.push(companion_pid(&scene.agent.until_verdict(&id(name), "attached")?)?);
        }
        for puppet in &mut puppets {
            scene.says_through_relay(puppet)?;
        }
        let open = connected(&mut puppets[0], scene.echo.address())?;
        still_answers(&mut puppets[0], open, "open")?;
        Ok(Self { before, scene, puppets, companions })
    }

    /// Kills the agent, and the companions in a way that leaves no time for anything.
    fn kill_agent(&mut self) -> Result<()> {
        self.scene.agent.stop(Signal::SIGKILL)
    }

    fn kill_companions(&self) -> Result<()> {
        for pid in &self.companions {
            kill(Pid::from_raw(i32::try_from(*pid)?), Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// `cleanup --yes` must succeed, say that nothing remains, and be right: the machine is as before the agent, and the
    /// workloads live and connect as if there had never been a Pillion.
    fn cleans_up(mut self) -> Result<()> {
        let done = self.scene.agent.cleanup(&["--yes", "-o", "json"])?.success()?;
        let report: Value = serde_json::from_str(&done.stdout)?;
        assert_eq!(report["remaining"], Value::Array(vec![]), "{}", done.stderr);
        self.before.expect_nothing_added(SOON)?;
        for path in [self.scene.agent.state_dir(), self.scene.agent.run_dir()] {
            ensure!(!path.exists(), "{} is left", path.display());
        }
        ensure!(self.scene.agent.policy_dir().join("web.yaml").exists(), "policies are the operator's");
        let peers = self.scene.echo.peers().len();
        for puppet in &mut self.puppets {
            assert_eq!(puppet.converse(self.scene.echo.address(), "free")?, Ok("free".to_owned()));
        }
        assert_eq!(self.scene.echo.peers().len(), peers + 2);
        let again = self.scene.agent.cleanup(&["--yes"])?.success()?;
        ensure!(again.stderr.contains("nothing to remove"), "{}", again.stderr);
        Ok(())
    }
}

/// The journal's records.
fn records(agent: &Agent) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(agent.state_dir().join("attachments"))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    Ok(paths)
}

#[test]
fn detaching_under_load_fails_no_connection() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        // Failing open: an attach lets connections pass until the companion is ready.
        scene.agent.policy("web.yaml", &web("open", ""))?;
        scene.agent.until_status("the policy", |status| status["policies"]["generation"] == 2)?;
        let puppet = scene.web("busy")?;
        let loads =
            [scene.insider("busy")?, scene.insider("busy")?].map(|it| Load::start(it, scene.echo.address()));
        let before = scene.redirected()?;
        for _ in 0..5 {
            loads[0].goes_on()?;
            scene.agent.cli(&["detach", &id("busy")])?.success()?;
            loads[0].goes_on()?;
            scene.agent.cli(&["attach", &id("busy")])?.success()?;
        }
        // By policy as well.
        for _ in 0..3 {
            loads[1].goes_on()?;
            fs::remove_file(scene.agent.policy_dir().join("web.yaml"))?;
            scene.agent.until_verdict(&id("busy"), "notMatched")?;
            loads[1].goes_on()?;
            scene.agent.policy("web.yaml", &web("open", ""))?;
            scene.agent.until_verdict(&id("busy"), "attached")?;
        }
        let made = loads.into_iter().map(Load::end).sum::<Result<u32>>()?;
        let redirected = scene.redirected()? - before;
        ensure!(redirected > 0 && redirected < u64::from(made), "{redirected} of {made} were redirected");
        assert_eq!(scene.agent.counter("slotsBusy")?, 0, "a slot is not given back");
        assert_eq!(scene.agent.counter("connections")?, 0, "a connection is not forgotten");
        ensure!(!scene.agent.log()?.contains("did not ask"), "a companion was stopped too early");
        drop(puppet);
        scene.agent.until_forgotten(&id("busy"))?;
        scene.end()
    })
}

#[test]
fn cleanup_after_everything_was_killed() -> Result<()> {
    on_machine(|machine| {
        let before = Inventory::take()?;
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        attached.kill_companions()?;
        let Attached { scene, puppets, .. } = attached;
        let Scene { agent, containerd, echo, near, far } = scene;
        // containerd, its shims, the containers and their namespaces.
        drop(puppets);
        drop(containerd);
        drop((echo, near, far));
        ensure!(!Inventory::take()?.added_since(&before).is_empty(), "a kill leaves things behind");
        agent.cleanup(&["--yes"])?.success()?;
        before.expect_nothing_added(SOON)?;
        ensure!(!agent.state_dir().exists() && !agent.run_dir().exists() && !agent.pin_root().exists());
        Ok(())
    })
}

#[test]
fn cleanup_under_living_workloads_and_companions() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        attached.cleans_up()
    })
}

#[test]
fn cleanup_after_the_agent_and_its_companions_were_killed() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        attached.kill_companions()?;
        attached.cleans_up()
    })
}

#[test]
fn cleanup_without_a_journal() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        // Everything that could tell what was attached; companions are known by what they have open.
        fs::remove_dir_all(attached.scene.agent.state_dir())?;
        fs::remove_dir_all(attached.scene.agent.run_dir())?;
        attached.cleans_up()
    })
}

/// A machine without systemd has no BPF file system mounted: Pillion mounts one, and takes it back.
#[test]
fn the_file_system_that_pillion_mounted_is_taken_back() -> Result<()> {
    on_machine(|machine| {
        let mut hold = Command::new("unshare");
        hold.args(["--mount", "--propagation", "private", "--", "/bin/sh", "-ec"]);
        hold.arg("umount /sys/fs/bpf; echo bare; exec sleep infinity");
        let mut holder = ProcessGuard::spawn("a machine without a BPF file system", &mut hold)?;
        holder.stdout_line(SOON, |line| line == "bare")?;
        let inside = holder.pid();
        let is_mounted = || -> Result<bool> {
            Ok(fs::read_to_string(format!("/proc/{inside}/mounts"))?.contains(" /sys/fs/bpf "))
        };
        ensure!(!is_mounted()?, "there is one");
        let flags = ["--docker-socket", "none", "--podman-socket", "none"];
        let mut agent = Agent::watching(machine, &flags, Some(inside))?;
        agent.policy("web.yaml", &web("closed", ""))?;
        agent.run()?;
        ensure!(is_mounted()?, "the agent has mounted none");
        agent.stop(Signal::SIGTERM)?;
        let mut cleanup = Command::new("nsenter");
        cleanup
            .args(["-m", "-t", &inside.to_string(), "--"])
            .arg(programs::pillion()?)
            .args(["cleanup", "--yes"]);
        cleanup.arg("--state-dir").arg(agent.state_dir()).arg("--run-dir").arg(agent.run_dir());
        cleanup.arg("--pin-root").arg(agent.pin_root());
        let done = ProcessGuard::finish("pillion cleanup", &mut cleanup, SOON)?.success()?;
        ensure!(!is_mounted()?, "it is still mounted: {}{}", done.stdout, done.stderr);
        Ok(())
    })
}

#[test]
fn cleanup_with_a_broken_journal_and_lost_pins() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        for record in records(&attached.scene.agent)? {
            let text = fs::read(&record)?;
            fs::write(&record, &text[..text.len() / 2])?;
            fs::write(record.with_extension("json.tmp"), &text[..text.len() / 3])?;
        }
        fs::remove_dir_all(attached.scene.agent.pin_root())?;
        attached.cleans_up()
    })
}

#[test]
fn a_dry_run_changes_nothing_and_names_everything() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        let before = Inventory::take()?;
        let done = attached.scene.agent.cleanup(&["--dry-run", "-o", "json"])?.success()?;
        before.expect_nothing_added(SOON)?;
        let gone = before.added_since(&Inventory::take()?);
        ensure!(gone.iter().all(|line| line.starts_with("process:")), "something was removed: {gone:?}");
        for pid in &attached.companions {
            ensure!(PathBuf::from(format!("/proc/{pid}")).exists(), "a companion was ended");
        }

        // What this inventory, which knows nothing of the product, has found since is what it would remove.
        let report: Value = serde_json::from_str(&done.stdout)?;
        let items = report["before"]["items"].as_array().context("items")?;
        let named: BTreeSet<String> = items
            .iter()
            .filter_map(|item| Some(format!("{}: {}", item["kind"].as_str()?, item["name"].as_str()?)))
            .collect();
        let number = |line: &str| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let ours = |line: &String| match line.strip_prefix("process: ") {
            Some(process) => attached.companions.iter().any(|pid| process.starts_with(&format!("{pid} "))),
            None => true,
        };
        for added in before.added_since(&attached.before).into_iter().filter(ours) {
            // Directories of pins, and cgroups, whose kind is their hierarchy here.
            let path = added.split_once(": ").context("kind: what")?.1;
            let found = named.contains(&added)
                || named.contains(&number(&added))
                || (added.starts_with("cgroup") && named.contains(&format!("cgroup: {path}")))
                || (added.starts_with("cgroup") && path.ends_with("/pillion.slice"))
                || (added.starts_with("pin") && PathBuf::from(path).is_dir())
                || (added.starts_with("process")
                    && named.iter().any(|name| name.starts_with(&number(&added))));
            ensure!(found, "the dry run does not name {added}; it names {named:#?}");
        }
        for kind in ["pin", "link", "program", "map", "process", "cgroup", "socket", "file"] {
            ensure!(report["before"]["counts"][kind].as_u64().is_some_and(|count| count > 0), "no {kind}");
        }
        for puppet in &mut attached.puppets {
            assert_eq!(puppet.converse(attached.scene.echo.address(), "on")?, Ok("on".to_owned()));
        }
        attached.cleans_up()
    })
}

#[test]
fn cleanup_leaves_a_living_agent_and_foreign_files_alone() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        let pid = attached.scene.agent.process()?.pid();
        let before = Inventory::take()?;
        let refused = attached.scene.agent.cleanup(&["--yes"])?.code(1)?;
        ensure!(refused.stderr.contains(&format!("pid {pid}")), "{}", refused.stderr);
        ensure!(refused.stdout.is_empty(), "{}", refused.stdout);
        assert_eq!(before.added_since(&Inventory::take()?), Vec::<String>::new(), "something was removed");
        for puppet in &mut attached.puppets {
            attached.scene.says_through_relay(puppet)?;
        }
        attached.kill_agent()?;
        // Nobody can be asked.
        let mut command = Command::new(programs::pillion()?);
        command.args(["cleanup", "--state-dir"]).arg(attached.scene.agent.state_dir());
        command.arg("--run-dir").arg(attached.scene.agent.run_dir());
        command.arg("--pin-root").arg(attached.scene.agent.pin_root());
        let asked = ProcessGuard::finish("pillion cleanup", &mut command, SOON)?.code(1)?;
        ensure!(asked.stderr.contains("--yes"), "{}", asked.stderr);
        // The agent itself, its socket, and programs that it kept ready.
        let gone = before.added_since(&Inventory::take()?);
        let with_it =
            |line: &String| ["process:", "socket:", "program:"].iter().any(|kind| line.starts_with(kind));
        ensure!(gone.iter().all(with_it), "more is gone than the agent: {gone:?}");

        let foreign = attached.scene.agent.state_dir().join("notes.txt");
        fs::write(&foreign, "not of Pillion")?;
        let done = attached.scene.agent.cleanup(&["--yes"])?.success()?;
        ensure!(done.stderr.contains("notes.txt"), "{}", done.stderr);
        assert_eq!(fs::read_to_string(&foreign)?, "not of Pillion");
        fs::remove_dir_all(attached.scene.agent.state_dir())?;
        attached.before.expect_nothing_added(SOON)
    })
}

/// A record is lost or half written, and the next agent must neither lose the workload nor leave anything of before.
fn journal_fault(machine: &Machine, spoil: impl Fn(&PathBuf) -> Result<()>, is_told: bool) -> Result<()> {
    let mut attached = Attached::new(machine)?;
    attached.kill_agent()?;
    let record =
        records(&attached.scene.agent)?.into_iter().find(|path| path.to_string_lossy().ends_with("one.json"));
    spoil(&record.context("a record of `one`")?)?;
    let scene = &mut attached.scene;
    scene.agent.run()?;
    let one = scene.agent.until_verdict(&id("one"), "attached")?;
    let two = scene.agent.until_verdict(&id("two"), "attached")?;
    ensure!(companion_pid(&one)? != attached.companions[0], "nothing is known of the companion any more");
    assert_eq!(companion_pid(&two)?, attached.companions[1], "the other record was good");
    let status = scene.agent.cli(&["status"])?;
    assert_eq!(status.status.code(), Some(if is_told { 5 } else { 0 }), "{}", status.stdout);
    assert_eq!(status.stdout.contains("one.json"), is_told, "{}", status.stdout);
    for puppet in &mut attached.puppets {
        scene.says_through_relay(puppet)?;
    }
    let gone = PathBuf::from(format!("/proc/{}", attached.companions[0]));
    wait_until("the end of a companion that nobody knows", SOON, || !gone.exists())?;
    // Detached is detached: nothing of the earlier attachment is in force.
    for name in ["one", "two"] {
        scene.agent.cli(&["detach", &id(name)])?.success()?;
    }
    for puppet in &mut attached.puppets {
        scene.says_directly(puppet)?;
    }
    scene.agent.stop(Signal::SIGTERM)?;
    attached.cleans_up()
}

#[test]
fn a_half_written_record_is_named_and_the_workload_attached_anew() -> Result<()> {
    on_machine(|machine| {
        let halve = |record: &PathBuf| {
            let text = fs::read(record)?;
            Ok(fs::write(record, &text[..text.len() / 2])?)
        };
        journal_fault(machine, halve, true)
    })
}

#[test]
fn a_lost_record_is_made_good() -> Result<()> {
    on_machine(|machine| journal_fault(machine, |record| Ok(fs::remove_file(record)?), false))
}

#[test]
fn a_write_that_was_cut_short_does_no_harm() -> Result<()> {
    on_machine(|machine| {
        let mut attached = Attached::new(machine)?;
        attached.kill_agent()?;
        for record in records(&attached.scene.agent)? {
            fs::write(record.with_extension("json.tmp"), "{\"version\":1,")?;
        }
        attached.scene.agent.run()?;
        for (name, pid) in [("one", attached.companions[0]), ("two", attached.companions[1])] {
            let workload = attached.scene.agent.until_verdict(&id(name), "attached")?;
            assert_eq!(companion_pid(&workload)?, pid, "{name} was not adopted");
        }
        attached.scene.agent.cli(&["status"])?.success()?;
        attached.scene.agent.stop(Signal::SIGTERM)?;
        attached.cleans_up()
    })
}

/// Ends at every step of its beginnings; whatever is there then, cleanup takes it away.
#[test]
fn cleanup_after_an_agent_that_was_killed_while_attaching() -> Result<()> {
    on_machine(|machine| {
        let before = Inventory::take()?;
        let mut scene = Scene::new(machine)?;
        scene.agent.policy("web.yaml", &web("closed", ""))?;
        scene.containerd.run(&Container {
            id: "slow",
            labels: &[("app", "web")],
            netns: Some(&scene.near),
            command: &["sleep", "1000"],
        })?;
        let mut puppet = scene.insider("slow")?;
        for awaited in
            ["AgentStarted", "attaching as policy", "the companion is ready", "redirection is in force"]
        {
            scene.agent.spawn()?;
            scene.agent.process()?.stderr_line(SOON, |line| line.contains(awaited))?;
            scene.agent.stop(Signal::SIGKILL)?;
            let done = scene.agent.cleanup(&["--yes"])?.success()?;
            ensure!(
                done.stdout.contains("pin") || done.stderr.contains("nothing to remove"),
                "{}",
                done.stdout
            );
            assert_eq!(puppet.converse(scene.echo.address(), "free")?, Ok("free".to_owned()), "{awaited}");
            // And again without a cleanup: the next agent gets there from what is left.
            scene.agent.spawn()?;
            scene.agent.process()?.stderr_line(SOON, |line| line.contains(awaited))?;
            scene.agent.stop(Signal::SIGKILL)?;
            scene.agent.run()?;
            scene.agent.until_verdict(&id("slow"), "attached")?;
            scene.says_through_relay(&mut puppet)?;
            scene.agent.cli(&["detach", &id("slow")])?.success()?;
            scene.says_directly(&mut puppet)?;
            scene.agent.stop(Signal::SIGTERM)?;
            scene.agent.cleanup(&["--yes"])?.success()?;
        }
        drop(puppet);
        scene.containerd.remove("slow")?;
        scene.end()?;
        before.expect_nothing_added(SOON)
    })
}
