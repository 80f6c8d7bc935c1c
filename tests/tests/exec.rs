//! Processes that nobody starts through Pillion, held at their exec: what a policy selects by program is captured from its very
//! first instruction, and nothing stays stopped whatever becomes of agent and companions.

use std::{
    fs,
    os::unix::{
        fs::PermissionsExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use pillion_tests::{
    Agent, EchoServer, Machine, NetNs, ProcessGuard, cgroup, on_machine, programs,
    scene::{FAR, KIND},
    wait_for, wait_until,
};
use procfs::process::Process;
use serde_json::Value;

const RELAY: &str = "builtin: relay";
const SOON: Duration = Duration::from_secs(20);

/// An agent, two namespaces on a cable with an echo server at the far end, and a program that a policy selects by its path.
struct Town {
    agent: Agent,
    echo: EchoServer,
    near: NetNs,
    _far: NetNs,
    directory: PathBuf,
}

/// The program at its first instruction: it connects, and says nothing.
struct Dialler(Child);

impl Drop for Dialler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Dialler {
    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("a pid fits an i32")
    }

    fn state(&self) -> Result<char> {
        Ok(Process::new(self.pid())?.stat()?.state)
    }

    fn id(&self) -> Result<String> {
        Ok(format!("process/{}-{}", self.pid(), Process::new(self.pid())?.stat()?.starttime))
    }

    fn cgroup(&self) -> Result<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid()))?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/")).context("a cgroup2 path")?;
        Ok(cgroup::cgroup2_mount()?.join(path))
    }
}

impl Town {
    fn new(machine: &Machine) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let echo = EchoServer::start(&far, &format!("{FAR}:8080"))?;
        let town = Self {
            agent: Agent::new(machine, None)?,
            echo,
            near,
            _far: far,
            directory: machine.directory().to_owned(),
        };
        town.program("dialler")?;
        Ok(town)
    }

    /// A copy of busybox.
    fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::create_dir_all(path.parent().context("in a directory")?)?;
        fs::copy(programs::system("busybox")?, &path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// `companion` is what follows its name.
    fn policy(&self, on_failure: &str, companion: &str) -> String {
        // A relay takes any port that is free: several diallers are in one namespace.
        let to = if companion == RELAY { "c" } else { "\"c:15001\"" };
        format!(
            "{KIND}\nmetadata: {{ name: diallers }}\nspec:\n  \
             select: {{ runtimes: [process], executables: [\"{}/dial*\"] }}\n  \
             companions: [{{ name: c, {companion} }}]\n  \
             redirect: {{ outbound: [{{ to: {to} }}] }}\n  onFailure: {on_failure}\n",
            self.directory.display()
        )
    }

    /// An agent with this policy that holds programs by now.
    fn armed(&mut self, on_failure: &str, companion: &str) -> Result<()> {
        self.agent.policy("diallers.yaml", &self.policy(on_failure, companion))?;
        self.agent.run()?;
        self.until_logged("held at their exec")
    }

    fn until_logged(&self, words: &str) -> Result<()> {
        wait_until(words, SOON, || self.agent.log().is_ok_and(|log| log.contains(words)))
    }

    fn dial(&self) -> Result<Dialler> {
        self.dial_with(&self.directory.join("dialler"))
    }

    fn dial_with(&self, program: &Path) -> Result<Dialler> {
        let mut command = Command::new(program);
        command.arg0("nc").args([FAR, &self.echo.address().port().to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Dialler(self.near.run(|| command.spawn())?))
    }

    fn connected(&self, number: usize) -> Result<()> {
        wait_until("the first connection", SOON, || self.echo.peers().len() >= number)
    }

    fn end(self) -> Result<()> {
        let cgroups = cgroup::cgroup2_mount()?;
        self.agent.end()?;
        for entry in fs::read_dir(cgroups)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix("pillion-").and_then(|rest| rest.chars().next());
            ensure!(!number.is_some_and(|first| first.is_ascii_digit()), "{name} is left");
        }
        Ok(())
    }
}

fn event(agent: &Agent, kind: &str) -> Result<Value> {
    wait_for(kind, SOON, || {
        let events = agent.cli(&["events", "-o", "json"]).ok()?.success().ok()?.stdout;
        let all = events.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.into_iter().find(|event| event["kind"] == kind)
    })
}

