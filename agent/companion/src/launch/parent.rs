//! The agent's side of the launcher: spawning it, following it to the exec, holding what waits at its gate.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use pillion_workload::{Pid, ProcessId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    LAUNCH, handover,
    spec::{InputSpec, LaunchFailure, LaunchSpec, NamespaceSpec, OutputSpec},
};
use crate::process::{Doomed, Ending, Process, ProcessError};

/// Longer failure texts are cut.
const LONGEST_ANSWER: u64 = 64 * 1024;
/// Launches that wait for the spawning thread.
const QUEUE: usize = 64;

/// Why a program does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The launcher itself does not start.
    #[error("cannot start the launcher {}", launcher.display())]
    Spawn {
        /// The `pillion` binary.
        launcher: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The launcher cannot be told.
    #[error("cannot talk to the launcher")]
    Control {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The launcher could not do what was asked.
    #[error("{0}")]
    Refused(LaunchFailure),
    /// The launcher died on the way.
    #[error("the launcher ended on the way to its program ({0})")]
    Ended(Ending),
    /// The launcher hangs.
    #[error("the launcher did not reach its program within {0:?}")]
    Timeout(Duration),
    /// Asking about it.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl LaunchError {
    /// What a shell would exit with: 127 when the program does not exist, else 126.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Refused(failure) => failure.exit_code,
            Self::Spawn { .. }
            | Self::Control { .. }
            | Self::Ended(_)
            | Self::Timeout(_)
            | Self::Process(_) => 126,
        }
    }
}

/// Where the program's output goes.
#[derive(Debug, Default)]
pub enum Output {
    /// Where this process's own goes.
    #[default]
    Inherit,
    /// Nowhere.
    Null,
    /// Into a descriptor.
    Given(OwnedFd),
}

impl Output {
    fn spec(&self) -> OutputSpec {
        match self {
            Self::Inherit => OutputSpec::Keep,
            Self::Null => OutputSpec::Null,
            Self::Given(_) => OutputSpec::Given,
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Inherit | Self::Null => None,
            Self::Given(descriptor) => Some(descriptor.as_fd()),
        }
    }
}

/// A program to launch: the specification and the descriptors that go with it.
#[derive(Debug)]
pub struct Request {
    /// All but descriptors. What it says of namespace and streams is set by the methods of this type.
    spec: LaunchSpec,
    output: Output,
    errors: Output,
    namespace: Option<OwnedFd>,
    input: Option<OwnedFd>,
}

impl Request {
    /// Nothing is changed but the program, unless the specification says so.
    pub fn new(spec: LaunchSpec) -> Self {
        Self { spec, output: Output::Inherit, errors: Output::Inherit, namespace: None, input: None }
    }

    /// Runs in this network namespace.
    #[must_use]
    pub fn in_namespace(mut self, namespace: OwnedFd) -> Self {
        self.spec.namespace = NamespaceSpec::Join;
        self.namespace = Some(namespace);
        self
    }

    /// Reads this as its standard input.
    #[must_use]
    pub fn with_input(mut self, input: OwnedFd) -> Self {
        self.spec.input = InputSpec::Given;
        self.input = Some(input);
        self
    }

    /// Writes its standard output and error there.
    #[must_use]
    pub fn with_output(mut self, output: Output, errors: Output) -> Self {
        (self.spec.output, self.spec.errors) = (output.spec(), errors.spec());
        (self.output, self.errors) = (output, errors);
        self
    }

    /// Tells a launcher at the other end of this socket.
    fn send(&self, control: &StdUnixStream) -> io::Result<()> {
        let specification = handover::memory_file("pillion-launch", &serde_json::to_vec(&self.spec)?)?;
        let given = [
            Some(specification.as_fd()),
            self.namespace.as_ref().map(AsFd::as_fd),
            self.input.as_ref().map(AsFd::as_fd),
            self.output.descriptor(),
            self.errors.descriptor(),
        ];
        handover::send(control.as_fd(), &given.into_iter().flatten().collect::<Vec<_>>())
    }
}

/// Starts `<launcher> launch` with this request. Dropping the result kills it.
pub async fn spawn(launcher: &Path, request: Request) -> Result<Launching, LaunchError> {
    Waiting::start(launcher, LAUNCH, Stdio::inherit).await?.launch(&request)
}

/// A launcher that has not been told yet what to become. Dropping it kills it; so does the end of this process.
#[derive(Debug)]
pub(super) struct Waiting {
    process: Doomed,
    control: StdUnixStream,
}

impl Waiting {
    /// Starts it by this command, with these output and error streams until it is told of others.
    pub(super) async fn start(
        launcher: &Path,
        command: &str,
        streams: impl Fn() -> Stdio,
    ) -> Result<Self, LaunchError> {
        let (control, theirs) = StdUnixStream::pair().map_err(|source| LaunchError::Control { source })?;
        let mut program = Command::new(launcher);
        program.arg(command).env_clear().stdin(OwnedFd::from(theirs)).stdout(streams()).stderr(streams());
        let spawned = spawn_on_lasting_thread(program)
            .await
            .map_err(|source| LaunchError::Spawn { launcher: launcher.to_owned(), source })?;
        let process = Doomed::new(Process::child(spawned.pid())?);
        spawned.release();
        Ok(Self { process, control })
    }

