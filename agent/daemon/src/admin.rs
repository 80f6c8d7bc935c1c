//! The admin API's server and the health endpoints: translates between HTTP and the controller's requests.
//!
//! Owns the socket file, deadlines and status codes. Who may speak is decided by the socket's mode (0660, in a
//! directory of root's). Never holds state: every answer comes from the controller.

use std::{convert::Infallible, fs, io, num::NonZeroU32, path::Path, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{
        DefaultBodyLimit, Path as UrlPath, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use pillion_attachment::chain;
use pillion_redirect::{Dataplane, RedirectError, TraceSettings};
use pillion_workload::WorkloadId;
use prometheus_client::registry::Registry;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::{
    StreamExt,
    wrappers::{BroadcastStream, ReceiverStream},
};

use crate::{
    api::{
        ConnectionsRequest, ConnectionsResponse, ErrorResponse, ExplainRequest, ExplainResponse,
        OverrideRequest, ReloadResponse, StatusResponse, WorkloadDetail, WorkloadSummary, WorkloadsResponse,
        path,
    },
    conflicts,
    connection::{self, Connection},
    controller::{InForce, Override, OverrideRefused, Pulse, Request},
    http::Listener,
    metrics::{self, Metrics},
    policy_watch::LoadNow,
    trace,
};

/// The controller answers at once, unless it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// `/livez` must be quicker than whoever kills the agent for being slow.
const PULSE_LIMIT: Duration = Duration::from_secs(2);
const RELOAD_LIMIT: Duration = Duration::from_secs(20);
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
const MAX_BODY_BYTES: usize = 256 * 1024;
const MOST_CONNECTIONS: usize = 64;
/// A ring buffer that is read twenty times a second holds no more.
const HIGHEST_RATE: NonZeroU32 = NonZeroU32::new(10_000).expect("not zero");
const LONGEST_TRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// What handlers need.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) loads: mpsc::Sender<LoadNow>,
    pub(crate) dataplane: Arc<Dataplane>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) registry: Arc<Registry>,
}

/// Makes the admin socket. The lock of the agent is held: one that is there belongs to an agent that is dead.
pub(crate) fn bind(socket: &Path) -> io::Result<Listener> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The socket gets its mode from the umask at once: there is no instant at which others could connect.
    let umask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o117));
    let bound = UnixListener::bind(socket);
    nix::sys::stat::umask(umask);
    bound.map(Listener::Unix)
}

