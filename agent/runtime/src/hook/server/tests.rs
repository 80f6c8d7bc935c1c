//! The gate from a hook's end, with a controller that the test plays.

use std::{
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream as Stream},
    process::{Child, Command, Stdio},
};

use futures_util::future::BoxFuture;
use pillion_common::hook::{ContainerId, Spec, Stopped};
use pillion_workload::{FailureMode, RuntimeKind, WorkloadId};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::*;
use crate::{
    Hold,
    gate::{Asked, MaySelect, Unheld},
    hook::{AskError, Described, Engine, FoundUnit, UnitManager},
};

/// Knows every container and every unit; the process of a unit is the test's own.
#[derive(Debug)]
struct Knows;

fn described(id: &str) -> Described {
    let subject = pillion_workload::Subject::new(RuntimeKind::Docker, id.to_owned());
    let id: WorkloadId = format!("docker/{id}").try_into().expect("valid");
    Described { id, subject, unknown: Vec::new() }
}

impl Engine for Knows {
    fn describe<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Described>, AskError>> {
        Box::pin(std::future::ready(Ok(Some(described(id)))))
    }
}

impl UnitManager for Knows {
    fn find<'a>(&'a self, name: &'a str, pid: Pid) -> BoxFuture<'a, Result<FoundUnit, AskError>> {
        let Described { id, subject, .. } = described(name);
        let found = crate::instance_of(pid).map_err(Into::into).map(|instance| FoundUnit {
            workload: pillion_workload::Workload { id, subject, instance },
            start_limit: None,
        });
        Box::pin(std::future::ready(found))
    }
}

struct Gates {
    directory: tempfile::TempDir,
    holds: mpsc::Receiver<Hold>,
    unheld: mpsc::Receiver<Unheld>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

impl Gates {
    fn open() -> Self {
        Self::with(None)
    }

    /// The same, with a policy of this failure mode that may select whatever is not known.
    fn with(mode: Option<FailureMode>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (gatekeeper, Asked { holds, unheld }) = Gatekeeper::new(Arc::new(MaySelect(mode)));
        let engines =
            Engines { docker: Some(Arc::new(Knows)), units: Some(Arc::new(Knows)), ..Engines::default() };
        let gate = HookGate::bind(&directory.path().join("gate.sock"), gatekeeper, engines).expect("bound");
        let stop = CancellationToken::new();
        let server = tokio::spawn(gate.run(stop.clone()));
        Self { directory, holds, unheld, stop, server }
    }

    fn connect(&self) -> Stream {
        Stream::connect(self.directory.path().join("gate.sock")).expect("somebody listens")
    }

    /// Asks, and leaves the answer to be read.
    fn ask(&self, question: Question, patience: Duration) -> Stream {
        let mut stream = self.connect();
        let patience_ms = patience.as_millis().try_into().expect("short");
        stream.write_all(&encode(&Request { patience_ms, question }).expect("valid")).expect("written");
        stream
    }

    async fn held(&mut self) -> Hold {
        timeout(SOON, self.holds.recv()).await.expect("in time").expect("the gate runs")
    }
}

const SOON: Duration = Duration::from_secs(20);

async fn answer(mut stream: Stream) -> Answer {
    spawn_blocking(move || {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).expect("a header");
        let mut body = vec![0; body_length::<Answer>(&header).expect("an answer's")];
        stream.read_exact(&mut body).expect("a body");
        decode(&body).expect("an answer")
    })
    .await
    .expect("no panic")
}

/// A process in a cgroup of its own would need privileges: these tests use a unit where the cgroup matters.
fn process() -> Child {
    Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat is everywhere")
}

fn container(pid: u32) -> Container {
    Container {
        point: Point::Start,
        id: ContainerId {
            id: "web".into(),
            bundle: "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby/web".into(),
            root: None,
        },
        pid: pid.try_into().expect("a pid fits an i32"),
        started: None,
        spec: Spec::default(),
    }
}

