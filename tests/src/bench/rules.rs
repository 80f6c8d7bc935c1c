//! Whether a connection costs more with more rules, exclusions or attached workloads: `connect()` and `close()` of redirected
//! sockets, against dialling the companion oneself, and of a workload that no policy selects.
//!
//! Owns that measurement. Each case is a workload of its own with a companion of its own, all in one namespace and on one
//! CPU; they take turns within every round. What is attached changes between phases, which come again in every cycle.

use std::{fs, fs::File, net::SocketAddr, os::fd::AsFd as _, path::Path, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use pillion_redirect::{AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, Sources};
use pillion_workload::{CompanionName, FailureMode, OutboundRule, RedirectSpec, Target};
use serde::Serialize;

use super::{
    report::{quartiles, to_float},
    stage::{Peer, pin},
};
use crate::{
    CgroupGuard, NetNs,
    ready::{identity, ready},
};

const CYCLES: u32 = 3;
/// Samples that one turn takes.
const BATCH: u32 = 200;
/// Of workloads that are attached beside those that are measured.
const CROWD: usize = 1000;
/// Of a companion without any program of ours on it; the others' follow.
const PLAIN_PORT: u16 = 15000;

/// What a workload's policy says.
#[derive(Debug, Clone, Copy)]
enum Policy {
    /// One rule for everything, which needs no table.
    Everything,
    /// So many rules, each for a network and a port of its own; the last one is for what is dialled.
    Rules(u32),
    /// One rule for so many networks.
    Networks(u32),
    /// One rule for everything, and a user and a program that are left alone.
    User,
    Program,
}

const CASES: [(&str, Policy); 9] = [
    ("everything", Policy::Everything),
    ("1 rule", Policy::Rules(1)),
    ("10 rules", Policy::Rules(10)),
    ("1,000 rules", Policy::Rules(1000)),
    ("5,000 rules", Policy::Rules(5000)),
    ("10,000 rules", Policy::Rules(10_000)),
    ("1 rule, 10,000 networks", Policy::Networks(10_000)),
    ("an excluded user", Policy::User),
    ("an excluded program", Policy::Program),
];

impl Policy {
    fn spec(self, to: Target) -> Result<RedirectSpec> {
        let all = OutboundRule::all_tcp(to);
        let mut spec = RedirectSpec::default();
        match self {
            Self::Everything => spec.outbound.push(all),
            Self::Rules(count) => {
                for number in 0..count {
                    let mut rule = all.clone();
                    rule.cidrs = networks(number)?.to_vec();
                    rule.ports = [port(number)?].into();
                    spec.outbound.push(rule);
                }
            }
            Self::Networks(count) => {
                let mut rule = all;
                for number in 0..count {
                    rule.cidrs.extend(networks(number)?);
                }
                spec.outbound.push(rule);
            }
            Self::User => {
                spec.outbound.push(all);
                spec.exclude.users = [1337].into();
            }
            Self::Program => {
                spec.outbound.push(all);
                spec.exclude.executables = ["/usr/sbin/not-this-one".into()].into();
            }
        }
        Ok(spec)
    }

    /// What is dialled: of several rules or networks that of the last one.
    fn destination(self, v6: bool) -> Result<SocketAddr> {
        let last = match self {
            Self::Rules(count) | Self::Networks(count) => count - 1,
            Self::Everything | Self::User | Self::Program => 0,
        };
        let network = networks(last)?[usize::from(v6)];
        let address = network.hosts().next().context("a network with a host")?;
        Ok(SocketAddr::new(address, port(last)?))
    }
}

fn networks(number: u32) -> Result<[IpNet; 2]> {
    Ok([
        format!("10.{}.{}.0/24", 100 + number / 256, number % 256).parse()?,
        format!("fd99:0:0:{number:x}::/64").parse()?,
    ])
}

fn port(number: u32) -> Result<u16> {
    Ok(u16::try_from(1000 + number)?)
}

/// A workload with its companion.
struct Case {
    name: &'static str,
    policy: Policy,
    port: u16,
    client: Peer,
    companion: Peer,
    workload: CgroupGuard,
    companion_cgroup: CgroupGuard,
    guard: Option<RedirectGuard>,
}

/// Everything that is measured with.
struct Ground {
    cases: Vec<Case>,
    crowd: Vec<RedirectGuard>,
    crowd_cgroups: Vec<(CgroupGuard, CgroupGuard)>,
    plain: Peer,
    dataplane: Arc<Dataplane>,
    _server: Peer,
    _cgroup: CgroupGuard,
    netns: NetNs,
}

fn serve(netns: &NetNs, cgroup: &CgroupGuard, port: u16) -> Result<Peer> {
    let mut peer =
        Peer::start(netns, cgroup, &["serve", &format!("127.0.0.1:{port}"), &format!("[::1]:{port}")])?;
    peer.line()?;
    Ok(peer)
}

fn target(port: u16) -> Result<Target> {
    Ok(Target { companion: "companion".parse()?, port: Some(port) })
}

impl Ground {
    fn new() -> Result<Self> {
        pin()?;
        let (netns, cgroup) = (NetNs::new()?, CgroupGuard::new()?);
        let mut cases = Vec::new();
        for ((name, policy), port) in CASES.into_iter().zip(PLAIN_PORT + 1..) {
            let (workload, companion_cgroup) = (CgroupGuard::new()?, CgroupGuard::new()?);
            cases.push(Case {
                name,
                policy,
                port,
                client: Peer::start(&netns, &workload, &["measure"])?,
                companion: serve(&netns, &companion_cgroup, port)?,
                workload,
                companion_cgroup,
                guard: None,
            });
        }
        let crowd_cgroups = (0..CROWD).map(|_| Ok((CgroupGuard::new()?, CgroupGuard::new()?)));
        Ok(Self {
            cases,
            crowd: Vec::new(),
            crowd_cgroups: crowd_cgroups.collect::<Result<_>>()?,
            plain: Peer::start(&netns, &cgroup, &["measure"])?,
            dataplane: Dataplane::load(&LoadOptions::new(format!(
                "/sys/fs/bpf/pillion-bench-{}",
                std::process::id()
            )))?,
            _server: serve(&netns, &cgroup, PLAIN_PORT)?,
            _cgroup: cgroup,
            netns,
        })
    }

    fn put_in_force(
        &self,
        spec: &RedirectSpec,
        workload: &CgroupGuard,
        companion: u32,
        companion_cgroup: &CgroupGuard,
    ) -> Result<RedirectGuard> {
        let netns = File::open(self.netns.path())?;
        let name: CompanionName = "companion".parse()?;
        Ok(self.dataplane.attach(AttachRequest {
            cgroup: &identity(workload)?,
            netns: netns.as_fd(),
            spec,
            on_failure: FailureMode::Closed,
            sources: Sources::default(),
            companions: vec![ready(name, companion, companion_cgroup)?],
        })?)
    }

    fn attach(&mut self) -> Result<()> {
        for index in 0..self.cases.len() {
            let case = &self.cases[index];
            let spec = case.policy.spec(target(case.port)?)?;
            let guard =
                self.put_in_force(&spec, &case.workload, case.companion.id(), &case.companion_cgroup)?;
            self.cases[index].guard = Some(guard);
        }
        Ok(())
    }

    fn attach_crowd(&mut self) -> Result<()> {
        let (port, companion) = (self.cases[0].port, self.cases[0].companion.id());
        let spec = Policy::Everything.spec(target(port)?)?;
        let guards = self.crowd_cgroups.iter();
        self.crowd = guards
            .map(|(workload, own)| self.put_in_force(&spec, workload, companion, own))
            .collect::<Result<_>>()?;
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        let cases = self.cases.iter_mut().filter_map(|case| case.guard.take());
        for guard in cases.chain(self.crowd.drain(..)) {
            guard.detach()?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        let counters = self.dataplane.counters()?;
        ensure!(counters.outbound_redirected > 0, "nothing was redirected");
        ensure!(counters.outbound_redirected == counters.destinations_answered, "unanswered: {counters:?}");
        self.detach()?;
        let mounted = self.dataplane.mounted_bpffs();
        self.dataplane.unpin()?;
        drop(self);
        if mounted {
            Bpffs::release()?;
        }
        Ok(())
    }
}

/// A case in a phase: medians of its rounds, and all samples.
struct Series {
    case: &'static str,
    /// How many workloads are attached.
    attached: usize,
    v6: bool,
    medians: Vec<f64>,
    samples: Vec<f64>,
}

/// Times in microseconds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    case: &'static str,
    attached: usize,
    family: &'static str,
    samples: usize,
    quartile1: f64,
    median: f64,
    quartile3: f64,
    /// Median of what the rounds took more than dialling oneself in the same round, with its quartiles; of what is not
    /// attached, more than with nothing attached in the same cycle.
    added: [f64; 3],
}

/// All of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    kernel: String,
    rounds: u32,
    unit: &'static str,
    lines: Vec<Line>,
}

