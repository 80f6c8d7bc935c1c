//! The data plane on the real kernel, without agent and relay: an application and a companion, both puppets, in the same
//! network namespace and in cgroups of their own.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use pillion_redirect::{AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, Sources};
use pillion_tests::{
    CgroupGuard, End, Machine, NetNs, Place, Puppet, on_machine,
    puppet::{Audited, Domain, Socket},
    ready::{identity, ready},
    wait_until,
};
use pillion_workload::{
    CompanionName, Exclusions, FailureMode, InboundRule, OutboundRule, ReadyCompanion, RedirectSpec, Target,
};

const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;

/// A workload's namespace on a cable to another host, a data plane, an application and its companion.
struct Stage {
    guard: Option<RedirectGuard>,
    app: Puppet,
    companion: Puppet,
    remote: Puppet,
    by4: Socket,
    by6: Socket,
    dataplane: Arc<Dataplane>,
    workload: CgroupGuard,
    // Dropped last: the processes above are inside.
    _nested: CgroupGuard,
    companion_cgroup: CgroupGuard,
    near: NetNs,
    _far: NetNs,
}

/// Whether this is part of the suite `oldest`, which has all of this run on a data plane that does without what the oldest
/// kernel lacks.
fn on_the_oldest() -> bool {
    module_path!().starts_with("oldest::")
}

/// What a refused `connect()` returns. Where a program cannot say why, the kernel refuses the connection.
fn refused(why: Errno) -> Errno {
    if on_the_oldest() { Errno::ECONNREFUSED } else { why }
}

