//! Namespaces, cgroups, data plane and rules of the measurement, and the peers placed within.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::fd::AsFd as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid as NixPid,
};
use pillion_redirect::{AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, Sources};
use pillion_workload::{CompanionName, FailureMode, OutboundRule, RedirectSpec, Target};
use serde::Serialize;

use super::{Kind, peers::Order};
use crate::{
    CgroupGuard, NetNs,
    ready::{identity, ready},
    wait_for,
};

const PORT: u16 = 15001;
/// Of a companion without any program of ours on it, which is dialled by its own address.
const PLAIN_PORT: u16 = 15002;

/// How the client reaches its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    /// No companion: the server in the other namespace.
    Direct,
    /// The client dials the companion by its own address.
    Dial,
    /// The client dials the server, eBPF takes it to the companion.
    Pillion,
    /// The same by `iptables -t nat -j REDIRECT`, in a namespace of its own.
    Iptables,
    /// By `pillion run` with the embedded relay, to the server in the other namespace.
    Relay,
}

pub(super) const MODES: [Mode; 4] = [Mode::Direct, Mode::Dial, Mode::Pillion, Mode::Iptables];

/// This process and all that it starts on one CPU.
pub(super) fn pin() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(CpuSet::count().min(std::thread::available_parallelism()?.get()) - 1)?;
    sched_setaffinity(NixPid::from_raw(0), &cpus).context("cannot pin to one CPU")
}

/// A child process with its input and output.
pub(super) struct Peer {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    pub(super) fn start(netns: &NetNs, cgroup: &CgroupGuard, arguments: &[&str]) -> Result<Self> {
        let mut command = cgroup.command(std::env::current_exe()?);
        command.args(arguments);
        Self::spawn(netns, &mut command)
    }

