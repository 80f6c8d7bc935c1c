//! `pillion run`: one command with its companions, without an agent.
//!
//! The command is born held at its gate, in a cgroup of its own; companions start, redirection comes into force, then the
//! command is released. Everything ends with it. When this process is killed, the kernel kills the command and its
//! companions with it (`PR_SET_PDEATHSIG`), and the next `pillion run` or `pillion cleanup` removes the rest.
//!
//! When companions or redirection fail, `onFailure` decides: `open` runs the command without them and says so, `closed`
//! does not run it. A policy file that does not select the command is an error, unless `--allow-unmatched` is given.

mod instance;
mod output;
mod signals;

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use pillion_attachment::{
    BoxFuture, CompanionView, Handle, Happening, Job, Ledger, Node, Record, Report, State, Wish, attach,
};
use pillion_companion::{
    Ending, Host, HostConfig, Process,
    cgroup::{CgroupGuard, CgroupPath, CgroupRoots},
    launch::{Held, LaunchSpec, NamespaceSpec, ParentDeath, Program, Request, spawn},
};
use pillion_policy::PolicySet;
use pillion_redirect::{Bpffs, Dataplane, LoadOptions};
use pillion_runtime::{ProcessWorkloadError, process_workload, resolve_program};
use pillion_workload::{
    FailureMode, FirstInstruction, Plan, Resources, RuntimeKind, Subject, Workload, WorkloadId,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

use self::{
    instance::Instance,
    signals::{Received, Signals},
};
use crate::{
    config::{LogConfig, NetnsChoice, RunConfig},
    render::note,
    telemetry, validate,
    witness::HeldAtGate,
};

const REPORTS: usize = 64;
const LOG_QUEUE: usize = 1024;
/// The launcher has nothing to wait for.
const LAUNCH_LIMIT: Duration = Duration::from_secs(10);
/// What a detach may take beyond the graces of the companions.
const DETACH_MARGIN: Duration = Duration::from_secs(30);
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(3);

/// Runs the command to its end and takes everything away.
pub(crate) fn main(config: RunConfig) -> anyhow::Result<ExitCode> {
    // Before the runtime has threads.
    signals::block().context("cannot block signals")?;
    telemetry::init(&LogConfig { log_format: config.log_format, log_level: config.log_level.clone() })?;
    let policies = match validate::load(&config.policy)? {
        Ok(policies) => policies,
        Err(invalid) => return Ok(invalid),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()?;
    let result = runtime.block_on(run(config, policies));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn run(config: RunConfig, policies: PolicySet) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::receive().context("cannot receive signals")?;
    let directory = std::env::current_dir().context("cannot tell the current directory")?;
    let path = std::env::var_os("PATH");
    let program = match resolve_program(&config.command[0], path.as_deref(), &directory) {
        Ok(program) => program,
        Err(error) => {
            note(format_args!("pillion run: {}", pillion_attachment::chain(&error)));
            let denied = matches!(
                &error,
                ProcessWorkloadError::NotFound { source, .. } if source.kind() == io::ErrorKind::PermissionDenied
            );
            // What a shell exits with.
            return Ok(ExitCode::from(if denied { 126 } else { 127 }));
        }
    };
    let plan = decide(&policies, &config, &program)?;
    let cgroups = CgroupRoots::discover()?;
    instance::sweep_the_dead(&config.paths, &cgroups).await;
    let instance = Instance::of_this_process(&config.paths)?;
    instance.make_directories()?;

    let stage = Stage { config, program, plan, cgroups, instance };
    let mut scene = Scene::default();
    let result = stage.play(&mut scene, &mut signals).await;
    // Whatever has happened: everything is taken away.
    let cleared = stage.clear(scene).await;
    let code = result?;
    cleared?;
    Ok(ExitCode::from(code))
}

/// The plan for the command; `None` when it may run without one.
fn decide(policies: &PolicySet, config: &RunConfig, program: &Path) -> anyhow::Result<Option<Arc<Plan>>> {
    let subject = subject(config, program);
    let decision = policies.decide(&subject);
    if decision.plan.is_none() {
        if !config.allow_unmatched {
            bail!(
                "no policy selects {}; --allow-unmatched runs it without companions\n{decision}",
                program.display()
            );
        }
        note(format_args!(
            "pillion run: no policy selects {}: it runs without companions",
            program.display()
        ));
    }
    Ok(decision.plan)
}

fn subject(config: &RunConfig, program: &Path) -> Subject {
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    Subject {
        labels: config.labels.iter().cloned().collect(),
        executable: Some(program.to_owned()),
        ..Subject::new(RuntimeKind::Process, name)
    }
}

/// What is known before anything is made.
struct Stage {
    config: RunConfig,
    program: PathBuf,
    plan: Option<Arc<Plan>>,
    cgroups: CgroupRoots,
    instance: Instance,
}

/// What has been made, to be taken away in reverse.
#[derive(Default)]
struct Scene {
    cgroup: Option<CgroupGuard>,
    node: Option<Arc<Node>>,
    attachment: Option<(Handle, mpsc::Receiver<Report>)>,
    output: Option<output::Output>,
}

/// How an attach came out.
enum Outcome {
    /// The command may run.
    Go,
    /// It must not, and this is why.
    Refused(String),
    /// A signal asked for the end first.
    Interrupted(Received),
}

impl Stage {
    async fn play(&self, scene: &mut Scene, signals: &mut Signals) -> anyhow::Result<u8> {
        let held = self.hold(scene).await?;
        if let Some(plan) = &self.plan {
            let workload = self.workload(&held)?;
            let netns = held.namespace().context("cannot open the command's network namespace")?;
            let outcome = match self.node(scene, plan).await {
                Ok(node) => {
                    let (reports_in, reports) = mpsc::channel(REPORTS);
                    let job = Job {
                        workload,
                        plan: plan.clone(),
                        netns,
                        witness: Arc::new(HeldAtGate),
                        told_first: FirstInstruction::Before,
                        serial: 1,
                        earlier: None,
                    };
                    let handle = attach(node, Arc::new(NoLedger), job, reports_in);
                    let (_, reports) = scene.attachment.insert((handle, reports));
                    wait_until_attached(reports, signals, &held, plan).await?
                }
                Err(error) => failed(plan, &format!("{error:#}")),
            };
            match outcome {
                Outcome::Go => {}
                Outcome::Refused(why) => bail!("{} was not started: {why}", self.program.display()),
                Outcome::Interrupted(received) => return Ok(code_of_signal(received.signal as i32)),
            }
        }
        let process = match held.release(LAUNCH_LIMIT).await {
            Ok(process) => process,
            Err(error) => {
                note(format_args!("pillion run: {}", pillion_attachment::chain(&error)));
                return Ok(u8::try_from(error.exit_code()).unwrap_or(126));
            }
        };
        let reports = scene.attachment.as_mut().map(|(_, reports)| reports);
        let ending = follow(&process, signals, reports).await?;
        Ok(match ending {
            Ending::Code(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            Ending::Signal(signal) => code_of_signal(signal),
            Ending::Unknown => bail!("the command has ended, but nobody told how"),
        })
    }

    /// Starts the command in its cgroup and namespace, up to but not including its first instruction.
    async fn hold(&self, scene: &mut Scene) -> anyhow::Result<Held> {
        let path = CgroupPath::workload(&self.instance.workload());
        let cgroup = self.cgroups.create(&path, &Resources::default()).await?;
        let arguments = self.config.command.clone();
        let environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
        let spec = LaunchSpec {
            cgroups: cgroup.procs_files(),
            namespace: match self.config.netns {
                NetnsChoice::Host => NamespaceSpec::Keep,
                NetnsChoice::New => NamespaceSpec::New,
            },
            parent_death: Some(ParentDeath {
                signal: nix::sys::signal::Signal::SIGKILL as i32,
                parent: i32::try_from(std::process::id())?,
            }),
            gate: true,
            ..LaunchSpec::new(Program::Path(self.program.clone().into()), arguments, environment)
        };
        scene.cgroup = Some(cgroup);
        let input: OwnedFd =
            io::stdin().as_fd().try_clone_to_owned().context("cannot pass standard input on")?;
        let request = Request::new(spec).with_input(input);
        let launcher = std::env::current_exe().context("cannot find this program")?;
        let launching = spawn(&launcher, request).await?;
        Ok(launching.held(LAUNCH_LIMIT).await?)
    }

    fn workload(&self, held: &Held) -> anyhow::Result<Workload> {
        let mut workload = process_workload(held.id().pid, &self.program)?;
        workload.id = self.instance.workload();
        workload.subject.labels = self.config.labels.iter().cloned().collect();
        Ok(workload)
    }

    async fn node(&self, scene: &mut Scene, plan: &Plan) -> anyhow::Result<Arc<Node>> {
        let executables = !plan.redirect.exclude.executables.is_empty();
        let options =
            LoadOptions { executables, ..LoadOptions::new(self.instance.pin_root()).for_one_workload() };
        let dataplane = tokio::task::spawn_blocking(move || Dataplane::load(&options))
            .await?
            .context("redirection cannot be loaded; `pillion check` says what is missing")?;
        let (lines_in, lines) = mpsc::channel(LOG_QUEUE);
        let host = HostConfig {
            state_dir: self.instance.state_dir(),
            launcher: std::env::current_exe().context("cannot find this program")?,
            cgroups: self.cgroups.clone(),
            die_with_parent: true,
        };
        let host = Host::new(host, lines_in)?;
        scene.output = Some(output::Output::follow(lines, plan));
        let node = Arc::new(Node { host, dataplane });
        scene.node = Some(node.clone());
        Ok(node)
    }

    /// In reverse of [`Stage::play`]. Goes on over errors and tells the first.
    async fn clear(&self, scene: Scene) -> anyhow::Result<()> {
        let Scene { cgroup, node, attachment, output } = scene;
        let mut first = None;
        let mut check = |result: anyhow::Result<()>| {
            if let Err(error) = result {
                first.get_or_insert(error);
            }
        };
        if let Some((handle, reports)) = attachment {
            check(self.detach(handle, reports).await);
        }
        if let Some(cgroup) = cgroup {
            check(cgroup.remove().await.context("the command's cgroup cannot be removed"));
        }
        if let Some(node) = node {
            let mounted = node.dataplane.mounted_bpffs();
            check(node.dataplane.unpin().context("pins cannot be removed"));
            // The last owner of the host: with it goes the sender of the companions' output.
            drop(node);
            check(self.instance.remove_files().context("files cannot be removed"));
            if mounted {
                check(Bpffs::release().map(drop).context("the BPF file system cannot be unmounted"));
            }
        } else {
            check(self.instance.remove_files().context("files cannot be removed"));
        }
        if let Some(output) = output {
            output.finish(LAST_WORDS_LIMIT).await;
        }
        match first {
            None => Ok(()),
            Some(error) => Err(error.context("something of Pillion is left; `pillion cleanup` removes it")),
        }
    }

    async fn detach(&self, handle: Handle, mut reports: mpsc::Receiver<Report>) -> anyhow::Result<()> {
        let graces: Duration =
            self.plan.iter().flat_map(|plan| &plan.companions).map(|companion| companion.stop_grace).sum();
        let deadline = Instant::now() + graces + DETACH_MARGIN;
        handle.wish(Wish::Detached);
        let mut state = State::Planned;
        let mut detaching = false;
        while let Ok(Some(report)) = timeout_at(deadline, reports.recv()).await {
            detaching |= report.happening == Happening::Detaching;
            state = report.view.state;
        }
        let _ = timeout_at(deadline, handle.ended()).await;
        match state {
            State::Failed { reason } if detaching => Err(anyhow!(reason)),
            // An attach that failed has rolled itself back, and has said what is left if anything is.
            State::Detached | State::Failed { .. } | State::Planned => Ok(()),
            State::Starting | State::Redirecting { .. } | State::Attached { .. } | State::Detaching => {
                Err(anyhow!("the companions did not end within {:?}", graces + DETACH_MARGIN))
            }
        }
    }
}

/// Waits for the outcome of the attach. What is not as it should be is decided by the policy.
async fn wait_until_attached(
    reports: &mut mpsc::Receiver<Report>,
    signals: &mut Signals,
    held: &Held,
    plan: &Plan,
) -> anyhow::Result<Outcome> {
    loop {
        let report = tokio::select! {
            report = reports.recv() => report,
            received = signals.next() => {
                let received = received?;
                if received.ends() {
                    return Ok(Outcome::Interrupted(received));
                }
                continue;
            }
            ending = held.ended() => bail!("the command has ended before it was released ({})", ending?),
        };
        let Some(report) = report else { bail!("the attachment has ended without a word") };
        match (&report.happening, &report.view.state) {
            (_, State::Attached { missing }) if missing.is_empty() => {
                info!(workload = %report.workload, policy = %plan.policy, "attached before the first instruction");
                return Ok(Outcome::Go);
            }
            // One that somebody else runs is still being looked for.
            (_, State::Attached { .. }) if report.view.companions.iter().any(is_awaited) => {}
            (_, State::Attached { .. }) => {
                let reasons: Vec<String> = report
                    .view
                    .companions
                    .iter()
                    .filter(|companion| !companion.ready)
                    .map(|companion| {
                        let error = companion.error.as_deref().unwrap_or("no reason given");
                        format!("companion {} is not ready: {error}", companion.name)
                    })
                    .collect();
                return Ok(failed(plan, &reasons.join("; ")));
            }
            (Happening::Failed, State::Failed { reason }) => return Ok(failed(plan, reason)),
            // What is not well is told with the outcome.
            (happening, _) => info!(workload = %report.workload, ?happening, "attachment"),
        }
    }
}

fn is_awaited(companion: &CompanionView) -> bool {
    companion.external && !companion.ready && companion.error.is_none()
}

fn failed(plan: &Plan, reason: &str) -> Outcome {
    match plan.on_failure {
        FailureMode::Open => {
            note(format_args!(
                "pillion run: {reason}; policy {} says onFailure: open: the command runs without it until it is there",
                plan.policy
            ));
            Outcome::Go
        }
        FailureMode::Closed => {
            Outcome::Refused(format!("{reason}; Pillion's policy {} says onFailure: closed", plan.policy))
        }
    }
}

/// Until the command has ended.
async fn follow(
    process: &Process,
    signals: &mut Signals,
    mut reports: Option<&mut mpsc::Receiver<Report>>,
) -> anyhow::Result<Ending> {
    loop {
        tokio::select! {
            ending = process.ended() => return Ok(ending?),
            received = signals.next() => {
                // It may have ended just now.
                if let Err(error) = received?.pass_on(process) {
                    warn!(%error, "a signal could not be passed on");
                }
            }
            Some(report) = next_report(&mut reports) => tell(&report, &report.happening),
        }
    }
}

async fn next_report(reports: &mut Option<&mut mpsc::Receiver<Report>>) -> Option<Report> {
    match reports {
        Some(reports) => {
            let report = reports.recv().await;
            if report.is_none() {
                // The attachment has ended by itself: nothing more comes.
                return std::future::pending().await;
            }
            report
        }
        None => std::future::pending().await,
    }
}

fn tell(report: &Report, happening: &Happening) {
    match happening {
        Happening::CompanionExited { companion, how } => {
            warn!(workload = %report.workload, %companion, "the companion has ended: {how}");
        }
        Happening::CompanionFailed { companion, reason } => {
            warn!(workload = %report.workload, %companion, "the companion is not ready: {reason}");
        }
        happening => info!(workload = %report.workload, ?happening, "attachment"),
    }
}

fn code_of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// Keeps nothing: names tell what belongs to a `pillion run`, and nobody adopts it.
struct NoLedger;

impl Ledger for NoLedger {
    fn save(&self, _: Record) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn erase(&self, _: &WorkloadId) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
