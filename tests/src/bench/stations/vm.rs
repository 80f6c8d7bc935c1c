//! Another kernel, in a virtual machine: `pillion run`, containers of containerd 1.6 with runc and with crun, and processes held at
//! their exec, all in one boot.
//!
//! The machine is emulated, so how long a start takes there says nothing.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Told, held};
use crate::{
    Machine,
    scene::KIND,
    vm::{Guest, Kernel, SERVER, records},
};

/// For any number of starts that somebody has the time for.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// Has `starts` at each gate.
pub(super) fn measure(machine: &Machine, starts: u32) -> Result<Vec<Told>> {
    let policy = |name: &str, select: &str| {
        let text = format!(
            "{KIND}\nmetadata: {{ name: {name} }}\nspec:\n  select: {{ {select} }}\n  \
             companions: [{{ name: relay, builtin: relay, stopGrace: 1s }}]\n  \
             redirect: {{ outbound: [{{ to: relay }}] }}\n  onFailure: closed\n"
        );
        machine.file(&format!("{name}.yaml"), &text)
    };
    let files = vec![
        machine.file("starts", &starts.to_string())?,
        policy("run", "runtimes: [process]")?,
        policy("containers", "runtimes: [containerd], labels: { app: web }")?,
        policy("programs", "runtimes: [process], executables: [/usr/local/bin/first-held]")?,
    ];
    let guest = Guest::run(machine, Kernel::Debian12, "gates.sh", files, LIMIT)?;
    figures(&guest, starts).with_context(|| format!("the guest printed:\n{}", guest.printed))
}

fn figures(guest: &Guest, starts: u32) -> Result<Vec<Told>> {
    let kernel = guest.ok("kernel")?;
    ensure!(kernel.starts_with("6.1."), "kernel {kernel}");
    // One that was not answered has ended its section.
    for section in ["run", "runc", "crun", "exec", "none-left", "cleanup"] {
        guest.ok(section)?;
    }
    let relayed = |text: &str, workload: &str| {
        let of = |record: &serde_json::Value| {
            record["destination"] == SERVER
                && record["outcome"] == "ok"
                && record["workload"].as_str().is_some_and(|id| id.starts_with(workload))
        };
        records(text).into_iter().filter(of).count()
    };
    let run = Told {
        gate: "vm 6.1, run",
        starts,
        captured: relayed(guest.ok("run")?, "process/"),
        held: Vec::new(),
    };
    let (log, events) = (guest.ok("agent-log")?, guest.ok("events")?);
    let mut told = vec![run];
    for (gate, workload) in [
        ("vm 6.1, wrapper runc", "containerd/default/runc-"),
        ("vm 6.1, wrapper crun", "containerd/default/crun-"),
        ("vm 6.1, exec", "process/"),
    ] {
        let of =
            |event: &serde_json::Value| event["workload"].as_str().is_some_and(|id| id.starts_with(workload));
        told.push(Told { gate, starts, captured: relayed(log, workload), held: held(events, of)? });
    }
    Ok(told)
}
