//! What the story does again and again: asking servers, calling `pillion`, waiting for the agent.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Story,
    town::{PAGE, PORT, SERVER, Town, hermetic},
};
use crate::programs;

/// What has not happened by then is not going to.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

impl Story<'_> {
    /// The container `name` asks the web server.
    pub(super) fn ask_server(&self, name: &str, code: i32, wanted: &str) -> Result<()> {
        let url = format!("http://{SERVER}/{PAGE}");
        let typed = format!("ctr task exec --exec-id 1 {name} wget -q -O - {url}");
        let mut command = self.town.in_container(name, &["wget", "-q", "-O", "-", &url])?;
        let done = self.screen.run("host", &typed, &mut command, code)?;
        expect(&format!("{}{}", done.stdout, done.stderr), wanted)
    }

    /// The server's side asks a workload.
    pub(super) fn curl_from_server(&self, host: &str) -> Result<String> {
        let url = format!("http://{host}:{PORT}/{PAGE}");
        // The address that the others know the server by.
        let arguments = ["-s", "--interface", SERVER, &url];
        let mut curl = hermetic(programs::system("curl")?);
        let typed = format!("curl {}", arguments.join(" "));
        let screen = &*self.screen;
        let done = self.town.server.run(|| screen.run("server", &typed, curl.args(arguments), 0))?;
        Ok(done.stdout)
    }

    /// `pillion ARGUMENTS`, towards the agent of the story.
    pub(super) fn pillion(&self, arguments: &[&str], code: i32) -> Result<String> {
        let typed = format!("pillion {}", arguments.join(" "));
        Ok(self.screen.run("host", &typed, &mut self.agent.cli_command(arguments)?, code)?.stdout)
    }

    /// `pillion run --policy desk.yaml --`, to be completed.
    pub(super) fn pillion_run(&self) -> Result<Command> {
        let mut command = pillion()?;
        command.arg("run").arg("--state-dir").arg(self.agent.state_dir());
        command.arg("--run-dir").arg(self.agent.run_dir()).arg("--pin-root").arg(self.agent.pin_root());
        command.arg("--policy").arg(self.machine.directory().join("desk.yaml")).arg("--");
        Ok(command)
    }

    /// Waits until a container is attached and its companion is ready.
    pub(super) fn attached(&self, name: &str) -> Result<()> {
        let ready = |workload: &Value| {
            workload["verdict"] == "attached" && workload["companions"][0]["state"] == "ready"
        };
        self.agent.until(&Town::workload(name), "attached", ready).map(drop)
    }

    /// The pid of a container's companion.
    pub(super) fn companion(&self, name: &str) -> Result<i32> {
        let workload = self.agent.workload(&Town::workload(name))?.context("the agent knows it")?;
        let pid = workload["companions"][0]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.with_context(|| format!("no companion runs: {workload}"))
    }

    /// A record as the relay has written it, with the fields in their order.
    pub(super) fn as_logged(&self, record: &Value) -> Result<String> {
        let log = self.agent.log()?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut messages = lines.filter_map(|line| {
            let text = line.pointer("/fields/message").or_else(|| line.get("message"))?.as_str()?.to_owned();
            (serde_json::from_str::<Value>(&text).ok()? == *record).then_some(text)
        });
        messages.next().with_context(|| format!("not in the log as it is: {record}"))
    }

    /// How many outbound connections of a container the relay has recorded.
    pub(super) fn records_out(&self, name: &str) -> Result<usize> {
        let id = Town::workload(name);
        let own = |record: &&Value| record["workload"] == *id && record["direction"] == "outbound";
        Ok(self.agent.records()?.iter().filter(own).count())
    }
}

/// `pillion`, to be completed.
pub(super) fn pillion() -> Result<Command> {
    Ok(hermetic(programs::pillion()?))
}

/// An error unless `wanted` is in `text`.
pub(super) fn expect(text: &str, wanted: &str) -> Result<()> {
    ensure!(text.contains(wanted), "expected {wanted:?} in what it printed: {text}");
    Ok(())
}

/// The relay's record among lines.
pub(super) fn record_in(lines: &str) -> Result<Value> {
    let record = lines.lines().find_map(|line| serde_json::from_str(line).ok());
    record.with_context(|| format!("no record of the relay in: {lines}"))
}

/// Gone, or a zombie: a dead agent's companion is reaped by init, which may take its time.
pub(super) fn is_dead(pid: i32) -> bool {
    procfs::process::Process::new(pid).and_then(|it| it.stat()).map_or(true, |stat| stat.state == 'Z')
}
