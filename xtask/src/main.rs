//! The project's own commands: `cargo xtask setup | demo | test | bench | tidy`. Wires nothing of the agent; depends on none of its crates.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program for developers")]

mod bench;
mod demo;
mod metadata;
mod setup;
mod shell;
mod test;
mod tidy;
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
    /// Show what Pillion does, on real programs, in under two minutes. Calls setup; needs root and asks for sudo.
    Demo,
    /// Run all checks, unit tests and suites. Calls setup; the suites need root and ask for sudo.
    Test(test::Options),
    /// Measure what redirection costs. Needs root and asks for sudo.
    Bench(bench::Options),
    /// Check what the compiler does not: crate arrows, form of the files, the map in ARCHITECTURE.md.
    Tidy,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Task::Setup => setup::run(),
        Task::Demo => demo::run(),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Tidy => tidy::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
