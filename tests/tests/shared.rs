//! What several workloads share: a network namespace, cgroups that are within others, a companion that somebody else runs.
//! Each one's connections follow its own policy, whatever the others do.

use std::{
    fs::File,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use pillion_redirect::{
    AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, RedirectRecord, Sources,
};
use pillion_tests::{
    CgroupGuard, EchoServer, NetNs, Place, Puppet, on_machine,
    puppet::{Domain, Socket},
    ready::{identity, ready},
    wait_until,
};
use pillion_workload::{CompanionName, Exclusions, FailureMode, OutboundRule, RedirectSpec, Target};

const SOON: Duration = Duration::from_secs(20);
/// Nobody is there: only a companion can answer.
const NOWHERE: &str = "192.0.2.9:80";

/// A namespace on a cable to an echo server, and a data plane: what the workloads of a test share.
struct Lot {
    dataplane: Arc<Dataplane>,
    pins: String,
    echo: EchoServer,
    near: NetNs,
    _far: NetNs,
}

/// A companion, in a cgroup of its own.
struct Sidecar {
    puppet: Puppet,
    listener: Socket,
    port: u16,
    cgroup: CgroupGuard,
}

impl Lot {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (near, far) = NetNs::pair()?;
        near.ip("route add default via 10.77.0.2")?;
        near.ip("-6 route add default via fd77::2")?;
        let echo = EchoServer::start(&far, "10.77.0.2:2222")?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pins = format!("/sys/fs/bpf/pillion-test-{}-shared-{number}", std::process::id());
        let dataplane = Dataplane::load(&LoadOptions::new(&pins))?;
        Ok(Self { dataplane, pins, echo, near, _far: far })
    }

    fn puppet(&self, cgroup: &CgroupGuard) -> Result<Puppet> {
        Puppet::start(Place { netns: Some(&self.near), cgroup: Some(cgroup) })
    }

    fn sidecar(&self, port: u16) -> Result<Sidecar> {
        self.sidecar_in(CgroupGuard::new()?, port)
    }

    fn sidecar_in(&self, cgroup: CgroupGuard, port: u16) -> Result<Sidecar> {
        let mut puppet = self.puppet(&cgroup)?;
        let listener = puppet.listen(SocketAddr::from(([127, 0, 0, 1], port)))??;
        Ok(Sidecar { puppet, listener, port, cgroup })
    }

    fn attach(&self, cgroup: &CgroupGuard, sidecar: &Sidecar, mode: FailureMode) -> Result<RedirectGuard> {
        self.attach_with(cgroup, sidecar, mode, &[2222])
    }

    fn attach_with(
        &self,
        cgroup: &CgroupGuard,
        sidecar: &Sidecar,
        mode: FailureMode,
        excluded: &[u16],
    ) -> Result<RedirectGuard> {
        let netns = File::open(self.near.path())?;
        Ok(self.dataplane.attach(AttachRequest {
            cgroup: &identity(cgroup)?,
            netns: netns.as_fd(),
            spec: &but(excluded, sidecar.port),
            on_failure: mode,
            sources: Sources { v4: [10, 77, 0, 1].into(), v6: "fd77::1".parse()? },
            companions: vec![ready(name(), sidecar.puppet.pid(), &sidecar.cgroup)?],
        })?)
    }

    fn adopt(&self, record: &RedirectRecord) -> Result<RedirectGuard> {
        let netns = File::open(self.near.path())?;
        Ok(self.dataplane.adopt(record, netns.as_fd())?)
    }

    /// Another agent: programs and memory of its own, on what the one before has left in the kernel.
    fn begin_anew(&mut self) -> Result<()> {
        self.dataplane = Dataplane::load(&LoadOptions::new(&self.pins))?;
        Ok(())
    }

    /// Demands that the connection is made to the server itself: what both policies exclude.
    fn passes(&self, app: &mut Puppet) -> Result<()> {
        let before = self.echo.peers().len();
        assert_eq!(app.converse(self.echo.address(), "directly")?, Ok("directly".to_owned()));
        let peers = self.echo.peers();
        assert_eq!(peers.len(), before + 1);
        ensure!(peers.last().is_some_and(|peer| peer.ip().to_string() == "10.77.0.1"), "{peers:?}");
        Ok(())
    }

    fn end(self) -> Result<()> {
        let counters = self.dataplane.counters()?;
        assert_eq!(
            (counters.slots_busy, counters.by_source, counters.connections),
            (0, 0, 0),
            "not given back"
        );
        let mounted = self.dataplane.mounted_bpffs();
        self.dataplane.unpin()?;
        drop(self);
        if mounted {
            ensure!(Bpffs::release()?, "something is pinned in the BPF file system");
        }
        Ok(())
    }
}

