//! Looks at a unit and makes a workload of it.
//!
//! Owns the joining of what systemd says with cgroup, namespace and manager process. Never remembers anything.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use pillion_workload::{
    Cgroup, FirstInstruction, Instance, NetnsId, Pid, ProcessId, RuntimeKind, Subject, Workload,
};

use super::{
    bus::{Bus, BusError, Unit, manager_pid},
    unit::UnitName,
};
use crate::{
    cgroup2::{Cgroup2Error, Cgroup2Mounts},
    instance::{InstanceError, cgroup_path_of, members, netns_of, program_of, start_time},
    inventory::Observation,
};

/// The state of a service whose `ExecCondition=` runs, our own among them.
const CONDITION: &str = "condition";

/// Why a unit cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// systemd does not answer.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The machine's cgroups.
    #[error("cannot find the cgroup of {unit}")]
    Cgroup {
        /// Whose.
        unit: String,
        /// Why.
        source: Cgroup2Error,
    },
    /// A process.
    #[error(transparent)]
    Process(#[from] InstanceError),
    /// The manager's process cannot be found.
    #[error("cannot find systemd's own process in {}: the agent must be in its PID namespace or above", path.display())]
    NoManager {
        /// Its cgroup.
        path: PathBuf,
        /// Why, if reading failed.
        source: Option<io::Error>,
    },
    /// Who asks is not a process of the unit.
    #[error("process {pid} asks for {unit}, but is in cgroup {cgroup}")]
    Stranger {
        /// Who.
        pid: Pid,
        /// For which unit.
        unit: String,
        /// Where it is.
        cgroup: String,
    },
}

/// The systemd of this machine, and how to look at its units. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Look {
    bus: Bus,
    mounts: Arc<Cgroup2Mounts>,
    manager: Manager,
    /// Path of this process's own cgroup: the unit that it runs in is no workload.
    own: Option<PathBuf>,
}

/// systemd's own process.
#[derive(Debug, Clone, Copy)]
struct Manager {
    process: ProcessId,
    netns: NetnsId,
    program: (u64, u64),
}

/// A unit that was looked at.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) observation: Observation,
    /// Which start of it.
    pub(super) invocation: Vec<u8>,
}

/// A unit whose hook waits.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) workload: Workload,
    pub(super) invocation: Vec<u8>,
    /// How long its start may take, altogether.
    pub(super) start_limit: Option<Duration>,
}

impl Look {
    pub(super) async fn new(bus: Bus) -> Result<Self, LookError> {
        let cgroup = |source| LookError::Cgroup { unit: "systemd".to_owned(), source };
        let mounts = Cgroup2Mounts::discover().map_err(cgroup)?;
        let root = bus.root().await?;
        let init = mounts.resolve(&PathBuf::from(format!("{root}/init.scope"))).map_err(cgroup)?;
        let missing = |source| LookError::NoManager { path: init.path.clone(), source };
        let pid =
            manager_pid(&init.path).map_err(|error| missing(Some(error)))?.ok_or_else(|| missing(None))?;
        let process = ProcessId { pid, started: start_time(pid)? };
        let manager = Manager { process, netns: netns_of(pid)?, program: program_of(pid)?.0 };
        let own = i32::try_from(std::process::id()).ok().and_then(|pid| cgroup_path_of(Pid(pid)).ok());
        Ok(Self { bus, mounts: Arc::new(mounts), manager, own })
    }

    pub(super) fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Looks at one unit. An error means that systemd gave no answer.
    pub(super) async fn at(&self, name: &UnitName) -> Result<Seen, BusError> {
        // Looked at, it would be loaded and unloaded again, which systemd would tell, which would be looked at: for ever.
        if !self.bus.is_loaded(name).await? {
            return Ok(Seen { observation: Observation::Absent, invocation: Vec::new() });
        }
        let unit = self.bus.unit(name).await?;
        // Another name for a unit that is told under its own.
        let mut observation =
            if unit.id == name.as_str() { self.observe(name, &unit) } else { Observation::Absent };
        // systemd was asked before its cgroup was looked at. A start in between gave it another one, which no hook has asked
        // for yet, and of which what systemd said is not true.
        if matches!(observation, Observation::Present(..)) {
            let (sub_state, invocation) = self.bus.start_of(name).await?;
            if sub_state == CONDITION || invocation != unit.invocation {
                observation = Observation::Unclear;
            }
        }
        Ok(Seen { observation, invocation: unit.invocation })
    }

