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
    handover,
    spec::{InputSpec, LaunchFailure, LaunchSpec, NamespaceSpec, Program},
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

impl From<Output> for Stdio {
    fn from(output: Output) -> Self {
        match output {
            Output::Inherit => Self::inherit(),
            Output::Null => Self::null(),
            Output::Given(descriptor) => Self::from(descriptor),
        }
    }
}

/// A program to launch: the specification and the descriptors that go with it.
#[derive(Debug)]
pub struct Request {
    /// All but descriptors. The three fields that announce descriptors are set by the methods of this type.
    pub spec: LaunchSpec,
    /// Standard output.
    pub output: Output,
    /// Standard error.
    pub errors: Output,
    namespace: Option<OwnedFd>,
    input: Option<OwnedFd>,
    program: Option<OwnedFd>,
}

impl Request {
    /// Nothing is changed but the program, unless the specification says so.
    pub fn new(spec: LaunchSpec) -> Self {
        Self {
            spec,
            output: Output::Inherit,
            errors: Output::Inherit,
            namespace: None,
            input: None,
            program: None,
        }
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

    /// Runs the program in this file, which may be where the program's user may not look.
    #[must_use]
    pub fn with_program(mut self, program: OwnedFd) -> Self {
        self.spec.program = Program::Given;
        self.program = Some(program);
        self
    }

    fn descriptors<'a>(&'a self, specification: &'a OwnedFd) -> Vec<BorrowedFd<'a>> {
        let wanted = [
            (true, Some(specification)),
            (self.spec.namespace == NamespaceSpec::Join, self.namespace.as_ref()),
            (self.spec.input == InputSpec::Given, self.input.as_ref()),
            (self.spec.program == Program::Given, self.program.as_ref()),
        ];
        wanted.into_iter().filter(|(wanted, _)| *wanted).filter_map(|(_, fd)| fd.map(AsFd::as_fd)).collect()
    }
}

/// Starts `<launcher> launch` with this request. Dropping the result kills it.
pub async fn spawn(launcher: &Path, request: Request) -> Result<Launching, LaunchError> {
    let control = |source| LaunchError::Control { source };
    let (ours, theirs) = StdUnixStream::pair().map_err(control)?;
    let json = serde_json::to_vec(&request.spec).map_err(|error| control(error.into()))?;
    let specification = handover::memory_file("pillion-launch", &json).map_err(control)?;
    handover::send(ours.as_fd(), &request.descriptors(&specification)).map_err(control)?;
    ours.set_nonblocking(true).map_err(control)?;
    let ours = UnixStream::from_std(ours).map_err(control)?;

    let mut command = Command::new(launcher);
    command
        .arg("launch")
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(request.output)
        .stderr(request.errors);
    // For the search of the program; all else is in the specification.
    if let Some((name, path)) = request.spec.environment.iter().find(|(name, _)| name == "PATH") {
        command.env(name, path);
    }
    let spawned = spawn_on_lasting_thread(command)
        .await
        .map_err(|source| LaunchError::Spawn { launcher: launcher.to_owned(), source })?;
    let process = Doomed::new(Process::child(spawned.pid())?);
    spawned.release();
    Ok(Launching { process, control: ours })
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
