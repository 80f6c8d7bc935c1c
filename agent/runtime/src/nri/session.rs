//! One connection to a runtime's NRI socket, from registering to its loss.
//!
//! Owns the order of things on a connection, the runtime's timeouts, and the requests in flight. Requests are handled
//! beside one another: one that is held keeps none waiting. Never survives a violation of the protocol.

use std::{io, path::PathBuf, time::Duration};

use prost::{DecodeError, Message as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    NriConfig,
    frames::{Connection, Decoder, FrameError, Kind, Message, Streams, encode},
    hold::Holder,
    messages::{RUNTIME_SERVICE, RegisterPluginRequest, Request, Response, Status, code},
    plugin::{Answer, Call, Setup, call, decoded},
};
use crate::{RuntimeEvent, SourceName};

/// Its name and its place among plug-ins: what changes containers comes earlier or later, to Pillion it does not matter.
const NAME: &str = "pillion";
const INDEX: &str = "10";
/// The stream of the only request that is made.
const REGISTER: u32 = 1;
/// The runtime's default, for versions that do not tell theirs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Of the time that the runtime gives, this part is used: answers travel, and machines are busy.
const PART_USED: (u32, u32) = (4, 5);
/// Requests in flight at once: more than a node has containers.
const IN_FLIGHT: usize = 1024;
/// A runtime that does not read is lost.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// How long to wait, at the end, for the answers to what is held.
const END_LIMIT: Duration = Duration::from_millis(500);

