//! What several workloads share: a network namespace, cgroups that are within others, a companion that somebody else runs.
//! Each one's connections follow its own policy, whatever the others do.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_redirect::{
    AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, RedirectRecord, Sources,
};
use pillion_tests::{
    CgroupGuard, EchoServer, Machine, NetNs, Place, ProcessGuard, Puppet, on_machine, programs,
    puppet::{Domain, Socket},
    ready::{identity, ready},
    scene::{KIND, Scene, companion_pid, connected, id, source_is, still_answers},
    wait_until,
};
use pillion_workload::{CompanionName, Exclusions, FailureMode, OutboundRule, RedirectSpec, Target};
use serde_json::Value;

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
    let rule = OutboundRule { exclude, ..OutboundRule::all_tcp(to) };
    RedirectSpec { outbound: vec![rule], ..RedirectSpec::default() }
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

#[test]
fn one_companion_serves_several_workloads() -> Result<()> {
    on_machine(|_| {
        let lot = Lot::new()?;
        let (one, other) = (CgroupGuard::new()?, CgroupGuard::new()?);
        let (mut app, mut neighbour) = (lot.puppet(&one)?, lot.puppet(&other)?);
        let mut common = lot.sidecar(15001)?;
        let guard = lot.attach(&one, &common, FailureMode::Closed)?;
        let mut beside = lot.attach(&other, &common, FailureMode::Closed)?;
        for _ in 0..10 {
            common.takes(&mut app)?;
            common.takes(&mut neighbour)?;
        }
        // For one of them it is gone; it is still told where the other's connections go.
        beside.companion_gone(&name())?;
        refused(&mut neighbour)?;
        common.takes(&mut app)?;
        beside.companion_ready(ready(name(), common.puppet.pid(), &common.cgroup)?)?;
        guard.detach()?;
        common.takes(&mut neighbour)?;
        lot.passes(&mut app)?;
        beside.detach()?;
        drop((app, neighbour, common));
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

/// Containers with the label `app=web` send what they dial to an Envoy that is there already, as user 65534 in a cgroup of
/// its own within theirs.
fn mesh(more: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: mesh }}\nspec:\n  select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
         companions: [{{ name: mesh, external: {{ users: [65534], executables: [\"*/envoy\"], cgroup: \"*/mesh\" }}{more} }}]\n  \
         redirect: {{ outbound: [{{ to: \"mesh:15001\" }}] }}\n  onFailure: closed\n"
    )
}

/// The Envoy of a mesh, which its owner starts.
struct Mesh<'a> {
    machine: &'a Machine,
    program: PathBuf,
    configuration: PathBuf,
    cgroup: CgroupGuard,
}

impl<'a> Mesh<'a> {
    /// In the cgroup `mesh` below that of a container.
    fn within(machine: &'a Machine, scene: &Scene, container: &str) -> Result<Self> {
        let pid = scene.containerd.pid(container)?;
        let cgroup = CgroupGuard::below(pid, "mesh")?;
        let file = programs::checkout().join("packaging/companions/envoy/envoy.yaml");
        let mut text = fs::read_to_string(file)?;
        for (variable, value) in
            [("workload", "w"), ("companion", "mesh"), ("outboundPort", "15001"), ("inboundPort", "15006")]
        {
            text = text.replace(&format!("{{{{ {variable} }}}}"), value);
        }
        let program = programs::for_everybody(&programs::envoy()?, machine.directory())?;
        Ok(Self { machine, program, configuration: machine.file("mesh.yaml", &text)?, cgroup })
    }

    fn start(&self, scene: &Scene) -> Result<ProcessGuard> {
        let mut command = self.cgroup.command("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&self.program).arg("-c");
        command.arg(&self.configuration).args([
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "-l",
            "warning",
        ]);
        command.current_dir(self.machine.directory());
        ProcessGuard::spawn_in(&scene.near, "envoy", &mut command)
    }
}

/// Says something to the echo server, which must have come through the mesh: it dialled from a port of its own.
fn says_through_mesh(scene: &Scene, app: &mut Puppet) -> Result<()> {
    let before = scene.echo.peers().len();
    let socket = connected(app, scene.echo.address())?;
    let own = app.names(socket)??;
    assert_eq!(own.peer, Some(scene.echo.address()));
    still_answers(app, socket, "through the mesh")?;
    app.close(socket)??;
    let peers = scene.echo.peers();
    ensure!(peers.len() == before + 1, "{} connections for one", peers.len() - before);
    ensure!(peers.last() != Some(&own.local), "it was not relayed");
    Ok(())
}

fn reason(workload: &Value) -> String {
    workload["reason"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_mesh_that_runs_already_is_used_and_left_alone() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        scene.agent.policy("mesh.yaml", &mesh(""))?;
        scene.agent.run()?;
        scene.agent.until_status("containerd", source_is("up"))?;
        let mut app = scene.puppet("web", &[("app", "web")])?;
        let id = id("web");
        let absent = scene.agent.until_verdict(&id, "degraded")?;
        ensure!(reason(&absent).contains("companion mesh is not ready"), "{absent}");
        assert_eq!(app.converse(scene.echo.address(), "?")?, Err(Errno::ECONNREFUSED));

        let mesh = Mesh::within(machine, &scene, "web")?;
        let envoy = mesh.start(&scene)?;
        let attached = scene.agent.until_verdict(&id, "attached")?;
        let companion = &attached["companions"][0];
        assert_eq!(
            (&companion["external"], companion["pid"].as_u64()),
            (&true.into(), Some(envoy.pid().into()))
        );
        for _ in 0..10 {
            says_through_mesh(&scene, &mut app)?;
        }
        let done = app.exchange(scene.echo.address(), 50, 50_000)??;
        assert_eq!((done.exact, done.faults), (50, vec![]));
        // Each of the application's connections was redirected, and none of Envoy's.
        assert_eq!(scene.redirected()?, 60);
        let listed = scene.agent.cli(&["list"])?.success()?.stdout;
        ensure!(listed.contains("mesh(external)"), "{listed}");
        let described = scene.agent.cli(&["describe", &id])?.success()?.stdout;
        ensure!(
            described.contains("external, run by others") && described.contains("user 65534"),
            "{described}"
        );

        // Its owner loses it, and starts it again.
        drop(envoy);
        wait_until("a refusal", SOON, || {
            app.converse(scene.echo.address(), "?").is_ok_and(|said| said == Err(Errno::ECONNREFUSED))
        })?;
        scene.agent.until_verdict(&id, "degraded")?;
        let mut envoy = mesh.start(&scene)?;
        scene.agent.until_verdict(&id, "attached")?;
        says_through_mesh(&scene, &mut app)?;

        // Another agent finds it, and until then the kernel goes on.
        scene.agent.stop(Signal::SIGKILL)?;
        says_through_mesh(&scene, &mut app)?;
        scene.agent.run()?;
        scene.agent.until_verdict(&id, "attached")?;
        for _ in 0..10 {
            says_through_mesh(&scene, &mut app)?;
        }

        fs::remove_file(scene.agent.policy_dir().join("mesh.yaml"))?;
        scene.agent.until_verdict(&id, "notMatched")?;
        scene.says_directly(&mut app)?;
        ensure!(!envoy.has_ended(), "Envoy was ended");
        assert_eq!(
            fs::read_to_string(mesh.cgroup.path().join("cgroup.procs"))?.trim(),
            envoy.pid().to_string()
        );
        drop((envoy, mesh, app));
        scene.end()
    })
}

#[test]
fn who_else_listens_on_the_port_is_not_the_mesh() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        scene.agent.policy("mesh.yaml", &mesh(", ready: { http: { port: 9901, path: /ready } }"))?;
        scene.agent.run()?;
        scene.agent.until_status("containerd", source_is("up"))?;
        let mut app = scene.puppet("web", &[("app", "web")])?;
        let id = id("web");
        let taken = app.listen("127.0.0.1:15001".parse()?)??;
        let told =
            scene.agent.until(&id, "a stranger", |it| reason(it).contains("is not the companion's"))?;
        ensure!(reason(&told).contains("its executable is another"), "{told}");
        assert_eq!(app.converse(scene.echo.address(), "?")?, Err(Errno::ECONNREFUSED));
        app.close(taken)??;
        let mesh = Mesh::within(machine, &scene, "web")?;
        let envoy = mesh.start(&scene)?;
        scene.agent.until_verdict(&id, "attached")?;
        says_through_mesh(&scene, &mut app)?;
        scene.agent.stop(Signal::SIGTERM)?;
        drop((envoy, mesh, app));
        scene.end()
    })
}

#[test]
fn a_companion_in_the_workloads_own_cgroup_would_meet_itself() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        let policy = mesh("").replace(
            "users: [65534], executables: [\"*/envoy\"], cgroup: \"*/mesh\"",
            "executables: [\"*/pillion-puppet\"]",
        );
        scene.agent.policy("mesh.yaml", &policy)?;
        scene.agent.run()?;
        scene.agent.until_status("containerd", source_is("up"))?;
        let mut app = scene.puppet("web", &[("app", "web")])?;
        app.listen("127.0.0.1:15001".parse()?)??;
        let told = scene.agent.until(&id("web"), "a refusal", |it| reason(it).contains("own cgroup"))?;
        ensure!(reason(&told).contains("cgroup of its own"), "{told}");
        assert_eq!(app.converse(scene.echo.address(), "?")?, Err(Errno::ECONNREFUSED));
        scene.end()
    })
}