/// The admin API.
pub(crate) fn api(admin: Admin) -> Router {
    Router::new()
        .route(path::STATUS, get(status))
        .route(path::WORKLOADS, get(workloads))
        .route(&format!("{}/{{*id}}", path::WORKLOADS), get(workload))
        .route(path::EVENTS, get(events))
        .route(path::ATTACH, post(attach))
        .route(path::DETACH, post(detach))
        .route(path::RELOAD, post(reload))
        .route(path::EXPLAIN, post(explain))
        .route(path::CONNECTIONS, post(connections))
        .route(path::TRACE, get(trace_workload))
        .fallback(|| async { Refusal::new(StatusCode::NOT_FOUND, "there is no such path") })
        .method_not_allowed_fallback(|| async {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this path has another method")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(admin)
}

/// Health and metrics, for loopback.
pub(crate) fn health(admin: Admin) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there are /livez, /readyz and /metrics\n") })
        .with_state(admin)
}

async fn status(State(admin): State<Admin>) -> Result<Json<StatusResponse>, Refusal> {
    let mut status = admin.ask(Request::Status).await?;
    let dataplane = admin.dataplane.clone();
    // Reads tens of thousands of map entries.
    let counters = tokio::task::spawn_blocking(move || dataplane.counters()).await;
    if let Ok(Ok(counters)) = counters
        && let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(counters)
    {
        status.dataplane.counters =
            fields.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect();
    }
    Ok(Json(status))
}

async fn workloads(State(admin): State<Admin>) -> Result<Json<WorkloadsResponse>, Refusal> {
    Ok(Json(WorkloadsResponse { workloads: admin.ask(Request::Workloads).await? }))
}

async fn workload(
    State(admin): State<Admin>,
    UrlPath(id): UrlPath<String>,
) -> Result<Json<WorkloadDetail>, Refusal> {
    let id = workload_id(id)?;
    let found = admin.ask(|reply| Request::Workload(id.clone(), reply)).await?;
    let mut detail = found.ok_or(OverrideRefused::Unknown(id))?;
    // Looks at every process's descriptors where somebody else has programs for the same sockets.
    if let Some(looked) = conflicts::of(&detail)
        && let Ok(neighbours) = tokio::task::spawn_blocking(looked).await
    {
        detail.neighbours = neighbours;
    }
    Ok(Json(detail))
}

#[derive(Debug, Deserialize)]
struct EventsQuery {
    #[serde(default)]
    since: u64,
    #[serde(default)]
    follow: bool,
    workload: Option<WorkloadId>,
}

async fn events(
    State(admin): State<Admin>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    let (backlog, rest) = admin.ask(|reply| Request::Events(query.since, reply)).await?;
    // A follower that is too slow loses events, which the gap in their sequence shows.
    let rest = BroadcastStream::new(rest).filter_map(Result::ok);
    let wanted = query.workload;
    let lines = |record: Arc<crate::api::EventRecord>| {
        let mut line = serde_json::to_vec(&*record).unwrap_or_default();
        line.push(b'\n');
        Ok::<Bytes, Infallible>(Bytes::from(line))
    };
    let filter = move |record: &Arc<crate::api::EventRecord>| wanted.is_none() || record.workload == wanted;
    let backlog = tokio_stream::iter(backlog);
    let body = if query.follow {
        Body::from_stream(backlog.chain(rest).filter(filter).map(lines))
    } else {
        Body::from_stream(backlog.filter(filter).map(lines))
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

async fn attach(State(admin): State<Admin>, body: RequestBody) -> Result<Json<WorkloadSummary>, Refusal> {
    admin.override_by_hand(&read(body)?, Override::Attach).await
}

async fn detach(State(admin): State<Admin>, body: RequestBody) -> Result<Json<WorkloadSummary>, Refusal> {
    admin.override_by_hand(&read(body)?, Override::Detach).await
}

async fn reload(State(admin): State<Admin>) -> Result<Json<ReloadResponse>, Refusal> {
    let (asker, taken) = oneshot::channel();
    let ask = async {
        admin.loads.send(LoadNow { asker: Some(asker) }).await.map_err(|_| Refusal::ending())?;
        taken.await.map_err(|_| Refusal::ending())
    };
    timeout(RELOAD_LIMIT, ask).await.unwrap_or_else(|_| Err(Refusal::silent()))?;
    let policies = admin.ask(Request::Status).await?.policies;
    Ok(Json(ReloadResponse { accepted: policies.refused.is_none(), policies }))
}

async fn explain(State(admin): State<Admin>, body: RequestBody) -> Result<Json<ExplainResponse>, Refusal> {
    let request: ExplainRequest = parse(&read(body)?)?;
    let unknown = match &request {
        ExplainRequest::Workload(id) => OverrideRefused::Unknown(id.clone()).into(),
        ExplainRequest::Subject(_) => Refusal::silent(),
    };
    admin.ask(|reply| Request::Explain(request, reply)).await?.map(Json).ok_or(unknown)
}

/// What is in force for a workload, and what the kernel's tables say.
async fn connections(
    State(admin): State<Admin>,
    body: RequestBody,
) -> Result<Json<ConnectionsResponse>, Refusal> {
    let ConnectionsRequest { workload, connections, sender } = parse(&read(body)?)?;
    if connections.len() > MOST_CONNECTIONS {
        let message = format!("more than {MOST_CONNECTIONS} connections in one request");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
    }
    let found = admin.ask(|reply| Request::InForce(workload.clone(), reply)).await?;
    let InForce { cgroup, plan, redirect, .. } = found.ok_or(OverrideRefused::Unknown(workload))?;
    let Some(plan) = plan else { return Ok(Json(ConnectionsResponse { connections: Vec::new() })) };
    let dataplane = admin.dataplane.clone();
    // Some hundred system calls at most for each.
    let explained = tokio::task::spawn_blocking(move || {
        let spec = redirect.as_ref().unwrap_or(&plan.redirect);
        let explain = |connection: Connection| {
            let looked = cgroup.map(|cgroup| dataplane.look_up(cgroup, connection.protocol, connection.to));
            let kernel = match looked {
                Some(Ok(answer)) => Some(answer),
                Some(Err(RedirectError::NotInForce)) | None => None,
                Some(Err(error)) => return Err(error),
            };
            Ok(connection::explain(spec, plan.on_failure, connection, &sender, kernel))
        };
        connections.into_iter().map(explain).collect::<Result<Vec<_>, _>>()
    });
    match explained.await {
        Ok(Ok(connections)) => Ok(Json(ConnectionsResponse { connections })),
        Ok(Err(error)) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, chain(&error))),
        Err(error) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

#[derive(Debug, Deserialize)]
struct TraceQuery {
    workload: WorkloadId,
    rate: NonZeroU32,
    sample: NonZeroU32,
    seconds: NonZeroU32,
}

async fn trace_workload(
    State(admin): State<Admin>,
    query: Result<Query<TraceQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    let id = query.workload;
    let found = admin.ask(|reply| Request::InForce(id.clone(), reply)).await?;
    let InForce { verdict, cgroup, .. } = found.ok_or_else(|| OverrideRefused::Unknown(id.clone()))?;
    let settings = TraceSettings { rate: query.rate.min(HIGHEST_RATE), sample: query.sample };
    let length = Duration::from_secs(query.seconds.get().into()).min(LONGEST_TRACE);
    let begun = cgroup
        .ok_or(RedirectError::NotInForce)
        .and_then(|cgroup| trace::stream(&admin.dataplane, cgroup, settings, length));
    let lines = begun.map_err(|error| match error {
        RedirectError::NotInForce => Refusal::new(
            StatusCode::CONFLICT,
            format!("{id} is {verdict}: nothing of it is redirected, so there is nothing to trace\nsee: pillion describe {id}"),
        ),
        RedirectError::Traced => Refusal::new(
            StatusCode::CONFLICT,
            format!("{id} is being traced already, and one at a time can: end the other `pillion trace`"),
        ),
        error => Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{id} cannot be traced: {}\nsee: pillion check", chain(&error)),
        ),
    })?;
    let body = Body::from_stream(ReceiverStream::new(lines).map(Ok::<Bytes, Infallible>));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

async fn livez(State(admin): State<Admin>) -> Response {
    match admin.pulse().await {
        Ok(_) => "ok\n".into_response(),
        Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", refusal.message)).into_response(),
    }
}

async fn readyz(State(admin): State<Admin>) -> Response {
    match admin.pulse().await {
        Ok(pulse) if pulse.policies_loaded => "ok\n".into_response(),
        Ok(_) => (StatusCode::SERVICE_UNAVAILABLE, "no policies have been loaded yet\n").into_response(),
        Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", refusal.message)).into_response(),
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    match admin.pulse().await {
        Ok(pulse) => admin.metrics.set(&pulse),
        Err(refusal) => return refusal.into_response(),
    }
    let registry = admin.registry.clone();
    match tokio::task::spawn_blocking(move || metrics::text(&registry)).await {
        Ok(Ok(text)) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Ok(Err(_)) | Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

impl Admin {
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Refusal> {
        self.ask_within(ANSWER_LIMIT, request).await
    }

    pub(crate) async fn pulse(&self) -> Result<Pulse, Refusal> {
        self.ask_within(PULSE_LIMIT, Request::Ping).await
    }

    async fn ask_within<T>(
        &self,
        limit: Duration,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let ask = async {
            self.requests.send(request(reply)).await.map_err(|_| Refusal::ending())?;
            answer.await.map_err(|_| Refusal::ending())
        };
        timeout(limit, ask).await.unwrap_or_else(|_| Err(Refusal::silent()))
    }

    async fn override_by_hand(&self, body: &[u8], what: Override) -> Result<Json<WorkloadSummary>, Refusal> {
        let OverrideRequest { workload, wait_seconds } = parse(body)?;
        let wait = wait_seconds.map_or(DEFAULT_WAIT, |seconds| Duration::from_secs(seconds.into()));
        let (reply, settled) = oneshot::channel();
        let order = Request::Override(workload.clone(), what, reply);
        let ordered = timeout(ANSWER_LIMIT, self.requests.send(order)).await;
        ordered.map_err(|_| Refusal::silent())?.map_err(|_| Refusal::ending())?;
        match timeout(wait.min(LONGEST_WAIT), settled).await {
            Ok(Ok(reply)) => Ok(Json(reply?)),
            Ok(Err(_)) => Err(Refusal::ending()),
            // The work goes on; this is how far it is.
            Err(_) => {
                let found = self.ask(|reply| Request::Workload(workload.clone(), reply)).await?;
                found
                    .map(|detail| Json(detail.summary))
                    .ok_or_else(|| OverrideRefused::Unknown(workload).into())
            }
        }
    }
}

/// Too long, or cut short, is an answer of ours like any other.
type RequestBody = Result<Bytes, BytesRejection>;

fn read(body: RequestBody) -> Result<Bytes, Refusal> {
    body.map_err(|error| Refusal::new(error.status(), error.body_text()))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| {
        Refusal::new(StatusCode::BAD_REQUEST, format!("the request cannot be read: {error}"))
    })
}

fn workload_id(id: String) -> Result<WorkloadId, Refusal> {
    WorkloadId::try_from(id).map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.to_string()))
}

/// An answer that is not a success.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn ending() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending")
    }

    fn silent() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the controller does not answer")
    }
}

impl From<OverrideRefused> for Refusal {
    fn from(refused: OverrideRefused) -> Self {
        let status = match refused {
            OverrideRefused::Unknown(_) => StatusCode::NOT_FOUND,
            OverrideRefused::NotMatched(_) => StatusCode::CONFLICT,
            OverrideRefused::Journal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, refused.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorResponse { error: self.message })).into_response()
    }
}
