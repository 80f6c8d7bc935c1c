//! The `pillion` binary: hands each command to its module and turns the outcome into an exit code.
//!
//! Wires, decides nothing. The hidden commands come first, before anything that starts a thread or takes time:
//! `launch` enters namespaces, which only a process with one thread can, and is started for every companion.

mod admin;
mod admit;
mod agent;
mod api;
mod check;
mod cleanup;
mod cli;
mod client;
mod config;
mod conflicts;
mod connection;
mod connection_text;
mod container_names;
mod controller;
mod event_log;
mod exec_gate;
mod explain;
mod hooks;
mod http;
mod inspect;
mod inventory;
mod journal;
mod last_good;
mod lock;
mod memory;
mod metrics;
mod notify;
mod on_node;
mod plan_text;
mod policy_files;
mod policy_watch;
mod readable;
mod render;
mod run;
mod sources;
mod standing;
mod telemetry;
mod trace;
mod units;
mod validate;
mod views;
mod witness;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use pillion_companion::launch;

use crate::{
    cli::{Cli, Command, CompletionArgs},
    client::ClientError,
    render::{Paint, Tone, note},
};

/// Exit code 4.
const UNREACHABLE: u8 = 4;

fn main() -> ExitCode {
    if let Some(command) = std::env::args_os().nth(1) {
        if command == launch::LAUNCH || command == launch::COMPANION {
            return launch::main();
        }
        if command == exec_gate::COMMAND {
            return exec_gate::guardian(&std::env::args_os().skip(2).collect::<Vec<_>>());
        }
    }
    run(Cli::parse().command).unwrap_or_else(|error| report(&error))
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Agent(args) => agent::main(*args),
        Command::Run(args) => run::main(*args),
        Command::Validate(args) => validate::main(&args),
        Command::Explain(args) => in_background(explain::main(args)),
        Command::Status(args) => in_background(inspect::status(args)),
        Command::List(args) => in_background(inspect::list(args)),
        Command::Describe(args) => in_background(inspect::describe(args)),
        Command::Attach(args) => in_background(inspect::attach(args)),
        Command::Detach(args) => in_background(inspect::detach(args)),
        Command::Events(args) => in_background(inspect::events(args)),
        Command::Trace(args) => in_background(trace::main(args)),
        Command::Admit(args) => in_background(admit::main(args)),
        Command::InstallHooks(args) => hooks::install(&args),
        Command::UninstallHooks(args) => hooks::uninstall(&args),
        Command::Check(args) => in_background(check::main(&args)),
        Command::Cleanup(args) => cleanup::main(&args),
        Command::OnNode(args) => on_node::main(&args),
        Command::Completion(args) => completion(&args),
        Command::Version(args) => in_background(inspect::version(args)),
    }
}

/// One thread does for a command that asks one question.
fn in_background(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn completion(args: &CompletionArgs) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pillion", &mut script);
    render::stdout(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

fn report(error: &anyhow::Error) -> ExitCode {
    let head = Paint::for_stderr().tone(Tone::Bad, "error");
    note(format_args!("{head}: {}", render::plain_lines(&format!("{error:#}"))));
    match error.downcast_ref::<ClientError>() {
        Some(error) if error.is_unreachable() => ExitCode::from(UNREACHABLE),
        _ => ExitCode::FAILURE,
    }
}