#[test]
fn the_first_connection_of_a_selected_program_is_captured() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.armed("closed", RELAY)?;
        let began = Instant::now();
        let mut dialler = town.dial()?;
        let id = dialler.id()?;
        let workload = town.agent.until_verdict(&id, "attached")?;
        assert_eq!((&workload["gate"], &workload["firstInstruction"]), (&"exec".into(), &"before".into()));
        town.connected(1)?;
        println!("held, attached and connected in {:?}", began.elapsed());
        assert_eq!(town.agent.counter("outboundRedirected")?, 1);
        let own = dialler.cgroup()?;
        ensure!(
            own.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pillion-")),
            "{own:?}"
        );
        // At the end of its input it ends the connection, and then itself.
        drop(dialler.0.stdin.take());
        assert_eq!(town.agent.record(&id, town.echo.address())?["direction"], "outbound");
        ensure!(dialler.0.wait()?.success());
        town.agent.until_forgotten(&id)?;
        wait_until("a cgroup that is given back", SOON, || !own.exists())?;
        town.end()
    })
}

#[test]
fn fifty_at_once_are_all_captured() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.armed("closed", RELAY)?;
        let began = Instant::now();
        let diallers: Vec<Dialler> = (0..50).map(|_| town.dial()).collect::<Result<_>>()?;
        town.connected(50)?;
        println!("50 held, attached and connected in {:?}", began.elapsed());
        assert_eq!(town.agent.counter("outboundRedirected")?, 50);
        for dialler in &diallers {
            let workload = town.agent.until_verdict(&dialler.id()?, "attached")?;
            assert_eq!(
                (&workload["gate"], &workload["firstInstruction"]),
                (&"exec".into(), &"before".into())
            );
        }
        drop(diallers);
        town.end()
    })
}

#[test]
fn a_companion_that_fails_ends_the_process_when_closed_and_not_when_open() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        let failing = "exec: { command: [/bin/false] }, ready: { timeout: 2s }";
        town.armed("closed", failing)?;
        let mut dialler = town.dial()?;
        let status = dialler.0.wait()?;
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
        let refused = event(&town.agent, "refused")?;
        let message = refused["message"].as_str().unwrap_or_default();
        ensure!(message.contains("exec") && message.contains("companion c"), "{refused}");
        ensure!(town.echo.peers().is_empty(), "it has connected");
        drop(dialler);

        town.agent.policy("diallers.yaml", &town.policy("open", failing))?;
        town.agent.until_status("the policy", |status| status["policies"]["generation"] == 2)?;
        let dialler = town.dial()?;
        town.connected(1)?;
        let workload = town.agent.until_verdict(&dialler.id()?, "degraded")?;
        assert_eq!(workload["gate"], "exec");
        event(&town.agent, "admittedOpen")?;
        drop(dialler);
        town.end()
    })
}

/// Never ready, and its time is longer than any hold.
const HANGING: &str = "exec: { command: [/bin/sleep, \"1000\"] }, ready: { timeout: 5m }, stopGrace: 1s";

#[test]
fn a_process_that_is_held_when_the_agent_is_killed_goes_on_within_a_second() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.armed("open", HANGING)?;
        let dialler = town.dial()?;
        wait_until("a stopped process", SOON, || dialler.state().is_ok_and(|state| state == 'T'))?;
        town.agent.until(&dialler.id()?, "attaching", |workload| workload["verdict"] == "attaching")?;
        assert_eq!(dialler.state()?, 'T');
        let killed = Instant::now();
        town.agent.stop(Signal::SIGKILL)?;
        wait_until("a process that goes on", Duration::from_secs(1), || {
            dialler.state().is_ok_and(|state| state != 'T')
        })?;
        println!("it goes on {:?} after the kill", killed.elapsed());
        town.connected(1)?;
        // What is executed while there is no agent is not held.
        let other = town.dial()?;
        town.connected(2)?;
        // The next agent knows the one whose cgroup it finds.
        town.agent.run()?;
        let workload = town.agent.until(&dialler.id()?, "known", |_| true)?;
        assert_eq!(workload["runtime"], "process");
        drop((dialler, other));
        town.end()
    })
}

#[test]
fn an_agent_that_ends_in_order_leaves_nothing_stopped() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.armed("open", HANGING)?;
        let dialler = town.dial()?;
        wait_until("a stopped process", SOON, || dialler.state().is_ok_and(|state| state == 'T'))?;
        town.agent.stop(Signal::SIGTERM)?;
        ensure!(dialler.state()? != 'T');
        // Cleanup moves the living process back.
        town.agent.cleanup(&["--yes"])?.success()?;
        assert_eq!(
            dialler.cgroup()?,
            Process::myself().and_then(|it| it.cgroups()).map(|all| {
                let own =
                    all.into_iter().find(|it| it.hierarchy == 0).map(|it| it.pathname).unwrap_or_default();
                cgroup::cgroup2_mount().unwrap_or_default().join(own.trim_start_matches('/'))
            })?
        );
        drop(dialler);
        town.end()
    })
}