/// Containers with the label `app=NAME` get a relay.
fn relay(name: &str, redirect: &str, mode: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: {name} }}\nspec:\n  select: {{ runtimes: [containerd], labels: {{ app: {name} }} }}\n  \
         companions: [{{ name: relay, builtin: relay, stopGrace: 2s }}]\n  redirect: {{ {redirect} }}\n  onFailure: {mode}\n"
    )
}

/// The pid of the companion of a workload.
fn companion(scene: &Scene, name: &str) -> Result<i32> {
    let workload = scene.agent.workload(&id(name))?.context("a workload")?;
    Ok(i32::try_from(companion_pid(&workload)?)?)
}

#[test]
fn two_containers_of_one_namespace_have_policies_of_their_own() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        scene.agent.policy("api.yaml", &relay("api", "outbound: [{ to: relay }]", "closed"))?;
        let but = "outbound: [{ to: relay, exclude: { ports: [8080] } }]";
        scene.agent.policy("db.yaml", &relay("db", but, "open"))?;
        scene.agent.run()?;
        scene.agent.until_status("containerd", source_is("up"))?;
        let mut api = scene.puppet("api", &[("app", "api")])?;
        let mut db = scene.puppet("db", &[("app", "db")])?;
        let attached = [
            scene.agent.until_verdict(&id("api"), "attached")?,
            scene.agent.until_verdict(&id("db"), "attached")?,
        ];
        let ports: Vec<_> = attached
            .iter()
            .map(|it| Some(it["ports"]["outbound"].to_string()).filter(|port| port != "null" && port != "[]"))
            .collect();
        ensure!(
            ports[0].is_some() && ports[1].is_some() && ports[0] != ports[1],
            "{ports:?} in {attached:?}"
        );
        scene.says_through_relay(&mut api)?;
        scene.says_directly(&mut db)?;
        // What db's policy does not exclude goes to its own relay, which tells of it.
        let other = EchoServer::start(&scene.far, "10.77.0.2:9090")?;
        for (app, name) in [(&mut db, "db"), (&mut api, "api")] {
            assert_eq!(app.converse(other.address(), name)?, Ok(name.to_owned()));
            let record = scene.agent.record(&id(name), other.address())?;
            assert_eq!(record["bytes_sent"], name.len(), "{record}");
        }

        // One loses its relay; the other does not notice.
        let killed = Pid::from_raw(companion(&scene, "api")?);
        kill(killed, Signal::SIGKILL)?;
        assert_eq!(db.converse(other.address(), "on")?, Ok("on".to_owned()));
        scene.agent.until(&id("api"), "another relay", |it| {
            it["verdict"] == "attached"
                && companion_pid(it).is_ok_and(|pid| pid != i64::from(killed.as_raw()))
        })?;
        scene.says_through_relay(&mut api)?;
        fs::remove_file(scene.agent.policy_dir().join("db.yaml"))?;
        scene.agent.until_verdict(&id("db"), "notMatched")?;
        scene.says_through_relay(&mut api)?;
        scene.says_directly(&mut db)?;
        drop((api, db, other));
        scene.end()
    })
}

