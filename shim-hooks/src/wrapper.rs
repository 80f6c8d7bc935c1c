//! As a container runtime: holds at `start`, and is the real runtime for everything else.
//!
//! Owns the pause before `start`: the container is created, its pid, its cgroup and its network are final, and nothing of it has run.
//! Every other command, and `start` once it is admitted, is the real runtime's by exec: its arguments, environment and descriptors are
//! those that came in, and its process is this one. `run` and `restore` create and start in one; they are not held here.

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use pillion_common::hook::{Container, ContainerId, Point, Question, Spec};

use crate::{
    absent::{self, GateFileRead, Running},
    command_line::CommandLine,
    container::{Created, FILE_LIMIT, parse_state, read_spec, read_state},
    deadline::Deadline,
    decision::{Decision, decide},
    real::Real,
    report::Level,
};

/// What the runtime's `state` may take. runc needs 15 ms.
const STATE: Duration = Duration::from_secs(10);

pub(crate) fn run(name: &OsStr, arguments: &[OsString]) -> ExitCode {
    let line = CommandLine::parse(arguments);
    let real = match Real::behind(name) {
        Ok(real) => real,
        Err(error) => {
            line.log.say(Level::Error, &format!("pillion: {error}"));
            return ExitCode::FAILURE;
        }
    };
    if let Some(id) = line.start {
        match hold(&real, &line, id) {
            Decision::Admit(None) => {}
            Decision::Admit(Some(message)) => line.log.say(Level::Warning, &message),
            Decision::Refuse(message) => {
                line.log.say(Level::Error, &message);
                return ExitCode::FAILURE;
            }
        }
    }
    // Some runtimes look at the name under which they are called: the real one's, not this link's.
    let error = Command::new(&real.program).args(arguments).exec();
    line.log.say(Level::Error, &format!("pillion: cannot execute {}: {error}", real.program.display()));
    ExitCode::FAILURE
}

fn hold(real: &Real, line: &CommandLine<'_>, id: &OsStr) -> Decision {
    let unknown = |why: &str| absent::decide_unknown(&GateFileRead::at(&real.places.gate_file()), why);
    let Some(id) = id.to_str() else {
        return unknown("the container's id is not UTF-8");
    };
    let root = line.root.clone().unwrap_or_else(|| real.default_root());
    let created = match read_state(&root, id) {
        Some(created) => created,
        None => match ask_runtime(real, line, id) {
            Ok(Some(created)) => created,
            // The real runtime says what is wrong.
            Ok(None) => return Decision::Admit(None),
            Err(why) => return unknown(&why),
        },
    };
    let Created { pid, started, bundle } = created;
    let spec = read_spec(&bundle).unwrap_or_else(|error| {
        line.log.say(Level::Warning, &format!("pillion: {error}; going on without"));
        Spec::default()
    });
    let root = line.root.as_deref().and_then(absolute);
    let id = ContainerId { id: id.to_owned(), bundle, root };
    decide(&real.places, Question::Container(Container { point: Point::Start, id, pid, started, spec }))
}

/// Asks a runtime whose files are not known for the container's state. `None` when it does not know the container.
fn ask_runtime(real: &Real, line: &CommandLine<'_>, id: &str) -> Result<Option<Created>, String> {
    let deadline = Deadline::after(STATE);
    let mut command = Command::new(&real.program);
    command.args(line.globals).args(["state", id]).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let failed = |what: &str| format!("`{} state {id}` {what}", real.program.display());
    let mut child = Running(command.spawn().map_err(|error| failed(&format!("cannot be run: {error}")))?);
    let text = match child.0.stdout.take() {
        Some(output) => deadline.read_to_end(&output, FILE_LIMIT),
        None => Ok(Vec::new()),
    };
    let text = text.map_err(|error| failed(&format!("gives no answer: {error}")))?;
    match parse_state(&text) {
        Some(created) => Ok(Some(created)),
        // It complains on stderr alone, or says that there is no process any more.
        None if text.is_empty() || is_over(&text) => Ok(None),
        None => Err(failed("does not tell its process")),
    }
}

fn is_over(text: &[u8]) -> bool {
    let state = serde_json::from_slice::<serde_json::Value>(text);
    state.is_ok_and(|state| state.get("status").is_some_and(|status| status == "stopped"))
}

/// The path as the agent can use it, which has another working directory.
fn absolute(path: &Path) -> Option<String> {
    let path: PathBuf = std::path::absolute(path).ok()?;
    path.into_os_string().into_string().ok()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::places::Places;

    #[test]
    fn a_runtime_of_an_unknown_kind_is_asked() {
        let directory = tempfile::tempdir().unwrap();
        let asked = |script: &str| {
            let program = directory.path().join("runtime");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            let arguments: Vec<OsString> = ["--root", "/r", "start", "x"].map(OsString::from).to_vec();
            let real = Real { program, places: Places::new(None, None) };
            ask_runtime(&real, &CommandLine::parse(&arguments), "x")
        };
        let state = r#"test "$*" = "--root /r state x" && echo '{"status":"created","pid":7,"bundle":"/b"}'"#;
        let created = Created { pid: 7, started: None, bundle: "/b".into() };
        assert_eq!(asked(state), Ok(Some(created)));
        assert_eq!(asked("echo no such container >&2; exit 1"), Ok(None));
        assert_eq!(asked(r#"echo '{"status":"stopped","bundle":"/b"}'"#), Ok(None));
        assert!(asked("echo nonsense").unwrap_err().contains("does not tell its process"));
    }
}
