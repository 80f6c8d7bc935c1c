//! What all companions of one agent share, and what is particular to one of them.

use std::{
    collections::BTreeSet,
    fmt, io,
    os::fd::OwnedFd,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use pillion_workload::{CgroupId, CompanionSpec, Protocol, WorkloadId};
use tokio::sync::mpsc;

use crate::{
    cgroup::CgroupRoots,
    error::CompanionError,
    launch::Launchers,
    logs::{LogHub, LogLine},
};

/// How companions are run on this node.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Holds `companions/<workload>/<name>/`. Companions look for their files below it under their own users, so it
    /// must be searchable by all (0711).
    pub state_dir: PathBuf,
    /// The `pillion` binary, run as `<launcher> launch` and `<launcher> companion`.
    pub launcher: PathBuf,
    /// Where cgroups are made.
    pub cgroups: CgroupRoots,
    /// `pillion run`: companions die with this process, however it ends. The agent's outlive it.
    pub die_with_parent: bool,
}

/// What all companions of one agent share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Host {
    shared: Arc<Shared>,
}

/// Tells which containers of this node bear a name.
pub trait ContainerNames: fmt::Debug + Send + Sync {
    /// The ids of all containers that Kubernetes knows by this name, in whichever pods.
    fn ids_of<'a>(
        &'a self,
        name: &'a str,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<String>>> + Send + 'a>>;
}

#[derive(Debug)]
struct Shared {
    config: HostConfig,
    logs: LogHub,
    launchers: Launchers,
    leaving: AtomicBool,
    containers: OnceLock<Arc<dyn ContainerNames>>,
}

impl Host {
    /// Must be called within a tokio runtime, on which it starts the task that follows the companions' output and
    /// sends it line by line to `logs`. When `logs` is full the files wait; when its receiver is gone, output is
    /// dropped.
    pub fn new(config: HostConfig, logs: mpsc::Sender<LogLine>) -> Result<Self, CompanionError> {
        let logs = LogHub::spawn(logs).map_err(|source| CompanionError::Logs { source })?;
        let launchers = Launchers::new(config.launcher.clone());
        let (leaving, containers) = (AtomicBool::new(false), OnceLock::new());
        Ok(Self { shared: Arc::new(Shared { config, logs, launchers, leaving, containers }) })
    }

    /// From now on companions that somebody else runs can be known by the names of their containers.
    pub fn tell_container_names(&self, names: Arc<dyn ContainerNames>) {
        // Said once, at the start; a second time would say the same.
        let _ = self.shared.containers.set(names);
    }

    pub(crate) fn container_names(&self) -> Option<&dyn ContainerNames> {
        self.shared.containers.get().map(Arc::as_ref)
    }

    /// How companions are run.
    pub fn config(&self) -> &HostConfig {
        &self.shared.config
    }

    /// From now on dropping a [`crate::Companion`] leaves its process running, to be adopted later: the agent is about
    /// to end. Without this, a dropped companion is killed.
    pub fn leave_all(&self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
    }

    /// Keeps this many processes ready that can become companions: a start has one less to wait for. Must be called
    /// within a tokio runtime.
    pub fn keep_ready(&self, count: usize) {
        self.shared.launchers.keep(count);
    }

    pub(crate) fn launchers(&self) -> &Launchers {
        &self.shared.launchers
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.shared.leaving.load(Ordering::Relaxed)
    }

    pub(crate) fn logs(&self) -> &LogHub {
        &self.shared.logs
    }
}

/// One companion to start.
#[derive(Debug)]
pub struct Launch {
    /// What the plan says.
    pub spec: CompanionSpec,
    /// Whose companion it is.
    pub workload: WorkloadId,
    /// The runtime's name for the workload: `{{ name }}`.
    pub workload_name: String,
    /// The workload's namespace, where the runtime has such: `{{ namespace }}`.
    pub workload_namespace: Option<String>,
    /// The workload's cgroup.
    pub workload_cgroup: CgroupId,
    /// The workload's network namespace.
    pub netns: OwnedFd,
    /// The ports on which redirection expects it.
    pub ports: ResolvedPorts,
}

/// The ports on which a companion must listen, after those that the policy left out were allocated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvedPorts {
    /// For connections that the workload makes: `{{ outboundPort }}`.
    pub outbound: Option<u16>,
    /// For connections that the workload accepts: `{{ inboundPort }}`.
    pub inbound: Option<u16>,
    /// For questions to resolvers: `{{ dnsPort }}`.
    pub dns: Option<u16>,
    /// Every port that redirection sends something to; holds those above and more when the policy has several rules.
    pub listening: BTreeSet<(u16, Protocol)>,
}
