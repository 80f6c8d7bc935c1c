//! A workload with two companions, and a far host: for tests of rules that drive the data plane themselves, without an
//! agent.

use std::{fs::File, net::SocketAddr, os::fd::AsFd as _, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use pillion_redirect::{AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, Sources};
use pillion_workload::{FailureMode, RedirectSpec, Target};

use crate::{
    CgroupGuard, End, Machine, NetNs, Place, Puppet,
    puppet::{Answer, Domain, Socket},
    ready::{identity, ready},
};

/// Names of the companions. The first listens on port 15001, the second on 15002.
pub const COMPANIONS: [(&str, u16); 2] = [("one", 15001), ("two", 15002)];

/// A puppet in the role of a companion.
#[derive(Debug)]
pub struct Companion {
    /// Controls it.
    pub puppet: Puppet,
    /// Its listeners for IPv4 and IPv6, on loopback.
    pub listeners: [Socket; 2],
    /// Its sockets for datagrams, on the same ports.
    pub datagrams: [Socket; 2],
    cgroup: CgroupGuard,
}

/// The application is in `near`, in a cgroup below the workload's; `far` is a host that can be reached.
#[derive(Debug)]
pub struct Duo {
    /// What is in force.
    pub guard: Option<RedirectGuard>,
    /// The application.
    pub app: Puppet,
    /// The two companions, in the workload's namespace.
    pub companions: [Companion; 2],
    /// A process on the far host.
    pub remote: Puppet,
    /// Programs and maps.
    pub dataplane: std::sync::Arc<Dataplane>,
    /// The workload's cgroup.
    pub workload: CgroupGuard,
    /// The application's.
    pub nested: CgroupGuard,
    /// The workload's namespace: 10.77.0.1 and `fd77::1`.
    pub near: NetNs,
    _far: NetNs,
}

/// An address, which must be one.
pub fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// One of the companions as a target.
pub fn to(which: usize) -> Target {
    let (name, port) = COMPANIONS[which];
    Target { companion: name.parse().expect("a valid name"), port: Some(port) }
}

impl Duo {
    /// Makes everything; nothing is attached yet. The far host has 10.77.0.2, 10.77.9.2, `fd77::2` and `fd77:9::2`.
    pub fn new(machine: &Machine) -> Result<Self> {
        Self::with(machine, |options| options)
    }

    /// The same with other limits.
    pub fn with(_: &Machine, limits: impl FnOnce(LoadOptions) -> LoadOptions) -> Result<Self> {
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
        let pins = format!("/sys/fs/bpf/pillion-test-{}-{}", std::process::id(), workload.id()?);
        let dataplane = Dataplane::load(&limits(LoadOptions {
            slot_expiry: Duration::from_secs(600),
            ..LoadOptions::new(pins)
        }))?;
        let companion = |(_, port): (&str, u16)| -> Result<Companion> {
            let cgroup = CgroupGuard::new()?;
            let mut puppet = Puppet::start(Place { netns: Some(&near), cgroup: Some(&cgroup) })?;
            let [by4, by6] =
                [format!("127.0.0.1:{port}"), format!("[::1]:{port}")].map(|text| address(&text));
            let listeners = [puppet.listen(by4)??, puppet.listen(by6)??];
            let datagrams = [puppet.datagrams(Domain::V4)??, puppet.datagrams(Domain::V6)??];
            puppet.bind(datagrams[0], by4)??;
            puppet.bind(datagrams[1], by6)??;
            Ok(Companion { puppet, listeners, datagrams, cgroup })
        };
        Ok(Self {
            guard: None,
            app: Puppet::start(Place { netns: Some(&near), cgroup: Some(&nested) })?,
            companions: [companion(COMPANIONS[0])?, companion(COMPANIONS[1])?],
            remote: Puppet::start(Place { netns: Some(&far), cgroup: None })?,
            dataplane,
            workload,
            nested,
            near,
            _far: far,
        })
    }

    /// Puts rules in force.
    pub fn attach(&mut self, spec: &RedirectSpec, on_failure: FailureMode) -> Result<()> {
        let netns = File::open(self.near.path())?;
        let mut companions = Vec::new();
        for ((name, _), companion) in COMPANIONS.iter().zip(&self.companions) {
            companions.push(ready(name.parse()?, companion.puppet.pid(), &companion.cgroup)?);
        }
        self.guard = Some(self.dataplane.attach(AttachRequest {
            cgroup: &identity(&self.workload)?,
            netns: netns.as_fd(),
            spec,
            on_failure,
            sources: sources()?,
            companions,
        })?);
        Ok(())
    }

    /// Puts other rules in force, with all companions.
    pub fn update(&mut self, spec: &RedirectSpec, on_failure: FailureMode) -> Result<()> {
        let netns = File::open(self.near.path())?;
        let guard = self.guard.as_mut().context("attached")?;
        guard.update(netns.as_fd(), spec, on_failure, sources()?)?;
        for ((name, _), companion) in COMPANIONS.iter().zip(&self.companions) {
            guard.companion_ready(ready(name.parse()?, companion.puppet.pid(), &companion.cgroup)?)?;
        }
        Ok(())
    }

    /// Connects on a new socket; says which companion accepted it and was told which destination, or the error.
    pub fn goes_to(&mut self, destination: SocketAddr) -> Result<Answer<(usize, SocketAddr)>> {
        let before: Vec<u64> = self.accepted()?;
        let socket = self.app.socket(Domain::of(destination))??;
        let connected = self.app.connect(socket, destination)?;
        let outcome = if let Err(errno) = connected {
            Err(errno)
        } else {
            let now = self.accepted()?;
            let which = now.iter().zip(&before).position(|(now, then)| now > then);
            which
                .map(|which| self.asked(which))
                .transpose()?
                .zip(which)
                .map(|(told, which)| (which, told))
                .ok_or(Errno::ENOTCONN)
        };
        self.app.close(socket)??;
        Ok(outcome)
    }

    /// Accepts the one connection that waits at a companion and asks for its destination.
    fn asked(&mut self, which: usize) -> Result<SocketAddr> {
        let Companion { puppet, listeners, .. } = &mut self.companions[which];
        let accepted = puppet.accept(listeners[0])??;
        let destination = puppet.original_destination(accepted, Domain::V6)?;
        puppet.close(accepted)??;
        let destination = destination?;
        Ok(SocketAddr::new(destination.ip().to_canonical(), destination.port()))
    }

    /// How many connections wait at each companion's IPv4 listener, of `ss`'s kind of knowledge.
    fn accepted(&self) -> Result<Vec<u64>> {
        let path = format!("/proc/{}/net/tcp", self.app.pid());
        let table = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let waiting = |port: u16| {
            let listener = format!("0100007F:{port:04X}");
            let line = table.lines().find(|line| {
                let mut fields = line.split_whitespace();
                fields.nth(1) == Some(&listener) && fields.nth(1) == Some("0A")
            })?;
            u64::from_str_radix(line.split_whitespace().nth(4)?.split_once(':')?.1, 16).ok()
        };
        COMPANIONS.iter().map(|(_, port)| waiting(*port).context("the companion's listener")).collect()
    }

    /// Ends redirection and everything else; the kernel must have forgotten all of it.
    pub fn end(mut self) -> Result<()> {
        if let Some(mut guard) = self.guard.take() {
            guard.drain()?;
            guard.detach()?;
        }
        let counters = self.dataplane.counters()?;
        assert_eq!((counters.by_source, counters.connections), (0, 0), "connections that are not forgotten");
        let mounted = self.dataplane.mounted_bpffs();
        self.dataplane.unpin()?;
        drop(self);
        if mounted {
            ensure!(Bpffs::release()?, "something is pinned in the BPF file system");
        }
        Ok(())
    }
}

fn sources() -> Result<Sources> {
    Ok(Sources { v4: [10, 77, 0, 1].into(), v6: "fd77::1".parse()? })
}