fn name() -> CompanionName {
    "companion".parse().expect("a valid name")
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn to(port: u16) -> Target {
    Target { companion: name(), port: Some(port) }
}

fn outbound() -> RedirectSpec {
    let exclude = Exclusions {
        ports: [2222].into(),
        cidrs: vec!["10.77.9.0/24".parse().expect("a network"), "fd77:9::/64".parse().expect("a network")],
    };
    let rule = OutboundRule { exclude, ..OutboundRule::all_tcp(to(OUTBOUND)) };
    RedirectSpec { outbound: vec![rule], ..RedirectSpec::default() }
}

/// Everything, for a flood: its destinations have every port.
fn all() -> RedirectSpec {
    RedirectSpec { outbound: vec![OutboundRule::all_tcp(to(OUTBOUND))], ..RedirectSpec::default() }
}

fn inbound() -> RedirectSpec {
    let rule = InboundRule { ports: [8080].into(), to: to(INBOUND) };
    RedirectSpec { inbound: vec![rule], ..RedirectSpec::default() }
}

impl Stage {
    fn new(machine: &Machine) -> Result<Self> {
        Self::with_slots(machine, 65_536)
    }

    /// The application is in a cgroup below the workload's. The companion listens on the outbound port, on both families.
    fn with_slots(_: &Machine, slots: u32) -> Result<Self> {
        let (near, far) = (NetNs::new()?, NetNs::new()?);
        NetNs::join(
            End { netns: &near, device: "far", addresses: &["10.77.0.1/24", "fd77::1/64"] },
            End {
                netns: &far,
                device: "near",
                addresses: &["10.77.0.2/24", "10.77.9.2/24", "fd77::2/64", "fd77:9::2/64"],
            },
        )?;
        near.ip("route add default via 10.77.0.2")?;
        near.ip("-6 route add default via fd77::2")?;
        let workload = CgroupGuard::new()?;
        let nested = workload.child("nested")?;
        let companion_cgroup = CgroupGuard::new()?;
        let pins = format!("/sys/fs/bpf/pillion-test-{}-{}", std::process::id(), workload.id()?);
        let options = LoadOptions {
            slots,
            slot_expiry: Duration::from_secs(600),
            as_on_the_oldest_kernel: on_the_oldest(),
            ..LoadOptions::new(pins)
        };
        let dataplane = Dataplane::load(&options)?;
        let app = Puppet::start(Place { netns: Some(&near), cgroup: Some(&nested) })?;
        let mut companion = Puppet::start(Place { netns: Some(&near), cgroup: Some(&companion_cgroup) })?;
        let remote = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
        let by4 = companion.listen(address(&format!("127.0.0.1:{OUTBOUND}")))??;
        let by6 = companion.listen(address(&format!("[::1]:{OUTBOUND}")))??;
        Ok(Self {
            guard: None,
            app,
            companion,
            remote,
            by4,
            by6,
            dataplane,
            workload,
            _nested: nested,
            companion_cgroup,
            near,
            _far: far,
        })
    }

    fn attach(&mut self, spec: &RedirectSpec, on_failure: FailureMode) -> Result<()> {
        let ready = self.ready()?;
        self.attach_to(spec, on_failure, vec![ready])
    }

    fn attach_to(
        &mut self,
        spec: &RedirectSpec,
        on_failure: FailureMode,
        companions: Vec<ReadyCompanion>,
    ) -> Result<()> {
        let netns = File::open(self.near.path())?;
        self.guard = Some(self.dataplane.attach(AttachRequest {
            cgroup: &identity(&self.workload)?,
            netns: netns.as_fd(),
            spec,
            on_failure,
            sources: Sources { v4: [10, 77, 0, 1].into(), v6: "fd77::1".parse()? },
            companions,
        })?);
        Ok(())
    }

    fn guard(&mut self) -> &mut RedirectGuard {
        self.guard.as_mut().expect("attached")
    }

    fn ready(&self) -> Result<ReadyCompanion> {
        ready(name(), self.companion.pid(), &self.companion_cgroup)
    }

    /// Accepts the connection that the application has made, and asks where it wanted to go.
    fn asked(&mut self, listener: Socket, level: Domain) -> Result<std::result::Result<SocketAddr, Errno>> {
        let accepted = self.companion.accept(listener)??;
        let first = self.companion.original_destination(accepted, level)?;
        assert_eq!(self.companion.original_destination(accepted, level)?, first, "a second question");
        self.companion.close(accepted)??;
        Ok(first)
    }

    /// Slots that wait, and destinations kept by source.
    fn busy(&self) -> Result<(u64, u64)> {
        let counters = self.dataplane.counters()?;
        Ok((counters.slots_busy, counters.by_source))
    }

    /// Ends redirection, and its memory of connections that are still open.
    fn detach(&mut self) -> Result<()> {
        let mut guard = self.guard.take().context("attached")?;
        assert_eq!(guard.drain()?, 0);
        guard.detach()?;
        let counters = self.dataplane.counters()?;
        assert_eq!((counters.by_source, counters.connections), (0, 0), "connections that are not forgotten");
        Ok(())
    }

    /// Everything must be given back, and the kernel must have forgotten us.
    fn end(mut self) -> Result<()> {
        assert_eq!(self.busy()?.0, 0, "slots that are not given back");
        if self.guard.is_some() {
            self.detach()?;
        }
        self.close()
    }

    fn close(self) -> Result<()> {
        let mounted = self.dataplane.mounted_bpffs();
        self.dataplane.unpin()?;
        drop(self);
        if mounted {
            ensure!(Bpffs::release()?, "something is pinned in the BPF file system");
        }
        Ok(())
    }
}

#[test]
fn outbound_connections_reach_the_companion_and_keep_their_names() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        stage.attach(&outbound(), FailureMode::Closed)?;
        for (domain, destination, level, answer, source) in [
            (Domain::V4, "192.0.2.9:80", Domain::V4, "192.0.2.9:80", "10.77.0.1"),
            (Domain::V4, "192.0.2.9:80", Domain::V6, "[::ffff:192.0.2.9]:80", "10.77.0.1"),
            (Domain::V6, "[2001:db8::9]:443", Domain::V6, "[2001:db8::9]:443", "fd77::1"),
            (Domain::V6, "[::ffff:192.0.2.9]:80", Domain::V4, "192.0.2.9:80", "::ffff:10.77.0.1"),
            // One's own address from outside is a destination like any other.
            (Domain::V4, "10.77.0.1:9", Domain::V4, "10.77.0.1:9", "10.77.0.1"),
        ] {
            let socket = stage.app.socket(domain)??;
            stage.app.connect(socket, address(destination))?.with_context(|| destination.to_owned())?;
            let names = stage.app.names(socket)??;
            assert_eq!(names.peer, Some(address(destination)));
            assert_eq!(names.local.ip().to_string(), source, "towards {destination}");
            assert_eq!(stage.asked(stage.by4, level)?, Ok(address(answer)));
            stage.app.close(socket)??;
        }
        let counters = stage.dataplane.counters()?;
        assert_eq!((counters.outbound_redirected, counters.destinations_answered), (5, 5));
        assert_eq!((stage.busy()?, counters.connections), ((0, 0), 0), "everything is closed");
        stage.end()
    })
}

