//! What a gate asks the engine that made a held container: what policies select on.
//!
//! Owns the question. The sources of the engines answer it. Never holds or releases anything.

use std::{error::Error, fmt};

use futures_util::future::BoxFuture;
use pillion_workload::{RuntimeKind, Subject, WorkloadId};

/// A workload but for its instance, which the gate finds out by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The same id as the engine's source uses.
    pub id: WorkloadId,
    /// What policies select on.
    pub subject: Subject,
}

/// Why an engine gave no description. The gate then takes what the container's specification says.
#[derive(Debug, thiserror::Error)]
#[error("{engine} cannot describe a container that it starts")]
pub struct DescribeError {
    /// Which engine.
    pub engine: RuntimeKind,
    /// Why.
    pub source: Box<dyn Error + Send + Sync>,
}

/// An engine that can describe a container of its own while it is being started.
pub trait Engine: fmt::Debug + Send + Sync {
    /// Describes the container with this id, which the engine gave it; `None` when it knows none such. The engine waits for the
    /// start, so nothing may be asked that waits for it in turn: of Docker the list, for example, and not `inspect`.
    /// Dropping the future gives up; the gate does so in time.
    fn describe<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Described>, DescribeError>>;
}
