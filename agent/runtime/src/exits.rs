//! Sees the end of a workload's first process at once, with or without its runtime.
//!
//! Owns one pidfd a workload. Never asks a runtime.

use std::{future, io};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use pillion_workload::{ProcessId, WorkloadId};

use crate::pidfd::Pidfd;

/// Processes that are waited for; one descriptor each.
#[derive(Debug, Default)]
pub struct Exits {
    waiting: FuturesUnordered<BoxFuture<'static, (WorkloadId, ProcessId, io::Result<()>)>>,
}

impl Exits {
    /// Begins to wait for the end of a process. `false` when it has ended already.
    pub fn watch(&self, id: WorkloadId, process: ProcessId) -> io::Result<bool> {
        let Some(pidfd) = Pidfd::open(process)? else { return Ok(false) };
        self.waiting.push(Box::pin(async move { (id, process, pidfd.ended().await) }));
        Ok(true)
    }

    /// The next process that ends. Waits for ever when none is watched. Cancel-safe.
    pub async fn next(&mut self) -> (WorkloadId, ProcessId) {
        loop {
            match self.waiting.next().await {
                Some((id, process, Ok(()))) => return (id, process),
                Some((id, _, Err(error))) => {
                    tracing::warn!(workload = %id, %error, "cannot wait for the workload's exit; relying on its runtime");
                }
                None => future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command, Stdio},
        time::Duration,
    };

    use pillion_workload::{Pid, StartTime};
    use tokio::time::timeout;

    use super::*;
    use crate::instance::start_time;

    #[tokio::test]
    async fn sees_an_exit_and_refuses_the_dead() {
        let mut exits = Exits::default();
        let id: WorkloadId = "containerd/default/a".parse().expect("valid");
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat is everywhere");
        let pid = Pid(child.id().try_into().expect("a pid fits an i32"));
        let process = ProcessId { pid, started: start_time(pid).expect("alive") };
        let other = ProcessId { pid, started: StartTime(process.started.0 + 1) };
        assert!(!exits.watch(id.clone(), other).expect("works"));
        assert!(exits.watch(id.clone(), process).expect("works"));
        assert!(timeout(Duration::from_millis(50), exits.next()).await.is_err());
        drop(child.stdin.take());
        let seen = timeout(Duration::from_secs(10), exits.next()).await.expect("it ends");
        assert_eq!(seen, (id.clone(), process));
        assert!(!exits.watch(id.clone(), process).expect("works"), "a zombie has ended");
        child.wait().expect("is our child");
        assert!(!exits.watch(id, process).expect("works"));
    }
}