fn unit() -> Question {
    Question::Unit(Unit { name: "web.service".into(), pid: 1 })
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[tokio::test]
async fn the_controllers_word_reaches_the_hook() {
    if !is_root() {
        return;
    }
    let mut gates = Gates::open();
    let mode = fs::metadata(gates.directory.path().join("gate.sock")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let policy: pillion_workload::PolicyName = "p".parse().expect("valid");
    let reason = "envoy is not ready".to_owned();
    for (admission, wanted) in [
        (Admission::Unmatched, Answer::Admit { message: None }),
        (Admission::Attached, Answer::Admit { message: None }),
        (
            Admission::Refused { policy: policy.clone(), reason: reason.clone() },
            Answer::Refuse {
                message: format!("pillion: {reason}; refused, as policy p says onFailure: closed"),
            },
        ),
    ] {
        let stream = gates.ask(unit(), SOON);
        let hold = gates.held().await;
        assert_eq!((hold.gate, hold.workload.id.as_str()), (Gate::Systemd, "docker/web.service"));
        // The peer's pid, not the one in the request.
        assert_eq!(hold.workload.instance.process.pid.0.unsigned_abs(), std::process::id());
        hold.answer.expect("it waits").send(admission).expect("it waits");
        assert_eq!(answer(stream).await, wanted);
    }
    let stream = gates.ask(unit(), SOON);
    let hold = gates.held().await;
    hold.answer.expect("it waits").send(Admission::Open { policy, reason }).expect("it waits");
    let Answer::Admit { message: Some(message) } = answer(stream).await else { panic!("admitted") };
    assert!(message.contains("onFailure: open"), "{message}");

    let stopped = Stopped { id: container(1).id, spec: Spec::default() };
    let stream = gates.ask(Question::Stopped(stopped), SOON);
    assert_eq!(answer(stream).await, Answer::Admit { message: None });
    assert!(gates.holds.try_recv().is_err(), "it is only a hint");
}

#[tokio::test]
async fn a_hook_that_goes_away_withdraws_and_the_dead_are_let_go() {
    if !is_root() {
        return;
    }
    let mut gates = Gates::with(Some(FailureMode::Open));
    let stream = gates.ask(unit(), SOON);
    let hold = gates.held().await;
    drop(stream);
    let mut waiting = hold.answer.expect("it waited");
    timeout(SOON, waiting.closed()).await.expect("withdrawn");

    let mut child = process();
    let id = child.id();
    // The pid is another process's by now.
    let reused = Container { started: Some(1), ..container(id) };
    let stream = gates.ask(Question::Container(reused), SOON);
    assert!(matches!(answer(stream).await, Answer::Admit { message: Some(_) }));
    assert!(gates.holds.try_recv().is_err());

    let held_alone = crate::Cgroup2Mounts::discover().expect("cgroup2").mount_point().to_owned();
    let in_root =
        crate::instance_of(Pid(id.try_into().expect("fits"))).expect("alive").cgroup.path == held_alone;
    let stream = gates.ask(Question::Container(container(id)), SOON);
    if in_root {
        let Answer::Admit { message: Some(message) } = answer(stream).await else { panic!("admitted") };
        assert!(message.contains("root cgroup"), "{message}");
        drop(child.stdin.take());
        child.wait().expect("our child");
    } else {
        let hold = gates.held().await;
        assert_eq!((hold.gate, hold.workload.id.as_str()), (Gate::Wrapper, "docker/web"));
        drop(child.stdin.take());
        assert_eq!(answer(stream).await, Answer::Admit { message: None });
        timeout(SOON, hold.answer.expect("it waited").closed()).await.expect("withdrawn");
        child.wait().expect("our child");
    }
    let stream = gates.ask(Question::Container(container(id)), SOON);
    assert!(matches!(answer(stream).await, Answer::Admit { message: Some(_) }));
}

#[tokio::test]
async fn nobody_waits_for_ever_and_nonsense_is_answered() {
    if !is_root() {
        return;
    }
    let mut gates = Gates::open();
    let stream = gates.ask(unit(), Duration::from_millis(250));
    let hold = gates.held().await;
    let Answer::Undecided { message, .. } = answer(stream).await else { panic!("nobody decided") };
    assert!(message.contains("did not decide in time"), "{message}");
    drop(hold);

    let mut stream = gates.connect();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("written");
    assert!(matches!(answer(stream).await, Answer::Undecided { .. }));

    // Those who wait when the agent ends are told, and the next find nobody.
    let stream = gates.ask(unit(), SOON);
    let hold = gates.held().await;
    gates.stop.cancel();
    let Answer::Undecided { message, leaving: true } = answer(stream).await else { panic!("nobody decides") };
    assert!(message.contains("ending"), "{message}");
    drop(hold);
    timeout(SOON, gates.server).await.expect("it ends").expect("no panic");
    assert!(Stream::connect(gates.directory.path().join("gate.sock")).is_err());
}

#[tokio::test]
async fn more_hooks_than_places_wait_their_turn() {
    if !is_root() {
        return;
    }
    let mut gates = Gates::open();
    let streams: Vec<Stream> = (0..MAX_HOOKS + 20).map(|_| gates.ask(unit(), SOON)).collect();
    for _ in 0..streams.len() {
        let hold = gates.held().await;
        hold.answer.expect("it waits").send(Admission::Unmatched).expect("it waits");
    }
    for stream in streams {
        assert_eq!(answer(stream).await, Answer::Admit { message: None });
    }
}

#[tokio::test]
async fn a_container_that_nobody_answers_for_is_refused_where_a_closed_policy_may_select_it() {
    if !is_root() {
        return;
    }
    // The agent has no containerd to ask.
    let bundle = "/run/containerd/io.containerd.runtime.v2.task/default/web";
    for mode in [None, Some(FailureMode::Open), Some(FailureMode::Closed)] {
        let mut gates = Gates::with(mode);
        let mut container = container(std::process::id());
        container.id.bundle = bundle.into();
        let told = answer(gates.ask(Question::Container(container), SOON)).await;
        let message = match (mode, told) {
            (Some(FailureMode::Closed), Answer::Refuse { message })
            | (Some(FailureMode::Open), Answer::Admit { message: Some(message) }) => Some(message),
            (None, Answer::Admit { message: None }) => None,
            (mode, told) => panic!("{mode:?}: {told:?}"),
        };
        for part in ["pillion: ", "policy payments", "container web", "--containerd-socket"] {
            assert!(message.iter().all(|message| message.contains(part)), "{message:?}");
        }
        let unheld = gates.unheld.try_recv();
        assert_eq!(unheld.is_ok(), mode.is_some(), "{unheld:?}");
        // Dead, or in a PID namespace that the agent does not see.
        let told =
            answer(gates.ask(Question::Container(self::container(i32::MAX.unsigned_abs())), SOON)).await;
        let refused = matches!(&told, Answer::Refuse { message } if message.contains("sees no process"));
        assert_eq!(refused, mode == Some(FailureMode::Closed), "{told:?}");
    }
}
