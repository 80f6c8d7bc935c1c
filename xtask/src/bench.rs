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
    /// What is measured.
    #[arg(value_enum, default_value_t = What::Redirect)]
    what: What,
    /// Of `gate`: only these gates. An unknown name shows which there are.
    #[arg(long, value_name = "NAME")]
    gate: Vec<String>,
    /// Of `gate`: this part of the starts that each gate is meant to have.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    share: f64,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Connections, messages and streams, against other ways to redirect.
    Redirect,
    /// The same through the embedded relay, against no companion.
    Relay,
    /// Connections with one rule and with thousands, and with one workload attached and a thousand.
    Rules,
    /// Starts of workloads at each gate: what is caught, and how long it takes. An error when anything was missed.
    Gate,
}

/// Measures. Judges no figure: they are for people and for comparison between runs.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    shell::authorize()?;
    shell::run(shell::cargo().args([
        "build",
        "--release",
        "--package",
        "pillion-tests",
        "--package",
        "pillion",
        "--package",
        "pillion-hook",
        "--bins",
    ]))?;
    let target = Metadata::read()?.target_directory;
    let output = target.join("bench");
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let mut bench = shell::as_root(target.join("release/pillion-bench"), &[])?;
    bench.current_dir(shell::checkout());
    let output = match options.what {
        What::Redirect | What::Relay | What::Rules => {
            let name = match options.what {
                What::Relay => "relay",
                What::Rules => "rules",
                What::Redirect | What::Gate => "redirect",
            };
            let output = output.join(name).with_extension("json");
            bench.arg(name).arg(&output).arg(options.rounds.to_string());
            output
        }
        What::Gate => {
            let output = output.join("gate.json");
            bench.arg("gate").arg(&output).arg(options.share.to_string()).args(&options.gate);
            output
        }
    };
    shell::run(&mut bench)?;
    println!("figures: {}", output.display());
    Ok(())
}
