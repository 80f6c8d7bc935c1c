//! The plug-in against a runtime of the test's own making, on a real socket.

use std::{sync::Arc, time::Duration};

use pillion_workload::FailureMode;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{
    frames::{Connection, Decoder, Kind, Message, encode},
    messages::{
        ConfigureRequest, ConfigureResponse, Container, PLUGIN_SERVICE, PodSandbox, RegisterPluginRequest,
        Request, Response, Status, Subject, SynchronizeRequest, SynchronizeResponse, code,
    },
    *,
};
use crate::gate::MaySelect;

const SOON: Duration = Duration::from_secs(10);

struct Runtime {
    listener: UnixListener,
    events: mpsc::Receiver<RuntimeEvent>,
    stop: CancellationToken,
    gate: JoinHandle<()>,
    _kept: (tempfile::TempDir, Box<dyn std::any::Any + Send>),
}

impl Runtime {
    /// A plug-in that is about to connect. No containerd answers it.
    fn new() -> Self {
        Self::with(None)
    }

    /// The same, with a policy of this failure mode that may select whatever is not known.
    fn with(mode: Option<FailureMode>) -> Self {
        let directory = tempfile::tempdir().expect("can be made");
        let socket = directory.path().join("nri.sock");
        let listener = UnixListener::bind(&socket).expect("can be bound");
        let (events, received) = mpsc::channel(8);
        let stop = CancellationToken::new();
        let (gatekeeper, _asked) = Gatekeeper::new(Arc::new(MaySelect(mode)));
        let (resolver, unconnected) = ContainerdResolver::unconnected();
        let gate = NriGate::spawn(NriConfig::at(socket), gatekeeper, resolver, events, stop.clone());
        Self { listener, events: received, stop, gate, _kept: (directory, unconnected) }
    }

    async fn event(&mut self) -> RuntimeEvent {
        timeout(SOON, self.events.recv()).await.expect("in time").expect("the gate runs")
    }

    async fn accept(&self) -> Plugin {
        let (stream, _) = timeout(SOON, self.listener.accept()).await.expect("in time").expect("connects");
        Plugin { stream, decoder: Decoder::default(), next: 1 }
    }

    /// A plug-in that has come up, with this timeout in milliseconds.
    async fn up(&mut self, request_timeout: i64) -> Plugin {
        let mut plugin = self.accept().await;
        plugin.register(0).await;
        let configure = ConfigureRequest { request_timeout, ..ConfigureRequest::default() };
        let configured = plugin.call("Configure", &configure).await;
        assert_eq!(ConfigureResponse::decode(configured.payload.as_slice()).expect("ours").events, 0b10_0001);
        for more in [true, true, false] {
            let synchronized =
                plugin.call("Synchronize", &SynchronizeRequest { more, ..Default::default() }).await;
            assert_eq!(
                SynchronizeResponse::decode(synchronized.payload.as_slice()).expect("ours").more,
                more
            );
        }
        assert_eq!(self.event().await, RuntimeEvent::Up { source: SourceName::NRI });
        plugin
    }
}

/// The runtime's end of one connection.
struct Plugin {
    stream: UnixStream,
    decoder: Decoder,
    next: u32,
}

impl Plugin {
    async fn receive(&mut self) -> (Connection, Message) {
        loop {
            if let Some(message) = self.decoder.next().expect("well formed") {
                return message;
            }
            let read = timeout(SOON, self.stream.read_buf(self.decoder.input())).await.expect("in time");
            assert_ne!(read.expect("readable"), 0, "the plug-in has closed");
        }
    }

    async fn register(&mut self, code: i32) {
        let (connection, message) = self.receive().await;
        assert_eq!((connection, message.kind), (Connection::Runtime, Kind::Request));
        let request = Request::decode(message.payload).expect("a request");
        assert_eq!(request.method, "RegisterPlugin");
        let register = RegisterPluginRequest::decode(request.payload.as_slice()).expect("a registration");
        assert_eq!((register.plugin_name.as_str(), register.plugin_idx.as_str()), ("pillion", "10"));
        let status = Some(Status { code, message: "by test".to_owned() });
        let response = Response { status, payload: Vec::new() }.encode_to_vec();
        self.send(Connection::Runtime, Kind::Response, message.stream, &response).await;
    }

    async fn send(&mut self, connection: Connection, kind: Kind, stream: u32, payload: &[u8]) {
        let frame = encode(connection, kind, stream, payload).expect("short enough");
        self.stream.write_all(&frame).await.expect("writable");
    }

    async fn ask(&mut self, method: &str, payload: &impl prost::Message) -> u32 {
        let request = Request {
            service: PLUGIN_SERVICE.to_owned(),
            method: method.to_owned(),
            payload: payload.encode_to_vec(),
            timeout_nano: 0,
        };
        let stream = self.next;
        self.next += 2;
        self.send(Connection::Plugin, Kind::Request, stream, &request.encode_to_vec()).await;
        stream
    }

    async fn answer(&mut self) -> (u32, Response) {
        let (connection, message) = self.receive().await;
        assert_eq!((connection, message.kind), (Connection::Plugin, Kind::Response));
        (message.stream, Response::decode(message.payload).expect("a response"))
    }

    async fn call(&mut self, method: &str, payload: &impl prost::Message) -> Response {
        let asked = self.ask(method, payload).await;
        let (stream, response) = self.answer().await;
        assert_eq!(stream, asked);
        response
    }

