//! A real systemd as PID 1, with `pillion agent` as a unit of it and an echo server on a cable: what the suite about units plays in.
//!
//! The agent has its default places: within the systemd's mount namespace all but the BPF file system is this test's own.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{EchoServer, End, Finished, Lab, NetNs, programs, scene::KIND, wait_for, wait_until};

const SOON: Duration = Duration::from_secs(30);
/// The address of units in the systemd's own network namespace.
pub const NEAR: &str = "10.77.0.1";
/// The address of the echo server.
pub const FAR: &str = "10.77.0.2";
/// Where the agent has its policies.
const POLICIES: &str = "/etc/pillion/policy.d";

/// See the module.
#[derive(Debug)]
pub struct Booted {
    /// The system.
    pub lab: Lab,
    /// At [`FAR`].
    pub echo: EchoServer,
    /// Where the echo server is.
    pub far: NetNs,
}

/// A workload's id as the agent has it.
pub fn id(unit: &str) -> String {
    format!("systemd/{unit}")
}

/// A policy: these units get these companions, and all their connections go to the one named `c`.
pub fn policy(name: &str, select: &str, companion: &str, on_failure: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: {name} }}\nspec:\n  select: {{ {select} }}\n  companions: [{{ name: c, {companion} }}]\n  \
         redirect: {{ outbound: [{{ to: c }}] }}\n  onFailure: {on_failure}\n"
    )
}

impl Booted {
    /// Boots; Pillion is not installed yet.
    pub fn new() -> Result<Self> {
        let lab = Lab::up("systemd", None, &[])?;
        let init: u32 = lab.value("INIT_PID")?.parse().context("INIT_PID is a number")?;
        let (near, far) = (NetNs::of(init)?, NetNs::new()?);
        NetNs::join(
            End { netns: &near, device: "far", addresses: &["10.77.0.1/24"] },
            End { netns: &far, device: "near", addresses: &["10.77.0.2/24"] },
        )?;
        let echo = EchoServer::start(&far, &format!("{FAR}:0"))?;
        Ok(Self { lab, echo, far })
    }

    /// Boots and starts the agent as its own unit, `systemd/pillion.service`, of programs that are where they were built.
    pub fn with_agent() -> Result<Self> {
        let booted = Self::new()?;
        let (pillion, checkout) = (programs::pillion()?, programs::checkout());
        programs::hook()?;
        booted.sh(&format!("mkdir -p {POLICIES} && chmod 755 /etc/pillion {POLICIES}"))?;
        booted.file(
            "/etc/systemd/system/pillion.service",
            &fs::read_to_string(checkout.join("systemd/pillion.service"))?,
        )?;
        // The machine may lack the privilege for a lower score.
        booted.file(
            "/etc/systemd/system/pillion.service.d/test.conf",
            &format!(
                "[Service]\nExecStart=\nExecStart={} agent --log-format json --containerd-socket none\nOOMScoreAdjust=0\n",
                pillion.display()
            ),
        )?;
        booted.systemctl(&["daemon-reload"])?;
        booted.systemctl(&["start", "pillion.service"])?;
        booted.until_up()?;
        Ok(booted)
    }

    /// Runs a shell's command line inside, to its good end.
    pub fn sh(&self, line: &str) -> Result<Finished> {
        self.lab.run(&["exec", "sh", "-c", line])?.success()
    }

    /// `systemctl ARGUMENTS`, to its good end.
    pub fn systemctl(&self, arguments: &[&str]) -> Result<Finished> {
        self.try_systemctl(arguments)?.success()
    }

    /// `systemctl ARGUMENTS`, however it ends.
    pub fn try_systemctl(&self, arguments: &[&str]) -> Result<Finished> {
        self.lab.run(&[&["exec", "systemctl"], arguments].concat())
    }

