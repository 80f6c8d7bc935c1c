//! cargo-deny, which applies deny.toml. Only `cargo xtask test` needs it, so the demo does not wait for it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::program::Program;

/// Builds it, unless it is there, and returns its path.
pub(crate) fn install(tools: &Path) -> Result<PathBuf> {
    // Optimisation would make it take longer to build than it ever runs.
    let quick = ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1".as_ref());
    let program = Program {
        name: "cargo-deny",
        version: "0.20.2",
        variant: "",
        arguments: &["--no-default-features"],
        environment: &[quick],
    };
    program.install(tools, || Ok(()))?;
    Ok(tools.join("bin/cargo-deny"))
}
