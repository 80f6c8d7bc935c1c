//! cargo-deb, which makes the Debian package. Only `cargo xtask dist deb`, and the suite that installs the package, need it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::program::Program;

/// Builds it, unless it is there, and returns its path.
pub(crate) fn install(tools: &Path) -> Result<PathBuf> {
    // Without a C library for compression: `xz`, which is on every Debian, does it.
    let quick = ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1".as_ref());
    let program = Program {
        name: "cargo-deb",
        version: "3.8.0",
        variant: "",
        arguments: &["--no-default-features"],
        environment: &[quick],
    };
    program.install(tools, || Ok(()))?;
    Ok(tools.join("bin/cargo-deb"))
}
