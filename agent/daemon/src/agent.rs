//! `pillion agent`: builds every part, in order, and waits for the end. Reading [`run`] shows every part there is.
//!
//! Wires, decides nothing.

use std::{mem::ManuallyDrop, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use pillion_attachment::{Node, Swept, sweep};
use pillion_companion::{Host, HostConfig, LogLine, cgroup::CgroupRoots};
use pillion_policy::PolicySet;
use pillion_redirect::{Bpffs, Dataplane, LoadOptions};
use pillion_runtime::{Gatekeeper, HookGate, SourceName};
use pillion_workload::RuntimeKind;
use prometheus_client::registry::Registry;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    admin::{self, Admin},
    config::{AgentConfig, OrNone},
    container_names::OfContainerd,
    controller::{Beginning, Controller, Parts},
    exec_gate,
    http::{self, Listener},
    journal::Journal,
    last_good::LastGood,
    lock::{AgentLock, make_directory},
    memory,
    metrics::{DataplaneCollector, Metrics},
    notify::{self, Notifier},
    policy_watch::{self, LoadNow, PolicyLoad},
    sources::Sources,
    standing::Standing,
    telemetry,
    units::{self, Selections},
};

/// Every queue has room for a burst; who sends more waits.
const QUEUE: usize = 64;
const LOG_QUEUE: usize = 1024;
/// What has not ended by then is left to the end of the process.
const END_LIMIT: Duration = Duration::from_secs(6);

/// Runs the agent to its end.
pub(crate) fn main(config: AgentConfig) -> anyhow::Result<ExitCode> {
    memory::give_back_early();
    telemetry::init(&config.log)?;
    // Two workers: one may be in a system call while the other answers.
    // Never dropped: that would drop attachments which have not let go in time, and a dropped one is taken back. The end
    // of the process leaves them in force, as a kill does.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    ManuallyDrop::new(runtime).block_on(run(config)).map(|()| ExitCode::SUCCESS)
}