impl Sidecar {
    /// Demands that what `app` dials comes here, with its destination, and that `app` cannot tell.
    fn takes(&mut self, app: &mut Puppet) -> Result<()> {
        let socket = app.socket(Domain::V4)??;
        self.takes_socket(app, socket)
    }

    fn takes_socket(&mut self, app: &mut Puppet, socket: Socket) -> Result<()> {
        let destination: SocketAddr = NOWHERE.parse()?;
        app.connect(socket, destination)?.context("a connection to the companion")?;
        let names = app.names(socket)??;
        assert_eq!((names.peer, names.local.ip().to_string()), (Some(destination), "10.77.0.1".to_owned()));
        let accepted = self.puppet.accept(self.listener)??;
        assert_eq!(self.puppet.original_destination(accepted, Domain::V4)?, Ok(destination));
        self.puppet.close(accepted)??;
        app.close(socket)??;
        Ok(())
    }
}

fn name() -> CompanionName {
    "companion".parse().expect("a valid name")
}

/// All but the echo server's port.
fn all_to(port: u16) -> RedirectSpec {
    but(&[2222], port)
}

fn but(excluded: &[u16], port: u16) -> RedirectSpec {
    let exclude = Exclusions { ports: excluded.iter().copied().collect(), cidrs: vec![] };
    let to = Target { companion: name(), port: Some(port) };
    RedirectSpec { outbound: Some(OutboundRule { to, exclude }), inbound: vec![] }
}

fn refused(app: &mut Puppet) -> Result<()> {
    assert_eq!(app.converse(NOWHERE.parse()?, "refused")?, Err(Errno::ECONNREFUSED));
    Ok(())
}

#[test]
fn neighbours_in_one_namespace_do_not_meet() -> Result<()> {
    on_machine(|_| {
        let lot = Lot::new()?;
        let (one, other) = (CgroupGuard::new()?, CgroupGuard::new()?);
        let (mut app, mut neighbour) = (lot.puppet(&one)?, lot.puppet(&other)?);
        let (mut near, mut next) = (lot.sidecar(15001)?, lot.sidecar(15100)?);
        let guard = lot.attach(&one, &near, FailureMode::Closed)?;
        let beside = lot.attach(&other, &next, FailureMode::Closed)?;
        for _ in 0..20 {
            near.takes(&mut app)?;
            next.takes(&mut neighbour)?;
        }
        // At once, to the same destination, accepted in the other order.
        let sockets = (app.socket(Domain::V4)??, neighbour.socket(Domain::V4)??);
        app.connect(sockets.0, NOWHERE.parse()?)??;
        neighbour.connect(sockets.1, NOWHERE.parse()?)??;
        for sidecar in [&mut next, &mut near] {
            let accepted = sidecar.puppet.accept(sidecar.listener)??;
            assert_eq!(sidecar.puppet.original_destination(accepted, Domain::V4)?, Ok(NOWHERE.parse()?));
            sidecar.puppet.close(accepted)??;
        }
        app.close(sockets.0)??;
        neighbour.close(sockets.1)??;

        // One companion dies; the other workload does not notice.
        let Sidecar { puppet, .. } = near;
        drop(puppet);
        wait_until("a refusal", SOON, || {
            app.converse(NOWHERE.parse().expect("valid"), "?")
                .is_ok_and(|said| said == Err(Errno::ECONNREFUSED))
        })?;
        next.takes(&mut neighbour)?;
        guard.detach()?;
        next.takes(&mut neighbour)?;
        lot.passes(&mut app)?;
        lot.passes(&mut neighbour)?;
        beside.detach()?;
        drop((app, neighbour, next));
        lot.end()
    })
}

/// Two workloads, the cgroup of one being below that of the other, with their companions. Only the inner one's policy leaves
/// the echo server alone.
struct Nested {
    app: Puppet,
    within: Puppet,
    sidecar: Sidecar,
    inmost: Sidecar,
    inner: CgroupGuard,
    _between: CgroupGuard,
    outer: CgroupGuard,
}

impl Nested {
    fn new(lot: &Lot) -> Result<Self> {
        let outer = CgroupGuard::new()?;
        let between = outer.child("between")?;
        let inner = between.child("inner")?;
        Ok(Self {
            app: lot.puppet(&outer)?,
            within: lot.puppet(&inner)?,
            sidecar: lot.sidecar(15001)?,
            inmost: lot.sidecar(15100)?,
            inner,
            _between: between,
            outer,
        })
    }

    fn attach_outer(&self, lot: &Lot) -> Result<RedirectGuard> {
        lot.attach_with(&self.outer, &self.sidecar, FailureMode::Closed, &[])
    }

