//! Asks the agent, over its socket.
//!
//! Owns the connection. Never decides what an unanswered question means.

use std::{fmt, io, os::fd::OwnedFd, path::Path};

use pillion_common::hook::{Answer, FrameError, HEADER, Request, body_length, decode, encode};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::deadline::Deadline;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// Nobody listens.
    NoAgent,
    /// Only root may ask.
    NotRoot,
    /// The agent took the question and said nothing in time.
    Silent,
    /// The agent went away, as when it is killed.
    Lost,
    /// The agent ends, and says so.
    Leaving(String),
    /// Another failure of the socket.
    Socket(io::Error),
    /// What it said is not an answer, or the question cannot be put.
    Protocol(FrameError),
    /// The agent says that it cannot say.
    Undecided(String),
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAgent => f.write_str("no agent is running"),
            Self::NotRoot => f.write_str("only root may ask the agent"),
            Self::Silent => f.write_str("the agent gave no answer in time"),
            Self::Lost => f.write_str("the agent went away before it answered"),
            Self::Leaving(message) => write!(f, "{message}, and no other came to answer"),
            Self::Socket(error) => write!(f, "cannot talk to the agent: {error}"),
            Self::Protocol(error) => write!(f, "cannot talk to the agent: {error}"),
            Self::Undecided(message) => write!(f, "the agent cannot decide: {message}"),
        }
    }
}

/// What the agent decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answered {
    Admit(Option<String>),
    Refuse(String),
}

/// Asks, and waits for the answer until `deadline`.
pub(crate) fn ask(socket: &Path, request: &Request, deadline: Deadline) -> Result<Answered, Unanswered> {
    let frame = encode(request).map_err(Unanswered::Protocol)?;
    let stream = open(socket, deadline)?;
    deadline.write_all(&stream, &frame).map_err(of_stream)?;
    read_answer(&stream, deadline)
}

/// Reads the one frame that answers.
pub(crate) fn read_answer(stream: &OwnedFd, deadline: Deadline) -> Result<Answered, Unanswered> {
    let mut header = [0; HEADER];
    deadline.read_exact(stream, &mut header).map_err(of_stream)?;
    let length = body_length::<Answer>(&header).map_err(Unanswered::Protocol)?;
    let mut body = vec![0; length];
    deadline.read_exact(stream, &mut body).map_err(of_stream)?;
    match decode(&body).map_err(Unanswered::Protocol)? {
        Answer::Admit { message } => Ok(Answered::Admit(message)),
        Answer::Refuse { message } => Ok(Answered::Refuse(message)),
        Answer::Undecided { message, leaving: true } => Err(Unanswered::Leaving(message)),
        Answer::Undecided { message, leaving: false } => Err(Unanswered::Undecided(message)),
    }
}

fn open(path: &Path, deadline: Deadline) -> Result<OwnedFd, Unanswered> {
    let failed = |errno: Errno| Unanswered::Socket(errno.into());
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    // Connecting waits while the agent's queue is full, for as long as sending may (unix(7)).
    let left = deadline.left().map_err(of_stream)?;
    set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(failed)?;
    match connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::NOENT | Errno::NOTDIR | Errno::CONNREFUSED) => return Err(Unanswered::NoAgent),
        Err(Errno::ACCESS | Errno::PERM) => return Err(Unanswered::NotRoot),
        Err(Errno::AGAIN) => return Err(Unanswered::Silent),
        Err(errno) => return Err(failed(errno)),
    }
    rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
    Ok(socket)
}

fn of_stream(error: io::Error) -> Unanswered {
    match error.kind() {
        io::ErrorKind::TimedOut => Unanswered::Silent,
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            Unanswered::Lost
        }
        _ => Unanswered::Socket(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixListener,
        thread,
        time::Duration,
    };

    use pillion_common::hook::{Question, Unit};

    use super::*;

    fn request() -> Request {
        let unit = Unit { name: "a.service".into(), pid: 1 };
        Request { patience_ms: 1000, question: Question::Unit(unit) }
    }

    /// What becomes of a question that an agent answers with these bytes; without them, it keeps the connection and is silent.
    fn answered(bytes: Option<Vec<u8>>, patience: Duration) -> Result<Answered, Unanswered> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gate.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut header = [0; HEADER];
            stream.read_exact(&mut header).unwrap();
            let mut body = vec![0; body_length::<Request>(&header).unwrap()];
            stream.read_exact(&mut body).unwrap();
            assert_eq!(decode::<Request>(&body), Ok(request()));
            if let Some(bytes) = &bytes {
                stream.write_all(bytes).unwrap();
            } else {
                // Until the hook gives up.
                let _ = stream.read(&mut [0]);
            }
        });
        let result = ask(&path, &request(), Deadline::after(patience));
        agent.join().unwrap();
        result
    }

    #[test]
    fn every_kind_of_answer_and_of_silence() {
        let patience = Duration::from_secs(20);
        let frame = |answer: Answer| encode(&answer).unwrap();
        let admit = frame(Answer::Admit { message: Some("open".into()) });
        assert_eq!(answered(Some(admit.clone()), patience).unwrap(), Answered::Admit(Some("open".into())));
        let refuse = frame(Answer::Refuse { message: "no".into() });
        assert_eq!(answered(Some(refuse), patience).unwrap(), Answered::Refuse("no".into()));
        let undecided = frame(Answer::Undecided { message: "why".into(), leaving: false });
        assert!(matches!(answered(Some(undecided), patience), Err(Unanswered::Undecided(_))));
        let leaving = frame(Answer::Undecided { message: "ending".into(), leaving: true });
        assert!(matches!(answered(Some(leaving), patience), Err(Unanswered::Leaving(_))));
        assert!(matches!(answered(Some(vec![]), patience), Err(Unanswered::Lost)));
        assert!(matches!(answered(Some(admit[..15].to_vec()), patience), Err(Unanswered::Lost)));
        assert!(matches!(answered(Some(vec![b'x'; 100]), patience), Err(Unanswered::Protocol(_))));
        assert!(matches!(answered(None, Duration::from_millis(50)), Err(Unanswered::Silent)));
    }

    #[test]
    fn no_agent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gate.sock");
        let deadline = Deadline::after(Duration::from_secs(20));
        assert!(matches!(ask(&path, &request(), deadline), Err(Unanswered::NoAgent)));
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(ask(&path, &request(), deadline), Err(Unanswered::NoAgent)));
    }
}