#[test]
fn what_is_excluded_or_local_is_left_alone() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        stage.attach(&outbound(), FailureMode::Closed)?;
        let by_port = stage.remote.echo(address("10.77.0.2:2222"))??;
        let by_network = stage.remote.echo(address("10.77.9.2:80"))??;
        let by_network6 = stage.remote.echo(address("[fd77:9::2]:80"))??;
        let mut neighbour = Puppet::start(Place { netns: Some(&stage.near), cgroup: None })?;
        let local = neighbour.echo(address("127.0.0.1:80"))??;
        let local6 = neighbour.echo(address("[::1]:80"))??;
        for destination in [by_port, by_network, by_network6, local, local6, address("[::ffff:10.77.9.2]:80")]
        {
            let said = stage.app.converse(destination, "directly")?;
            assert_eq!(said, Ok("directly".to_owned()), "{destination}");
        }
        // The companion itself, and a neighbour in the namespace, are not in the workload's cgroup.
        let other = stage.remote.echo(address("10.77.0.2:80"))??;
        assert_eq!(stage.companion.converse(other, "upstream")?, Ok("upstream".to_owned()));
        assert_eq!(neighbour.converse(other, "neighbour")?, Ok("neighbour".to_owned()));
        let counters = stage.dataplane.counters()?;
        assert_eq!((counters.outbound_redirected, counters.outbound_excluded), (0, 4));
        stage.end()
    })
}

#[test]
fn bound_sockets_are_found_by_their_source() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        stage.attach(&outbound(), FailureMode::Closed)?;
        // Bound address, destination, by which listener, what getsockname must still say.
        for (domain, bound, destination, by6) in [
            (Domain::V4, "10.77.0.1:40001", "192.0.2.1:80", false),
            (Domain::V4, "0.0.0.0:40002", "192.0.2.2:80", false),
            (Domain::V6, "[fd77::1]:40003", "[2001:db8::3]:80", true),
            (Domain::V6, "[::]:40004", "[2001:db8::4]:80", true),
            (Domain::V6, "[::]:40005", "[::ffff:192.0.2.5]:80", false),
            (Domain::V6, "[::ffff:10.77.0.1]:40006", "[::ffff:192.0.2.6]:80", false),
        ] {
            let socket = stage.app.socket(domain)??;
            stage.app.bind(socket, address(bound))??;
            stage.app.connect(socket, address(destination))?.with_context(|| bound.to_owned())?;
            let names = stage.app.names(socket)??;
            assert_eq!(names.peer, Some(address(destination)));
            assert_eq!(names.local.port(), address(bound).port());
            assert!(!names.local.ip().is_loopback(), "{} is not what {bound} asked for", names.local);
            let (listener, level) = if by6 { (stage.by6, Domain::V6) } else { (stage.by4, Domain::V4) };
            let wanted = destination.replace("[::ffff:", "").replace("]:80", ":80");
            let wanted = if by6 { address(destination) } else { address(&wanted) };
            assert_eq!(stage.asked(listener, level)?, Ok(wanted), "bound to {bound}");
            stage.app.close(socket)??;
        }
        let only = stage.app.socket(Domain::V6)??;
        stage.app.v6_only(only, true)??;
        stage.app.connect(only, address("[2001:db8::7]:80"))??;
        assert_eq!(stage.app.names(only)??.local.ip().to_string(), "fd77::1");
        assert_eq!(stage.asked(stage.by6, Domain::V6)?, Ok(address("[2001:db8::7]:80")));

        let device = stage.app.socket(Domain::V4)??;
        stage.app.bind_device(device, "far")??;
        stage.app.connect(device, address("192.0.2.8:80"))??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(address("192.0.2.8:80")));
        stage.end()
    })
}