/// Builds every part and runs until SIGTERM or SIGINT. Attachments stay in force afterwards.
pub(crate) async fn run(config: AgentConfig) -> anyhow::Result<()> {
    // First of all: a signal that comes during the start must not end the agent half way.
    let signals = Signals::catch()?;
    let notifier = Notifier::from_environment();
    let stop = CancellationToken::new();

    // Directories, and the lock before anything that two agents would fight over.
    make_directory(&config.paths.run_dir, 0o755)
        .with_context(|| format!("cannot make {}", config.paths.run_dir.display()))?;
    make_directory(&config.paths.state_dir, 0o711)
        .with_context(|| format!("cannot make {}", config.paths.state_dir.display()))?;
    Bpffs::ensure(&config.paths.pin_root).context("`pillion check` says what is missing")?;
    let lock = AgentLock::take(&config.lock_file(), &config.paths.state_dir, &config.paths.pin_root)?;
    let journal = Journal::open(&config.paths.state_dir).context("cannot open the journal")?;
    let loaded = journal.load().context("cannot read the journal")?;
    // Whatever can fail comes before anything is adopted.
    let listeners = listen(&config).await?;

    // The node: companions and redirection.
    let options = LoadOptions::new(&config.paths.pin_root);
    let dataplane = tokio::task::spawn_blocking(move || Dataplane::load(&options))
        .await?
        .context("cannot load the data plane; `pillion check` says what is missing")?;
    let (log_lines, lines) = mpsc::channel(LOG_QUEUE);
    let program = std::env::current_exe().context("cannot find this program")?;
    let host = HostConfig {
        state_dir: config.paths.state_dir.clone(),
        launcher: program.clone(),
        cgroups: CgroupRoots::discover()?,
        die_with_parent: false,
    };
    let host = Host::new(host, log_lines).context("cannot run companions")?;
    let node = Arc::new(Node { host, dataplane: dataplane.clone() });
    let swept = sweep(&node, &loaded.records).await;
    if swept != Swept::default() {
        let (attachments, companions, left) = (swept.attachments, swept.companions, swept.left.join("; "));
        warn!(attachments, companions, left, "what no record tells of was taken back");
    }
    tokio::spawn(log(lines));

    // Sources, and the gates that belong to them.
    let (runtime_events, runtime) = mpsc::channel(QUEUE);
    let standing = Arc::new(Standing::recall(config.paths.state_dir.clone()));
    let (gatekeeper, asked) = Gatekeeper::new(standing.clone());
    let attached: Vec<_> = loaded.records.iter().map(|record| record.workload.subject.runtime).collect();
    let mut watched = Sources::start(&config, &attached, &runtime_events, &gatekeeper, &stop);
    let selections = Arc::new(watch::Sender::new(None));
    if let Some(units) = units::watch(&config, &program, &runtime_events, &selections, &stop) {
        watched.names.push((SourceName::SYSTEMD, RuntimeKind::Systemd));
        watched.engines.units = Some(Arc::new(units));
    }
    if let Some(resolver) = &watched.engines.containerd {
        node.host.tell_container_names(Arc::new(OfContainerd(resolver.clone())));
    }
    let gates = watched.gates;
    let hooks = HookGate::bind(&config.gate_socket(), gatekeeper.clone(), watched.engines)
        .with_context(|| format!("cannot listen on {}", config.gate_socket().display()))?;

    // Policies.
    let Policies { loads, loaded: policies, selecting } =
        watch_policies(&config, watched.docker, (selections, standing), &stop)?;

    // Processes held at their exec.
    let exec_gate = exec_gate::start(&config, gatekeeper, selecting, runtime_events.clone(), &stop);
    let mut sources = watched.names;
    sources.push((SourceName::PROCESS, RuntimeKind::Process));

    // The controller.
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    registry.register_collector(Box::new(DataplaneCollector(dataplane.clone())));
    let (requests, requests_in) = mpsc::channel(QUEUE);
    let parts = Parts {
        node,
        journal,
        witness: watched.probe,
        metrics: metrics.clone(),
        policy_dir: config.policy_dir.clone(),
        pin_root: config.paths.pin_root.clone(),
    };
    let beginning =
        Beginning { sources, runtime, asked, policies, requests: requests_in, stop: stop.clone() };
    let controller = tokio::spawn(Controller::begin_with(parts, beginning, loaded).run());

    // Servers.
    let registry = Arc::new(registry);
    let admin = Admin { requests, loads: loads.clone(), dataplane, metrics, registry };
    let mut servers = serve(listeners, &admin, &stop);
    servers.push(tokio::spawn(hooks.run(stop.clone())));
    servers.push(exec_gate);
    notifier.ready();
    info!(socket = %config.admin_socket().display(), "the agent is up");
    tokio::spawn(memory::give_back_the_beginnings());

    let ended = wait(signals, &notifier, &admin, &loads, controller, &stop).await;
    drop(runtime_events);
    // They pass on what the controller has answered at its end.
    let _ = timeout(END_LIMIT, futures(gates)).await;
    let _ = timeout(END_LIMIT, futures(servers)).await;
    for socket in [config.admin_socket(), config.gate_socket()] {
        let _ = std::fs::remove_file(socket);
    }
    drop(lock);
    ended
}

/// Where policies come from, and for whom.
struct Policies {
    /// Asks for a load.
    loads: mpsc::Sender<LoadNow>,
    /// For the controller.
    loaded: mpsc::Receiver<PolicyLoad>,
    /// Those in force, for what holds processes at their exec.
    selecting: watch::Receiver<PolicySet>,
}

fn watch_policies(
    config: &AgentConfig,
    docker: Option<PathBuf>,
    (selections, standing): (Arc<Selections>, Arc<Standing>),
    stop: &CancellationToken,
) -> anyhow::Result<Policies> {
    let (loads, load_requests) = mpsc::channel(4);
    let (policy_loads, loaded) = mpsc::channel(1);
    let (told, selecting) = watch::channel(PolicySet::empty());
    let deliver = move |load: PolicyLoad| {
        let policy_loads = policy_loads.clone();
        let policies = load.result.as_ref().ok().cloned();
        let (told, selections) = (told.clone(), selections.clone());
        if let Some(policies) = policies.as_ref().or(load.fallback.as_ref()) {
            standing.replace(policies.clone());
        }
        async move {
            // The controller has ended, and so will this.
            let _ = policy_loads.send(load).await;
            if let Some(policies) = policies {
                told.send_replace(policies.clone());
                // Units are started when their drop-ins are there: these come last.
                units::select(&selections, policies);
            }
        }
    };
    let last_good = LastGood {
        state_dir: config.paths.state_dir.clone(),
        command: offline_command(config, docker)?,
        patience: config.hold_limit,
    };
    tokio::spawn(policy_watch::run(
        config.policy_dir.clone(),
        last_good,
        load_requests,
        deliver,
        stop.clone(),
    ));
    Ok(Policies { loads, loaded, selecting })
}