    /// The workload of a unit whose hook `pid` is, a process in its cgroup and its network namespace.
    pub(super) async fn held(&self, name: &UnitName, pid: Pid) -> Result<Held, LookError> {
        let unit = self.bus.unit(name).await?;
        let path = cgroup_path_of(pid)?;
        let own = name.cgroup_in(&path).ok_or_else(|| LookError::Stranger {
            pid,
            unit: name.to_string(),
            cgroup: path.display().to_string(),
        })?;
        let cgroup = self.mounts.resolve(own);
        let cgroup = cgroup.map_err(|source| LookError::Cgroup { unit: name.to_string(), source })?;
        let instance = Instance { cgroup, netns: netns_of(pid)?, process: self.manager.process };
        let workload = Workload { id: name.id(), subject: subject(name, &unit), instance };
        Ok(Held { workload, invocation: unit.invocation, start_limit: unit.start_limit })
    }

    fn observe(&self, name: &UnitName, unit: &Unit) -> Observation {
        let path = PathBuf::from(&unit.control_group);
        let runs = !matches!(unit.active_state.as_str(), "inactive" | "failed");
        let is_own = self.own.as_ref().is_some_and(|own| own.starts_with(&path));
        // Without a cgroup it has no process: a oneshot service that remains active, for example.
        if unit.control_group.is_empty() || !runs || is_own {
            return Observation::Absent;
        }
        // Conditions come before everything else, and our own is among them: its hook asks, and then it is known. What else runs
        // as a condition is soon over.
        if unit.sub_state == CONDITION {
            return Observation::Unclear;
        }
        let cgroup = match self.mounts.resolve(&path) {
            Ok(cgroup) => cgroup,
            Err(Cgroup2Error::Gone { .. }) => return Observation::Absent,
            Err(error) => {
                tracing::warn!(workload = %name.id(), %error, "cannot find the unit's cgroup");
                return Observation::Unclear;
            }
        };
        let Some(netns) = self.netns(unit, &cgroup) else { return Observation::Unclear };
        let instance = Instance { cgroup, netns, process: self.manager.process };
        let workload = Workload { id: name.id(), subject: subject(name, unit), instance };
        Observation::Present(Box::new(workload), FirstInstruction::After)
    }

    /// The network namespace of a unit: the manager's unless it says otherwise, and then that of its processes. A process that
    /// systemd has just forked is in the cgroup already and not yet in the namespace: it still runs systemd's program,
    /// or its helper's (systemd 255).
    fn netns(&self, unit: &Unit, cgroup: &Cgroup) -> Option<NetnsId> {
        if !unit.own_network {
            return Some(self.manager.netns);
        }
        let begun = |pid: &Pid| {
            program_of(*pid).is_ok_and(|(program, path)| {
                program != self.manager.program && !path.ends_with("systemd-executor")
            })
        };
        let mut namespaces =
            members(&cgroup.path).into_iter().filter(begun).filter_map(|pid| netns_of(pid).ok());
        let first = namespaces.next()?;
        Some(namespaces.chain([first]).find(|netns| *netns != self.manager.netns).unwrap_or(first))
    }
}

/// What policies select on.
pub(super) fn subject(name: &UnitName, unit: &Unit) -> Subject {
    Subject {
        unit: Some(name.as_str().to_owned()),
        executable: unit.program.as_ref().map(PathBuf::from),
        ..Subject::new(RuntimeKind::Systemd, name.as_str().to_owned())
    }
}
