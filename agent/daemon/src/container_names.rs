//! Joins companions that are known by their container's name with who knows those names. Decides nothing.

use std::{io, pin::Pin};

use pillion_companion::ContainerNames;
use pillion_runtime::ContainerdResolver;

/// The names that containerd keeps.
#[derive(Debug)]
pub(crate) struct OfContainerd(pub(crate) ContainerdResolver);

impl ContainerNames for OfContainerd {
    fn ids_of<'a>(
        &'a self,
        name: &'a str,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<String>>> + Send + 'a>> {
        Box::pin(async { self.0.containers_named(name).await.map_err(io::Error::other) })
    }
}
