//! `cargo xtask demo`: the story of Pillion for a newcomer, on real programs, where every step is checked.
//!
//! Runs within [`on_machine`], as the suites do: root, alone on the machine, and a proof at the end that nothing is left.
//! Owns the story; the stage is in `town`, the printing in `screen`.

mod hands;
mod screen;
mod town;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use self::{
    hands::{DEADLINE, expect, is_dead, pillion, record_in},
    screen::{Screen, finished, output, say},
    town::{PAGE, PORT, SERVER, SERVER6, Town, until_listening},
};
use crate::{Agent, Inventory, Machine, ProcessGuard, on_machine, process::keep_quiet, programs, wait_until};

const DESK_POLICY: &str = "\
spec:
  select: { runtimes: [process] }
  companions: [{ name: relay, builtin: relay }]
  redirect:
    outbound: [{ to: relay }]
    inbound: [{ ports: [8080], to: relay }]
  onFailure: open
";
const WEB_POLICY: &str = "\
spec:
  select: { runtimes: [containerd], labels: { app: web } }
  companions: [{ name: relay, builtin: relay }]
  redirect:
    outbound: [{ to: relay }]
    inbound: [{ ports: [8080], to: relay }]
  onFailure: open
";
const PAYMENTS_POLICY: &str = "\
spec:
  select: { runtimes: [containerd], labels: { app: payments } }
  companions: [{ name: relay, builtin: relay }]
  redirect:
    outbound: [{ to: relay }]
  onFailure: closed
";

/// Tells the story once.
pub fn main() -> Result<()> {
    screen::heed_signals()?;
    keep_quiet();
    let mut screen = Screen::new();
    let told = on_machine(|machine| tell(machine, &mut screen));
    // A signal ends commands as well: not their failure is the news then.
    screen::go_on()?;
    told.context("the demo met a surprise")?;
    screen.proven("the stage is gone, too");
    say(&format!(
        "\nThat was all, in {:.0} s. README.md says where to go next.",
        screen.took().as_secs_f32()
    ));
    Ok(())
}

fn tell(machine: &Machine, screen: &mut Screen) -> Result<()> {
    note_others()?;
    screen.chapter("The stage, still without Pillion")?;
    let town = Town::build(machine)?;
    town.run_container("web")?;
    let mut story = Story { screen, machine, agent: Agent::new(machine, Some(&town.containerd))?, town };
    story.stage()?;
    // All that may be there when Pillion is gone again.
    let before = Inventory::take()?;
    story.process_out()?;
    story.process_in()?;
    story.containers()?;
    story.requests()?;
    story.status()?;
    story.policy()?;
    story.failure()?;
    story.cleanup(&before)
}

/// The proof at the end compares the machine with itself: another Pillion at work may spoil it, and should be known then.
fn note_others() -> Result<()> {
    let found = Inventory::take()?;
    let others: Vec<&str> = found.lines().filter_map(|line| line.strip_prefix("process: ")).collect();
    if !others.is_empty() {
        say(
            "\nPillion is at work on this machine already. What it does meanwhile, the proof at the end may take for ours:",
        );
        output(&others.join("\n"));
    }
    Ok(())
}

struct Story<'a> {
    screen: &'a mut Screen,
    machine: &'a Machine,
    /// Before the town: companions end before their containers.
    agent: Agent,
    town: Town,
}

