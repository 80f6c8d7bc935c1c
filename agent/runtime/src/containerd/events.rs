//! containerd's event stream: subscribed for certain, read without blocking containerd, decoded.
//!
//! Owns the subscription and its bounded queue. Never trusts an event for more than which container it is about.
//!
//! containerd gives no sign that a subscription is in force (the answer's headers come with the first event). So an
//! event of our own is published, on a topic that only we ask for, until it comes back: then the subscription was in
//! force, and nothing that happens from now on is lost. The marker is not stored anywhere; other subscribers without a
//! filter, such as `ctr events`, see it as one `/pillion/subscribed` in the namespace `pillion`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_client::{
    events::{
        ContainerDelete, ContainerUpdate, NamespaceUpdate, TaskCreate, TaskDelete, TaskExit, TaskStart,
    },
    types::Envelope,
};
use pillion_workload::Pid;
use prost::{Message, Name};
use prost_types::Any;
use tokio::{sync::mpsc, task::AbortHandle, time};

use super::{
    Key,
    client::{Client, ClientError, next_event},
};

/// Events that wait while we are busy. More than that are dropped, and a new snapshot makes up for them.
const QUEUE: usize = 1024;
/// How long to wait for the marker before another is sent.
const MARKER_INTERVAL: Duration = Duration::from_millis(50);
const MARKER_TOPIC: &str = "/pillion/subscribed";
const MARKER_NAMESPACE: &str = "pillion";
const TOPICS: [&str; 6] = [
    "/tasks/create",
    "/tasks/start",
    "/tasks/exit",
    "/tasks/delete",
    "/containers/update",
    "/containers/delete",
];

/// What an event means here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Signal {
    /// Look at this container again.
    Look(Key),
    /// The same, and its task has just been created with this first process. Only a hint: the event may be an old one.
    Created(Key, Pid),
    /// Some events were lost or not understood: look at everything again.
    Resync,
}

/// Events from a subscription that is in force. Ends the subscription when dropped.
pub(super) struct Events {
    queue: mpsc::Receiver<Result<Signal, ClientError>>,
    lost: Arc<AtomicBool>,
    reader: AbortHandle,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Events {
    /// Subscribes, and returns when the subscription is in force.
    pub(super) async fn subscribe(client: &Client) -> Result<Self, ClientError> {
        let (sender, queue) = mpsc::channel(QUEUE);
        let (in_force, marked) = mpsc::channel(1);
        let lost = Arc::new(AtomicBool::new(false));
        let reader = tokio::spawn(read(client.clone(), sender, in_force, Arc::clone(&lost))).abort_handle();
        let mut events = Self { queue, lost, reader };
        let after = client.deadline();
        time::timeout(after, events.wait_for_marker(client, marked))
            .await
            .unwrap_or(Err(ClientError::Deadline { rpc: "Events.Subscribe", after }))?;
        Ok(events)
    }

    /// The next signal. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Signal, ClientError> {
        if self.lost.swap(false, Ordering::AcqRel) {
            return Ok(Signal::Resync);
        }
        self.queue.recv().await.unwrap_or(Err(ClientError::EventsEnded))
    }

    async fn wait_for_marker(
        &mut self,
        client: &Client,
        mut marked: mpsc::Receiver<()>,
    ) -> Result<(), ClientError> {
        let mut again = time::interval(MARKER_INTERVAL);
        loop {
            tokio::select! {
                seen = marked.recv() => match seen {
                    Some(()) => return Ok(()),
                    // The reader has ended; its error is the last thing in the queue.
                    None => loop {
                        self.next().await?;
                    },
                },
                _ = again.tick() => client.publish(MARKER_NAMESPACE, MARKER_TOPIC, marker()).await?,
            }
        }
    }
}

/// Reads as fast as containerd sends, because containerd queues without a bound for a slow reader.
async fn read(
    client: Client,
    queue: mpsc::Sender<Result<Signal, ClientError>>,
    in_force: mpsc::Sender<()>,
    lost: Arc<AtomicBool>,
) {
    let error = async {
        let filters = TOPICS.iter().chain([&MARKER_TOPIC]).map(|topic| format!("topic=={topic:?}")).collect();
        let mut stream = client.subscribe(filters).await?;
        loop {
            let envelope = next_event(&mut stream).await?;
            if envelope.topic == MARKER_TOPIC {
                // Full when there was one before, and then nobody waits for another.
                let _ = in_force.try_send(());
            } else if client.leaves_alone(&envelope.namespace) {
                // Another source tells of it.
            } else if let Some(signal) = decode(&envelope)
                && queue.try_send(Ok(signal)).is_err()
            {
                lost.store(true, Ordering::Release);
            }
        }
    };
    let result: Result<std::convert::Infallible, ClientError> = error.await;
    let Err(error) = result;
    // Waits for room: the last word must arrive. Fails only when nobody listens any more.
    let _ = queue.send(Err(error)).await;
}

