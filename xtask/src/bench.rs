//! `cargo xtask bench`: builds with optimisation, measures as root, leaves the figures in `target/bench/`.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{metadata::Metadata, setup, shell};

/// What is measured, and how often.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How many times the modes take turns. More rounds make the figures steadier.
    #[arg(long, default_value_t = 60)]
    rounds: u32,
}

/// Measures redirection. Judges nothing: the figures are for people and for comparison between runs.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    shell::authorize()?;
    shell::run(shell::cargo().args([
        "build",
        "--release",
        "--package",
        "pillion-tests",
        "--bin",
        "pillion-bench",
    ]))?;
    let target = Metadata::read()?.target_directory;
    let output = target.join("bench");
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let output = output.join("redirect.json");
    let mut bench = shell::as_root(target.join("release/pillion-bench"), &[])?;
    shell::run(bench.arg("redirect").arg(&output).arg(options.rounds.to_string()))?;
    println!("figures: {}", output.display());
    Ok(())
}