#[test]
fn other_ways_to_connect() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        // A socket that was there before.
        let early = stage.app.socket(Domain::V4)??;
        stage.attach(&outbound(), FailureMode::Closed)?;
        stage.app.connect(early, address("192.0.2.1:80"))??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(address("192.0.2.1:80")));

        let nonblocking = stage.app.socket(Domain::V4)??;
        stage.app.nonblocking(nonblocking, true)??;
        let begun = stage.app.connect(nonblocking, address("192.0.2.2:80"))?;
        assert!(matches!(begun, Ok(()) | Err(Errno::EINPROGRESS)), "{begun:?}");
        stage.app.finish_connect(nonblocking)??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(address("192.0.2.2:80")));

        let fast = stage.app.socket(Domain::V4)??;
        stage.app.fast_open(fast, address("192.0.2.3:80"), "early data")??;
        let accepted = stage.companion.accept(stage.by4)??;
        let answer = stage.companion.original_destination(accepted, Domain::V4)?;
        assert_eq!(answer, Ok(address("192.0.2.3:80")));
        assert_eq!(stage.companion.receive(accepted)??, "early data");

        // Multipath TCP is not to be had, as on a kernel without it; elsewhere it is.
        let why = if on_the_oldest() { Errno::EPERM } else { Errno::EPROTONOSUPPORT };
        assert_eq!(stage.app.multipath_socket()?.err(), Some(why));
        if fs::read_to_string("/proc/sys/net/mptcp/enabled").is_ok_and(|enabled| enabled.trim() == "1") {
            stage.companion.multipath_socket()??;
        }

        // The same socket again: to another destination, and then to one that is left alone.
        let again = stage.app.socket(Domain::V4)??;
        stage.app.connect(again, address("192.0.2.4:80"))??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(address("192.0.2.4:80")));
        stage.app.disconnect(again)??;
        stage.app.connect(again, address("192.0.2.5:80"))??;
        assert_eq!(stage.app.names(again)??.peer, Some(address("192.0.2.5:80")));
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(address("192.0.2.5:80")));
        stage.app.disconnect(again)??;
        let excluded = stage.remote.echo(address("10.77.9.2:80"))??;
        stage.app.connect(again, excluded)??;
        let names = stage.app.names(again)??;
        assert_eq!((names.peer, names.local.ip()), (Some(excluded), address("10.77.0.1:0").ip()));
        stage.app.send(again, "directly")??;
        assert_eq!(stage.app.receive(again)??, "directly");
        stage.end()
    })
}