    pub(super) fn spawn(netns: &NetNs, command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = netns.run(|| command.spawn()).context("cannot start a peer")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("a pipe")?);
        Ok(Self { child, stdin, stdout })
    }

    pub(super) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(!line.is_empty(), "a peer has ended");
        Ok(line)
    }

    /// One turn of a peer that measures: `batch` samples in nanoseconds, of talking to the server in the other namespace.
    pub(super) fn sample(&mut self, kind: Kind, v6: bool, batch: u32) -> Result<Vec<u64>> {
        self.carry_out(&Order { kind, destination: server(v6)?, batch })
    }

    /// As many samples of `connect()` and `close()`.
    pub(super) fn dial(&mut self, destination: SocketAddr, batch: u32) -> Result<Vec<u64>> {
        self.carry_out(&Order { kind: Kind::Connect, destination, batch })
    }

    /// Its pid.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    fn carry_out(&mut self, order: &Order) -> Result<Vec<u64>> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        self.stdin.as_mut().context("a running peer")?.write_all(line.as_bytes())?;
        let samples: Vec<u64> = serde_json::from_str(&self.line()?)?;
        ensure!(samples.len() == order.batch as usize, "{} samples: {order:?}", samples.len());
        Ok(samples)
    }

    /// Ends it in an orderly way, by the end of its input.
    pub(super) fn finish(mut self, patience: Duration) -> Result<()> {
        self.stdin = None;
        let child = &mut self.child;
        let status = wait_for("a peer to end", patience, || child.try_wait().ok().flatten())?;
        ensure!(status.success(), "a peer ended with {status}");
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stdin = None;
        // The end of its input ends it; a peer in the middle of something is killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the peer in the other namespace serves.
fn server(v6: bool) -> Result<SocketAddr> {
    Ok(if v6 { "[fd77::2]:80" } else { "10.77.0.2:80" }.parse()?)
}

/// Everything that is measured with.
pub(super) struct Stage {
    guard: Option<RedirectGuard>,
    dataplane: Arc<Dataplane>,
    plain: Peer,
    workload: Peer,
    iptables: Peer,
    _servers: Vec<Peer>,
    _cgroups: Vec<CgroupGuard>,
    _namespaces: Vec<NetNs>,
}

impl Stage {
    pub(super) fn new() -> Result<Self> {
        pin()?;
        let ((near, far), (near_nat, far_nat)) = (NetNs::pair()?, NetNs::pair()?);
        for (tool, target) in [("iptables", "10.77.0.2"), ("ip6tables", "fd77::2")] {
            let rule = format!("-t nat -A OUTPUT -d {target} -p tcp -j REDIRECT --to-ports {PORT}");
            let status = near_nat.run(|| Command::new(tool).args(rule.split(' ')).status())?;
            ensure!(status.success(), "{tool} cannot redirect");
        }
        let (workload, companion, others) = (CgroupGuard::new()?, CgroupGuard::new()?, CgroupGuard::new()?);
        let own = [format!("127.0.0.1:{PORT}"), format!("[::1]:{PORT}")];
        let serve = ["serve", &own[0], &own[1]];
        let plain = [format!("127.0.0.1:{PLAIN_PORT}"), format!("[::1]:{PLAIN_PORT}")];
        let mut servers = vec![
            Peer::start(&near, &companion, &serve)?,
            Peer::start(&near, &others, &["serve", &plain[0], &plain[1]])?,
            Peer::start(&near_nat, &others, &serve)?,
            Peer::start(&far, &others, &["serve", "10.77.0.2:80", "[fd77::2]:80"])?,
            Peer::start(&far_nat, &others, &["serve", "10.77.0.2:80", "[fd77::2]:80"])?,
        ];
        for server in &mut servers {
            server.line()?;
        }
        let pins = format!("/sys/fs/bpf/pillion-bench-{}", std::process::id());
        let dataplane = Dataplane::load(&LoadOptions::new(pins))?;
        let name: CompanionName = "companion".parse()?;
        let outbound = OutboundRule::all_tcp(Target { companion: name.clone(), port: Some(PORT) });
        let netns = File::open(near.path())?;
        let ready = ready(name, servers[0].child.id(), &companion)?;
        let guard = dataplane.attach(AttachRequest {
            cgroup: &identity(&workload)?,
            netns: netns.as_fd(),
            spec: &RedirectSpec { outbound: vec![outbound], ..RedirectSpec::default() },
            on_failure: FailureMode::Closed,
            sources: Sources { v4: [10, 77, 0, 1].into(), v6: "fd77::1".parse()? },
            companions: vec![ready],
        })?;
        Ok(Self {
            guard: Some(guard),
            dataplane,
            plain: Peer::start(&near, &others, &["measure"])?,
            workload: Peer::start(&near, &workload, &["measure"])?,
            iptables: Peer::start(&near_nat, &others, &["measure"])?,
            _servers: servers,
            _cgroups: vec![workload, companion, others],
            _namespaces: vec![near, far, near_nat, far_nat],
        })
    }

    /// One turn: `batch` samples in nanoseconds.
    pub(super) fn sample(&mut self, mode: Mode, kind: Kind, v6: bool, batch: u32) -> Result<Vec<u64>> {
        let server = server(v6)?;
        let own = SocketAddr::new(if v6 { "::1" } else { "127.0.0.1" }.parse()?, PLAIN_PORT);
        let (client, destination) = match mode {
            Mode::Direct => (&mut self.plain, server),
            Mode::Dial => (&mut self.plain, own),
            Mode::Pillion => (&mut self.workload, server),
            Mode::Iptables => (&mut self.iptables, server),
            Mode::Relay => bail!("there is no relay on this stage"),
        };
        client.carry_out(&Order { kind, destination, batch })
    }

    /// What was measured as redirected must have been redirected, every time.
    pub(super) fn check(&self) -> Result<()> {
        let counters = self.dataplane.counters()?;
        ensure!(counters.outbound_redirected > 0, "nothing was redirected");
        ensure!(counters.outbound_redirected == counters.destinations_answered, "unanswered: {counters:?}");
        Ok(())
    }

    pub(super) fn end(mut self) -> Result<()> {
        if let Some(guard) = self.guard.take() {
            guard.detach()?;
        }
        let mounted = self.dataplane.mounted_bpffs();
        self.dataplane.unpin()?;
        drop(self);
        if mounted {
            Bpffs::release()?;
        }
        Ok(())
    }
}