    async fn until_closed(mut self) {
        let read = timeout(SOON, self.stream.read_buf(self.decoder.input())).await.expect("in time");
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}

/// A container whose process lives and is in no pod's cgroup: its workload is containerd's to tell.
fn start(pid: u32) -> Subject {
    let pod = PodSandbox { id: "s1".into(), ..PodSandbox::default() };
    let container = Container { id: "c1".into(), pid, ..Container::default() };
    Subject { pod: Some(pod), container: Some(container) }
}

#[tokio::test]
async fn one_that_is_held_keeps_no_other_waiting_and_is_let_go_in_time() {
    let mut runtime = Runtime::new();
    let mut plugin = runtime.up(1_000).await;
    let begun = Instant::now();
    let held = plugin.ask("StartContainer", &start(std::process::id())).await;
    let gone = plugin.call("StartContainer", &start(i32::MAX.unsigned_abs())).await;
    assert_eq!(gone, Response::default());
    assert_eq!(plugin.call("StopContainer", &start(1)).await, Response::default());
    assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
    let (stream, answer) = plugin.answer().await;
    assert_eq!((stream, answer), (held, Response::default()));
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(700) && took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn what_cannot_be_identified_is_refused_where_a_closed_policy_may_select_it() {
    let refused = |response: Response| {
        let status = response.status.unwrap_or_default();
        (status.code == code::FAILED_PRECONDITION).then_some(status.message)
    };
    for mode in [None, Some(FailureMode::Open), Some(FailureMode::Closed)] {
        let mut runtime = Runtime::with(mode);
        let mut plugin = runtime.up(1_000).await;
        // containerd does not answer; the runtime tells no process; the process is gone.
        for (pid, word) in [
            (std::process::id(), "did not tell in time"),
            (0, "its process"),
            (i32::MAX.unsigned_abs(), "cannot"),
        ] {
            let answer = plugin.call("StartContainer", &start(pid)).await;
            let message = refused(answer.clone());
            assert_eq!(message.is_some(), mode == Some(FailureMode::Closed), "{mode:?} {pid}: {answer:?}");
            for part in ["pillion: ", "policy payments", "container c1", word] {
                assert!(message.iter().all(|message| message.contains(part)), "{message:?}");
            }
        }
        // A sandbox is never refused.
        assert_eq!(plugin.call("RunPodSandbox", &start(0)).await, Response::default());
    }
}

#[tokio::test]
async fn connects_again_whatever_the_runtime_does() {
    let mut runtime = Runtime::new();
    let refused = |event| match event {
        RuntimeEvent::Down { source: SourceName::NRI, error } => error,
        other => panic!("{other:?}"),
    };
    let mut plugin = runtime.accept().await;
    plugin.register(7).await;
    assert!(refused(runtime.event().await).contains("by test"));
    plugin.until_closed().await;

    let garbage: [(&[u8], &str); 4] = [
        (&[0, 0, 0, 9, 0, 0, 0, 0], "connection 9"),
        (&[0, 0, 0, 1, 0xff, 0, 0, 0], "announces"),
        (&[0, 0, 0, 1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0], "stream 2"),
        (&[0, 0, 0, 1, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0, 0, 99, 1, 0, 0xff], "cannot read"),
    ];
    for (bytes, word) in garbage {
        let mut plugin = runtime.up(1_000).await;
        plugin.stream.write_all(bytes).await.expect("writable");
        let error = refused(runtime.event().await);
        assert!(error.contains(word), "{error}");
        plugin.until_closed().await;
    }
    let mut plugin = runtime.up(1_000).await;
    plugin.call("Shutdown", &Subject::default()).await;
    assert!(refused(runtime.event().await).contains("shuts down"));
    drop(runtime.up(1_000).await);
    assert!(refused(runtime.event().await).contains("closed the connection"));
    runtime.up(1_000).await.call("StopContainer", &start(1)).await;
}

#[tokio::test]
async fn ends_when_it_is_told_to_after_a_moment_for_what_it_holds() {
    let mut runtime = Runtime::new();
    let mut plugin = runtime.up(60_000).await;
    plugin.ask("StartContainer", &start(std::process::id())).await;
    plugin.call("StopContainer", &start(1)).await;
    runtime.stop.cancel();
    timeout(SOON, runtime.gate).await.expect("in time").expect("no panic");
    plugin.until_closed().await;
}

#[tokio::test]
async fn a_socket_that_has_never_been_there_is_no_failure() {
    let directory = tempfile::tempdir().expect("can be made");
    let (events, mut received) = mpsc::channel(8);
    let (gatekeeper, _asked) = Gatekeeper::new(Arc::new(MaySelect(None)));
    let (resolver, _unconnected) = ContainerdResolver::unconnected();
    let stop = CancellationToken::new();
    let socket = directory.path().join("nri.sock");
    let gate = NriGate::spawn(NriConfig::at(&socket), gatekeeper, resolver, events, stop.clone());
    assert!(timeout(Duration::from_millis(300), received.recv()).await.is_err(), "nothing to tell");
    // It appears, and nobody listens there.
    drop(UnixListener::bind(&socket).expect("can be bound"));
    let event = timeout(SOON, received.recv()).await.expect("in time");
    assert!(matches!(event, Some(RuntimeEvent::Down { .. })), "{event:?}");
    stop.cancel();
    timeout(SOON, gate).await.expect("in time").expect("no panic");
}

#[test]
fn the_fuzzers_seeds_are_understood() {
    for (seed, requests) in [("session", 4), ("refused", 0)] {
        let path = format!("{}/../../fuzz/seeds/nri/{seed}", env!("CARGO_MANIFEST_DIR"));
        assert_eq!(read_all(&std::fs::read(path).expect("is there")), requests, "{seed}");
    }
}