#[test]
fn the_kernel_applies_the_failure_mode() -> Result<()> {
    on_machine(|machine| {
        for on_failure in [FailureMode::Open, FailureMode::Closed] {
            let mut stage = Stage::new(machine)?;
            let server = stage.remote.echo(address("10.77.0.2:80"))??;
            let server6 = stage.remote.echo(address("[fd77::2]:80"))??;
            let expected = match on_failure {
                FailureMode::Open => Ok("hello".to_owned()),
                FailureMode::Closed => Err(Errno::ECONNREFUSED),
            };
            // Before the companion is ready.
            stage.attach_to(&outbound(), on_failure, vec![])?;
            assert_eq!(stage.app.converse(server, "hello")?, expected);
            let ready = stage.ready()?;
            stage.guard().companion_ready(ready)?;
            let socket = stage.app.socket(Domain::V4)??;
            stage.app.connect(socket, server)??;
            assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(server));
            // Its sockets closed: nobody has to tell the kernel.
            let (by4, by6) = (stage.by4, stage.by6);
            stage.companion.close(by4)??;
            stage.companion.close(by6)??;
            assert_eq!(stage.app.converse(server, "hello")?, expected);
            assert_eq!(stage.app.converse(server6, "hello")?, expected);
            // Its port taken by somebody else, who is not to have the traffic.
            let mut thief = Puppet::start(Place { netns: Some(&stage.near), cgroup: None })?;
            thief.echo(address(&format!("127.0.0.1:{OUTBOUND}")))??;
            assert_eq!(stage.app.converse(server, "hello")?, expected);
            let counters = stage.dataplane.counters()?;
            match on_failure {
                FailureMode::Open => assert_eq!(counters.outbound_failed_open, 4),
                FailureMode::Closed => assert_eq!(counters.outbound_failed_closed, 4),
            }
            stage.end()?;
        }
        Ok(())
    })
}

#[test]
fn an_unready_family_and_a_link_local_destination_follow_the_failure_mode() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        stage.attach(&outbound(), FailureMode::Closed)?;
        let by6 = stage.by6;
        stage.companion.close(by6)??;
        let only = stage.app.socket(Domain::V6)??;
        stage.app.v6_only(only, true)??;
        let told = stage.app.connect(only, address("[2001:db8::1]:80"))?;
        assert_eq!(told, Err(refused(Errno::EADDRNOTAVAIL)), "a v6-only socket without a v6 listener");
        let link_local = stage.app.socket(Domain::V6)??;
        assert_eq!(stage.app.connect(link_local, address("[fe80::1%2]:80"))?, Err(Errno::ECONNREFUSED));
        stage.end()
    })
}

#[test]
fn inbound_connections_are_steered_to_the_companion() -> Result<()> {
    on_machine(|machine| {
        for on_failure in [FailureMode::Open, FailureMode::Closed] {
            let mut stage = Stage::new(machine)?;
            let app = stage.app.echo(address("[::]:8080"))??;
            let aside = stage.app.echo(address("[::]:8081"))??;
            let by4 = stage.companion.listen(address(&format!("127.0.0.1:{INBOUND}")))??;
            let by6 = stage.companion.listen(address(&format!("[::1]:{INBOUND}")))??;
            stage.dataplane.prepare_inbound(2)?;
            stage.attach(&inbound(), on_failure)?;
            for (listener, destination, level) in
                [(by4, "10.77.0.1:8080", Domain::V4), (by6, "[fd77::1]:8080", Domain::V6)]
            {
                let socket = stage.remote.socket(level)??;
                stage.remote.connect(socket, address(destination))??;
                let accepted = stage.companion.accept(listener)??;
                assert_eq!(stage.companion.names(accepted)??.local, address(destination));
                let answer = stage.companion.original_destination(accepted, level)?;
                assert_eq!(answer, Ok(address(destination)));
                let source = stage.remote.names(socket)??.local;
                assert_eq!(stage.companion.names(accepted)??.peer, Some(source));
                // The companion's own dial reaches the application, by the very address.
                let said = stage.companion.converse(address(destination), "from the companion")?;
                assert_eq!(said, Ok("from the companion".to_owned()));
                let said = stage.app.converse(address(destination), "by its own address")?;
                assert_eq!(said, Ok("by its own address".to_owned()));
            }
            let local = SocketAddr::new("127.0.0.1".parse()?, app.port());
            assert_eq!(stage.app.converse(local, "loopback")?, Ok("loopback".to_owned()));
            let other = SocketAddr::new("10.77.0.1".parse()?, aside.port());
            assert_eq!(stage.remote.converse(other, "no rule")?, Ok("no rule".to_owned()));

            // Dialled directly, a companion's port has no original destination.
            let direct = stage.app.socket(Domain::V4)??;
            stage.app.connect(direct, address(&format!("127.0.0.1:{INBOUND}")))??;
            let accepted = stage.companion.accept(by4)??;
            let answer = stage.companion.original_destination(accepted, Domain::V4)?;
            assert!(matches!(answer, Err(Errno::ENOPROTOOPT | Errno::ENOENT)), "{answer:?}");

            stage.companion.close(by4)??;
            let expected = match on_failure {
                FailureMode::Open => Ok("hello".to_owned()),
                FailureMode::Closed => Err(Errno::ECONNREFUSED),
            };
            assert_eq!(stage.remote.converse(address("10.77.0.1:8080"), "hello")?, expected);
            let counters = stage.dataplane.counters()?;
            assert_eq!(counters.inbound_redirected, 2);
            assert_eq!(counters.inbound_failed_open + counters.inbound_failed_closed, 1);
            stage.end()?;
        }
        Ok(())
    })
}