    pub(super) fn has_ended(&self) -> bool {
        self.process.get().has_ended()
    }

    /// Tells it.
    pub(super) fn launch(self, request: &Request) -> Result<Launching, LaunchError> {
        let Self { process, control } = self;
        let tell = || {
            request.send(&control)?;
            control.set_nonblocking(true)?;
            UnixStream::from_std(control)
        };
        Ok(Launching { process, control: tell().map_err(|source| LaunchError::Control { source })? })
    }
}

/// A launcher on its way.
#[derive(Debug)]
pub struct Launching {
    process: Doomed,
    control: UnixStream,
}

impl Launching {
    /// Which process it is and will stay.
    pub fn id(&self) -> ProcessId {
        self.process.get().id()
    }

    /// Waits until the program runs.
    pub async fn executed(mut self, limit: Duration) -> Result<Process, LaunchError> {
        match timeout(limit, self.answer()).await.map_err(|_| LaunchError::Timeout(limit))?? {
            Answer::Executed => Ok(self.process.spare()),
            Answer::Held => Err(unexpected("the launcher waits at a gate that nobody asked for")),
        }
    }

    /// Waits until all is done but the exec. The specification must have a gate.
    pub async fn held(mut self, limit: Duration) -> Result<Held, LaunchError> {
        match timeout(limit, self.answer()).await.map_err(|_| LaunchError::Timeout(limit))?? {
            Answer::Held => Ok(Held { launching: self }),
            Answer::Executed => Err(LaunchError::Ended(self.process.get().ended().await?)),
        }
    }

    async fn answer(&mut self) -> Result<Answer, LaunchError> {
        let control = |source| LaunchError::Control { source };
        let mut kind = [0];
        match self.control.read(&mut kind).await {
            Ok(0) => return Ok(Answer::Executed),
            Ok(_) => {}
            Err(source) => return Err(control(source)),
        }
        match kind[0] {
            b'H' => Ok(Answer::Held),
            b'E' => {
                let mut text = Vec::new();
                (&mut self.control).take(LONGEST_ANSWER).read_to_end(&mut text).await.map_err(control)?;
                let failure = serde_json::from_slice(&text).map_err(|error| control(error.into()))?;
                Err(LaunchError::Refused(failure))
            }
            _ => Err(unexpected("the launcher said something unknown")),
        }
    }
}

/// A program that is ready to be executed. Dropping it kills it before its first instruction; so does the end of this
/// process.
#[derive(Debug)]
pub struct Held {
    launching: Launching,
}

impl Held {
    /// Which process it is and will stay.
    pub fn id(&self) -> ProcessId {
        self.launching.id()
    }

    /// The network namespace it is in.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        File::open(format!("/proc/{}/ns/net", self.id().pid)).map(OwnedFd::from)
    }

    /// Completes when it ends while it is held, for example by a signal from its terminal.
    pub async fn ended(&self) -> Result<Ending, ProcessError> {
        self.launching.process.get().ended().await
    }

    /// Lets it go and waits until the program runs.
    pub async fn release(mut self, limit: Duration) -> Result<Process, LaunchError> {
        self.launching.control.write_all(b"G").await.map_err(|source| LaunchError::Control { source })?;
        self.launching.executed(limit).await
    }
}

enum Answer {
    Held,
    Executed,
}

fn unexpected(what: &'static str) -> LaunchError {
    LaunchError::Control { source: io::Error::new(io::ErrorKind::InvalidData, what) }
}

type Job = (Command, oneshot::Sender<io::Result<Spawned>>);

/// Spawns on one thread that lasts as long as this process: `PR_SET_PDEATHSIG` (prctl(2)) fires when the *thread* that
/// spawned ends, and a runtime's threads come and go. It also keeps fork and exec from blocking a worker.
async fn spawn_on_lasting_thread(command: Command) -> io::Result<Spawned> {
    static THREAD: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let jobs = THREAD.get_or_init(|| {
        let (sender, mut receiver) = mpsc::channel::<Job>(QUEUE);
        let body = move || {
            while let Some((mut command, reply)) = receiver.blocking_recv() {
                // When nobody waits any more, the reply comes back and its drop kills the child.
                let _ = reply.send(command.spawn().map(|child| Spawned { child: Some(child) }));
            }
        };
        // Without the thread the channel is closed, which every caller is told.
        let _ = std::thread::Builder::new().name("pillion-spawn".into()).stack_size(256 * 1024).spawn(body);
        sender
    });
    let (reply, answer) = oneshot::channel();
    let lost = || io::Error::other("the spawning thread is not there");
    jobs.send((command, reply)).await.map_err(|_| lost())?;
    answer.await.map_err(|_| lost())?
}

/// A child that nobody watches yet. Dropping it kills it.
#[derive(Debug)]
struct Spawned {
    child: Option<Child>,
}

impl Spawned {
    fn pid(&self) -> Pid {
        let pid = self.child.as_ref().expect("only `release` takes it, with the whole of self").id();
        Pid(i32::try_from(pid).expect("pids are positive i32 (pid_max is at most 2^22)"))
    }

    fn release(mut self) {
        // std's Child neither kills nor waits when dropped.
        drop(self.child.take());
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
