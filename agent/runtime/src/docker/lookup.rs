//! Asks an engine about one container that a gate holds.
//!
//! Owns the question. Never asks what would wait for the container's start, which waits for the gate.

use futures_util::future::BoxFuture;
use pillion_workload::{Facet, InvalidName, Subject};
use tokio::io::AsyncReadExt as _;

use super::{
    ContainerId, EngineConfig, EngineKind, api,
    client::{Client, ClientError},
};
use crate::{
    chain,
    hook::{AskError, Described, Engine},
};

/// Docker's file about a container has some 4 KiB, and its labels and environment.
const KEPT_LIMIT: u64 = 4 << 20;

/// Why a held container is not known.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The engine gave no answer.
    #[error("{engine} does not say what the container is")]
    Engine {
        /// Which one.
        engine: EngineKind,
        /// Why.
        source: EngineError,
    },
    /// Podman's files are not readable.
    #[error("cannot read Podman's files")]
    Files(#[source] std::io::Error),
    /// Its name cannot be part of an id.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// What the engine's client says.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct EngineError(#[from] ClientError);

/// Asks one engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineLookup {
    engine: EngineKind,
    client: Client,
}

impl EngineLookup {
    /// For the engine that a source watches with the same configuration.
    pub fn new(config: &EngineConfig) -> Self {
        Self { engine: config.engine, client: Client::new(config) }
    }

    /// The id and the subject that the source will tell for this container; `None` when the engine knows none such. Waits for
    /// as long as the configuration says; dropping the future gives up earlier.
    async fn find(&self, container: &str) -> Result<Option<Described>, LookupError> {
        let Ok(id) = container.parse() else { return Ok(None) };
        let engine = self.engine;
        let found = self.subject(&id).await;
        let found = found.map_err(|error| LookupError::Engine { engine, source: error.into() })?;
        let Some((subject, unknown)) = found else { return Ok(None) };
        Ok(Some(Described { id: engine.workload_id(&subject.name)?, subject, unknown }))
    }

    async fn subject(&self, id: &ContainerId) -> Result<Option<(Subject, Vec<Facet>)>, ClientError> {
        let mut unknown = Vec::new();
        let Some(summary) = self.client.summary(id).await? else { return Ok(None) };
        let Some(mut subject) = summary.subject(self.engine) else { return Ok(None) };
        if summary.image_is_digest() {
            match self.image_by_name(id).await {
                Ok(image) => subject.image = image.or(subject.image),
                Err(error) => {
                    let error = chain(&*error);
                    unknown.push(Facet::Image);
                    tracing::warn!(
                        container = %id,
                        error,
                        "the container's image is known by its digest only: no policy selects it by name"
                    );
                }
            }
        }
        Ok(Some((subject, unknown)))
    }

    /// The name that a container was made from is told by an inspection, which would wait, and by Docker's own file.
    async fn image_by_name(
        &self,
        id: &ContainerId,
    ) -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>> {
        let root = self.client.root_directory().await?;
        let path = root.join("containers").join(id.as_str()).join("config.v2.json");
        let mut json = Vec::new();
        tokio::fs::File::open(path).await?.take(KEPT_LIMIT).read_to_end(&mut json).await?;
        Ok(api::kept_image(&json)?)
    }
}

impl Engine for EngineLookup {
    fn describe<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Described>, AskError>> {
        Box::pin(async { Ok(self.find(id).await?) })
    }
}