/// Not redirected: dials the companion itself.
const UNMATCHED: &str = "no policy (dials)";

fn note(series: &mut Vec<Series>, case: &'static str, attached: usize, v6: bool, samples: &[u64]) {
    let found = series.iter().position(|s| (s.case, s.attached, s.v6) == (case, attached, v6));
    let index = found.unwrap_or_else(|| {
        series.push(Series { case, attached, v6, medians: Vec::new(), samples: Vec::new() });
        series.len() - 1
    });
    let samples: Vec<f64> = samples.iter().map(|taken| to_float(*taken) / 1000.0).collect();
    series[index].medians.push(quartiles(samples.iter().copied())[1]);
    series[index].samples.extend(samples);
}

/// One phase: `rounds` rounds of those cases, and of a workload without a policy.
fn phase(
    ground: &mut Ground,
    series: &mut Vec<Series>,
    attached: usize,
    cases: usize,
    rounds: u32,
) -> Result<()> {
    for round in 0..=rounds {
        for v6 in [false, true] {
            for turn in 0..=cases {
                let index = (turn + round as usize) % (cases + 1);
                let (name, samples) = if index == cases {
                    let own = if v6 { "::1" } else { "127.0.0.1" };
                    (UNMATCHED, ground.plain.dial(SocketAddr::new(own.parse()?, PLAIN_PORT), BATCH)?)
                } else {
                    let case = &mut ground.cases[index];
                    (case.name, case.client.dial(case.policy.destination(v6)?, BATCH)?)
                };
                // The first round warms caches.
                if round > 0 {
                    note(series, name, attached, v6, &samples);
                }
            }
        }
    }
    Ok(())
}

