//! What cargo says about the workspace: members, their dependencies and targets.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::shell;

/// The part of `cargo metadata` that is used here.
#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_directory: PathBuf,
}

#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) manifest_path: PathBuf,
    pub(crate) dependencies: Vec<Dependency>,
    pub(crate) targets: Vec<Target>,
}

#[derive(Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// Set for a member of the workspace.
    pub(crate) path: Option<PathBuf>,
}

#[derive(Deserialize)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) kind: Vec<String>,
}

impl Metadata {
    /// Asks cargo; reads manifests only.
    pub(crate) fn read() -> Result<Self> {
        let text = shell::capture(shell::cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        serde_json::from_str(&text).context("cargo metadata prints JSON")
    }

    /// Pillion's: all members of the workspace have the same.
    pub(crate) fn version(&self) -> Result<&str> {
        let agent = self.packages.iter().find(|package| package.name == "pillion");
        Ok(&agent.context("the workspace has the package pillion")?.version)
    }

    /// The suites: integration tests of the crate `tests`, sorted.
    pub(crate) fn suites(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .packages
            .iter()
            .filter(|package| package.name == TESTS)
            .flat_map(|package| &package.targets)
            .filter(|target| target.kind.iter().any(|kind| kind == "test"))
            .map(|target| target.name.as_str())
            .collect();
        names.sort_unstable();
        names
    }
}

/// The crate of the suites.
pub(crate) const TESTS: &str = "pillion-tests";
/// Compiled for another target, by agent/redirect/build.rs.
pub(crate) const EBPF: &str = "pillion-ebpf";