#[test]
fn rules_change_and_end_without_touching_connections() -> Result<()> {
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        stage.attach(&outbound(), FailureMode::Closed)?;
        let server = stage.remote.echo(address("10.77.0.2:80"))??;
        let socket = stage.app.socket(Domain::V4)??;
        stage.app.connect(socket, server)??;
        let accepted = stage.companion.accept(stage.by4)??;
        assert_eq!(stage.companion.original_destination(accepted, Domain::V4)?, Ok(server));

        let netns = File::open(stage.near.path())?;
        let sources = Sources::default();
        let mut spec = outbound();
        spec.outbound[0].exclude.ports = [80].into();
        stage.guard().update(netns.as_fd(), &spec, FailureMode::Closed, sources)?;
        assert_eq!(stage.app.converse(server, "excluded now")?, Ok("excluded now".to_owned()));
        stage.guard().update(netns.as_fd(), &outbound(), FailureMode::Open, sources)?;
        let again = stage.app.socket(Domain::V4)??;
        stage.app.connect(again, server)??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(server));

        // Left and taken up by the next agent, with the connection and the listeners as they are.
        let record = stage.guard().record();
        stage.guard.take().context("attached")?.leave();
        let third = stage.app.socket(Domain::V4)??;
        stage.app.connect(third, server)??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(server));
        stage.guard = Some(stage.dataplane.adopt(&record, netns.as_fd())?);
        let fourth = stage.app.socket(Domain::V4)??;
        stage.app.connect(fourth, server)??;
        assert_eq!(stage.asked(stage.by4, Domain::V4)?, Ok(server));

        stage.detach()?;
        assert_eq!(stage.app.converse(server, "detached")?, Ok("detached".to_owned()));
        stage.app.send(socket, "still with the companion")??;
        assert_eq!(stage.companion.receive(accepted)??, "still with the companion");
        assert_eq!(
            stage.app.names(socket)??.peer.context("connected")?.port(),
            OUTBOUND,
            "names are the kernel's again"
        );
        stage.end()
    })
}

/// Waits until the companion has dealt with `count` connections.
fn settle(companion: &mut Puppet, count: u32) -> Result<Audited> {
    wait_until("the companion to catch up", Duration::from_secs(120), || {
        companion.audit_seen().is_ok_and(|seen| seen.is_ok_and(|seen| seen.accepted >= count))
    })?;
    companion.audit_stop()?.context("audit")
}

