//! Whether what is held may run: the agent's word, or what stands in for it.
//!
//! An agent that goes away while it is asked is perhaps being replaced: the next one is asked the same, within the time that was there from
//! the beginning. Where no agent is and none is coming, nobody waits.

use std::time::Duration;

use pillion_common::hook::{Question, Request};

use crate::{
    absent::{self, GateFileRead},
    ask::{Answered, Unanswered, ask},
    deadline::Deadline,
    places::Places,
    successor::is_locked,
};

/// For how long the agent is waited for when its file does not say. The kubelet gives a runtime two minutes and systemd a unit
/// 90 seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a file may say at most.
const LONGEST: Duration = Duration::from_secs(600);
/// For how long the next agent is waited for, after the last sign of one. Restarted by systemd it listens within a second.
const SUCCESSOR: Duration = Duration::from_secs(5);
/// Between looks for it.
const PAUSE: Duration = Duration::from_millis(50);
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
    let patience = GateFileRead::at(&places.gate_file()).patience().unwrap_or(PATIENCE).min(LONGEST);
    match ask_until_answered(places, &question, Deadline::after(patience)) {
        Ok(Answered::Admit(message)) => Decision::Admit(message),
        Ok(Answered::Refuse(message)) => Decision::Refuse(message),
        Err(reason) => {
            let request = Request { patience_ms: millis(patience), question };
            // Read again: the agent that went away may have been uninstalled, and the next one may have had other policies.
            absent::decide(GateFileRead::at(&places.gate_file()), &request, &reason)
        }
    }
}

/// Asks the agent, and its successors.
fn ask_until_answered(
    places: &Places,
    question: &Question,
    deadline: Deadline,
) -> Result<Answered, Unanswered> {
    let mut last = Unanswered::NoAgent;
    // Until when an agent may be expected.
    let mut hope: Option<Deadline> = None;
    while let Ok(left) = deadline.left() {
        let request = Request { patience_ms: millis(left), question: question.clone() };
        match ask(&places.socket(), &request, deadline) {
            Ok(answered) => return Ok(answered),
            Err(gone @ (Unanswered::Lost | Unanswered::Leaving(_))) => {
                (last, hope) = (gone, Some(Deadline::after(SUCCESSOR)));
            }
            Err(Unanswered::NoAgent) => {
                if is_locked(&places.lock()) {
                    hope = Some(Deadline::after(SUCCESSOR));
                }
                if hope.is_none_or(|hope| hope.left().is_err()) {
                    return Err(last);
                }
            }
            Err(
                error @ (Unanswered::NotRoot
                | Unanswered::Silent
                | Unanswered::Socket(_)
                | Unanswered::Protocol(_)
                | Unanswered::Undecided(_)),
            ) => return Err(error),
        }
        deadline.pause(PAUSE);
    }
    Err(last)
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Tells the agent something that needs no answer. Whether it arrives does not matter.
pub(crate) fn tell(places: &Places, question: Question) {
    let request = Request { patience_ms: millis(HINT), question };
    let _ = ask(&places.socket(), &request, Deadline::after(HINT));
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read as _, Write as _},
        os::unix::net::UnixListener,
        thread,
        time::Instant,
    };

    use pillion_common::hook::decode as read_frame;
    use pillion_common::hook::{Answer, HEADER, Unit, body_length, encode};

    use super::*;

    fn question() -> Question {
        Question::Unit(Unit { name: "a.service".into(), pid: 1 })
    }

    /// An agent that answers one question, or hangs up.
    fn serve(listener: &UnixListener, answer: Option<Answer>) -> u32 {
        let (mut stream, _) = listener.accept().unwrap();
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).unwrap();
        let mut body = vec![0; body_length::<Request>(&header).unwrap()];
        stream.read_exact(&mut body).unwrap();
        if let Some(answer) = answer {
            stream.write_all(&encode(&answer).unwrap()).unwrap();
        }
        let request: Request = read_frame(&body).unwrap();
        assert_eq!(request.question, question());
        request.patience_ms
    }

    fn bind(places: &Places) -> UnixListener {
        let _ = std::fs::remove_file(places.socket());
        UnixListener::bind(places.socket()).unwrap()
    }

    #[test]
    fn the_next_agent_is_asked_with_the_time_that_is_left() {
        let leaving = Answer::Undecided { message: "the agent is ending".into(), leaving: true };
        for first in [None, Some(leaving)] {
            let directory = tempfile::tempdir().unwrap();
            let places = Places::new(Some(directory.path().into()), Some(directory.path().into()));
            let listener = bind(&places);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let before = serve(&listener, first);
                    drop(listener);
                    // Some looks find nobody.
                    thread::sleep(PAUSE * 4);
                    let after = serve(&bind(&places), Some(Answer::Refuse { message: "no".into() }));
                    assert!(after < before, "{after} {before}");
                });
                let answered = ask_until_answered(&places, &question(), Deadline::after(PATIENCE));
                assert_eq!(answered.unwrap(), Answered::Refuse("no".into()));
            });
        }
    }

    #[test]
    fn nobody_is_waited_for_unless_one_is_coming() {
        let directory = tempfile::tempdir().unwrap();
        let places = Places::new(Some(directory.path().into()), Some(directory.path().into()));
        let begun = Instant::now();
        let none = ask_until_answered(&places, &question(), Deadline::after(PATIENCE));
        assert!(matches!(none, Err(Unanswered::NoAgent)), "{none:?}");
        // One that was killed, and no other came.
        drop(bind(&places));
        let none = ask_until_answered(&places, &question(), Deadline::after(PATIENCE));
        assert!(matches!(none, Err(Unanswered::NoAgent)), "{none:?}");
        assert!(begun.elapsed() < SUCCESSOR / 2, "{:?}", begun.elapsed());
        // One that has its lock and does not listen is waited for, as long as there is time.
        let lock = File::create(places.lock()).unwrap();
        lock.lock().unwrap();
        let begun = Instant::now();
        let none = ask_until_answered(&places, &question(), Deadline::after(PAUSE * 6));
        assert!(matches!(none, Err(Unanswered::NoAgent)) && begun.elapsed() >= PAUSE * 6, "{none:?}");
        thread::scope(|scope| {
            scope.spawn(|| {
                // It has its lock for a while before it listens.
                thread::sleep(PAUSE * 2);
                serve(&bind(&places), Some(Answer::Admit { message: None }))
            });
            let answered = ask_until_answered(&places, &question(), Deadline::after(PATIENCE));
            assert_eq!(answered.unwrap(), Answered::Admit(None));
        });
    }

    #[test]
    fn no_successor_is_waited_for_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let places = Places::new(Some(directory.path().into()), Some(directory.path().into()));
        let listener = bind(&places);
        thread::scope(|scope| {
            scope.spawn(move || serve(&listener, None));
            let begun = Instant::now();
            let none = ask_until_answered(&places, &question(), Deadline::after(PATIENCE));
            assert!(matches!(none, Err(Unanswered::Lost)), "{none:?}");
            assert!(begun.elapsed() >= SUCCESSOR && begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        });
    }
}