/// What hooks run when they find no agent.
fn offline_command(config: &AgentConfig, docker: Option<PathBuf>) -> anyhow::Result<Vec<String>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let systemd = config.systemd.to_string();
    let state_dir =
        std::path::absolute(&config.paths.state_dir).context("cannot find the state directory")?;
    let containerd = config.containerd_socket.to_string();
    let docker = OrNone(docker).to_string();
    let text = |path: PathBuf| {
        path.into_os_string().into_string().ok().context("hooks cannot be told of a path that is not UTF-8")
    };
    let flags = ["admit", "--offline", "--state-dir"].map(str::to_owned);
    let values =
        [text(state_dir)?, "--containerd-socket".to_owned(), containerd, "--systemd".to_owned(), systemd];
    let of_docker = ["--docker-socket".to_owned(), docker];
    let podman =
        config.podman_socket.iter().flat_map(|socket| ["--podman-socket".to_owned(), socket.to_string()]);
    Ok([text(program)?].into_iter().chain(flags).chain(values).chain(of_docker).chain(podman).collect())
}

async fn listen(config: &AgentConfig) -> anyhow::Result<Listeners> {
    let socket = config.admin_socket();
    let admin = admin::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let health = match config.http_addr.get() {
        Some(address) => {
            let listener = Listener::tcp(*address).await;
            let cure = || format!("cannot listen on {address}; --http-addr gives another, or 'none'");
            Some(listener.with_context(cure)?)
        }
        None => None,
    };
    Ok(Listeners { admin, health })
}

fn serve(listeners: Listeners, admin: &Admin, stop: &CancellationToken) -> Vec<JoinHandle<()>> {
    let mut servers =
        vec![tokio::spawn(http::serve(listeners.admin, admin::api(admin.clone()), stop.clone()))];
    if let Some(listener) = listeners.health {
        servers.push(tokio::spawn(http::serve(listener, admin::health(admin.clone()), stop.clone())));
    }
    servers
}

struct Listeners {
    admin: Listener,
    health: Option<Listener>,
}

/// What an agent is told by signals. One that came before it is waited for is not lost.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn catch() -> anyhow::Result<Self> {
        let catch = |kind| signal(kind).context("cannot catch signals");
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            interrupt: catch(SignalKind::interrupt())?,
            hangup: catch(SignalKind::hangup())?,
        })
    }
}

/// Waits for a signal to end; reloads on SIGHUP; tells systemd that the controller answers.
async fn wait(
    mut signals: Signals,
    notifier: &Notifier,
    admin: &Admin,
    loads: &mpsc::Sender<LoadNow>,
    mut controller: JoinHandle<()>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut watchdog = notify::watchdog_interval().map(|period| {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    });
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hangup.recv() => {
                notifier.reloading();
                let (asker, taken) = tokio::sync::oneshot::channel();
                // A full queue means that a reload is about to happen anyway.
                if loads.try_send(LoadNow { asker: Some(asker) }).is_ok() {
                    let _ = timeout(END_LIMIT, taken).await;
                }
                notifier.ready();
            }
            () = async {
                match &mut watchdog {
                    Some(ticks) => { ticks.tick().await; }
                    None => std::future::pending().await,
                }
            } => if admin.pulse().await.is_ok() {
                notifier.alive();
            } else {
                warn!("the controller does not answer; systemd is not told that all is well");
            },
            ended = &mut controller => {
                // Only a panic ends it before it is told to. Its attachments see that and let go.
                return Err(anyhow::anyhow!("the controller has ended: {ended:?}"));
            }
        }
    }
    notifier.stopping();
    stop.cancel();
    let _ = timeout(END_LIMIT, controller).await;
    Ok(())
}

async fn futures(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        let _ = task.await;
    }
}

/// Companions' output, with whose it is.
async fn log(mut lines: mpsc::Receiver<LogLine>) {
    while let Some(line) = lines.recv().await {
        info!(
            workload = %line.workload,
            companion = %line.companion,
            stream = line.stream.as_str(),
            "{}", line.line
        );
    }
}
