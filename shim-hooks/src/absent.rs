//! What is done without the agent's word: as the file that it left says.
//!
//! Owns the rule. Selects nothing by itself: where a policy could refuse, `pillion admit --offline` decides, by the policies
//! that were in force last; where that cannot, what is held does not run.
//!
//! | the file | what is held |
//! | --- | --- |
//! | is not there | runs: there is no agent on this machine, or it was cleaned up |
//! | has no closed policy | runs |
//! | has closed policies | `pillion admit --offline` decides |
//! | cannot be read by root | does not run: it may have closed policies |
//! | cannot be read by somebody else | runs: only root's workloads are held |

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use pillion_common::hook::{GATE_FILE, GateFile, Request, encode};

use crate::{
    ask::{Answered, Unanswered, read_answer},
    deadline::Deadline,
    decision::Decision,
};

/// What `pillion admit --offline` may take: it asks containerd or Docker once.
const OFFLINE: Duration = Duration::from_secs(10);
/// How many names a message has.
const NAMES: usize = 8;

/// The file, as far as it could be read.
#[derive(Debug)]
pub(crate) enum GateFileRead {
    File(GateFile),
    Missing,
    /// By one who is not root.
    Hidden,
    Broken {
        path: PathBuf,
        why: String,
    },
}

impl GateFileRead {
    pub(crate) fn at(path: &Path) -> Self {
        let broken = |why: String| Self::Broken { path: path.to_owned(), why };
        match read(path) {
            Ok(text) => match GateFile::parse(&text) {
                Ok(file) => Self::File(file),
                Err(error) => broken(error.to_string()),
            },
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => Self::Missing,
                io::ErrorKind::PermissionDenied => Self::Hidden,
                _ => broken(error.to_string()),
            },
        }
    }

    pub(crate) fn patience(&self) -> Option<Duration> {
        match self {
            Self::File(file) => Some(Duration::from_millis(file.patience_ms.into())),
            Self::Missing | Self::Hidden | Self::Broken { .. } => None,
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut text = Vec::new();
    let limit = u64::try_from(GateFile::LIMIT).unwrap_or(u64::MAX).saturating_add(1);
    fs::File::open(path)?.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

/// Decides, when the agent did not for this `reason`.
pub(crate) fn decide(file: GateFileRead, request: &Request, reason: &Unanswered) -> Decision {
    let file = match file {
        GateFileRead::Missing => return Decision::Admit(None),
        GateFileRead::Hidden => {
            return Decision::Admit(Some(format!("pillion: not held: {reason}, and {GATE_FILE} is root's")));
        }
        GateFileRead::Broken { path, why } => {
            return Decision::Refuse(format!(
                "pillion: {reason}, and {} cannot be read ({why}), so whether a policy says onFailure: closed is not \
                 known; refused; start `pillion agent`, which writes the file anew",
                path.display()
            ));
        }
        GateFileRead::File(file) => file,
    };
    if file.closed().next().is_none() {
        return Decision::Admit(Some(format!(
            "pillion: not held: {reason}; no policy that was in force last says onFailure: closed"
        )));
    }
    match offline(&file, request) {
        Ok(Answered::Admit(message)) => Decision::Admit(message.map(|message| said(reason, &message))),
        Ok(Answered::Refuse(message)) => Decision::Refuse(said(reason, &message)),
        Err(error) => {
            let program = file.command.first().map_or("pillion", String::as_str);
            Decision::Refuse(format!(
                "pillion: {reason}, and `{program} admit --offline` does not decide in its place ({error}); refused, \
                 because of the policies that say onFailure: closed: {}; start `pillion agent`",
                names(&file)
            ))
        }
    }
}

/// Decides about what cannot even be asked about, for this reason.
pub(crate) fn decide_unknown(file: &GateFileRead, why: &str) -> Decision {
    match file {
        GateFileRead::File(file) if file.closed().next().is_some() => Decision::Refuse(format!(
            "pillion: {why}; refused, because of the policies that say onFailure: closed: {}",
            names(file)
        )),
        GateFileRead::Broken { path, why: broken } => Decision::Refuse(format!(
            "pillion: {why}, and {} cannot be read ({broken}); refused",
            path.display()
        )),
        GateFileRead::File(_) | GateFileRead::Missing | GateFileRead::Hidden => {
            Decision::Admit(Some(format!("pillion: not held: {why}")))
        }
    }
}

/// The reason goes where the message names Pillion.
fn said(reason: &Unanswered, message: &str) -> String {
    format!("pillion: {reason}; {}", message.strip_prefix("pillion: ").unwrap_or(message))
}

fn names(file: &GateFile) -> String {
    let mut names: Vec<&str> = file.closed().take(NAMES + 1).collect();
    if names.len() > NAMES {
        names.truncate(NAMES);
        names.push("and more");
    }
    names.join(", ")
}

/// Lets the full policy engine decide.
fn offline(file: &GateFile, request: &Request) -> Result<Answered, Unanswered> {
    let [program, arguments @ ..] = &file.command[..] else {
        return Err(Unanswered::NoAgent);
    };
    let frame = encode(request).map_err(Unanswered::Protocol)?;
    let deadline = Deadline::after(OFFLINE);
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    // Killed as one group, with whatever it may have started.
    command.process_group(0);
    let mut child = Running(command.spawn().map_err(Unanswered::Socket)?);
    let (Some(input), Some(output)) = (child.0.stdin.take(), child.0.stdout.take()) else {
        return Err(Unanswered::Lost);
    };
    let (input, output) = (OwnedFd::from(input), OwnedFd::from(output));
    let put = rustix::io::ioctl_fionbio(input.as_fd(), true).map_err(io::Error::from);
    put.and_then(|()| deadline.write_all(&input, &frame)).map_err(Unanswered::Socket)?;
    drop(input);
    read_answer(&output, deadline)
}

/// A child that does not outlive its use.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended is not waited for yet, so its pid is still its own.
        if let Some(group) = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use pillion_common::hook::{Answer, GatePolicy, OnFailure, Question, Unit};

    use super::*;

    fn request() -> Request {
        let unit = Unit { name: "a.service".into(), pid: 1 };
        Request { patience_ms: 1000, question: Question::Unit(unit) }
    }

    fn file(command: &str, policies: &[(&str, OnFailure)]) -> GateFile {
        let policies = policies
            .iter()
            .map(|(name, on_failure)| GatePolicy { name: (*name).to_owned(), on_failure: *on_failure });
        GateFile::new(vec![command.to_owned()], policies.collect(), 1000)
    }

    #[test]
    fn only_a_closed_policy_can_refuse() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gate.json");
        let decision = |text: Option<Vec<u8>>| {
            match text {
                Some(text) => fs::write(&path, text).unwrap(),
                None => _ = fs::remove_file(&path),
            }
            decide(GateFileRead::at(&path), &request(), &Unanswered::NoAgent)
        };
        assert_eq!(decision(None), Decision::Admit(None));
        let open = file("/x", &[("a", OnFailure::Open)]).to_json().unwrap();
        assert!(matches!(decision(Some(open)), Decision::Admit(Some(_))));
        let none = file("/x", &[]).to_json().unwrap();
        assert!(matches!(decision(Some(none)), Decision::Admit(Some(_))));
        let closed = file("/nowhere/pillion", &[("a", OnFailure::Open), ("b", OnFailure::Closed)]);
        let Decision::Refuse(message) = decision(Some(closed.to_json().unwrap())) else {
            panic!("must be refused")
        };
        for part in ["pillion: no agent is running", "/nowhere/pillion", "closed: b;"] {
            assert!(message.contains(part), "{message}");
        }
        for broken in [&b""[..], b"{}", b"\xff", br#"{"version":9}"#] {
            let decision = decision(Some(broken.to_vec()));
            assert!(
                matches!(&decision, Decision::Refuse(message) if message.contains("gate.json")),
                "{decision:?}"
            );
        }
        // What cannot be asked about is not known to be open.
        for (policies, refused) in
            [(&[("a", OnFailure::Open)][..], false), (&[("b", OnFailure::Closed)], true)]
        {
            let decision = decide_unknown(&GateFileRead::File(file("/x", policies)), "why");
            assert_eq!(
                matches!(&decision, Decision::Refuse(message) if message.contains("closed: b")),
                refused
            );
        }
        assert!(matches!(decide_unknown(&GateFileRead::Missing, "why"), Decision::Admit(Some(_))));
        // Not a file at all.
        let directory = GateFileRead::at(directory.path());
        assert!(matches!(directory, GateFileRead::Broken { .. }), "{directory:?}");
    }

    /// A program that stands in for `pillion admit --offline`.
    fn stand_in(directory: &Path, script: &str) -> GateFile {
        let program = directory.join("pillion");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        file(program.to_str().unwrap(), &[("b", OnFailure::Closed)])
    }

    #[test]
    fn the_offline_decision_is_taken_and_its_absence_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let answer = |answer: Answer| {
            let path = directory.path().join("answer");
            fs::write(&path, encode(&answer).unwrap()).unwrap();
            format!("cat >{0}/question; cat {0}/answer", directory.path().display())
        };
        let decided = |script: &str| {
            let file = GateFileRead::File(stand_in(directory.path(), script));
            decide(file, &request(), &Unanswered::Silent)
        };
        assert_eq!(decided(&answer(Answer::Admit { message: None })), Decision::Admit(None));
        assert_eq!(fs::read(directory.path().join("question")).unwrap(), encode(&request()).unwrap());
        let refused = decided(&answer(Answer::Refuse { message: "pillion: policy b says so".into() }));
        let expected = "pillion: the agent gave no answer in time; policy b says so";
        assert_eq!(refused, Decision::Refuse(expected.into()));
        for script in [
            "exit 1",
            "cat",
            "echo nonsense",
            &answer(Answer::Undecided { message: "x".into(), leaving: false }),
        ] {
            let decision = decided(script);
            assert!(
                matches!(&decision, Decision::Refuse(message) if message.contains("closed: b")),
                "{script}: {decision:?}"
            );
        }
    }
}
