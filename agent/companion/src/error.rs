//! Why a companion could not be started, made ready or stopped.

use std::{io, path::PathBuf, time::Duration};

use pillion_workload::Pid;

use crate::{
    cgroup::CgroupError,
    launch::LaunchError,
    netns::NetnsError,
    process::{Ending, ProcessError},
    render::RenderError,
    user::UserError,
};

/// Why a companion could not be started, made ready or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompanionError {
    /// Its directory or a file in it.
    #[error("cannot {operation} {}", path.display())]
    Directory {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A variable or a template.
    #[error("cannot render {what}")]
    Render {
        /// The argument or file.
        what: String,
        /// Why not.
        source: RenderError,
    },
    /// Its program.
    #[error("the program {program:?} is not an absolute path")]
    RelativeProgram {
        /// What the plan says.
        program: String,
    },
    /// Its user or group.
    #[error(transparent)]
    User(#[from] UserError),
    /// Its cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Running it.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Asking about it.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The workload's network namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The relay's configuration.
    #[error(transparent)]
    Relay(#[from] crate::relay::InvalidRelayConfig),
    /// Following its output.
    #[error("cannot follow the companion's output")]
    Logs {
        /// Why not.
        source: io::Error,
    },
    /// It ended before it was ready.
    #[error("the companion ended before it was ready ({status}){}", oom_note(*oom))]
    EndedEarly {
        /// How it ended.
        status: Ending,
        /// Whether the kernel killed it for memory.
        oom: bool,
    },
    /// Its probe command says no.
    #[error("the probe command failed ({status})")]
    ProbeCommand {
        /// How it ended.
        status: Ending,
    },
    /// It was not ready in time.
    #[error("the companion was not ready within {timeout:?}: {last}")]
    NotReady {
        /// How long it had.
        timeout: Duration,
        /// What the last look found.
        last: String,
    },
    /// Somebody else listens on its port.
    #[error(
        "port {port} of the workload's network namespace is taken by a process that is not the companion's"
    )]
    PortTaken {
        /// The port.
        port: u16,
    },
    /// Somebody else listens where one is expected that somebody else runs.
    #[error("port {port} of the workload's network namespace is not the companion's: {who}")]
    Stranger {
        /// The port.
        port: u16,
        /// Who does, and why that is not the companion.
        who: String,
    },
    /// It is found where no programs are attached.
    #[error(
        "the companion, process {pid}, is in the root cgroup, to which nothing is attached; run it in a cgroup of its own"
    )]
    InRootCgroup {
        /// Its process.
        pid: Pid,
    },
    /// Its own connections could not be told from the workload's.
    #[error(
        "the companion, process {pid}, is in the workload's own cgroup, so that its connections would come back to it; run it in a cgroup of its own, as a container of the pod is"
    )]
    InWorkloadCgroup {
        /// Its process.
        pid: Pid,
    },
    /// Somebody else starts it.
    #[error("somebody else runs this companion: it is not started")]
    NotOurs,
    /// It is not where it was.
    #[error("the companion no longer listens as it did")]
    ListenerGone,
    /// The names of containers are not known.
    #[error("cannot tell which container is named {name}: {reason}")]
    Containers {
        /// The name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// It could not be removed within its time.
    #[error("the companion was not stopped and removed within {timeout:?}")]
    StopTimeout {
        /// How long was waited.
        timeout: Duration,
    },
    /// The work was lost with the runtime.
    #[error("the runtime is shutting down")]
    Abandoned,
}

fn oom_note(oom: bool) -> &'static str {
    if oom { ": killed by the kernel, out of memory" } else { "" }
}
