//! The command line's end of the admin API: HTTP/1 over the agent's Unix socket.
//!
//! Owns the connection, its deadlines and the wording of what can go wrong with it. Never prints, never interprets
//! what the agent answers.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

use crate::api::ErrorResponse;

/// No answer of the agent comes near: a workload takes about 2 KiB.
const LONGEST_ANSWER: usize = 256 << 20;
/// No event comes near.
const LONGEST_LINE: usize = 1 << 20;

/// Why the agent's answer could not be had. The text has the cause in its middle and the cure on its last line, so causes
/// are not error sources, which would be appended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// No connection to the socket. Exit code 4.
    #[error("cannot reach the agent at {}: {cause}\n{}", .socket.display(), cure_for_unreachable(.cause))]
    Unreachable {
        /// The admin socket.
        socket: PathBuf,
        /// What connect(2) said.
        cause: io::Error,
    },
    /// Connected, but nothing comes. Exit code 4.
    #[error(
        "the agent at {} was silent for {}\nlook at its log, or give it more time with --timeout",
        .socket.display(), humantime::format_duration(*.after)
    )]
    Silent {
        /// The admin socket.
        socket: PathBuf,
        /// For how long.
        after: Duration,
    },
    /// The connection broke half-way. Exit code 4.
    #[error("the connection to the agent at {} broke: {cause}\nlook at the agent's log", .socket.display())]
    Broken {
        /// The admin socket.
        socket: PathBuf,
        /// What HTTP said.
        cause: hyper::Error,
    },
    /// The agent understood and said no.
    #[error("{message}")]
    Refused {
        /// Its status.
        status: StatusCode,
        /// Its words.
        message: String,
    },
    /// The answer makes no sense.
    #[error(
        "the agent's answer to {path} cannot be read: {reason}\nis it of another version? see: pillion version"
    )]
    Unreadable {
        /// What was asked.
        path: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

impl ClientError {
    /// Whether it is about reaching the agent rather than about what it said.
    pub(crate) fn is_unreachable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::Broken { .. } => true,
            Self::Refused { .. } | Self::Unreadable { .. } => false,
        }
    }
}

fn cure_for_unreachable(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "no agent runs here (start it: systemctl start pillion, or: pillion agent), or it uses another --run-dir"
        }
        io::ErrorKind::PermissionDenied => "the socket belongs to root and its group: use sudo",
        io::ErrorKind::ConnectionRefused => {
            "the agent has died and left its socket; what it attached stays in force; start it: systemctl start pillion, or: pillion agent"
        }
        _ => "is the agent running? see: systemctl status pillion",
    }
}

/// One agent. Each request has a connection of its own.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    /// How long the agent may be silent.
    patience: Duration,
}

impl Client {
    /// The agent whose run directory is `run_dir`. Does not connect yet.
    pub(crate) fn new(run_dir: &Path, patience: Duration) -> Self {
        Self { socket: run_dir.join("admin.sock"), patience }
    }

    /// The same, for a request that takes up to `longer` by itself.
    pub(crate) fn with_more_patience(&self, longer: Duration) -> Self {
        Self { socket: self.socket.clone(), patience: self.patience.saturating_add(longer) }
    }

    /// Asks for `path`, which may have a query.
    pub(crate) async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        self.exchange(Method::GET, path, Bytes::new()).await
    }

    /// Sends `body` as JSON.
    pub(crate) async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| unreadable(path, &error))?;
        self.exchange(Method::POST, path, body.into()).await
    }

    /// Asks for lines of JSON. The head of the answer has the usual deadline; between lines there is none.
    pub(crate) async fn lines(&self, path: &str) -> Result<Lines, ClientError> {
        let response = self.within(self.send(Method::GET, path, Bytes::new())).await?;
        let (parts, body) = response.into_parts();
        if !parts.status.is_success() {
            return Err(self.refusal(parts.status, &self.within(self.collect(path, body)).await?));
        }
        Ok(Lines { socket: self.socket.clone(), path: path.to_owned(), body, buffer: Vec::new() })
    }

    async fn exchange<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<A, ClientError> {
        let (status, body) = self
            .within(async {
                let response = self.send(method, path, body).await?;
                let status = response.status();
                Ok((status, self.collect(path, response.into_body()).await?))
            })
            .await?;
        if status.is_success() {
            serde_json::from_slice(&body).map_err(|error| unreadable(path, &error))
        } else {
            Err(self.refusal(status, &body))
        }
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "pillion")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| unreadable(path, &error))?;
        let mut sender = self.connect().await?;
        sender.send_request(request).await.map_err(|cause| self.broken(cause))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|cause| ClientError::Unreachable { socket: self.socket.clone(), cause })?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|cause| self.broken(cause))?;
        // Ends with the connection: when the answer has been read, or the process ends. Its error also reaches the sender.
        tokio::spawn(async move { connection.await.ok() });
        Ok(sender)
    }

    async fn collect(&self, path: &str, body: Incoming) -> Result<Bytes, ClientError> {
        match Limited::new(body, LONGEST_ANSWER).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) => match error.downcast::<hyper::Error>() {
                Ok(cause) => Err(self.broken(*cause)),
                Err(error) => {
                    debug_assert!(error.is::<LengthLimitError>(), "{error}");
                    Err(unreadable(path, &format_args!("it is longer than {LONGEST_ANSWER} bytes")))
                }
            },
        }
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        timeout(self.patience, work).await.unwrap_or_else(|_| {
            Err(ClientError::Silent { socket: self.socket.clone(), after: self.patience })
        })
    }

    fn broken(&self, cause: hyper::Error) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), cause }
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        let message = match serde_json::from_slice::<ErrorResponse>(body) {
            Ok(answer) => answer.error,
            Err(_) => format!("the agent at {} answered {status}", self.socket.display()),
        };
        ClientError::Refused { status, message }
    }
}

