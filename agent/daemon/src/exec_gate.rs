//! Joins what stops programs at their exec (redirect) with what becomes of them (runtime), which do not know each other.
//!
//! Owns the eBPF side while a policy selects programs, and the guardian, a process that lets go what is stopped when the
//! agent is gone. Decides nothing: the policies say which programs, the gate what becomes of each.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use pillion_companion::cgroup::SLICE;
use pillion_policy::{PolicySet, ProgramName};
use pillion_redirect::{BEAT, ExecEvents, ExecWatch, FileName, guard, let_go_left};
use pillion_runtime::{Cgroup2Mounts, ExecConfig, ExecNews, ExecSource, Gatekeeper, RuntimeEvent, Stopper};
use pillion_workload::{CgroupId, ProcessId};
use tokio::{
    io::unix::AsyncFd,
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{config::AgentConfig, inventory, readable::readable};

/// The hidden command of the guardian.
pub(crate) const COMMAND: &str = "guard-held";
/// When the agent has not let go by itself by then, it hangs, and the guardian does.
const MARGIN: Duration = Duration::from_secs(5);
const QUEUE: usize = 64;
/// What the guardian's end may take.
const END_LIMIT: Duration = Duration::from_secs(5);
/// A kernel that refuses is asked again after this.
const RETRY: Duration = Duration::from_secs(30);

/// What the gate's tasks tell the eBPF side, whether it is there or not.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    watch: Option<ExecWatch>,
    exempt: BTreeSet<CgroupId>,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stopper for Shared {
    fn forget(&self, process: ProcessId) {
        if let Some(watch) = &mut self.inner().watch {
            watch.forget(process.pid);
        }
    }

    fn exempt(&self, cgroup: CgroupId) {
        let mut inner = self.inner();
        inner.exempt.insert(cgroup);
        if let Some(watch) = &mut inner.watch
            && let Err(error) = watch.exempt(cgroup)
        {
            // What is stopped there is let go at once all the same.
            warn!(%error, "a cgroup cannot be exempted from being held at exec");
        }
    }

    fn no_longer_exempt(&self, cgroup: CgroupId) {
        let mut inner = self.inner();
        inner.exempt.remove(&cgroup);
        if let Some(watch) = &mut inner.watch {
            watch.no_longer_exempt(cgroup);
        }
    }
}

/// What does not change.
struct Gate {
    shared: Arc<Shared>,
    pin_root: PathBuf,
    longest: Duration,
}

/// Everything that is there while programs are stopped, but for what is shared.
struct Armed {
    events: AsyncFd<ExecEvents>,
    guardian: Guardian,
    missed: u64,
}

/// Begins both sides. `policies` are those in force. Ends, with nothing stopped any more, when told to.
pub(crate) fn start(
    config: &AgentConfig,
    gatekeeper: Gatekeeper,
    policies: watch::Receiver<PolicySet>,
    events: mpsc::Sender<RuntimeEvent>,
    stop: &CancellationToken,
) -> JoinHandle<()> {
    let shared = Arc::new(Shared::default());
    let (news, heard) = mpsc::channel(QUEUE);
    let wanted = policies.clone();
    let source = ExecConfig {
        owner: config.paths.state_dir.clone(),
        longest: config.hold_limit,
        stopper: shared.clone(),
        wants: Arc::new(move |subject| wanted.borrow().wants_program(subject)),
        is_taken: Arc::new(|cgroup| pillion_redirect::is_redirected(&cgroup.path)),
        gatekeeper,
    };
    ExecSource::spawn(source, heard, events, stop.clone());
    let gate = Gate { shared, pin_root: config.paths.pin_root.clone(), longest: config.hold_limit };
    tokio::spawn(run(gate, policies, news, stop.clone()))
}

/// Keeps the eBPF side in step with the policies until told to stop; then lets everything go.
async fn run(
    gate: Gate,
    mut policies: watch::Receiver<PolicySet>,
    news: mpsc::Sender<ExecNews>,
    stop: CancellationToken,
) {
    match let_go_left(&gate.pin_root) {
        Ok(0) => {}
        Ok(count) => warn!(count, "processes that an earlier agent had stopped run again"),
        Err(error) => warn!(%error, "what an earlier agent had stopped cannot be let go"),
    }
    let mut ticks = interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut armed: Option<Armed> = None;
    let mut retry_at: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            changed = policies.changed() => {
                if changed.is_err() { break; }
                retry_at = Some(Instant::now());
            }
            _ = ticks.tick(), if armed.is_some() => beat(&gate.shared, &mut armed),
            ready = executed(&mut armed) => {
                for (process, held) in ready {
                    if news.send(ExecNews::Executed { process, held }).await.is_err() { return; }
                }
            }
            () = until(retry_at), if retry_at.is_some() => {
                retry_at = None;
                let names: BTreeSet<FileName> =
                    policies.borrow_and_update().program_names().into_iter().map(file_name).collect();
                match arm(&gate, &mut armed, names).await {
                    Ok(()) => {
                        if news.send(ExecNews::Up).await.is_err() { break; }
                    }
                    Err(error) => {
                        disarm(&gate.shared, armed.take()).await;
                        retry_at = Some(Instant::now() + RETRY);
                        if news.send(ExecNews::Down(format!("{error:#}"))).await.is_err() { break; }
                    }
                }
            }
        }
    }
    disarm(&gate.shared, armed).await;
}

