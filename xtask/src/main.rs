//! The project's own commands: `cargo xtask setup | demo | test | bench | dist | tidy`. Wires nothing of the agent; depends on none of its crates.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program for developers")]

mod bench;
mod demo;
mod dist;
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
    /// Install everything that building, demo and tests need. Asks for sudo to install packages and to make the suites' systems.
    Setup,
    /// Show what Pillion does, on real programs, in under two minutes. Calls setup; needs root and asks for sudo.
    Demo,
    /// Run all checks, unit tests and suites. Calls setup; the suites need root and ask for sudo.
    Test(test::Options),
    /// Measure what redirection costs. Needs root and asks for sudo.
    Bench(bench::Options),
    /// Make what is given to users: a container image.
    #[command(subcommand)]
    Dist(dist::What),
    /// Check what the compiler does not: crate arrows, form of the files, the map in ARCHITECTURE.md.
    Tidy,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Task::Setup => setup::run().and_then(|()| setup::lab()),
        Task::Demo => demo::run(),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Dist(what) => dist::run(&what),
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
