//! What can go wrong, with the object it went wrong with.

use std::{io, path::PathBuf};

use pillion_workload::{CompanionName, Protocol};

/// A failure of redirection.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The BPF file system cannot be used.
    #[error("cannot use the BPF file system at {}", path.display())]
    Bpffs {
        /// Where it is, or should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The object as a whole cannot be loaded.
    #[error("cannot load the eBPF object (kernel without BTF, or not enough privileges?)")]
    Object(#[source] Box<aya::EbpfError>),
    /// The kernel refuses a program.
    #[error("the kernel refuses the eBPF program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why, with the verifier's log.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// The kernel lacks something for which there is no substitute.
    #[error("this kernel has no {feature}; Linux {since} has, and Pillion needs 5.10 or later")]
    Kernel {
        /// What it lacks.
        feature: &'static str,
        /// Which kernel has it.
        since: &'static str,
    },
    /// It cannot be told what the kernel has.
    #[error("cannot try whether this kernel has {feature} (not enough privileges?)")]
    Probe {
        /// What was tried.
        feature: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another's program lets none beside it.
    #[error(
        "another eBPF program was attached for {attach_type} so that nothing can be attached beside or below it: {programs}"
    )]
    Exclusive {
        /// Where it runs.
        attach_type: String,
        /// Which it is, and whose.
        programs: String,
        /// The kernel's refusal.
        #[source]
        source: Box<RedirectError>,
    },
    /// A program or map is not in the object.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// A map has another shape than this build expects.
    #[error("the pinned map {map} has another layout; run `pillion cleanup`, then start again")]
    Layout {
        /// Its name.
        map: &'static str,
        /// Why.
        #[source]
        source: Box<aya::maps::MapError>,
    },
    /// The kernel's description of its structures cannot be used.
    #[error("cannot use /sys/kernel/btf/vmlinux: {0}")]
    Btf(String),
    /// Processes have other numbers here.
    #[error(
        "programs can be held at exec only by an agent in the machine's PID namespace (in a container: hostPID, --pid=host)"
    )]
    PidNamespace,
    /// A map entry cannot be written or removed.
    #[error("cannot change map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        #[source]
        source: Box<aya::maps::MapError>,
    },
    /// A raw BPF system call failed.
    #[error("{operation} {}", subject.display())]
    Sys {
        /// What was tried.
        operation: &'static str,
        /// On which path.
        subject: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A cgroup lies too deep to be told apart from those around it.
    #[error("{} is more than {} cgroups deep", cgroup.display(), pillion_common::EXEMPT_LEVELS - 1)]
    TooDeep {
        /// Its path.
        cgroup: PathBuf,
    },
    /// Nothing is attached there.
    #[error("no redirection is in force")]
    NotInForce,
    /// The programs for this kernel do not tell.
    #[error(
        "the programs for a kernel before Linux 5.12 do not tell of their decisions; `explain --connection` works"
    )]
    Untraceable,
    /// Somebody listens already.
    #[error("it is being traced already; one trace of a workload at a time")]
    Traced,
    /// A redirect target has no port yet.
    #[error("the redirect to companion {0} has no port; ports are settled before attaching")]
    NoPort(CompanionName),
    /// The rules of a policy make too many entries for one workload.
    #[error(
        "the outbound rules make more than {most} entries, as rules by network with different ports do: give fewer, or the same ports to all"
    )]
    TooManyRules {
        /// How many are possible.
        most: usize,
    },
    /// A program's path cannot be compared by the kernel side.
    #[error("the path {} is too long to be excluded", .0.display())]
    PathTooLong(PathBuf),
    /// A companion does not listen where the policy sends connections.
    #[error("companion {companion} does not listen on port {port} ({})", protocol.as_str())]
    NotListening {
        /// Which companion.
        companion: CompanionName,
        /// On which port.
        port: u16,
        /// For which protocol.
        protocol: Protocol,
    },
    /// A companion listens on more ports than the kernel side knows.
    #[error(
        "companion {companion} has {count} ports, at most {} are possible",
        pillion_common::PORTS_PER_COMPANION
    )]
    TooManyPorts {
        /// Which companion.
        companion: CompanionName,
        /// How many.
        count: usize,
    },
}

impl RedirectError {
    pub(crate) fn map(map: &'static str) -> impl Fn(aya::maps::MapError) -> Self {
        move |source| Self::Map { map, source: Box::new(source) }
    }

    pub(crate) fn sys(operation: &'static str, subject: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let subject = subject.to_owned();
        move |source| Self::Sys { operation, subject, source }
    }
}