fn file_name(name: ProgramName) -> FileName {
    match name {
        ProgramName::Whole(name) => FileName::Whole(name),
        ProgramName::Beginning(name) => FileName::Beginning(name),
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn beat(shared: &Shared, armed: &mut Option<Armed>) {
    let mut inner = shared.inner();
    let Some(watch) = &mut inner.watch else { return };
    if let Err(error) = watch.beat() {
        warn!(%error, "the agent cannot tell that it is alive: nothing is held at exec");
    }
    exempt_companions(watch);
    let missed = watch.missed();
    if let Some(armed) = armed
        && missed > armed.missed
    {
        warn!(
            count = missed - armed.missed,
            "programs were executed faster than they could be told of, and not held"
        );
        armed.missed = missed;
    }
}

/// The slice is made with the first companion.
fn exempt_companions(watch: &mut ExecWatch) {
    let slice = Cgroup2Mounts::discover().ok().map(|mounts| mounts.mount_point().join(SLICE));
    if let Some(slice) = slice.and_then(|path| fs::metadata(path).ok()) {
        // Told again and again: it may be another one by now.
        let _ = watch.exempt(CgroupId(slice.ino()));
    }
}

async fn executed(armed: &mut Option<Armed>) -> Vec<(ProcessId, bool)> {
    let Some(armed) = armed else { return std::future::pending().await };
    let Ok(mut ready) = armed.events.readable_mut().await else { return std::future::pending().await };
    let mut found = Vec::new();
    while let Some(executed) = ready.get_inner_mut().next_waiting() {
        found.push((executed.process, executed.held));
    }
    ready.clear_ready();
    found
}

async fn arm(gate: &Gate, armed: &mut Option<Armed>, names: BTreeSet<FileName>) -> anyhow::Result<()> {
    let shared = &gate.shared;
    if names.is_empty() {
        if armed.is_some() {
            info!("no policy selects programs any more: nothing is held at exec");
        }
        disarm(shared, armed.take()).await;
        return Ok(());
    }
    if armed.is_none() {
        let root = gate.pin_root.clone();
        let (mut watch, events) = tokio::task::spawn_blocking(move || ExecWatch::load(&root)).await??;
        let guardian =
            Guardian::start(watch.pin(), gate.longest + MARGIN).context("the guardian cannot be started")?;
        exempt_companions(&mut watch);
        let mut inner = shared.inner();
        for cgroup in &inner.exempt {
            watch.exempt(*cgroup)?;
        }
        inner.watch = Some(watch);
        drop(inner);
        *armed = Some(Armed { events: readable(events)?, guardian, missed: 0 });
        info!("programs that policies select are held at their exec");
    }
    if let Some(watch) = &mut shared.inner().watch {
        watch.set_names(&names)?;
    }
    Ok(())
}

async fn disarm(shared: &Shared, armed: Option<Armed>) {
    let watch = shared.inner().watch.take();
    if let Some(watch) = watch
        && let Ok(Err(error)) = tokio::task::spawn_blocking(move || watch.end()).await
    {
        warn!(%error, "what is stopped at exec cannot be let go by the agent; its guardian does");
    }
    if let Some(armed) = armed {
        armed.guardian.end().await;
    }
}

/// The process that lets go when the agent is gone.
struct Guardian(Child);

impl Guardian {
    fn start(pin: &Path, limit: Duration) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(COMMAND).arg(pin).arg(limit.as_secs().to_string()).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    async fn end(mut self) {
        drop(self.0.stdin.take());
        // It ends by itself; what it does not do in time, it does without us.
        let _ = timeout(END_LIMIT, self.0.wait()).await;
    }
}

/// `pillion guard-held PIN SECONDS`: out of reach of whatever ends the agent's session or cgroup.
pub(crate) fn guardian(arguments: &[OsString]) -> ExitCode {
    let (pin, limit) = match arguments {
        [pin, limit] => (Path::new(pin), limit.to_str().and_then(|limit| limit.parse().ok())),
        _ => return ExitCode::FAILURE,
    };
    let Some(limit) = limit.map(Duration::from_secs) else { return ExitCode::FAILURE };
    // Fails only for the leader of a process group, which has a session of its own choice.
    let _ = nix::unistd::setsid();
    let own = std::process::id().to_string();
    for mount in inventory::mounts().unwrap_or_default() {
        if matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2") {
            // Where it cannot be moved it stays beside the agent, and ends with it when all of that cgroup is killed.
            let _ = fs::write(mount.mount_point.join("cgroup.procs"), &own);
        }
    }
    match guard(pin, std::io::stdin(), limit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