impl Story<'_> {
    fn stage(&self) -> Result<()> {
        say("
                      ┌──────────────────────────────┐
                      │ server  10.77.0.1, fd77::1   │  a web server
                      └──┬───────────┬───────────┬───┘
          10.77.1.2 ┌────┴───┐ ┌─────┴────┐ ┌────┴───┐ 10.77.3.2
    a container of  │  web   │ │ payments │ │  desk  │  processes, under
        containerd  └────────┘ └──────────┘ └────────┘  `pillion run`

Each box is a network namespace. Every server here greets its client by the address it sees.
What is private to this demo (directories, sockets) is left out of the commands below.");
        self.ask_server("web", 0, "hello 10.77.1.2, this is the web server")?;
        Ok(())
    }

    fn process_out(&mut self) -> Result<()> {
        self.screen.chapter("A process with a companion: requests out")?;
        say("A policy: every process gets the embedded relay, and its TCP connections go through it.");
        let policy = self.machine.file("desk.yaml", DESK_POLICY)?;
        self.screen.run("desk", "cat desk.yaml", Command::new("cat").arg(&policy), 0)?;
        for (host, local) in [(SERVER.to_owned(), "10.77.3.2"), (format!("[{SERVER6}]"), "fd77:3::2")] {
            let url = format!("http://{host}/{PAGE}");
            let format = "curl sees: %{local_ip} to %{remote_ip} port %{remote_port}\\n";
            let mut curl = self.pillion_run()?;
            curl.arg(programs::system("curl")?).args(["-s", "-g", "-w", format, &url]);
            let typed = format!("pillion run --policy desk.yaml -- curl -s -g -w '{format}' '{url}'");
            let done = self.town.desk.run(|| self.screen.run("desk", &typed, &mut curl, 0))?;
            let peer = host.trim_matches(['[', ']']);
            expect(&done.stdout, &format!("hello {local}, this is the web server"))?;
            expect(&done.stdout, &format!("curl sees: {local} to {peer} port 80"))?;
            let record = record_in(&done.stderr)?;
            ensure!(record["direction"] == "outbound" && record["outcome"] == "ok", "not so: {record}");
            ensure!(record["destination"] == format!("{host}:80"), "not so: {record}");
        }
        self.screen.proven("curl went through the relay, whose record is the JSON line; both ends saw each other's true address");
        Ok(())
    }

    fn process_in(&mut self) -> Result<()> {
        self.screen.chapter("A process with a companion: requests in")?;
        let (busybox, pages) = (programs::system("busybox")?, &self.town.desk_pages);
        let mut httpd = self.pillion_run()?;
        httpd.arg(busybox).args(["httpd", "-f", "-p", &PORT.to_string(), "-h"]).arg(pages);
        self.screen.typed("desk", &format!("pillion run --policy desk.yaml -- busybox httpd -f -p {PORT} &"));
        let mut httpd = ProcessGuard::spawn_in(&self.town.desk, "pillion run", &mut httpd)?;
        until_listening(httpd.pid(), PORT)?;
        let answer = self.curl_from_server("10.77.3.2")?;
        expect(&answer, "this is the process at the desk")?;
        let line = httpd.stderr_line(DEADLINE, |line| line.contains("inbound"))?;
        httpd.signal(Signal::SIGTERM)?;
        self.screen.typed("desk", "kill %1");
        httpd.exit(DEADLINE)?;
        output(&line);
        let record = record_in(&line)?;
        let source = record["source"].as_str().unwrap_or_default();
        ensure!(source.starts_with("10.77.0.1:") || source.starts_with("10.77.3.1:"), "not so: {record}");
        ensure!(record["destination"] == "10.77.3.2:8080", "not so: {record}");
        self.screen.proven(
            "the record has the client's address. The server itself sees its own: its peer is the companion",
        );
        Ok(())
    }

    fn containers(&mut self) -> Result<()> {
        self.screen.chapter("The agent and containers")?;
        say(
            "The container `web` runs already; `payments` is started after the agent. Its policy differs in one line:\n\
             without its companion nothing may leave (`onFailure: closed`).",
        );
        let policies = [("web.yaml", WEB_POLICY), ("payments.yaml", PAYMENTS_POLICY)];
        for (name, text) in policies {
            self.agent.policy(name, text)?;
        }
        let payments = self.agent.policy_dir().join("payments.yaml");
        self.screen.run(
            "host",
            "cat /etc/pillion/policy.d/payments.yaml",
            Command::new("cat").arg(payments),
            0,
        )?;
        self.screen.typed("host", "pillion agent &");
        self.agent.run()?;
        self.attached("web")?;
        self.screen.typed(
            "host",
            "ctr run --detach --label app=payments localhost/town:1 payments httpd -f -p 8080",
        );
        self.town.run_container("payments")?;
        self.attached("payments")?;
        let list = self.pillion(&["list"], 0)?;
        ensure!(list.matches(" attached ").count() == 2, "two workloads are attached: {list}");
        Ok(())
    }

    fn requests(&mut self) -> Result<()> {
        self.screen.chapter("Containers: requests out and in")?;
        self.ask_server("web", 0, "hello 10.77.1.2, this is the web server")?;
        let out =
            self.agent.record(&Town::workload("web"), (SERVER.parse::<std::net::IpAddr>()?, 80).into())?;
        let answer = self.curl_from_server("10.77.1.2")?;
        expect(&answer, "this is container web")?;
        let into = self.agent.record(&Town::workload("web"), "10.77.1.2:8080".parse()?)?;
        say("\nThe relay's records, from the agent's log:");
        for record in [&out, &into] {
            output(&self.as_logged(record)?);
        }
        ensure!(out["direction"] == "outbound" && into["direction"] == "inbound", "not so: {out} {into}");
        self.screen.proven("the container was neither changed nor restarted for this");
        Ok(())
    }

    fn status(&mut self) -> Result<()> {
        self.screen.chapter("What the agent knows")?;
        let status = self.pillion(&["status"], 0)?;
        expect(&status, "containerd")?;
        let described = self.pillion(&["describe", &Town::workload("web")], 0)?;
        expect(&described, "relay")
    }

    fn policy(&mut self) -> Result<()> {
        self.screen.chapter("The policy changes while everything runs")?;
        say("Port 80 is excluded from redirection: the file is saved, nothing else is done.");
        let changed = WEB_POLICY
            .replace("outbound: [{ to: relay }]", "outbound: [{ to: relay, exclude: { ports: [80] } }]");
        let path = self.agent.policy("web.yaml", &changed)?;
        let mut grep = Command::new("grep");
        self.screen.run(
            "host",
            "grep outbound /etc/pillion/policy.d/web.yaml",
            grep.arg("outbound").arg(&path),
            0,
        )?;
        self.agent.until(&Town::workload("web"), "port 80 excluded", |workload| {
            let ports = &workload["plan"]["redirect"]["outbound"][0]["exclude"]["ports"];
            *ports == serde_json::json!([80]) && workload["verdict"] == "attached"
        })?;
        let excluded = || self.agent.counter("outboundExcluded");
        let (before, records) = (excluded()?, self.records_out("web")?);
        self.ask_server("web", 0, "hello 10.77.1.2, this is the web server")?;
        ensure!(excluded()? == before + 1, "the connection was not excluded");
        ensure!(self.records_out("web")? == records, "the relay has seen an excluded connection");
        self.screen.proven(
            "the same container, the same companion, but this request went past it: there is no record",
        );

        say("\nA mistake is shown with its place and its cure, and the last good policy stays in force.");
        let wrong = self.machine.file("wrong.yaml", &changed.replace("ports: [8080]", "ports: [80800]"))?;
        let mut validate = pillion()?;
        let done = self.screen.run(
            "host",
            "pillion validate wrong.yaml",
            validate.arg("validate").arg(&wrong),
            3,
        )?;
        expect(&format!("{}{}", done.stdout, done.stderr), "80800")
    }

    fn failure(&mut self) -> Result<()> {
        self.screen.chapter("Everything of Pillion is killed")?;
        say("First the agent, so that it cannot help; then both companions.");
        // Redirection as in the beginning.
        self.agent.policy("web.yaml", WEB_POLICY)?;
        self.agent.until(&Town::workload("web"), "no exclusion", |workload| {
            let ports = &workload["plan"]["redirect"]["outbound"][0]["exclude"]["ports"];
            ports.as_array().is_none_or(Vec::is_empty) && workload["verdict"] == "attached"
        })?;
        let companions = [self.companion("web")?, self.companion("payments")?];
        self.screen.typed("host", "kill -9 %1             # the agent");
        self.agent.stop(Signal::SIGKILL)?;
        self.screen.typed("host", &format!("kill -9 {} {}", companions[0], companions[1]));
        for pid in companions {
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            wait_until("the end of a companion", DEADLINE, || is_dead(pid))?;
        }
        say("\n`web` has onFailure: open, out and in:");
        self.ask_server("web", 0, "hello 10.77.1.2, this is the web server")?;
        expect(&self.curl_from_server("10.77.1.2")?, "hello 10.77.0.1, this is container web")?;
        say("\n`payments` has onFailure: closed:");
        self.ask_server("payments", 1, "Connection refused")?;
        self.screen.proven(
            "open flows, closed refuses: the kernel decides at each connect, and needs no process of Pillion for it",
        );

        say("\nThe next agent takes over what it finds, and brings the companions back.");
        self.screen.typed("host", "pillion agent &");
        self.agent.run()?;
        for (name, dead) in ["web", "payments"].iter().zip(companions) {
            self.attached(name)?;
            ensure!(self.companion(name)? != dead, "{name} still has its dead companion");
        }
        self.ask_server("payments", 0, "hello 10.77.2.2, this is the web server")?;
        self.pillion(&["list"], 0)?;
        Ok(())
    }

    fn cleanup(mut self, before: &Inventory) -> Result<()> {
        self.screen.chapter("Nothing is left")?;
        self.screen
            .typed("host", "kill -TERM %2          # the agent; companions and redirection stay in force");
        self.agent.stop(Signal::SIGTERM)?;
        self.screen.typed("host", "pillion cleanup --yes");
        let done = self.agent.cleanup(&["--yes"])?;
        finished(done, 0)?;
        self.ask_server("web", 0, "hello 10.77.1.2, this is the web server")?;
        expect(&self.curl_from_server("10.77.1.2")?, "hello 10.77.0.1, this is container web")?;
        self.screen.proven("`web` runs on, untouched by any of this");
        // Which came after the first inventory.
        self.screen.typed("host", "ctr task rm --force payments && ctr container rm payments");
        self.town.containerd.remove("payments")?;
        before.expect_nothing_added(DEADLINE)?;
        self.screen.proven(&format!(
            "{} programs, maps, links, pins, cgroups, mounts, processes, sockets and files were found on this machine \
             before Pillion came; nothing has been added to them",
            before.lines().count()
        ));
        Ok(())
    }
}
