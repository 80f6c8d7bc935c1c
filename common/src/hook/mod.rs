//! What `pillion-hook` and the agent say to each other: one request and one answer over a Unix stream socket.
//!
//! Owns the messages, their limits and their form on the wire. Never does IO, and never decides anything.
//!
//! The hook connects to [`SOCKET`] in the agent's run directory (only root may, and the agent looks at the peer's credentials), sends one
//! frame with a [`Request`], and reads one with an [`Answer`]; then both close. A hook that closes earlier withdraws its question; one whose
//! agent goes away asks the next one the same, with the time that is left.
//! `pillion admit --offline` reads and writes the same frames on its standard input and output.
//!
//! A frame is a header of [`HEADER`] bytes and a body:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–3 | `PLGA` |
//! | 4–5 | version of this protocol, big-endian |
//! | 6–7 | zero |
//! | 8–11 | length of the body in bytes, big-endian; bounded by [`Message::LIMIT`] |
//! | from 12 | the message as JSON |
//!
//! Fields may be added without a new version: unknown ones are passed over, new ones have a default. So the hook and the agent
//! need not be of the same release.

mod file;
mod request;

use alloc::{string::String, vec::Vec};
use core::fmt;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use file::{GATE_FILE, GateFile, GateFileError, GatePolicy, OnFailure};
pub use request::{Container, ContainerId, Point, Question, Request, Spec, Stopped, Unit};

/// Name of the agent's socket in its run directory.
pub const SOCKET: &str = "gate.sock";
/// Name of the file in its run directory that an agent holds with flock(2) from its beginning, before there is a socket, to its end.
pub const LOCK: &str = "agent.lock";
/// The agent's run directory, unless it is told otherwise.
pub const RUN_DIRECTORY: &str = "/run/pillion";
/// The agent's state directory, unless it is told otherwise.
pub const STATE_DIRECTORY: &str = "/var/lib/pillion";
/// Version of the protocol.
pub const VERSION: u16 = 1;
/// Length of a frame's header.
pub const HEADER: usize = 12;

const MAGIC: [u8; 4] = *b"PLGA";

/// What is to be done with what is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// Let it run.
    Admit {
        /// What its user should read, if anything.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
    /// Do not let it run.
    Refuse {
        /// Why; names Pillion and the policy.
        message: String,
    },
    /// The agent cannot say. The hook does as if there were no agent.
    Undecided {
        /// Why.
        message: String,
        /// The agent is ending, and another one may be about to take its place: that one can be asked again.
        #[serde(default, skip_serializing_if = "core::ops::Not::not")]
        leaving: bool,
    },
}

/// A message that can be framed.
pub trait Message: Serialize + DeserializeOwned {
    /// The longest body, in bytes.
    const LIMIT: usize;

    /// What is wrong with a message that can be parsed.
    fn check(&self) -> Result<(), FrameError>;
}

impl Message for Request {
    /// The kubelet bounds annotations to 256 KiB; the hook leaves out what is too much.
    const LIMIT: usize = 1 << 20;

    fn check(&self) -> Result<(), FrameError> {
        self.question.check()
    }
}

impl Message for Answer {
    const LIMIT: usize = 64 << 10;

    fn check(&self) -> Result<(), FrameError> {
        Ok(())
    }
}

/// Why a frame cannot be made or read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameError {
    /// It does not begin as a frame does.
    NotAFrame,
    /// The other side speaks another version.
    Version {
        /// Which one.
        theirs: u16,
    },
    /// The body is longer than its kind of message may be.
    TooLong {
        /// Its length, in bytes.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The body is not such a message.
    Body(String),
    /// A field has a value that it cannot have.
    Field {
        /// Which field.
        field: &'static str,
        /// What it must be.
        rule: &'static str,
    },
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAFrame => f.write_str("this is not Pillion's gate protocol"),
            Self::Version { theirs } => {
                write!(f, "the other side speaks version {theirs} of the gate protocol, this one {VERSION}")
            }
            Self::TooLong { length, limit } => {
                write!(f, "a message of {length} bytes, where {limit} are allowed")
            }
            Self::Body(why) => write!(f, "not a message of the gate protocol: {why}"),
            Self::Field { field, rule } => write!(f, "{field} {rule}"),
        }
    }
}

impl core::error::Error for FrameError {}

/// A whole frame.
pub fn encode<T: Message>(message: &T) -> Result<Vec<u8>, FrameError> {
    message.check()?;
    let body = serde_json::to_vec(message).map_err(|error| FrameError::Body(alloc::format!("{error}")))?;
    let length = bounded::<T>(body.len())?;
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.extend(MAGIC);
    frame.extend(VERSION.to_be_bytes());
    frame.extend([0; 2]);
    frame.extend(length.to_be_bytes());
    frame.extend(body);
    Ok(frame)
}

/// How long the body after this header is, in bytes.
pub fn body_length<T: Message>(header: &[u8; HEADER]) -> Result<usize, FrameError> {
    let [m0, m1, m2, m3, v0, v1, _, _, l0, l1, l2, l3] = *header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(FrameError::NotAFrame);
    }
    let theirs = u16::from_be_bytes([v0, v1]);
    if theirs != VERSION {
        return Err(FrameError::Version { theirs });
    }
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    bounded::<T>(length)?;
    Ok(length)
}

/// The message in a body.
pub fn decode<T: Message>(body: &[u8]) -> Result<T, FrameError> {
    bounded::<T>(body.len())?;
    let message: T =
        serde_json::from_slice(body).map_err(|error| FrameError::Body(alloc::format!("{error}")))?;
    message.check()?;
    Ok(message)
}

fn bounded<T: Message>(length: usize) -> Result<u32, FrameError> {
    let fits = u32::try_from(length).ok().filter(|_| length <= T::LIMIT);
    fits.ok_or(FrameError::TooLong { length, limit: T::LIMIT })
}

#[cfg(test)]
mod tests;
