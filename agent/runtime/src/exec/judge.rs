//! Which of the processes that were stopped is a workload. What is not is let go at once.

use std::path::Path;

use pillion_workload::{Cgroup, Instance, ProcessId, RuntimeKind, Subject, Workload, WorkloadId};
use procfs::process::Process;

use super::{ExecConfig, cgroup, cgroup::OwnCgroup};
use crate::{executable_of, instance_of};

/// Programs that start other workloads, and our own: by the beginning of their names. Held, they would hold those.
const STARTERS: [&str; 15] = [
    "pillion",
    "runc",
    "crun",
    "youki",
    "runsc",
    "kata-",
    "containerd",
    "dockerd",
    "docker-proxy",
    "docker-init",
    "conmon",
    "crio",
    "podman",
    "kubelet",
    "systemd",
];
/// The parent of what the kernel starts by itself, such as modprobe.
const KTHREADD: i32 = 2;
/// Companions are below it (`pillion_companion::cgroup::SLICE`).
const SLICE: &str = "pillion.slice";

/// What is to become of a process.
#[derive(Debug)]
pub(super) enum Judgement {
    /// No workload, or another's.
    LetBe,
    /// A workload, in a cgroup of its own by now.
    Workload(Box<Workload>, OwnCgroup),
    /// A workload that cannot be attached.
    Unattachable(WorkloadId, Box<Subject>, String),
}

/// Looks at the process. Blocks for some system calls.
pub(super) fn judge(config: &ExecConfig, process: ProcessId) -> Judgement {
    let Ok(executable) = executable_of(process) else { return Judgement::LetBe };
    let name = executable.file_name().unwrap_or(executable.as_os_str()).to_string_lossy().into_owned();
    let subject = Subject { executable: Some(executable), ..Subject::new(RuntimeKind::Process, name) };
    if STARTERS.iter().any(|starter| subject.name.starts_with(starter))
        || !(config.wants)(&subject)
        || is_the_kernels(process)
    {
        return Judgement::LetBe;
    }
    let Ok(instance) = instance_of(process.pid) else { return Judgement::LetBe };
    if instance.process != process || is_anothers(&instance.cgroup) || (config.is_taken)(&instance.cgroup) {
        return Judgement::LetBe;
    }
    let Ok(id) =
        WorkloadId::try_from(format!("{}/{}-{}", RuntimeKind::Process, process.pid, process.started.0))
    else {
        return Judgement::LetBe;
    };
    match OwnCgroup::make(process, &instance.cgroup.path, &config.owner) {
        Ok(own) => match cgroup::identity(&own) {
            Ok(cgroup) => {
                let instance = Instance { cgroup, ..instance };
                Judgement::Workload(Box::new(Workload { id, subject, instance }), own)
            }
            // It has ended, and somebody has removed the directory.
            Err(error) => {
                let _ = own.give_back();
                Judgement::Unattachable(id, Box::new(subject), error.to_string())
            }
        },
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            Judgement::Unattachable(id, Box::new(subject), format!("{error}{}", cause.unwrap_or_default()))
        }
    }
}

/// The workload of a cgroup that an earlier agent made; `None` when its process has ended or left.
pub(super) fn recall(own: &OwnCgroup) -> Option<Workload> {
    let process = own.process();
    let executable = executable_of(process).ok()?;
    let workload = crate::process_workload(process.pid, &executable).ok()?;
    let same = workload.instance.process == process && workload.instance.cgroup.path.starts_with(own.path());
    same.then_some(workload)
}

fn is_anothers(cgroup: &Cgroup) -> bool {
    cgroup::is_within_one(&cgroup.path)
        || cgroup.path.components().any(|part| part.as_os_str() == Path::new(SLICE))
}

fn is_the_kernels(process: ProcessId) -> bool {
    let stat = Process::new(process.pid.0).and_then(|process| process.stat());
    stat.is_ok_and(|stat| stat.ppid == KTHREADD)
}