    /// Starts units; an error tells what they, and the agent, have logged.
    pub fn start(&self, units: &[&str]) -> Result<()> {
        let done = self.try_systemctl(&[&["start"], units].concat())?;
        let failed = || {
            let logs = units.iter().chain(&["pillion.service"]).map(|unit| {
                format!("--- log of {unit} ---\n{}", self.log(unit).unwrap_or_else(|error| error.to_string()))
            });
            logs.collect::<Vec<_>>().join("\n")
        };
        done.success().with_context(failed).map(drop)
    }

    /// Writes a file inside, with the directories above it.
    pub fn file(&self, path: &str, text: &str) -> Result<()> {
        ensure!(!text.contains("PILLION_END"), "the text must not hold its own end");
        self.sh(&format!(
            "mkdir -p \"$(dirname '{path}')\" && cat >'{path}' <<'PILLION_END'\n{text}\nPILLION_END\n"
        ))
        .map(drop)
    }

    /// Brings in a program of the machine's; returns its path inside.
    pub fn program(&self, program: &Path) -> Result<PathBuf> {
        let name = program.file_name().context("a program has a name")?;
        let path = Path::new("usr/local/bin").join(name);
        let inside = Path::new("/proc").join(self.lab.value("INIT_PID")?).join("root").join(&path);
        fs::copy(program, &inside).with_context(|| format!("cannot copy to {}", inside.display()))?;
        Ok(Path::new("/").join(path))
    }

    /// A service unit, which systemd then knows.
    pub fn unit(&self, name: &str, service: &str) -> Result<()> {
        self.file(&format!("/etc/systemd/system/{name}"), &format!("[Service]\n{service}\n"))?;
        self.systemctl(&["daemon-reload"]).map(drop)
    }

    /// Puts a policy file in place, in one step, and waits until the agent has it in force.
    pub fn policy(&self, name: &str, text: &str) -> Result<()> {
        let before = self.generation()?;
        self.file(&format!("{POLICIES}/.{name}"), text)?;
        self.sh(&format!("mv {POLICIES}/.{name} {POLICIES}/{name}"))?;
        wait_until("the policy in force", SOON, || self.generation().is_ok_and(|now| now != before))
    }

    /// Waits until exactly these names have a drop-in, and systemd has read them.
    pub fn until_drop_ins(&self, wanted: &[&str]) -> Result<()> {
        let mut last = Vec::new();
        let found = wait_until("the drop-ins", SOON, || {
            last = self.drop_ins().unwrap_or_default();
            last == wanted && self.is_read(wanted)
        });
        found.with_context(|| format!("wanted {wanted:?}, there are {last:?}"))
    }