#[test]
fn no_connection_ever_sees_anothers_destination() -> Result<()> {
    const CONNECTIONS: u32 = 200_000;
    on_machine(|machine| {
        let mut stage = Stage::new(machine)?;
        let (by4, by6) = (stage.by4, stage.by6);
        stage.companion.close(by4)??;
        stage.companion.close(by6)??;
        stage.companion.audit(address(&format!("127.0.0.1:{OUTBOUND}")), 2, 1500, 20, true)??;
        stage.attach(&all(), FailureMode::Closed)?;
        let flooded = stage.app.flood(CONNECTIONS, 4)??;
        assert_eq!((flooded.sent, flooded.failed), (CONNECTIONS, [].into()));
        let seen = settle(&mut stage.companion, CONNECTIONS)?;
        let wanted = Audited { accepted: CONNECTIONS, right: CONNECTIONS, ..Audited::default() };
        assert_eq!(seen, wanted);
        let counters = stage.dataplane.counters()?;
        assert_eq!(counters.destinations_answered, u64::from(CONNECTIONS));
        assert_eq!(
            (counters.slots_exhausted, counters.slots_expired, counters.destinations_stale),
            (0, 0, 0)
        );
        stage.end()
    })
}

#[test]
fn slots_run_out_by_policy_and_come_back() -> Result<()> {
    const SLOTS: u32 = 64;
    on_machine(|machine| {
        for on_failure in [FailureMode::Closed, FailureMode::Open] {
            let mut stage = Stage::with_slots(machine, SLOTS)?;
            stage.attach(&all(), on_failure)?;
            let server = stage.remote.echo(address("10.77.0.2:80"))??;
            // The companion accepts nothing: every connection waits with its slot.
            let flooded = stage.app.flood(SLOTS, 1)??;
            assert_eq!((flooded.sent, flooded.failed), (SLOTS, [].into()));
            assert_eq!(stage.busy()?, (u64::from(SLOTS), 0));
            let expected = match on_failure {
                FailureMode::Open => Ok("hello".to_owned()),
                FailureMode::Closed => Err(refused(Errno::EADDRNOTAVAIL)),
            };
            assert_eq!(stage.app.converse(server, "hello")?, expected);
            // One question gives one slot back.
            stage.asked(stage.by4, Domain::V4)??;
            assert_eq!(stage.busy()?, (u64::from(SLOTS) - 1, 0));
            let socket = stage.app.socket(Domain::V4)??;
            stage.app.connect(socket, server)??;
            for _ in 1..=SLOTS {
                stage.asked(stage.by4, Domain::V4)??;
            }
            assert!(stage.dataplane.counters()?.slots_exhausted >= 1);
            stage.end()?;
        }
        Ok(())
    })
}

#[test]
fn a_companion_that_never_asks_leaks_nothing() -> Result<()> {
    const CONNECTIONS: u32 = 10_000;
    on_machine(|machine| {
        // Far fewer slots than connections, so that a leak would show as a refusal.
        let mut stage = Stage::with_slots(machine, 4096)?;
        let (by4, by6) = (stage.by4, stage.by6);
        stage.companion.close(by4)??;
        stage.companion.close(by6)??;
        stage.companion.audit(address(&format!("127.0.0.1:{OUTBOUND}")), 1, 256, 0, false)??;
        stage.attach(&all(), FailureMode::Closed)?;
        let flooded = stage.app.flood(CONNECTIONS, 2)??;
        assert_eq!((flooded.sent, flooded.failed), (CONNECTIONS, [].into()));
        assert_eq!(settle(&mut stage.companion, CONNECTIONS)?.accepted, CONNECTIONS);
        // By source as well.
        let bound = stage.app.socket(Domain::V4)??;
        stage.app.bind(bound, address("10.77.0.1:40001"))??;
        assert_eq!(
            stage.app.connect(bound, address("192.0.2.1:80"))?,
            Err(Errno::ECONNREFUSED),
            "nobody listens"
        );
        stage.end()
    })
}
