//! `pillion-hook`: the program that container runtimes and systemd are to call when a workload starts.
//!
//! It will hold the workload until the agent has its plan in force. In this version it says so and refuses every call:
//! a hook that let workloads pass without a word would be worse than none, so nothing installs it yet. It depends on
//! `common` alone and stays small and static.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is all it has")]

use std::{env, process::ExitCode};

/// Wrong usage, as everywhere in Pillion.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    if env::args_os().nth(1).is_some_and(|argument| argument == "--version") {
        println!("pillion-hook {} (layout {})", env!("CARGO_PKG_VERSION"), pillion_common::LAYOUT_VERSION);
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "pillion-hook: this version does not hold workloads yet; take it out of the runtime's configuration"
    );
    ExitCode::from(USAGE)
}