#[test]
fn a_port_is_redirected_for_one_workload_of_a_namespace() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        let inbound = "inbound: [{ ports: [8080], to: relay }]";
        scene.agent.policy("api.yaml", &relay("api", inbound, "closed"))?;
        scene.agent.policy("db.yaml", &relay("db", inbound, "open"))?;
        scene.agent.run()?;
        scene.agent.until_status("containerd", source_is("up"))?;
        let mut api = scene.puppet("api", &[("app", "api")])?;
        api.echo("10.77.0.1:8080".parse()?)??;
        scene.agent.until_verdict(&id("api"), "attached")?;
        let db = scene.puppet("db", &[("app", "db")])?;
        let failed = scene.agent.until_verdict(&id("db"), "failed")?;
        ensure!(reason(&failed).contains("port 8080") && reason(&failed).contains(&id("api")), "{failed}");
        let events = scene.agent.cli(&["events"])?.success()?.stdout;
        ensure!(events.contains("is not the only one in this network namespace"), "{events}");
        // The first one keeps it.
        let mut client = Puppet::start(Place { netns: Some(&scene.far), cgroup: None })?;
        let before = scene.agent.counter("inboundRedirected")?;
        assert_eq!(client.converse("10.77.0.1:8080".parse()?, "in")?, Ok("in".to_owned()));
        assert_eq!(scene.agent.counter("inboundRedirected")?, before + 1);
        let record = scene.agent.record(&id("api"), "10.77.0.1:8080".parse()?)?;
        assert_eq!(record["direction"], "inbound", "{record}");
        // And when it is gone, the second one has it.
        fs::remove_file(scene.agent.policy_dir().join("api.yaml"))?;
        scene.agent.until_verdict(&id("api"), "notMatched")?;
        scene.agent.until_verdict(&id("db"), "attached")?;
        drop((api, db, client));
        scene.end()
    })
}