/// Measures, and writes the figures to `output`.
pub(super) fn run(output: &Path, rounds: u32) -> Result<()> {
    let mut ground = Ground::new()?;
    let mut series = Vec::new();
    let rounds = rounds.div_ceil(CYCLES);
    for _ in 0..CYCLES {
        phase(&mut ground, &mut series, 0, 0, rounds)?;
        ground.attach()?;
        phase(&mut ground, &mut series, CASES.len(), CASES.len(), rounds)?;
        ground.attach_crowd()?;
        phase(&mut ground, &mut series, CASES.len() + CROWD, CASES.len(), rounds)?;
        ground.detach()?;
    }
    ground.end()?;
    let figures = Figures {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        rounds: rounds * CYCLES,
        unit: "microseconds of connect() and close()",
        lines: series.iter().map(|one| line(one, &series)).collect(),
    };
    show(&figures);
    let mut text = serde_json::to_string_pretty(&figures)?;
    text.push('\n');
    fs::write(output, text).with_context(|| format!("cannot write {}", output.display()))
}

fn line(one: &Series, all: &[Series]) -> Line {
    let attached = if one.case == UNMATCHED { 0 } else { one.attached };
    let base = all.iter().find(|s| (s.case, s.attached, s.v6) == (UNMATCHED, attached, one.v6));
    let base: &[f64] = base.map_or(&[], |base| &base.medians);
    let [quartile1, median, quartile3] = quartiles(one.samples.iter().copied());
    Line {
        case: one.case,
        attached: one.attached,
        family: if one.v6 { "v6" } else { "v4" },
        samples: one.samples.len(),
        quartile1,
        median,
        quartile3,
        added: quartiles(one.medians.iter().zip(base).map(|(own, base)| own - base)),
    }
}

#[expect(clippy::print_stdout, reason = "a command line program")]
fn show(figures: &Figures) {
    println!("kernel {}, {} rounds, everything on one CPU", figures.kernel, figures.rounds);
    println!(
        "{:26} {:>8} {:6} {:>8} {:>8} {:>8}   ADDED us",
        "CONNECT AND CLOSE", "ATTACHED", "FAMILY", "Q1 us", "MEDIAN", "Q3 us"
    );
    for line in &figures.lines {
        let [low, middle, high] = line.added;
        println!(
            "{:26} {:>8} {:6} {:8.2} {:8.2} {:8.2}   {middle:+.2} ({low:+.2} to {high:+.2})",
            line.case, line.attached, line.family, line.quartile1, line.median, line.quartile3
        );
    }
}
