//! One process that is held: from the news of it to its release.
//!
//! Owns the obligation to let it go, on every path. A process that is refused is ended: it has no runtime that could be
//! told, and its parent sees it killed.

use std::{io, os::fd::OwnedFd, sync::Arc, thread, time::Duration};

use pillion_workload::{FirstInstruction, Gate, ProcessId, Subject, Workload, WorkloadId};
use procfs::process::Process;
use rustix::process::{Pid as RawPid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::{
    ExecConfig, Stopper,
    cgroup::OwnCgroup,
    judge::{Judgement, judge},
};
use crate::{Admission, instance::is_alive, pidfd::Pidfd};

/// The news may come before the process has stopped: on its way there it only has to return from the system call.
const STOP_LIMIT: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(1);
/// The first looks: most have stopped by then, and timers of the runtime wait for a millisecond at least. Such a nap leaves
/// the processor to the process, at the price of that much of a worker's time.
const NAPS: [Duration; 3] =
    [Duration::from_micros(20), Duration::from_micros(50), Duration::from_micros(100)];
/// A policy that was just saved may be known here before the controller knows it.
const SETTLE: Duration = Duration::from_secs(1);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);
/// What the end of a killed process may take.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What has become of one.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Nothing that is to be kept.
    Nothing,
    /// A workload.
    Workload(Box<Workload>, OwnCgroup, FirstInstruction),
    /// One that cannot be attached.
    Unattachable(WorkloadId, Box<Subject>, String),
}

/// Dropping it lets the process go.
struct Held {
    process: ProcessId,
    pidfd: OwnedFd,
    stopper: Arc<dyn Stopper>,
    is_stopped: bool,
}

impl Held {
    fn take(process: ProcessId, is_stopped: bool, stopper: &Arc<dyn Stopper>) -> Option<Self> {
        let opened = RawPid::from_raw(process.pid.0).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        match opened {
            // In this order, so that both are of one process.
            Some(Ok(pidfd)) if is_alive(process) => {
                Some(Self { process, pidfd, stopper: stopper.clone(), is_stopped })
            }
            _ => {
                stopper.forget(process);
                None
            }
        }
    }

    fn signal(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(&self.pidfd, signal)
            && error != rustix::io::Errno::SRCH
        {
            // Root may signal everything: this cannot be but by a security module.
            warn!(pid = %self.process.pid, %error, "a held process cannot be signalled");
        }
    }

    /// Waits until it has stopped. `false` when it has not: then it has begun.
    async fn has_stopped(&self) -> bool {
        let end = Instant::now() + STOP_LIMIT;
        let mut naps = NAPS.into_iter();
        while Instant::now() < end {
            match Process::new(self.process.pid.0).and_then(|process| process.stat()) {
                Ok(stat) if stat.state == 'T' => return true,
                Ok(stat) if stat.starttime == self.process.started.0 => match naps.next() {
                    Some(nap) => thread::sleep(nap),
                    None => sleep(LOOK).await,
                },
                _ => return false,
            }
        }
        false
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.is_stopped {
            self.signal(Signal::CONT);
        }
        // Afterwards: whoever reads the list meanwhile continues it once more, which does no harm.
        self.stopper.forget(self.process);
    }
}

/// Deals with one execution.
pub(super) async fn hold(config: Arc<ExecConfig>, process: ProcessId, held: bool) -> Outcome {
    let since = Instant::now();
    let deadline = since + config.longest;
    let Some(holder) = Held::take(process, held, &config.stopper) else { return Outcome::Nothing };
    let before = held && holder.has_stopped().await;
    let judging = tokio::task::spawn_blocking({
        let config = config.clone();
        move || judge(&config, process)
    });
    let (workload, own) = match judging.await {
        Ok(Judgement::Workload(workload, own)) => (workload, own),
        Ok(Judgement::Unattachable(id, subject, reason)) => {
            return Outcome::Unattachable(id, subject, reason);
        }
        Ok(Judgement::LetBe) | Err(_) => return Outcome::Nothing,
    };
    // From here on its descendants are not stopped.
    config.stopper.exempt(workload.instance.cgroup.id);
    if !before {
        info!(workload = %workload.id, "a process could not be held: attached late");
        return Outcome::Workload(workload, own, FirstInstruction::After);
    }
    match ask(&config, &workload, since, deadline).await {
        Ok(Admission::Attached) => Outcome::Workload(workload, own, FirstInstruction::Before),
        Ok(Admission::Open { policy, reason }) => {
            warn!(workload = %workload.id, %policy, reason, "a held process is let go without its companions");
            Outcome::Workload(workload, own, FirstInstruction::Before)
        }
        Ok(admission @ Admission::Refused { .. }) => {
            let message = admission.message().unwrap_or_default();
            warn!(workload = %workload.id, message, "a held process is killed");
            holder.signal(Signal::KILL);
            ended(process).await;
            back(&config, own, &workload).await;
            Outcome::Nothing
        }
        Ok(Admission::Unmatched | Admission::Covered) => {
            back(&config, own, &workload).await;
            Outcome::Nothing
        }
        Err(()) => {
            warn!(workload = %workload.id, "nothing was decided in time: a held process is let go");
            Outcome::Workload(workload, own, FirstInstruction::After)
        }
    }
}

async fn ask(
    config: &ExecConfig,
    workload: &Workload,
    since: Instant,
    deadline: Instant,
) -> Result<Admission, ()> {
    loop {
        let asked = config.gatekeeper.admit(Gate::Exec, workload.clone(), deadline).await.map_err(drop)?;
        let settled = since.elapsed() >= SETTLE || !(config.wants)(&workload.subject);
        if asked != Admission::Unmatched || settled {
            return Ok(asked);
        }
        sleep(SETTLE_PAUSE).await;
    }
}

async fn ended(process: ProcessId) {
    if let Ok(Some(pidfd)) = Pidfd::open(process) {
        // After that its cgroup is given back with it inside.
        let _: Result<io::Result<()>, _> = timeout(END_LIMIT, pidfd.ended()).await;
    }
}

/// Gives a cgroup back; what cannot be is found by the next agent.
pub(super) async fn back(config: &ExecConfig, own: OwnCgroup, workload: &Workload) {
    let id = &workload.id;
    let given = tokio::task::spawn_blocking(move || own.give_back().map_err(|error| (own, error))).await;
    if let Ok(Err((own, error))) = given {
        warn!(workload = %id, cgroup = %own.path().display(), %error, "its cgroup cannot be given back");
    }
    config.stopper.no_longer_exempt(workload.instance.cgroup.id);
}
