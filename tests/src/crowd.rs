//! Many workloads on one data plane, each with an application and a companion: for what is only seen in numbers.

use std::{fs, fs::File, os::fd::AsFd as _, path::Path, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use pillion_redirect::{AttachRequest, Bpffs, Dataplane, LoadOptions, RedirectGuard, Sources};
use pillion_workload::{CompanionName, FailureMode, OutboundRule, RedirectSpec, Target};

use crate::{
    CgroupGuard, Machine, NetNs, Place, Puppet,
    duo::address,
    ready::{identity, ready},
};

/// Where companions listen.
pub const PORT: u16 = 15001;

/// A network namespace with a companion, and an application that can enter any workload's cgroup.
#[derive(Debug)]
pub struct Site {
    /// Makes the connections.
    pub app: Puppet,
    /// Keeps what it accepts, see [`Puppet::hold_accepted`].
    pub companion: Puppet,
    /// The companion's.
    pub cgroup: CgroupGuard,
    netns: NetNs,
}

impl Site {
    /// Nothing is attached yet.
    pub fn new() -> Result<Self> {
        let netns = NetNs::new()?;
        // Else no address but loopback can be dialled.
        netns.ip("route add default dev lo")?;
        let cgroup = CgroupGuard::new()?;
        let app = Puppet::start(Place { netns: Some(&netns), cgroup: None })?;
        let mut companion = Puppet::start(Place { netns: Some(&netns), cgroup: Some(&cgroup) })?;
        companion.hold_accepted(address(&format!("127.0.0.1:{PORT}")))??;
        Ok(Self { app, companion, cgroup, netns })
    }

    /// Redirects everything of `workload` to this site's companion, which is taken to be in `companion_cgroup`.
    pub fn attach(
        &self,
        dataplane: &Arc<Dataplane>,
        workload: &CgroupGuard,
        companion_cgroup: &CgroupGuard,
    ) -> Result<RedirectGuard> {
        let name: CompanionName = "companion".parse()?;
        let netns = File::open(self.netns.path())?;
        let rule = OutboundRule::all_tcp(Target { companion: name.clone(), port: Some(PORT) });
        let guard = dataplane.attach(AttachRequest {
            cgroup: &identity(workload)?,
            netns: netns.as_fd(),
            spec: &RedirectSpec { outbound: vec![rule], ..RedirectSpec::default() },
            on_failure: FailureMode::Closed,
            sources: Sources::default(),
            companions: vec![ready(name, self.companion.pid(), companion_cgroup)?],
        })?;
        Ok(guard)
    }
}

/// A data plane of the test's own.
pub fn dataplane(_: &Machine, limits: impl FnOnce(LoadOptions) -> LoadOptions) -> Result<Arc<Dataplane>> {
    let pins = format!("/sys/fs/bpf/pillion-test-{}", std::process::id());
    Ok(Dataplane::load(&limits(LoadOptions::new(pins)))?)
}

/// Ends it.
pub fn end(dataplane: Arc<Dataplane>) -> Result<()> {
    let mounted = dataplane.mounted_bpffs();
    dataplane.unpin()?;
    drop(dataplane);
    if mounted {
        ensure!(Bpffs::release()?, "something is pinned in the BPF file system");
    }
    Ok(())
}

/// What the kernel says that Pillion's maps take, in bytes: of one of them, or of all. (What cgroup storage takes for each
/// cgroup is not in it.)
pub fn maps_memory(only: Option<&str>) -> Result<u64> {
    let mut sum = 0;
    for map in aya::maps::loaded_maps().flatten() {
        let name = map.name_as_str().unwrap_or_default().to_owned();
        // The kernel cuts names to 15 bytes.
        if !name.starts_with("PL_") || only.is_some_and(|only| !only.starts_with(&name)) {
            continue;
        }
        let descriptor = map.fd()?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&descriptor.as_fd());
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let memlock = text.lines().find_map(|line| line.strip_prefix("memlock:")).context("memlock")?;
        sum += memlock.trim().parse::<u64>()?;
    }
    Ok(sum)
}

/// A field of `/proc/meminfo` or of a process's status, in bytes.
pub fn memory(file: &Path, field: &str) -> Result<u64> {
    let text = fs::read_to_string(file)?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: u64 = line.with_context(|| field.to_owned())?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
