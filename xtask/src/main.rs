//! The project's own commands: `cargo xtask setup | test | tidy`. Wires nothing of the agent; depends on none of its crates.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program for developers")]

mod setup;
mod shell;
#[path = "../../agent/redirect/build/toolchain.rs"]
#[expect(dead_code, reason = "build.rs, which shares it, reads more fields")]
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tests and looks after Pillion.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install everything that building, demo and tests need. Asks for sudo only to install packages.
    Setup,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Task::Setup => setup::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