fn unreadable(path: &str, reason: &dyn std::fmt::Display) -> ClientError {
    ClientError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
}

/// An answer of lines of JSON.
#[derive(Debug)]
pub(crate) struct Lines {
    socket: PathBuf,
    path: String,
    body: Incoming,
    /// What came after the last line break.
    buffer: Vec<u8>,
}

impl Lines {
    /// The next line, or `None` at the end. Dropping the future loses nothing.
    pub(crate) async fn next<A: DeserializeOwned>(&mut self) -> Result<Option<A>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return self.parse(&line).map(Some);
            }
            if self.buffer.len() > LONGEST_LINE {
                return Err(self.unreadable(&format!("a line is longer than {LONGEST_LINE} bytes")));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend(frame.data_ref().into_iter().flatten()),
                Some(Err(cause)) => {
                    return Err(ClientError::Broken { socket: self.socket.clone(), cause });
                }
                None if self.buffer.trim_ascii().is_empty() => return Ok(None),
                None => return Err(self.unreadable("it ends within a line")),
            }
        }
    }

    fn parse<A: DeserializeOwned>(&self, line: &[u8]) -> Result<A, ClientError> {
        serde_json::from_slice(line).map_err(|error| self.unreadable(&error.to_string()))
    }

    fn unreadable(&self, reason: &str) -> ClientError {
        ClientError::Unreadable { path: self.path.clone(), reason: reason.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixListener,
    };

    use super::*;

    /// A socket on which one connection gets `answer`, and then silence when `hold`.
    fn agent(answer: &'static [u8], hold: bool) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("admin.sock")).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(answer).await.unwrap();
            if hold {
                let _ = stream.read(&mut request).await;
            }
        });
        directory
    }

    async fn ask(answer: &'static [u8], hold: bool) -> Result<serde_json::Value, ClientError> {
        let directory = agent(answer, hold);
        Client::new(directory.path(), Duration::from_millis(500)).get("/v1/status").await
    }

    #[tokio::test]
    async fn every_way_to_fail_has_its_error() {
        let good = ask(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}", true).await.unwrap();
        assert_eq!(good, serde_json::json!({ "a": 1 }));

        let refused =
            ask(b"HTTP/1.1 404 Not Found\r\ncontent-length: 16\r\n\r\n{\"error\":\"nope\"}", true).await;
        assert_eq!(refused.unwrap_err().to_string(), "nope");

        let silent = ask(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{", true).await.unwrap_err();
        assert!(matches!(silent, ClientError::Silent { .. }), "{silent}");

        let broken = ask(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{", false).await.unwrap_err();
        assert!(matches!(broken, ClientError::Broken { .. }), "{broken}");

        let odd = ask(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", true).await.unwrap_err();
        assert!(matches!(odd, ClientError::Unreadable { .. }), "{odd}");
        assert!(!odd.is_unreachable());
    }

    #[tokio::test]
    async fn an_absent_agent_is_told_with_its_cure() {
        let directory = tempfile::tempdir().unwrap();
        let client = Client::new(directory.path(), Duration::from_secs(5));
        let missing = client.get::<()>("/").await.unwrap_err();
        assert!(missing.is_unreachable());
        assert!(missing.to_string().contains("pillion agent"), "{missing}");

        drop(UnixListener::bind(directory.path().join("admin.sock")).unwrap());
        let dead = client.get::<()>("/").await.unwrap_err();
        assert!(dead.is_unreachable());
        assert!(dead.to_string().contains("has died"), "{dead}");
    }

    #[tokio::test]
    async fn lines_may_come_in_pieces() {
        let directory = agent(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n1\n\r\n1\r\n2\r\n3\r\n3\n\n\r\n0\r\n\r\n",
            true,
        );
        let client = Client::new(directory.path(), Duration::from_secs(5));
        let mut lines = client.lines("/v1/events").await.unwrap();
        let mut numbers = Vec::new();
        while let Some(number) = lines.next::<u32>().await.unwrap() {
            numbers.push(number);
        }
        assert_eq!(numbers, [1, 23]);
    }
}