/// What an event means; `None` when it is about an `exec` inside a container.
fn decode(envelope: &Envelope) -> Option<Signal> {
    let key = |container: String| Some((container, String::new()));
    let mut created = None;
    let decoded = envelope.event.as_ref().and_then(|event| match envelope.topic.as_str() {
        "/tasks/create" => {
            let event = unpack::<TaskCreate>(event)?;
            created = i32::try_from(event.pid).ok().map(Pid);
            key(event.container_id)
        }
        "/tasks/start" => key(unpack::<TaskStart>(event)?.container_id),
        "/tasks/exit" => unpack::<TaskExit>(event).map(|exit| (exit.container_id, exit.id)),
        "/tasks/delete" => unpack::<TaskDelete>(event).map(|delete| (delete.container_id, delete.id)),
        "/containers/update" => key(unpack::<ContainerUpdate>(event)?.id),
        "/containers/delete" => key(unpack::<ContainerDelete>(event)?.id),
        _ => None,
    });
    match decoded {
        Some((container, process)) if process.is_empty() || process == container => {
            let key = Key::new(&envelope.namespace, container);
            Some(created.map_or_else(|| Signal::Look(key.clone()), |pid| Signal::Created(key.clone(), pid)))
        }
        Some(_) => None,
        None => {
            tracing::warn!(
                topic = envelope.topic,
                "cannot read an event of containerd; looking at everything again"
            );
            Some(Signal::Resync)
        }
    }
}

/// containerd names its types without the usual `type.googleapis.com/`.
fn unpack<T: Message + Name + Default>(event: &Any) -> Option<T> {
    let name = event.type_url.rsplit('/').next()?;
    if name != T::full_name() {
        return None;
    }
    T::decode(event.value.as_slice()).ok()
}

fn marker() -> Any {
    // A type that every containerd and client knows, so that nobody stumbles over it.
    containerd_client::to_any(&NamespaceUpdate {
        name: MARKER_NAMESPACE.to_owned(),
        ..NamespaceUpdate::default()
    })
}

#[cfg(test)]
mod tests {
    use containerd_client::to_any;
    use proptest::prelude::*;

    use super::*;

    fn envelope(topic: &str, event: Any) -> Envelope {
        let (namespace, topic) = ("default".to_owned(), topic.to_owned());
        Envelope { namespace, topic, event: Some(event), timestamp: None }
    }

    #[test]
    fn decodes_events() {
        let look = Some(Signal::Look(Key::new("default", "c1")));
        let created = Some(Signal::Created(Key::new("default", "c1"), Pid(7)));
        let id = || "c1".to_owned();
        let exit =
            |process: &str| TaskExit { container_id: id(), id: process.to_owned(), ..TaskExit::default() };
        let delete = |process: &str| TaskDelete {
            container_id: id(),
            id: process.to_owned(),
            ..TaskDelete::default()
        };
        for (topic, event, wanted) in [
            (
                "/tasks/create",
                to_any(&TaskCreate { container_id: id(), pid: 7, ..TaskCreate::default() }),
                &created,
            ),
            (
                "/tasks/create",
                to_any(&TaskCreate { container_id: id(), pid: u32::MAX, ..TaskCreate::default() }),
                &look,
            ),
            ("/tasks/start", to_any(&TaskStart { container_id: id(), pid: 1 }), &look),
            ("/tasks/exit", to_any(&exit("c1")), &look),
            ("/tasks/exit", to_any(&exit("an-exec")), &None),
            ("/tasks/delete", to_any(&delete("")), &look),
            ("/tasks/delete", to_any(&delete("an-exec")), &None),
            (
                "/containers/update",
                to_any(&ContainerUpdate { id: id(), ..ContainerUpdate::default() }),
                &look,
            ),
            ("/containers/delete", to_any(&ContainerDelete { id: id() }), &look),
            ("/tasks/start", to_any(&ContainerDelete { id: id() }), &Some(Signal::Resync)),
            ("/tasks/unknown", to_any(&ContainerDelete { id: id() }), &Some(Signal::Resync)),
        ] {
            assert_eq!(&decode(&envelope(topic, event)), wanted, "{topic}");
        }
        let mut prefixed = to_any(&TaskStart { container_id: id(), pid: 1 });
        prefixed.type_url.insert_str(0, "type.googleapis.com/");
        assert_eq!(decode(&envelope("/tasks/start", prefixed)), look);
        assert_eq!(
            decode(&Envelope { topic: TOPICS[0].into(), ..Envelope::default() }),
            Some(Signal::Resync)
        );
    }

    #[tokio::test]
    async fn lost_events_mean_to_look_at_everything() {
        let (sender, queue) = mpsc::channel(1);
        let reader = tokio::spawn(async {}).abort_handle();
        let mut events = Events { queue, lost: Arc::new(AtomicBool::new(true)), reader };
        let look = Signal::Look(Key::new("default", "c1"));
        sender.send(Ok(look.clone())).await.expect("has room");
        assert_eq!(events.next().await.expect("no error"), Signal::Resync);
        assert_eq!(events.next().await.expect("no error"), look);
        drop(sender);
        assert!(matches!(events.next().await, Err(ClientError::EventsEnded)));
    }

    proptest! {
        #[test]
        fn arbitrary_events_never_panic(topic in 0..TOPICS.len(), kind in 0..4_usize, value: Vec<u8>) {
            let type_url = [TaskCreate::full_name(), TaskExit::full_name(), TaskDelete::full_name(),
                ContainerUpdate::full_name()][kind].clone();
            let _ = decode(&envelope(TOPICS[topic], Any { type_url, value }));
        }
    }
}
