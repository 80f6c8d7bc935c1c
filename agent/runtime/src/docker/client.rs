//! An engine's API as plain functions, each with a deadline and a bound.
//!
//! Owns the connections, one a question, and the wording of their errors. Never interprets what is answered.
//!
//! HTTP/1.1 over the Unix socket by hyper, which is here anyway. A client library for Docker would bring some thirty crates,
//! mostly for URLs in foreign alphabets, and bounds nothing; four paths are asked for here. They name no version of the API, so
//! each engine answers in its own: what is read of it has been the same since 1.24 (2016).

use std::{
    io,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    ContainerId, EngineConfig,
    api::{self, Inspection, Nonsense, Summary},
};

/// The list of a node with a thousand containers has 2 MiB.
const LIST_LIMIT: usize = 32 << 20;
/// What is said about one thing.
const ANSWER_LIMIT: usize = 4 << 20;
/// An error's text.
const ERROR_LIMIT: usize = 64 << 10;
/// What is shown of one.
const SHOWN: usize = 500;

/// Why an engine did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("cannot connect to {socket}")]
    Connect { socket: PathBuf, source: io::Error },
    #[error("GET {path}: the connection broke")]
    Http { path: String, source: hyper::Error },
    #[error("GET {path}: the answer broke off, or is longer than {limit} bytes")]
    Body { path: String, limit: usize, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("GET {path}: {status}: {message}")]
    Status { path: String, status: StatusCode, message: String },
    #[error("GET {path}: no answer within {after:?}")]
    Deadline { path: String, after: Duration },
    #[error("GET {path}: {source}")]
    Nonsense { path: String, source: Nonsense },
    #[error("the engine ended the stream of events")]
    EventsEnded,
}

/// Where an engine is; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Client {
    socket: PathBuf,
    deadline: Duration,
    list_deadline: Duration,
}

/// A body that is still coming. Dropping it closes its connection.
pub(super) struct Stream {
    body: Incoming,
    _connection: AbortOnDropHandle<()>,
}

impl Client {
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self { socket: config.socket.clone(), deadline: config.deadline, list_deadline: config.list_deadline }
    }

    /// Asks for the version: the cheapest question there is.
    pub(super) async fn version(&self) -> Result<String, ClientError> {
        self.ask("/version".to_owned(), self.deadline, ANSWER_LIMIT, api::version).await
    }

    /// Where Docker keeps its containers.
    pub(super) async fn root_directory(&self) -> Result<PathBuf, ClientError> {
        self.ask("/info".to_owned(), self.deadline, ANSWER_LIMIT, api::root_directory).await
    }

    /// All containers that run.
    pub(super) async fn running(&self) -> Result<Vec<Summary>, ClientError> {
        self.ask("/containers/json".to_owned(), self.list_deadline, LIST_LIMIT, api::list).await
    }

    /// One container as the list has it, whatever its state. Docker answers from a copy, without waiting for the container.
    pub(super) async fn summary(&self, id: &ContainerId) -> Result<Option<Summary>, ClientError> {
        // {"id":["…"]}; the engine matches prefixes and expressions, of which a whole id is one.
        let path = format!("/containers/json?all=1&filters=%7B%22id%22%3A%5B%22{id}%22%5D%7D");
        let list = self.ask(path, self.deadline, LIST_LIMIT, api::list).await?;
        Ok(list.into_iter().find(|summary| summary.id().as_ref() == Some(id)))
    }

    /// All about one container; `None` when there is none. Waits while the container is being started.
    pub(super) async fn inspect(&self, id: &ContainerId) -> Result<Option<Inspection>, ClientError> {
        let path = format!("/containers/{id}/json");
        match self.ask(path, self.deadline, ANSWER_LIMIT, api::inspection).await {
            Ok(inspection) => Ok(Some(inspection).filter(|it| it.id().as_ref() == Some(id))),
            Err(ClientError::Status { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Events of containers, beginning with those of the last second.
    pub(super) async fn events(&self) -> Result<Stream, ClientError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = now.as_secs().saturating_sub(1);
        // {"type":["container"]}
        let path = format!("/events?since={since}&filters=%7B%22type%22%3A%5B%22container%22%5D%7D");
        let after = self.deadline;
        let late = |path| ClientError::Deadline { path, after };
        timeout(after, self.get(&path)).await.unwrap_or_else(|_| Err(late(path)))
    }

    async fn ask<T>(
        &self,
        path: String,
        after: Duration,
        limit: usize,
        parse: impl FnOnce(&[u8]) -> Result<T, Nonsense>,
    ) -> Result<T, ClientError> {
        let asked = async {
            let stream = self.get(&path).await?;
            let body = stream.collect(limit).await;
            let body = body.map_err(|source| ClientError::Body { path: path.clone(), limit, source })?;
            parse(&body).map_err(|source| ClientError::Nonsense { path: path.clone(), source })
        };
        let answer = timeout(after, asked).await;
        answer.unwrap_or_else(|_| Err(ClientError::Deadline { path, after }))
    }

    async fn get(&self, path: &str) -> Result<Stream, ClientError> {
        let http = |source| ClientError::Http { path: path.to_owned(), source };
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::Connect { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        // Its error is also that of the question, or of the body.
        let connection = AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }));
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = path.parse().unwrap_or_default();
        request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
        let answer = sender.send_request(request).await.map_err(http)?;
        let (status, body) = (answer.status(), Response::into_body(answer));
        let stream = Stream { body, _connection: connection };
        if status == StatusCode::OK {
            return Ok(stream);
        }
        let message = stream.collect(ERROR_LIMIT).await.unwrap_or_default();
        let message = String::from_utf8_lossy(&message).trim().chars().take(SHOWN).collect();
        Err(ClientError::Status { path: path.to_owned(), status, message })
    }
}

impl Stream {
    /// The next piece. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Bytes, ClientError> {
        loop {
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(data);
                    }
                }
                Some(Err(source)) => return Err(ClientError::Http { path: "/events".to_owned(), source }),
                None => return Err(ClientError::EventsEnded),
            }
        }
    }

    async fn collect(self, limit: usize) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Limited::new(self.body, limit).collect().await?.to_bytes())
    }
}