#[test]
fn a_command_run_within_a_workload_has_its_own_policy() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let mut web = scene.web("web")?;
        let policy = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: { name: own }\nspec:\n  \
                      select: { runtimes: [process] }\n  companions: [{ name: relay, builtin: relay }]\n  \
                      redirect: { outbound: [{ to: relay }] }\n  onFailure: closed\n";
        let policy = machine.file("own.yaml", policy)?;
        let cgroup = CgroupGuard::below(scene.containerd.pid("web")?, "shell")?;
        let mut command = cgroup.command(programs::pillion()?);
        command.arg("run").arg("--policy").arg(policy).arg("--").arg(programs::puppet()?);
        let mut within = scene.near.run(|| Puppet::under(&mut command))?;
        for _ in 0..5 {
            let before = scene.redirected()?;
            let socket = connected(&mut within, scene.echo.address())?;
            still_answers(&mut within, socket, "within")?;
            let own = within.names(socket)??.local;
            within.close(socket)??;
            ensure!(scene.echo.peers().last() != Some(&own), "it was not relayed");
            assert_eq!(scene.redirected()?, before, "the outer policy has taken it, or its relay's");
            scene.says_through_relay(&mut web)?;
        }
        ensure!(within.dismiss(SOON)?.success(), "pillion run");
        drop((web, cgroup));
        scene.end()
    })
}
