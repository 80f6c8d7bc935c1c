//! The conflict doctor's words: eBPF programs of others that run for the same sockets as Pillion's, for `check` and `describe`.
//!
//! Owns where to look and how it is told. What is found, and what is at stake, is the redirection crate's.

use std::{fmt::Write as _, path::PathBuf};

use pillion_redirect::{Neighbour, Order, neighbours_of};
use pillion_runtime::instance_of;
use pillion_workload::Pid;

use crate::{
    api::WorkloadDetail,
    render::{Cell, Paint, Table, Tone, plain_lines},
};

/// How to look for those around a workload, which takes system calls; nothing for one that cannot be attached.
pub(crate) fn of(detail: &WorkloadDetail) -> Option<impl FnOnce() -> Vec<Neighbour> + Send + use<>> {
    let instance = detail.instance.clone()?;
    let companions: Vec<i32> =
        detail.summary.companions.iter().filter_map(|companion| companion.pid).collect();
    Some(move || {
        // One that has ended meanwhile has no cgroup.
        let companions: Vec<PathBuf> =
            companions.into_iter().filter_map(|pid| Some(instance_of(Pid(pid)).ok()?.cgroup.path)).collect();
        let netns = PathBuf::from(format!("/proc/{}/ns/net", instance.process.pid));
        neighbours_of(&instance.cgroup.path, &netns, &companions).unwrap_or_else(|error| {
            tracing::warn!(%error, "eBPF programs of others cannot be looked for");
            Vec::new()
        })
    })
}

/// Program by program, and then what is at stake.
pub(crate) fn table(neighbours: &[Neighbour], paint: Paint) -> String {
    let mut table = Table::new(&["PROGRAM", "RUNS AT", "ON", "ORDER", "OWNER"]);
    for neighbour in neighbours {
        let tone = if neighbour.at_stake.is_some() { Tone::Warn } else { Tone::Plain };
        table.row(vec![
            named(neighbour).into(),
            (&neighbour.attach_type).into(),
            (&neighbour.at).into(),
            Cell::toned(order(neighbour.order), tone),
            owner(neighbour).into(),
        ]);
    }
    let mut out = table.render(paint);
    for neighbour in neighbours {
        if let Some(stake) = &neighbour.at_stake {
            let name = paint.tone(Tone::Warn, &named(neighbour));
            let _ = writeln!(out, "{name}, {}: {stake}", neighbour.attach_type);
        }
    }
    out
}

/// In a sentence.
pub(crate) fn sentence(neighbour: &Neighbour) -> String {
    let Neighbour { attach_type, at, .. } = neighbour;
    format!(
        "{} runs at {attach_type} on {at}, {}, {}",
        named(neighbour),
        order(neighbour.order),
        owner(neighbour)
    )
}

/// Names and paths are others': nothing in them may look like a line of ours.
fn named(neighbour: &Neighbour) -> String {
    plain_lines(&format!("{} (id {})", neighbour.name, neighbour.program)).replace('\n', " ")
}

fn owner(neighbour: &Neighbour) -> String {
    if neighbour.owners.is_empty() {
        return "held by no process and no pin".to_owned();
    }
    plain_lines(&neighbour.owners.join(", ")).replace('\n', " ")
}

fn order(order: Order) -> &'static str {
    match order {
        Order::Before => "before Pillion's",
        Order::After => "after Pillion's",
        Order::Replaced => "replaced by Pillion's",
        Order::Exclusive => "alone: Pillion's is refused",
    }
}
