//! Whether what is held may run: the agent's word, or what stands in for it.

use std::time::Duration;

use pillion_common::hook::{Question, Request};

use crate::{
    absent::{self, GateFileRead},
    ask::{Answered, ask},
    deadline::Deadline,
    places::Places,
};

/// For how long the agent is waited for when its file does not say. The kubelet gives a runtime two minutes and systemd a unit
/// 90 seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a file may say at most.
const LONGEST: Duration = Duration::from_secs(600);
/// For how long a hint may hold up a runtime.
const HINT: Duration = Duration::from_secs(1);

/// What is to be done, and what is to be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    Admit(Option<String>),
    Refuse(String),
}

/// Asks the agent, and does without it where it must.
pub(crate) fn decide(places: &Places, question: Question) -> Decision {
    let file = GateFileRead::at(&places.gate_file());
    let patience = file.patience().unwrap_or(PATIENCE).min(LONGEST);
    let patience_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    let request = Request { patience_ms, question };
    match ask(&places.socket(), &request, Deadline::after(patience)) {
        Ok(Answered::Admit(message)) => Decision::Admit(message),
        Ok(Answered::Refuse(message)) => Decision::Refuse(message),
        Err(reason) => absent::decide(file, &request, &reason),
    }
}

/// Tells the agent something that needs no answer. Whether it arrives does not matter.
pub(crate) fn tell(places: &Places, question: Question) {
    let request = Request { patience_ms: u32::try_from(HINT.as_millis()).unwrap_or(u32::MAX), question };
    let _ = ask(&places.socket(), &request, Deadline::after(HINT));
}