#[test]
fn a_hold_ends_at_its_deadline() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.armed("open", HANGING)?;
        let began = Instant::now();
        let dialler = town.dial()?;
        wait_until("a process that goes on", Duration::from_secs(40), || !town.echo.peers().is_empty())?;
        let held = began.elapsed();
        ensure!((Duration::from_secs(25)..Duration::from_secs(35)).contains(&held), "held for {held:?}");
        let admitted = event(&town.agent, "admittedOpen")?;
        let message = admitted["message"].as_str().unwrap_or_default();
        ensure!(message.contains("not attached within the time"), "{message}");
        drop(dialler);
        town.end()
    })
}

/// Whether a child was seen stopped before it ended.
fn is_seen_stopped(mut child: Child) -> Result<bool> {
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    drop(child.stdin.take());
    let mut seen = false;
    loop {
        match waitpid(pid, Some(WaitPidFlag::WUNTRACED))? {
            WaitStatus::Stopped(..) => seen = true,
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Ok(seen),
            _ => {}
        }
    }
}

/// How long the program has run, and how often.
fn cost() -> Result<(Duration, u64)> {
    let program = aya::programs::loaded_programs()
        .flatten()
        .find(|program| program.name_as_str() == Some("pl_exec"))
        .context("the program is loaded")?;
    Ok((program.run_time(), program.run_count()))
}

#[test]
fn other_programs_are_not_disturbed() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        let (other, elsewhere) = (town.program("other")?, town.program("elsewhere/dialler")?);
        town.armed("closed", RELAY)?;
        let run = |program: &Path| {
            let mut command = Command::new(program);
            command.arg0("true").stdin(Stdio::null()).spawn()
        };
        for _ in 0..20 {
            ensure!(!is_seen_stopped(run(&other)?)?, "a program with another name was stopped");
        }
        // The same name elsewhere is looked at, and let go.
        let began = Instant::now();
        ensure!(is_seen_stopped(run(&elsewhere)?)?, "it was never looked at");
        println!("let go after {:?}", began.elapsed());
        ensure!(began.elapsed() < Duration::from_secs(2));
        // What each exec on the machine pays, by the kernel's own count.
        let stats = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
        let before = cost()?;
        for _ in 0..200 {
            run(&other)?.wait()?;
        }
        let after = cost()?;
        drop(stats);
        let (took, executed) = (after.0.saturating_sub(before.0), after.1 - before.1);
        println!("{} ns an exec", took.as_nanos() / u128::from(executed.max(1)));
        ensure!(executed >= 200 && took < Duration::from_micros(50) * u32::try_from(executed)?);
        // No policy any more: nothing of it is in the kernel.
        fs::remove_file(town.agent.policy_dir().join("diallers.yaml"))?;
        town.until_logged("nothing is held at exec")?;
        wait_until("a kernel without the program", SOON, || {
            !aya::programs::loaded_programs()
                .flatten()
                .any(|program| program.name_as_str() == Some("pl_exec"))
        })?;
        ensure!(!is_seen_stopped(run(&town.directory.join("dialler"))?)?);
        town.end()
    })
}

/// What a shell sees: a job of an interactive one, which would take the stop for its user's, is not held but attached late.
#[test]
fn shells_are_not_confused() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.armed("closed", RELAY)?;
        let program = town.directory.join("dialler");
        let called = format!("exec -a true {} ; echo status=$?", program.display());
        // Without job control a shell does not ask about stopped children.
        let mut command = Command::new("/bin/bash");
        command.args(["-c", &format!("({called}) & wait; ({called}); echo done")]);
        let finished = ProcessGuard::finish("bash -c", &mut command, SOON)?.success()?;
        ensure!(finished.stdout.ends_with("done\n"), "{finished:?}");
        // With a terminal and job control: script(1) gives the terminal.
        let inner = format!("bash --norc -i -c '(exec -a true {}); echo status=$?'", program.display());
        let mut command = Command::new("/usr/bin/script");
        command.args(["-qec", &inner, "/dev/null"]).stdin(Stdio::null());
        let finished = ProcessGuard::finish("bash -i", &mut command, SOON)?.success()?;
        ensure!(finished.stdout.contains("status=0"), "{finished:?}");
        ensure!(!finished.stdout.contains("Stopped"), "{finished:?}");
        town.end()
    })
}
