//! The sources of Docker Engine and of Podman's API service, which speaks the same language over its own socket.
//!
//! Owns the connections and what is known of the engine's containers. Never changes anything in an engine.
//!
//! How nothing is missed and nothing is told twice:
//! 1. Subscribe to the events, from a second before: an engine answers before its subscription is in force, and gives what
//!    it remembers of the time between.
//! 2. Take a snapshot: the list of what runs, and a look at each.
//! 3. An event says only *which* container to look at again; what is reported comes from looking.
//! 4. Exits of first processes are also seen by pidfd, with the engine or without.
//!
//! An engine answers for a container (`inspect`) only when that container's start is over, which a gate may hold up. So looks
//! have a deadline and are tried again, and a gate asks by [`EngineLookup`], which lists: a list waits for nobody in Docker.
//! Podman's list does wait; its gates read what Podman has written down, see `podman`.

mod api;
mod client;
mod events;
mod look;
mod lookup;
mod session;
mod source;

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use pillion_workload::{InvalidName, RuntimeKind, WorkloadId};

use crate::SourceName;

pub(crate) use api::subject;
pub(crate) use look::container_instance;
pub use lookup::{EngineError, EngineLookup, LookupError};
pub use source::EngineSource;
pub(crate) use source::Known;

/// Who answers on the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// Docker Engine, 20.10 and later (API 1.41).
    Docker,
    /// Podman's API service, 4.0 and later.
    Podman,
}

impl EngineKind {
    /// The runtime of its workloads.
    pub fn kind(self) -> RuntimeKind {
        match self {
            Self::Docker => RuntimeKind::Docker,
            Self::Podman => RuntimeKind::Podman,
        }
    }

    /// The name of its source.
    pub fn source(self) -> SourceName {
        match self {
            Self::Docker => SourceName::DOCKER,
            Self::Podman => SourceName::PODMAN,
        }
    }

    /// Where its socket is unless somebody moved it.
    pub fn default_socket(self) -> &'static str {
        match self {
            Self::Docker => "/run/docker.sock",
            Self::Podman => "/run/podman/podman.sock",
        }
    }

    /// What it is called.
    fn as_str(self) -> &'static str {
        match self {
            Self::Docker => "Docker",
            Self::Podman => "Podman's API service",
        }
    }

    /// The id of its container `name`.
    pub(crate) fn workload_id(self, name: &str) -> Result<WorkloadId, InvalidName> {
        WorkloadId::try_from(format!("{}/{name}", self.kind()))
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where an engine is, and how patient to be with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Who answers.
    pub engine: EngineKind,
    /// The socket of its API.
    pub socket: PathBuf,
    /// For connecting and for each question about one thing.
    pub deadline: Duration,
    /// For the list of what runs.
    pub list_deadline: Duration,
    /// How often to ask whether it still answers.
    pub health_interval: Duration,
    /// The first and the longest pause between attempts to connect.
    pub backoff: (Duration, Duration),
}

impl EngineConfig {
    /// The defaults for an engine at `socket`.
    pub fn at(engine: EngineKind, socket: impl Into<PathBuf>) -> Self {
        Self {
            engine,
            socket: socket.into(),
            deadline: Duration::from_secs(3),
            list_deadline: Duration::from_secs(30),
            health_interval: Duration::from_secs(10),
            backoff: (Duration::from_millis(100), Duration::from_secs(10)),
        }
    }
}

/// Why an engine did not tell its version.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct EngineVersionError(client::ClientError);

/// Connects and asks for the version, once: whether the engine is there and answers. For `pillion check`.
pub async fn engine_version(config: &EngineConfig) -> Result<String, EngineVersionError> {
    client::Client::new(config).version().await.map_err(EngineVersionError)
}

/// A container's id: 64 hexadecimal digits in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ContainerId(String);

impl ContainerId {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// What is no container id of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoContainerId;

impl FromStr for ContainerId {
    type Err = NoContainerId;
    fn from_str(text: &str) -> Result<Self, NoContainerId> {
        if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Self(text.to_owned()));
        }
        Err(NoContainerId)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_hexadecimal_and_whole() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(id.parse::<ContainerId>().expect("valid").as_str(), id);
        for other in ["", "web", &id[1..], &id.to_uppercase(), &format!("{id}0"), &id.replace('0', "%")] {
            assert!(other.parse::<ContainerId>().is_err(), "{other}");
        }
    }
}