    /// Units, templates and prefixes that have a drop-in, in order.
    pub fn drop_ins(&self) -> Result<Vec<String>> {
        let listed = self.sh("cd /run/systemd/system && ls -d *.d/50-pillion.conf 2>/dev/null || true")?;
        let names = listed.stdout.lines().map(|line| line.trim_end_matches(".d/50-pillion.conf").to_owned());
        Ok(names.collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// Whether systemd runs the hook of each unit among `names`, and of an instance of each template. Prefixes are no units.
    fn is_read(&self, names: &[&str]) -> bool {
        let units = names.iter().filter(|name| !name.ends_with("-.service"));
        units.map(|name| name.replace("@.", "@pillion.")).all(|unit| {
            let shown = self.try_systemctl(&["show", "--property", "ExecCondition,NeedDaemonReload", &unit]);
            shown.is_ok_and(|shown| {
                shown.stdout.contains("pillion-hook") && shown.stdout.contains("NeedDaemonReload=no")
            })
        })
    }

    /// `pillion ARGUMENTS`, however it ends.
    pub fn pillion(&self, arguments: &[&str]) -> Result<Finished> {
        let program: PathBuf = programs::pillion()?;
        let program = program.to_str().context("the program's path is UTF-8")?;
        self.lab.run(&[&["exec", program], arguments].concat())
    }

    /// What a command prints with `-o json`; it may end with 0 or 5.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let done = self.pillion(&[arguments, &["-o", "json"]].concat())?;
        ensure!(matches!(done.status.code(), Some(0 | 5)), "pillion {arguments:?}: {}", done.stderr);
        serde_json::from_str(&done.stdout).with_context(|| format!("not JSON: {}", done.stdout))
    }

    fn generation(&self) -> Result<Value> {
        Ok(self.json(&["status"])?["policies"]["generation"].clone())
    }

    /// Waits until the agent answers and has systemd's answer.
    pub fn until_up(&self) -> Result<()> {
        wait_until("an agent that watches systemd", SOON, || {
            self.json(&["status"]).is_ok_and(|status| {
                let sources = status["sources"].as_array().cloned().unwrap_or_default();
                sources.iter().any(|source| source["name"] == "systemd" && source["state"] == "up")
            })
        })
    }

    /// Waits for a workload that `fits`.
    pub fn until(&self, unit: &str, what: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = None;
        let found = wait_for(&format!("{unit}: {what}"), SOON, || {
            last = self.json(&["describe", &id(unit)]).ok();
            last.clone().filter(&fits)
        });
        found.with_context(|| {
            format!("the last look showed {last:?}\n{}", self.log("pillion.service").unwrap_or_default())
        })
    }

    /// Waits until the agent does not know a unit any more.
    pub fn until_forgotten(&self, unit: &str) -> Result<()> {
        let mut last = String::new();
        let forgotten = wait_until(&format!("an agent that has forgotten {unit}"), SOON, || {
            self.pillion(&["describe", &id(unit)]).is_ok_and(|done| {
                last = done.stdout;
                done.status.code() == Some(1)
            })
        });
        forgotten.with_context(|| {
            format!("the last look showed {last}\n{}", self.log("pillion.service").unwrap_or_default())
        })
    }

    /// What a unit has logged, as the journal has it.
    pub fn log(&self, unit: &str) -> Result<String> {
        Ok(self.sh(&format!("journalctl --no-pager -o cat -u '{unit}'"))?.stdout)
    }

    /// How many records the relay has of connections of a unit to a destination.
    pub fn records(&self, unit: &str, destination: SocketAddr) -> Result<usize> {
        let workload = id(unit);
        Ok(self.records_to(destination)?.iter().filter(|record| record["workload"] == *workload).count())
    }

    /// The relays' records of connections of any unit to a destination.
    pub fn records_to(&self, destination: SocketAddr) -> Result<Vec<Value>> {
        let destination = destination.to_string();
        let log = self.log("pillion.service")?;
        let message = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let text = line.pointer("/fields/message").or_else(|| line.get("message"))?.as_str()?.to_owned();
            serde_json::from_str::<Value>(&text).ok()
        };
        Ok(log.lines().filter_map(message).filter(|record| record["destination"] == *destination).collect())
    }

    /// Waits for exactly so many records.
    pub fn until_records(&self, unit: &str, destination: SocketAddr, wanted: usize) -> Result<()> {
        let mut last = 0;
        let found = wait_until(&format!("{wanted} records of {unit} to {destination}"), SOON, || {
            last = self.records(unit, destination).unwrap_or_default();
            last == wanted
        });
        found.with_context(|| {
            format!("there are {last}:\n{}", self.log("pillion.service").unwrap_or_default())
        })
    }

    /// Stops the agent, cleans up, demands that nothing of Pillion is left, and takes the system down.
    pub fn end(self) -> Result<()> {
        self.systemctl(&["stop", "pillion.service"])?;
        self.pillion(&["cleanup", "--yes"])?.success()?;
        ensure!(self.drop_ins()?.is_empty(), "cleanup left drop-ins");
        let left = self
            .sh("ls -d /var/lib/pillion/* /run/pillion/* /sys/fs/bpf/pillion 2>/dev/null || true")?
            .stdout;
        ensure!(left.is_empty(), "cleanup left {left}");
        self.lab.down()
    }
}