    fn attach_inner(&self, lot: &Lot) -> Result<RedirectGuard> {
        lot.attach(&self.inner, &self.inmost, FailureMode::Closed)
    }

    /// Each one's connections follow its own policy.
    fn are_apart(&mut self, lot: &Lot) -> Result<()> {
        self.sidecar.takes(&mut self.app)?;
        self.inmost.takes(&mut self.within)?;
        lot.passes(&mut self.within)
    }

    /// The outer policy is everybody's.
    fn are_one(&mut self) -> Result<()> {
        self.sidecar.takes(&mut self.app)?;
        self.sidecar.takes(&mut self.within)
    }
}

#[test]
fn the_innermost_policy_wins_in_whichever_order_they_come() -> Result<()> {
    on_machine(|_| {
        let lot = Lot::new()?;
        let mut nested = Nested::new(&lot)?;
        let outer = nested.attach_outer(&lot)?;
        nested.are_one()?;
        let inner = nested.attach_inner(&lot)?;
        nested.are_apart(&lot)?;
        inner.detach()?;
        nested.are_one()?;
        outer.detach()?;

        let inner = nested.attach_inner(&lot)?;
        let outer = nested.attach_outer(&lot)?;
        nested.are_apart(&lot)?;
        outer.detach()?;
        nested.inmost.takes(&mut nested.within)?;
        lot.passes(&mut nested.app)?;
        // Again, and the outer one is the last to go.
        let outer = nested.attach_outer(&lot)?;
        nested.are_apart(&lot)?;
        inner.detach()?;
        nested.are_one()?;
        outer.detach()?;
        lot.passes(&mut nested.app)?;
        lot.passes(&mut nested.within)?;
        drop(nested);
        lot.end()
    })
}

#[test]
fn a_failing_inner_workload_fails_by_its_own_policy() -> Result<()> {
    on_machine(|_| {
        let lot = Lot::new()?;
        let mut nested = Nested::new(&lot)?;
        let outer = nested.attach_outer(&lot)?;
        let mut inner = nested.attach_inner(&lot)?;
        inner.companion_gone(&name())?;
        refused(&mut nested.within)?;
        nested.sidecar.takes(&mut nested.app)?;
        let (spec, sources) = (all_to(nested.inmost.port), Sources::default());
        inner.update(File::open(lot.near.path())?.as_fd(), &spec, FailureMode::Open, sources)?;
        lot.passes(&mut nested.within)?;
        // Without an outbound rule of its own it is left alone, too.
        let none = RedirectSpec::default();
        inner.update(File::open(lot.near.path())?.as_fd(), &none, FailureMode::Closed, sources)?;
        lot.passes(&mut nested.within)?;
        outer.detach()?;
        inner.detach()?;
        drop(nested);
        lot.end()
    })
}

#[test]
fn nesting_outlives_the_agent() -> Result<()> {
    on_machine(|_| {
        let mut lot = Lot::new()?;
        let mut nested = Nested::new(&lot)?;
        let (outer, inner) = (nested.attach_outer(&lot)?, nested.attach_inner(&lot)?);
        let (record, within) = (outer.record(), inner.record());
        outer.leave();
        inner.leave();
        nested.are_apart(&lot)?;
        lot.begin_anew()?;
        nested.are_apart(&lot)?;
        // Between the two nothing changes.
        let outer = lot.adopt(&record)?;
        nested.are_apart(&lot)?;
        let inner = lot.adopt(&within)?;
        nested.are_apart(&lot)?;
        inner.detach()?;
        nested.are_one()?;
        outer.leave();

        // Killed with the inner one in force, which ends before the next agent comes.
        let inner = nested.attach_inner(&lot)?;
        let within = inner.record();
        inner.leave();
        lot.begin_anew()?;
        let outer = lot.adopt(&record)?;
        nested.are_apart(&lot)?;
        lot.dataplane.discard(&within)?;
        nested.are_one()?;
        outer.detach()?;
        drop(nested);
        lot.end()
    })
}

#[test]
fn what_inner_programs_have_taken_outer_ones_leave() -> Result<()> {
    on_machine(|_| {
        let lot = Lot::new()?;
        let mut nested = Nested::new(&lot)?;
        let (outer, inner) = (nested.attach_outer(&lot)?, nested.attach_inner(&lot)?);
        // The socket stays in the inner cgroup, its process does not: both programs act on its connect.
        let socket = nested.within.socket(Domain::V4)??;
        nested.outer.add(nested.within.pid())?;
        nested.inmost.takes_socket(&mut nested.within, socket)?;
        let counters = lot.dataplane.counters()?;
        assert_eq!((counters.outbound_redirected, counters.destinations_stale), (1, 0));
        inner.detach()?;
        outer.detach()?;
        drop(nested);
        lot.end()
    })
}
