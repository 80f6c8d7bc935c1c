//! What the suite about Kubernetes needs besides the others: a cluster, and Pillion's image.
//!
//! Brings no cluster up: the suite does, by the script, so that the cluster is gone when it has ended.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::tally::Tally;
use crate::{dist, shell};

/// The suite that needs one.
pub(super) const SUITE: &str = "kubernetes";

/// By which the cluster is found.
#[derive(Debug)]
pub(super) enum Cluster {
    /// A script brings it up.
    Script(PathBuf),
    /// The environment names one that is up.
    Environment,
}

impl Cluster {
    /// Nothing when nothing names one. A script that is not there is the suite's to complain of.
    pub(super) fn named(script: Option<&Path>) -> Result<Option<Self>> {
        match script {
            Some(script) => {
                let script = std::path::absolute(script).context("the path of the cluster's script")?;
                Ok(Some(Self::Script(script)))
            }
            None => Ok(env::var_os("KUBECONFIG").map(|_| Self::Environment)),
        }
    }

    /// Builds what its script has to build once, which may take minutes that no test has.
    pub(super) fn prepare(&self, tally: &mut Tally) {
        if let Self::Script(script) = self
            && script.is_file()
        {
            tally.step("the cluster's programs", |_| shell::run(shell::as_root(script, &[])?.arg("build")));
        }
    }

    /// What the suite is told about it.
    pub(super) fn environment(&self) -> Vec<(&'static str, OsString)> {
        match self {
            Self::Script(script) => vec![("PILLION_CLUSTER", script.into())],
            Self::Environment => ["KUBECONFIG", "KUBECTL", "CONTAINERD_ADDRESS"]
                .into_iter()
                .filter_map(|name| Some((name, env::var_os(name)?)))
                .collect(),
        }
    }
}

/// The image of the programs that the suites test.
pub(super) fn image(pillion: &Path) -> Result<(&'static str, OsString)> {
    let output = pillion.with_file_name("pillion-image.tar");
    dist::image_of(pillion, &output)?;
    Ok(("PILLION_IMAGE_ARCHIVE", AsRef::<OsStr>::as_ref(&output).to_owned()))
}
