//! containerd's gRPC services as plain functions, each with a deadline.
//!
//! Owns the channel and the wording of its errors. Never interprets what containerd answers.

use std::{collections::BTreeSet, future::Future, path::PathBuf, sync::Arc, time::Duration};

use containerd_client::{
    services::v1::{
        Container, GetContainerRequest, GetRequest, ListContainersRequest, ListNamespacesRequest,
        ListTasksRequest, PublishRequest, SubscribeRequest, containers_client::ContainersClient,
        events_client::EventsClient, namespaces_client::NamespacesClient, tasks_client::TasksClient,
        version_client::VersionClient,
    },
    types::{Envelope, v1::Process},
};
use prost_types::Any;
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue, transport::Channel};

use super::ContainerdConfig;

/// What containerd itself allows to send in one message (its `max_send_message_size`); tonic's default of 4 MiB is too
/// little for a list of some hundred tasks.
const MESSAGE_LIMIT: usize = 16 << 20;
/// More containers than a node can run: beyond it an answer is broken or hostile.
pub(super) const LIST_LIMIT: usize = 65_536;

/// Why containerd did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("cannot connect to containerd at {socket:?}")]
    Connect { socket: PathBuf, source: tonic::transport::Error },
    #[error("containerd did not answer {rpc} within {after:?}")]
    Deadline { rpc: &'static str, after: Duration },
    #[error("containerd answered {rpc} with {code:?}: {message}")]
    Rpc { rpc: &'static str, code: Code, message: String },
    #[error("containerd lists more than {LIST_LIMIT} {what}")]
    TooMany { what: &'static str },
    #[error("containerd's namespace {namespace:?} cannot be sent in a header")]
    Namespace { namespace: String },
    #[error("containerd ended the event stream")]
    EventsEnded,
}

/// A connection; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Client {
    channel: Channel,
    deadline: Duration,
    list_deadline: Duration,
    left_alone: Arc<BTreeSet<String>>,
}

impl Client {
    /// Connects, without asking anything yet.
    pub(super) async fn connect(config: &ContainerdConfig) -> Result<Self, ClientError> {
        within("connect", config.deadline, async {
            containerd_client::connect(&config.socket)
                .await
                .map_err(|source| ClientError::Connect { socket: config.socket.clone(), source })
        })
        .await
        .map(|channel| Self {
            channel,
            deadline: config.deadline,
            list_deadline: config.list_deadline,
            left_alone: Arc::new(config.left_alone.clone()),
        })
    }

    /// Whether a namespace is another source's.
    pub(super) fn leaves_alone(&self, namespace: &str) -> bool {
        self.left_alone.contains(namespace)
            || (self.left_alone.contains(ContainerdConfig::DOCKERS)
                && ContainerdConfig::is_dockers(namespace))
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Asks for the version: the cheapest question there is.
    pub(super) async fn version(&self) -> Result<String, ClientError> {
        let mut client = VersionClient::new(self.channel.clone());
        let answer = within("Version", self.deadline, rpc("Version", client.version(()))).await?;
        Ok(answer.version)
    }

    pub(super) async fn namespaces(&self) -> Result<Vec<String>, ClientError> {
        let mut client = NamespacesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = ListNamespacesRequest::default();
        let answer =
            within("Namespaces.List", self.list_deadline, rpc("Namespaces.List", client.list(request)))
                .await?;
        if answer.namespaces.len() > LIST_LIMIT {
            return Err(ClientError::TooMany { what: "namespaces" });
        }
        let names = answer.namespaces.into_iter().map(|namespace| namespace.name);
        Ok(names.filter(|name| !self.leaves_alone(name)).collect())
    }

    pub(super) async fn tasks(&self, namespace: &str) -> Result<Vec<Process>, ClientError> {
        let mut client = TasksClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = in_namespace(namespace, ListTasksRequest::default())?;
        let answer =
            within("Tasks.List", self.list_deadline, rpc("Tasks.List", client.list(request))).await?;
        if answer.tasks.len() > LIST_LIMIT {
            return Err(ClientError::TooMany { what: "tasks" });
        }
        Ok(answer.tasks)
    }

    /// Gives every container of a namespace that passes one of the filters to `each`; all of them when there is no
    /// filter. Streamed, because one message cannot hold some hundred of them with their specs.
    pub(super) async fn containers(
        &self,
        namespace: &str,
        filters: Vec<String>,
        mut each: impl FnMut(Container),
    ) -> Result<(), ClientError> {
        const RPC: &str = "Containers.ListStream";
        let mut client = ContainersClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = in_namespace(namespace, ListContainersRequest { filters })?;
        within(RPC, self.list_deadline, async {
            let mut stream = rpc(RPC, client.list_stream(request)).await?;
            let mut seen = 0;
            while let Some(message) = stream.message().await.map_err(|status| refused(RPC, &status))? {
                seen += 1;
                if seen > LIST_LIMIT {
                    return Err(ClientError::TooMany { what: "containers" });
                }
                message.container.into_iter().for_each(&mut each);
            }
            Ok(())
        })
        .await
    }

    /// `None` when there is no such container.
    pub(super) async fn container(
        &self,
        namespace: &str,
        id: &str,
    ) -> Result<Option<Container>, ClientError> {
        let mut client = ContainersClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = in_namespace(namespace, GetContainerRequest { id: id.to_owned() })?;
        let answer =
            within("Containers.Get", self.deadline, rpc("Containers.Get", client.get(request))).await;
        Ok(found(answer)?.and_then(|answer| answer.container))
    }

    /// `None` when there is no such task.
    pub(super) async fn task(&self, namespace: &str, id: &str) -> Result<Option<Process>, ClientError> {
        let mut client = TasksClient::new(self.channel.clone());
        let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
        let request = in_namespace(namespace, request)?;
        let answer = within("Tasks.Get", self.deadline, rpc("Tasks.Get", client.get(request))).await;
        Ok(found(answer)?.and_then(|answer| answer.process))
    }

    /// Events of all namespaces. The answer's headers come with the first event (a habit of gRPC for Go), so this
    /// waits as long as there is none, without a deadline.
    pub(super) async fn subscribe(&self, filters: Vec<String>) -> Result<Streaming<Envelope>, ClientError> {
        let mut client = EventsClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        rpc("Events.Subscribe", client.subscribe(SubscribeRequest { filters })).await
    }

    pub(super) async fn publish(&self, namespace: &str, topic: &str, event: Any) -> Result<(), ClientError> {
        let mut client = EventsClient::new(self.channel.clone());
        let request = PublishRequest { topic: topic.to_owned(), event: Some(event) };
        let request = in_namespace(namespace, request)?;
        within("Events.Publish", self.deadline, rpc("Events.Publish", client.publish(request))).await
    }
}

/// The next event of a stream.
pub(super) async fn next_event(stream: &mut Streaming<Envelope>) -> Result<Envelope, ClientError> {
    match stream.message().await {
        Ok(Some(envelope)) => Ok(envelope),
        Ok(None) => Err(ClientError::EventsEnded),
        Err(status) => Err(refused("Events.Subscribe", &status)),
    }
}

async fn within<T>(
    rpc: &'static str,
    after: Duration,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    timeout(after, work).await.unwrap_or(Err(ClientError::Deadline { rpc, after }))
}

async fn rpc<T>(
    name: &'static str,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ClientError> {
    call.await.map(tonic::Response::into_inner).map_err(|status| refused(name, &status))
}

fn refused(rpc: &'static str, status: &Status) -> ClientError {
    let mut message = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        message.push_str(": ");
        message.push_str(&error.to_string());
        cause = error.source();
    }
    ClientError::Rpc { rpc, code: status.code(), message }
}

fn found<T>(answer: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(ClientError::Rpc { code: Code::NotFound, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// containerd reads the namespace from a header.
fn in_namespace<T>(namespace: &str, message: T) -> Result<Request<T>, ClientError> {
    let value = MetadataValue::try_from(namespace)
        .map_err(|_| ClientError::Namespace { namespace: namespace.to_owned() })?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}
