//! Units whose hook waits: from the unit's name and the hook's process to the workload that is asked for.
//!
//! Owns the way from the gate's server to the source. Never decides.

use futures_util::future::BoxFuture;
use pillion_workload::{Pid, Workload};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    look::{Held, Look, LookError},
    unit::{InvalidUnitName, UnitName},
};
use crate::hook::{AskError, FoundUnit, UnitManager};

/// A held unit that the source is to know of.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) workload: Workload,
    pub(super) invocation: Vec<u8>,
    /// Told when its events, if any, are on their way.
    pub(super) done: oneshot::Sender<()>,
}

/// Why a hook's unit cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// What the hook named is no service.
    #[error(transparent)]
    Name(#[from] InvalidUnitName),
    /// There is no connection to systemd now.
    #[error("the agent has no connection to systemd: `pillion status` says why")]
    Disconnected,
    /// systemd, or the hook's process, cannot be asked.
    #[error("cannot look at the unit")]
    Look(#[from] LookError),
}

/// Answers for units. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Units {
    looks: watch::Receiver<Option<Look>>,
    told: mpsc::Sender<Told>,
}

impl Units {
    pub(super) fn new(looks: watch::Receiver<Option<Look>>, told: mpsc::Sender<Told>) -> Self {
        Self { looks, told }
    }

    /// The unit `name`, whose hook is the process `pid` of it. From here on the source knows it.
    async fn held(&self, name: &str, pid: Pid) -> Result<FoundUnit, UnitError> {
        let name = UnitName::try_from(name)?;
        // Early in the boot, and for a moment after the agent's start, there is no connection yet.
        let mut looks = self.looks.clone();
        let connected = looks.wait_for(Option::is_some).await;
        let look = connected.ok().and_then(|look| look.clone()).ok_or(UnitError::Disconnected)?;
        let Held { workload, invocation, start_limit } = look.held(&name, pid).await?;
        let (done, noted) = oneshot::channel();
        let told = Told { workload: workload.clone(), invocation, done };
        self.told.send(told).await.map_err(|_| UnitError::Disconnected)?;
        noted.await.map_err(|_| UnitError::Disconnected)?;
        Ok(FoundUnit { workload, start_limit })
    }
}

impl UnitManager for Units {
    fn find<'a>(&'a self, name: &'a str, pid: Pid) -> BoxFuture<'a, Result<FoundUnit, AskError>> {
        Box::pin(async move { self.held(name, pid).await.map_err(Into::into) })
    }
}
