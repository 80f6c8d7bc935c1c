//! One companion of an attachment, from its turn to its end.
//!
//! Owns the companion and its proof of readiness. Decides nothing: the driver does.

use std::time::Duration;

use pillion_companion::ResolvedPorts;
use pillion_workload::{CompanionSpec, Pid};
use tokio::{task::AbortHandle, time::Instant};

use crate::{machinery::Machinery, report::CompanionView};

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

pub(crate) struct Slot<M: Machinery> {
    pub(crate) spec: CompanionSpec,
    pub(crate) ports: ResolvedPorts,
    pub(crate) stage: Stage<M>,
    /// Kept only until redirection is in force, since it keeps the listeners of a dead companion alive.
    pub(crate) proof: Option<M::Ready>,
    pub(crate) is_ready: bool,
    /// Whether its first attempt has ended, well or not.
    pub(crate) tried: bool,
    failures: u32,
    restarts: u64,
    pid: Option<Pid>,
    error: Option<String>,
}

pub(crate) enum Stage<M: Machinery> {
    /// Its turn has not come.
    Idle,
    /// Being started, or taken up from an earlier agent, by a task.
    Starting(AbortHandle),
    /// To be started again at this time.
    Waiting(Instant),
    /// Supervised, ready or not.
    Up(M::Companion),
}

impl<M: Machinery> Slot<M> {
    pub(crate) fn new(spec: CompanionSpec, ports: ResolvedPorts) -> Self {
        Self {
            spec,
            ports,
            stage: Stage::Idle,
            proof: None,
            is_ready: false,
            tried: false,
            failures: 0,
            restarts: 0,
            pid: None,
            error: None,
        }
    }

    /// Ready for the first time, or again. Tells whether it was started again in between.
    pub(crate) fn ready(&mut self, pid: Pid) -> bool {
        let before = self.pid.is_some() || !self.spec.is_external();
        let restarted = self.tried && before && self.pid != Some(pid);
        self.restarts += u64::from(restarted);
        (self.is_ready, self.tried, self.failures) = (true, true, 0);
        (self.pid, self.error) = (Some(pid), None);
        restarted
    }

    /// Ended or not ready. Its listeners must not outlive it.
    pub(crate) fn not_ready(&mut self, why: &str) {
        (self.is_ready, self.tried, self.proof) = (false, true, None);
        self.error = Some(why.to_owned());
    }

    /// Nothing of it is there: it is started again after a while, each time a longer one.
    pub(crate) fn retry_later(&mut self, why: &str) {
        self.not_ready(why);
        self.stage = Stage::Waiting(Instant::now() + back_off(self.failures));
        self.failures = self.failures.saturating_add(1);
    }

    pub(crate) fn retry_at(&self) -> Option<Instant> {
        match self.stage {
            Stage::Waiting(at) => Some(at),
            Stage::Idle | Stage::Starting(_) | Stage::Up(_) => None,
        }
    }

    pub(crate) fn view(&self) -> CompanionView {
        CompanionView {
            name: self.spec.name.clone(),
            ready: self.is_ready,
            waiting: matches!(self.stage, Stage::Idle | Stage::Waiting(_)),
            external: self.spec.is_external(),
            pid: self.pid.filter(|_| matches!(self.stage, Stage::Up(_))),
            restarts: self.restarts,
            error: self.error.clone(),
        }
    }
}

fn back_off(failures: u32) -> Duration {
    FIRST_RETRY.saturating_mul(1 << failures.min(6)).min(LONGEST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_doubles_to_a_minute() {
        let seconds: Vec<u64> = (0..9).map(|failures| back_off(failures).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(back_off(u32::MAX), LONGEST_RETRY);
    }
}
