//! `pillion-hook`: the program that container runtimes and systemd call when a workload starts, and which returns only when the
//! agent has decided.
//!
//! Owns the holding and nothing else: what becomes of a workload is decided by the agent, or by `pillion admit --offline` where there is
//! none. One thread, no async runtime, no allocation to speak of; every wait has a deadline, every input a limit, and nothing panics.
//!
//! Its name decides what it is. As `pillion-hook` it takes a mode as argument (see [`USAGE`]). Under any other name, by a link such as
//! `pillion-runc`, it is a container runtime: see `wrapper.rs`.

mod absent;
mod ask;
mod command_line;
mod container;
mod deadline;
mod decision;
mod oci;
mod places;
mod real;
mod report;
mod successor;
mod wrapper;

use std::{
    env,
    ffi::{OsStr, OsString},
    path::Path,
    process::ExitCode,
};

use pillion_common::hook::{Question, Unit};

use crate::{decision::Decision, places::Places, report::say};

/// Wrong usage, as everywhere in Pillion.
const USAGE_CODE: u8 = 2;
/// An `ExecCondition=` that ends with less only skips its unit (systemd.service(5)); of an `ExecStartPre=` any will do.
const UNIT_FAILS: u8 = 255;
/// How it is called.
const USAGE: &str = "\
usage: pillion-hook [--run-dir DIR] [--state-dir DIR] MODE

modes:
  createRuntime   as this hook of an OCI runtime: holds the container whose state is on standard input
  prestart        the same, as the older hook
  poststop        as this hook of an OCI runtime: tells the agent that the container has ended
  systemd UNIT    as ExecCondition=+ or ExecStartPre=+ of a systemd unit: holds the unit
  --version       tells its version and ends

Under any other name, such as pillion-runc by a link, it is that container runtime and holds containers at `start`.";

fn main() -> ExitCode {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    let arguments: Vec<OsString> = arguments.collect();
    match Path::new(&name).file_name() {
        Some(file) if file != "pillion-hook" => wrapper::run(file, &arguments),
        Some(_) | None => hook(&arguments),
    }
}

fn hook(arguments: &[OsString]) -> ExitCode {
    let (places, mode) = match Places::from_arguments(arguments) {
        Ok(parsed) => parsed,
        Err(error) => return wrong(&error),
    };
    let mode: Option<Vec<&str>> = mode.iter().map(|argument| argument.to_str()).collect();
    let Some(mode) = mode else { return wrong("arguments must be UTF-8") };
    let mut refusal = ExitCode::FAILURE;
    let decision = match mode[..] {
        ["--version"] => {
            report::print(&format!(
                "pillion-hook {} (gate protocol {})",
                env!("CARGO_PKG_VERSION"),
                pillion_common::hook::VERSION
            ));
            return ExitCode::SUCCESS;
        }
        ["--help" | "-h" | "help"] => {
            report::print(USAGE);
            return ExitCode::SUCCESS;
        }
        ["systemd", unit] => {
            // A pid fits, or this process would not exist.
            let pid = i32::try_from(std::process::id()).unwrap_or_default();
            refusal = ExitCode::from(UNIT_FAILS);
            decision::decide(&places, Question::Unit(Unit { name: unit.to_owned(), pid }))
        }
        [mode] => match oci::Hook::named(mode) {
            Some(hook) => oci::run(hook, &places),
            None => return wrong(&format!("there is no mode {mode:?}")),
        },
        [] => return wrong("a mode is missing"),
        [mode, ..] => return wrong(&format!("wrong arguments for {mode:?}")),
    };
    match decision {
        Decision::Admit(message) => {
            if let Some(message) = message {
                say(&message);
            }
            ExitCode::SUCCESS
        }
        Decision::Refuse(message) => {
            say(&message);
            refusal
        }
    }
}

fn wrong(what: &str) -> ExitCode {
    say(&format!("pillion-hook: {what}\n{USAGE}"));
    ExitCode::from(USAGE_CODE)
}

/// As text, also when it is not UTF-8.
fn shown(text: &OsStr) -> std::path::Display<'_> {
    Path::new(text).display()
}