/// How a session ended. Sessions end only by errors.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("cannot connect to NRI at {socket:?}")]
    Connect { socket: PathBuf, source: io::Error },
    #[error("NRI at {socket:?} has not {missing} within {after:?}")]
    Deadline { socket: PathBuf, missing: &'static str, after: Duration },
    #[error("the runtime refuses the plug-in: {message} (code {code})")]
    Refused { code: i32, message: String },
    #[error("the runtime breaks the protocol")]
    Frame(#[from] FrameError),
    #[error("cannot read what the runtime sends")]
    Decode(#[from] DecodeError),
    #[error("cannot read from NRI")]
    Read(#[source] io::Error),
    #[error("cannot write to NRI")]
    Write(#[source] io::Error),
    #[error("the runtime has closed the connection")]
    Closed,
    #[error("the runtime shuts down")]
    Shutdown,
    #[error("the agent ends")]
    NobodyListens,
}

/// Runs one session to its end; `true` when it had come so far as to hold containers.
pub(super) async fn run(
    config: &NriConfig,
    holder: &Holder,
    events: &mpsc::Sender<RuntimeEvent>,
    stop: &CancellationToken,
) -> (SessionError, bool) {
    let connect = |source| SessionError::Connect { socket: config.socket.clone(), source };
    let connecting = timeout(config.deadline, UnixStream::connect(&config.socket));
    let stream = match stop.run_until_cancelled(connecting).await {
        Some(Ok(Ok(stream))) => stream,
        Some(Ok(Err(error))) => return (connect(error), false),
        Some(Err(_)) => return (connect(io::ErrorKind::TimedOut.into()), false),
        None => return (SessionError::NobodyListens, false),
    };
    let mut session = Session {
        stream,
        decoder: Decoder::default(),
        streams: Streams::default(),
        holder: holder.clone(),
        request_timeout: REQUEST_TIMEOUT,
        progress: Progress::Registering,
        registered: false,
        flights: JoinSet::new(),
    };
    let result: Result<std::convert::Infallible, SessionError> = session.follow(config, events, stop).await;
    let Err(error) = result;
    (error, session.progress == Progress::Up)
}

/// How far the plug-in has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Registering,
    Configuring,
    Synchronizing,
    Up,
}

impl Progress {
    fn missing(self) -> &'static str {
        match self {
            Self::Registering => "answered the registration",
            Self::Configuring => "configured the plug-in",
            Self::Synchronizing => "synchronized the plug-in",
            Self::Up => "stayed",
        }
    }
}

struct Session {
    stream: UnixStream,
    decoder: Decoder,
    streams: Streams,
    holder: Holder,
    request_timeout: Duration,
    progress: Progress,
    /// Whether the registration was answered, which may come after the first requests.
    registered: bool,
    /// Given up with the session: whoever held there lets go of its question.
    flights: JoinSet<(u32, Answer)>,
}

impl Session {
    async fn follow(
        &mut self,
        config: &NriConfig,
        events: &mpsc::Sender<RuntimeEvent>,
        stop: &CancellationToken,
    ) -> Result<std::convert::Infallible, SessionError> {
        let register = RegisterPluginRequest { plugin_name: NAME.to_owned(), plugin_idx: INDEX.to_owned() };
        let request = Request {
            service: RUNTIME_SERVICE.to_owned(),
            method: "RegisterPlugin".to_owned(),
            payload: register.encode_to_vec(),
            timeout_nano: i64::try_from(config.deadline.as_nanos()).unwrap_or(i64::MAX),
        };
        self.send(Connection::Runtime, Kind::Request, REGISTER, &request.encode_to_vec()).await?;
        let up_by = Instant::now() + config.deadline;
        let mut ending = None;
        loop {
            if ending.is_some() && self.flights.is_empty() {
                return Err(SessionError::NobodyListens);
            }
            while let Some((connection, message)) = self.decoder.next()? {
                let was_up = self.progress == Progress::Up;
                self.take(connection, &message).await?;
                if !was_up && self.progress == Progress::Up {
                    let up = RuntimeEvent::Up { source: SourceName::NRI };
                    events.send(up).await.map_err(|_| SessionError::NobodyListens)?;
                }
            }
            tokio::select! {
                Some(done) = self.flights.join_next() => if let Ok((stream, answer)) = done {
                    self.answer(stream, answer).await?;
                },
                read = self.stream.read_buf(self.decoder.input()) => match read {
                    Ok(0) => return Err(SessionError::Closed),
                    Ok(_) => {}
                    Err(error) => return Err(SessionError::Read(error)),
                },
                () = sleep_until(up_by), if self.progress != Progress::Up => {
                    return Err(SessionError::Deadline {
                        socket: config.socket.clone(),
                        missing: self.progress.missing(),
                        after: config.deadline,
                    });
                }
                () = stop.cancelled(), if ending.is_none() => ending = Some(Instant::now() + END_LIMIT),
                () = events.closed(), if ending.is_none() => ending = Some(Instant::now() + END_LIMIT),
                () = sleep_until(ending.unwrap_or(up_by)), if ending.is_some() => {
                    return Err(SessionError::NobodyListens);
                }
            }
        }
    }

    async fn take(&mut self, connection: Connection, message: &Message) -> Result<(), SessionError> {
        match (connection, message.kind) {
            (Connection::Plugin, Kind::Request) => {
                self.streams.open(message.stream)?;
                let request = Request::decode(message.payload.clone())?;
                self.request(message.stream, request).await
            }
            (Connection::Runtime, Kind::Response) if message.stream == REGISTER && !self.registered => {
                let status = Response::decode(message.payload.clone())?.status.unwrap_or_default();
                if status.code != 0 {
                    return Err(SessionError::Refused { code: status.code, message: status.message });
                }
                self.registered = true;
                if self.progress == Progress::Registering {
                    self.progress = Progress::Configuring;
                }
                Ok(())
            }
            (Connection::Plugin, Kind::Response) => Err(FrameError::Kind(2).into()),
            (Connection::Runtime, Kind::Request) => Err(FrameError::Kind(1).into()),
            (Connection::Runtime, Kind::Response) => {
                Err(FrameError::Stream { stream: message.stream, last: REGISTER }.into())
            }
        }
    }

    async fn request(&mut self, stream: u32, request: Request) -> Result<(), SessionError> {
        let deadline = Instant::now() + self.allowed(request.timeout_nano);
        let answer = match call(request) {
            Ok(Call::Setup(Setup::Configure(configure))) => {
                let millis = u64::try_from(configure.request_timeout).unwrap_or(0);
                if millis > 0 {
                    self.request_timeout = Duration::from_millis(millis);
                }
                tracing::info!(
                    runtime = configure.runtime_name,
                    version = configure.runtime_version,
                    request_timeout = ?self.request_timeout,
                    "registered with NRI"
                );
                self.progress = Progress::Synchronizing;
                Answer::subscribed()
            }
            Ok(Call::Setup(Setup::Synchronize(synchronize))) => {
                let (pods, containers) = (synchronize.pods.len(), synchronize.containers.len());
                tracing::debug!(pods, containers, "NRI tells what runs already");
                if !synchronize.more {
                    self.progress = Progress::Up;
                }
                Answer::synchronized(synchronize.more)
            }
            Ok(Call::Setup(Setup::Shutdown)) => {
                self.answer(stream, Answer::Empty).await?;
                return Err(SessionError::Shutdown);
            }
            Ok(Call::Hold(event)) if self.flights.len() < IN_FLIGHT => {
                let holder = self.holder.clone();
                self.flights.spawn(async move { (stream, holder.handle(event, deadline).await) });
                return Ok(());
            }
            Ok(Call::Hold(_)) => Answer::Error(Status {
                code: code::RESOURCE_EXHAUSTED,
                message: format!("pillion: more than {IN_FLIGHT} requests at once"),
            }),
            Ok(Call::Nothing) => Answer::Empty,
            Err(status) => Answer::Error(status),
        };
        self.answer(stream, answer).await
    }

    /// How long a request may take, by the runtime's setting and by what the request itself says.
    fn allowed(&self, timeout_nano: i64) -> Duration {
        let asked = u64::try_from(timeout_nano).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos);
        let whole = asked.unwrap_or(self.request_timeout).min(self.request_timeout);
        whole / PART_USED.1 * PART_USED.0
    }

    async fn answer(&mut self, stream: u32, answer: Answer) -> Result<(), SessionError> {
        let response = answer.into_response().encode_to_vec();
        self.send(Connection::Plugin, Kind::Response, stream, &response).await
    }

    async fn send(
        &mut self,
        connection: Connection,
        kind: Kind,
        stream: u32,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        let frame = encode(connection, kind, stream, payload)?;
        match timeout(WRITE_LIMIT, self.stream.write_all(&frame)).await {
            Ok(written) => written.map_err(SessionError::Write),
            Err(_) => Err(SessionError::Write(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// Reads bytes as a session does, to the first error, and returns how many requests were understood. It has no effect; it
/// is for trying hostile input.
pub fn read_all(bytes: &[u8]) -> usize {
    let (mut decoder, mut streams, mut understood) = (Decoder::default(), Streams::default(), 0);
    for piece in bytes.chunks(4096) {
        decoder.input().extend_from_slice(piece);
        while let Ok(Some((connection, message))) = decoder.next() {
            match (connection, message.kind) {
                (Connection::Plugin, Kind::Request) => {
                    let request = streams.open(message.stream).ok().and_then(|()| decoded(&message.payload));
                    understood += usize::from(request.is_some_and(|request| call(request).is_ok()));
                }
                (Connection::Runtime, Kind::Response) => drop(Response::decode(message.payload)),
                (Connection::Plugin, Kind::Response) | (Connection::Runtime, Kind::Request) => {
                    return understood;
                }
            }
        }
    }
    understood
}
