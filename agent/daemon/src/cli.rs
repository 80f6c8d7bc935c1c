//! The command line: what can be typed, and what `--help` says about it.
//!
//! Owns names, defaults and help texts. Never does anything: `main` hands the parsed arguments on.

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use pillion_workload::{RuntimeKind, WorkloadId};

use crate::{
    config::{AgentConfig, OrNone, Paths, RunConfig, SystemdChoice},
    connection::Connection,
    hooks,
    render::Format,
};

const AFTER_HELP: &str = "\
Exit codes:
  0  ok
  1  failure
  2  wrong usage
  3  a policy is invalid
  4  the agent cannot be reached
  5  degraded: it works, but not all of it (status, check)

Data goes to stdout, everything else to stderr.

Examples:
  pillion check                                     can this machine do it?
  pillion validate /etc/pillion/policy.d            are the policies right?
  pillion run --policy relay.yaml -- curl http://192.0.2.1/
  pillion agent                                     run the agent in the foreground
  pillion list -o wide                              what is attached to what?";

const AGENT_HELP: &str = "\
SIGHUP reloads the policies (they are also reloaded when a file changes). SIGTERM stops the agent and leaves \
companions and redirection in force: the next agent takes them over. `pillion cleanup` takes them away.

Examples:
  pillion agent
  pillion agent --log-format json --log-level info,pillion_redirect=debug
  pillion agent --policy-dir /srv/policies --http-addr none";

const RUN_HELP: &str = "\
The command starts only when its companions are ready and redirection is in force; when that fails, `onFailure: open` \
starts it bare and `closed` does not start it. Signals are passed on, the exit code is the command's (128 + the signal's \
number when one killed it), and everything is taken away at its end. The relay's records go to stderr as JSON lines.

Examples:
  pillion run --policy relay.yaml -- curl http://192.0.2.1/
  pillion run --policy relay.yaml --netns new --label app=api -- ./server --port 8080";

/// Attaches companion processes (sidecars) to running workloads: no restart, no change to the workload.
#[derive(Debug, Parser)]
#[command(name = "pillion", version, after_help = AFTER_HELP, propagate_version = true, max_term_width = 100)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent in the foreground
    #[command(after_help = AGENT_HELP)]
    Agent(Box<AgentConfig>),
    /// Run one command with its companions, without an agent
    #[command(after_help = RUN_HELP)]
    Run(Box<RunConfig>),
    /// Check policy files and show every fault
    Validate(ValidateArgs),
    /// Tell which policy matches a workload, and why
    Explain(ExplainArgs),
    /// Show the agent's state: sources, policies, attachments
    Status(StatusArgs),
    /// List the workloads that the agent knows
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show everything known about one workload
    Describe(DescribeArgs),
    /// Attach a workload now, as its policy says
    Attach(AttachArgs),
    /// Detach a workload and leave it alone until `pillion attach`
    Detach(DetachArgs),
    /// Show what happened, and with -f what happens
    Events(EventsArgs),
    /// Show what becomes of a workload's connections, as the kernel decides
    Trace(TraceArgs),
    /// Have a container runtime hold its containers until Pillion is done with them
    #[command(name = "install-hooks")]
    InstallHooks(Box<InstallHooksArgs>),
    /// Take the hooks out of the container runtimes again
    #[command(name = "uninstall-hooks")]
    UninstallHooks(UninstallHooksArgs),
    /// Tell whether this machine can run Pillion: each shortcoming with cause and cure
    Check(CheckArgs),
    /// Remove everything of Pillion from this machine, and prove it
    Cleanup(CleanupArgs),
    /// Decide about a workload that pillion-hook holds, without an agent
    #[command(hide = true)]
    Admit(AdmitArgs),
    /// Run a command of pillion on the node that this container runs on
    OnNode(OnNodeArgs),
    /// Print the completion script for a shell
    Completion(CompletionArgs),
    /// Print the version of this program and of the running agent
    Version(VersionArgs),
}

/// How to reach the agent.
#[derive(Debug, Clone, Args)]
pub(crate) struct Reach {
    /// The agent's run directory; its admin socket is DIR/admin.sock
    #[arg(
        long,
        env = "PILLION_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/pillion",
        help_heading = "Agent"
    )]
    pub(crate) run_dir: PathBuf,
    /// Give up when the agent is silent for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration, help_heading = "Agent")]
    pub(crate) timeout: Duration,
}

/// How to print.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Output {
    /// How to print the result
    #[arg(short = 'o', long = "output", value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

/// `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Label {
    /// Before the first `=`.
    pub(crate) key: String,
    /// After it; may be empty.
    pub(crate) value: String,
}

/// Arguments of `pillion validate`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
All files are checked together, as the agent would load them: two files that define the same policy are a fault. \
Every fault of every file is shown in one go, with file, line and column. Exit code 3 when there is one.

Examples:
  pillion validate /etc/pillion/policy.d
  pillion validate a.yaml b.yaml
  generate-policies | pillion validate -
  pillion validate -o json policies/ | jq '.faults[].message'")]
pub(crate) struct ValidateArgs {
    /// Policy file, directory of *.yaml and *.yml files, or - for stdin
    #[arg(required = true, value_name = "FILE|DIR")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion explain`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
For each policy it shows which field of `select` matched and which did not, what the field wanted and what the workload \
has; then the plan of the policy that wins. Exit code 0 whether or not a policy matches: -o json has the answer in \
`.plan`, which is null when none does.

A described workload (--subject) is YAML or JSON:
  runtime: containerd
  name: web
  namespace: default
  labels: { app: api }
  image: docker.io/library/nginx:1.27

Examples:
  pillion explain containerd/default/web
  pillion explain --policy p.yaml --subject workload.yaml
  pillion explain --policy p.yaml --runtime process --name curl --label app=api
  pillion explain containerd/default/web --connection tcp:10.1.2.3:443 --user 1000")]
pub(crate) struct ExplainArgs {
    /// A workload that the running agent knows, as `pillion list` names it
    #[arg(value_name = "WORKLOAD", conflicts_with_all = ["policies", "subject", "runtime", "name", "namespace", "labels", "image", "unit"])]
    pub(crate) workload: Option<WorkloadId>,
    /// Policy file or directory; may be given more than once [default: /etc/pillion/policy.d]
    #[arg(long = "policy", value_name = "FILE")]
    pub(crate) policies: Vec<PathBuf>,
    /// Description of the workload, YAML or JSON; - for stdin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["runtime", "name", "namespace", "labels", "image", "unit", "executable"])]
    pub(crate) subject: Option<PathBuf>,
    /// Describe the workload here: its runtime (process or containerd)
    #[arg(long, value_name = "RUNTIME", help_heading = "Description", required_unless_present_any = ["workload", "subject"])]
    pub(crate) runtime: Option<RuntimeKind>,
    /// Its name
    #[arg(long, value_name = "NAME", help_heading = "Description", required_unless_present_any = ["workload", "subject"])]
    pub(crate) name: Option<String>,
    /// Its namespace
    #[arg(long, value_name = "NAMESPACE", help_heading = "Description")]
    pub(crate) namespace: Option<String>,
    /// A label of it; may be given more than once
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label, help_heading = "Description")]
    pub(crate) labels: Vec<Label>,
    /// Its image
    #[arg(long, value_name = "IMAGE", help_heading = "Description")]
    pub(crate) image: Option<String>,
    /// Its systemd unit
    #[arg(long, value_name = "UNIT", help_heading = "Description")]
    pub(crate) unit: Option<String>,
    /// Its program, an absolute path; with --connection also the program that connects
    #[arg(long, value_name = "PATH", help_heading = "Description")]
    pub(crate) executable: Option<PathBuf>,
    /// Explain a connection of it, such as tcp:10.1.2.3:443; may be given more than once
    #[arg(long = "connection", value_name = "PROTOCOL:ADDRESS:PORT", help_heading = "Connections")]
    pub(crate) connections: Vec<Connection>,
    /// The user that connects, a number on the host
    #[arg(long, value_name = "UID", requires = "connections", help_heading = "Connections")]
    pub(crate) user: Option<u32>,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion status`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Exit code 5 when something is amiss: a source is down, the last reload of the policies failed, or an attachment failed.

Examples:
  pillion status
  pillion status -o json | jq .policy")]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion list`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  pillion list
  pillion list -o wide
  pillion list -o name | xargs -n1 pillion describe")]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion describe`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  pillion describe containerd/default/web")]
pub(crate) struct DescribeArgs {
    /// The workload, as `pillion list` names it
    #[arg(value_name = "WORKLOAD")]
    pub(crate) workload: WorkloadId,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion attach`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Undoes an earlier `pillion detach`, and tries again at once where an attachment failed. A workload that no policy \
matches cannot be attached: see `pillion explain WORKLOAD`.

Examples:
  pillion attach containerd/default/web
  pillion attach --wait 1m containerd/default/web")]
pub(crate) struct AttachArgs {
    /// The workload, as `pillion list` names it
    #[arg(value_name = "WORKLOAD")]
    pub(crate) workload: WorkloadId,
    /// Wait this long for the outcome; the work goes on afterwards
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = wait)]
    pub(crate) wait: Duration,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion detach`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
New connections of the workload go straight to where they are meant. Connections that exist are cut when their companion \
stops. The workload is left alone until `pillion attach`, also across restarts of the agent.

Example:
  pillion detach containerd/default/web")]
pub(crate) struct DetachArgs {
    /// The workload, as `pillion list` names it
    #[arg(value_name = "WORKLOAD")]
    pub(crate) workload: WorkloadId,
    /// Wait this long for the outcome; the work goes on afterwards
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = wait)]
    pub(crate) wait: Duration,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion events`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The agent keeps the latest events since its start. With -o json each event is one line.

Examples:
  pillion events
  pillion events -f -o json")]
pub(crate) struct EventsArgs {
    /// Go on with new events until interrupted
    #[arg(short, long)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion trace`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Each line is one decision: the connection, the rule, where it goes, the verdict, and the process. An address or port that \
the kernel has still to choose is `*`. What is more than the rate is counted and told as `left out`. A trace ends with \
this command; while there is none, connections cost nothing more.

Examples:
  pillion trace containerd/default/web
  pillion trace --rate 1000 --sample 1/10 --for 1m containerd/default/web
  pillion trace -o json containerd/default/web | jq 'select(.verdict == \"refused\")'")]
pub(crate) struct TraceArgs {
    /// The workload, as `pillion list` names it
    #[arg(value_name = "WORKLOAD")]
    pub(crate) workload: WorkloadId,
    /// Tell at most so many decisions a second
    #[arg(long, value_name = "N[/s]", default_value = "100/s", value_parser = rate)]
    pub(crate) rate: NonZeroU32,
    /// Tell one of so many decisions
    #[arg(long, value_name = "1/N", default_value = "1/1", value_parser = sample)]
    pub(crate) sample: NonZeroU32,
    /// End after this time, at most 24h
    #[arg(long = "for", value_name = "TIME", default_value = "10m", value_parser = trace_length)]
    pub(crate) length: Duration,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Where Pillion's own configuration is.
#[derive(Debug, Clone, Args)]
pub(crate) struct Etc {
    /// Directory of what is kept about hooks; `pillion-hook` looks into /etc/pillion
    #[arg(long = "etc-dir", value_name = "DIR", env = hooks::ETC_VARIABLE, default_value = hooks::ETC, hide = true)]
    pub(crate) etc: PathBuf,
}

/// Arguments of `pillion install-hooks`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
containerd, docker: adds a runtime `pillion`, which is the default one held at each start by pillion-hook; --default makes every \
container start that way. With --by hook, containerd's runtime has no other program: its containers begin with a specification that \
has the OCI hooks. podman, crio: adds OCI hooks for every container. The change is shown and checked, the file of before is \
kept beside it, and what is to be restarted is said and not done. Doing it again changes nothing.

Examples:
  pillion install-hooks --runtime docker --default --dry-run
  pillion install-hooks --runtime docker
  docker run --runtime pillion …
  pillion install-hooks --runtime podman")]
pub(crate) struct InstallHooksArgs {
    /// The runtime
    #[arg(long, value_enum)]
    pub(crate) runtime: hooks::Runtime,
    /// Hold every container, and not those alone that ask for the runtime `pillion`
    #[arg(long)]
    pub(crate) default: bool,
    /// What holds containerd's containers
    #[arg(long, value_enum, default_value_t)]
    pub(crate) by: hooks::By,
    /// Only show what would be changed
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// The runtime's configuration file; the directory of hooks for podman and crio [default: where the runtime looks]
    #[arg(long, value_name = "PATH")]
    pub(crate) config: Option<PathBuf>,
    /// The program pillion-hook [default: beside this one]
    #[arg(long, value_name = "PATH")]
    pub(crate) hook: Option<PathBuf>,
    /// The real runtime [default: as configured, else runc]
    #[arg(long, value_name = "PATH")]
    pub(crate) real: Option<PathBuf>,
    /// Where the wrapper is linked [default: beside pillion-hook]
    #[arg(long, value_name = "DIR")]
    pub(crate) link_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) paths: Paths,
    #[command(flatten)]
    pub(crate) etc: Etc,
}

/// Arguments of `pillion uninstall-hooks`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
A configuration that nobody has edited since is again what it was, to the byte; out of one that was edited, Pillion's settings are taken.

Examples:
  pillion uninstall-hooks
  pillion uninstall-hooks --runtime docker --dry-run")]
pub(crate) struct UninstallHooksArgs {
    /// The runtime [default: all]
    #[arg(long, value_enum)]
    pub(crate) runtime: Option<hooks::Runtime>,
    /// Only show what would be changed
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) etc: Etc,
}

/// Arguments of `pillion check`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Kernel features are tried out, not guessed from the version; nothing is changed and nothing is left behind. \
Exit code 0 when all is well, 5 when Pillion works but something does not (warn), 1 when it cannot work (fail).

Examples:
  sudo pillion check
  pillion check -o json | jq '.checks[] | select(.verdict != \"ok\")'")]
pub(crate) struct CheckArgs {
    /// Directory of the policy files
    #[arg(long, value_name = "DIR", env = "PILLION_POLICY_DIR", default_value = "/etc/pillion/policy.d")]
    pub(crate) policy_dir: PathBuf,
    /// containerd's socket, or 'none' where there is no containerd
    #[arg(
        long,
        env = "PILLION_CONTAINERD_SOCKET",
        value_name = "PATH",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub(crate) containerd_socket: OrNone<PathBuf>,
    #[command(flatten)]
    pub(crate) paths: Paths,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) etc: Etc,
}

/// Arguments of `pillion cleanup`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Removes eBPF links, programs and maps, companions, cgroups, mounts, sockets and files; workloads run on without \
companions, and connections through a companion are cut. Works without an agent, a journal, or anything intact: it goes by \
what is there. Policy files are yours and stay. Refuses while an agent or a `pillion run` runs: end that first. \
Exit code 1 when anything remains.

Examples:
  pillion cleanup --dry-run
  pillion cleanup --yes
  pillion cleanup --yes -o json | jq .remaining")]
pub(crate) struct CleanupArgs {
    /// Only show what would be removed
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Once nothing remains, wait for SIGTERM: for a DaemonSet, which starts again what ends
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) stay: bool,
    #[command(flatten)]
    pub(crate) paths: Paths,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `pillion admit`, which pillion-hook starts.
#[derive(Debug, Clone, Args)]
pub(crate) struct AdmitArgs {
    /// By the policies that were in force last; the request is on stdin, the answer on stdout
    #[arg(long, required = true)]
    pub(crate) offline: bool,
    /// Where the agent kept them
    #[arg(long, env = "PILLION_STATE_DIR", value_name = "DIR", default_value = "/var/lib/pillion")]
    pub(crate) state_dir: PathBuf,
    /// containerd's socket, or 'none'
    #[arg(
        long,
        env = "PILLION_CONTAINERD_SOCKET",
        value_name = "PATH",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub(crate) containerd_socket: OrNone<PathBuf>,
    /// Docker Engine's socket, or 'none'
    #[arg(long, env = "PILLION_DOCKER_SOCKET", value_name = "PATH")]
    pub(crate) docker_socket: Option<OrNone<PathBuf>>,
    /// 'none' to leave Podman alone
    #[arg(long, env = "PILLION_PODMAN_SOCKET", value_name = "PATH")]
    pub(crate) podman_socket: Option<OrNone<PathBuf>>,
    /// systemd's bus, 'auto' or 'none', as for the agent
    #[arg(long, env = "PILLION_SYSTEMD", value_name = "auto|none|PATH", default_value = "auto")]
    pub(crate) systemd: SystemdChoice,
}

/// Arguments of `pillion on-node`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
For the agent as a pod, with hostPID: true and privileged: true: leaves the container's mount and cgroup namespaces for \
those of the node, and becomes the command, which then finds everything where it is on the node. The agent is run from a \
copy on the node (STATE_DIR/bin, with pillion-hook beside it), because companions are started from it and outlive the pod.

Examples:
  pillion on-node agent --policy-dir /srv/policies
  pillion on-node --node /run/containerd/containerd.sock agent
  pillion on-node cleanup --yes")]
pub(crate) struct OnNodeArgs {
    /// A process of the node: the server of this Unix socket, such as the container runtime's, or a directory /proc/PID
    #[arg(long, env = "PILLION_NODE", value_name = "PATH", default_value = "/proc/1")]
    pub(crate) node: PathBuf,
    /// The agent's state directory on the node, where the programs are copied to
    #[arg(long, env = "PILLION_STATE_DIR", value_name = "DIR", default_value = "/var/lib/pillion")]
    pub(crate) state_dir: PathBuf,
    /// The command and its arguments, as behind `pillion`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

/// Arguments of `pillion completion`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  pillion completion bash > /etc/bash_completion.d/pillion
  pillion completion zsh > \"${fpath[1]}/_pillion\"
  pillion completion fish > ~/.config/fish/completions/pillion.fish")]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Arguments of `pillion version`.
#[derive(Debug, Clone, Args)]
pub(crate) struct VersionArgs {
    /// Do not ask the agent
    #[arg(long)]
    pub(crate) client: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) output: Output,
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed =
        humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 10s or 1m30s"))?;
    if parsed.is_zero() { Err("must be more than 0".to_owned()) } else { Ok(parsed) }
}

/// The agent waits for 5 minutes at most, and in whole seconds.
fn wait(text: &str) -> Result<Duration, String> {
    let wait = duration(text)?;
    if wait < Duration::from_secs(1) || wait > Duration::from_secs(300) {
        return Err("must be between 1s and 5m".to_owned());
    }
    Ok(wait)
}

/// In whole seconds, and for a day at most.
fn trace_length(text: &str) -> Result<Duration, String> {
    let length = duration(text)?;
    if length < Duration::from_secs(1) || length > Duration::from_secs(24 * 60 * 60) {
        return Err("must be between 1s and 24h".to_owned());
    }
    Ok(length)
}

fn rate(text: &str) -> Result<NonZeroU32, String> {
    match text.strip_suffix("/s").unwrap_or(text).parse() {
        Ok(rate) if (1..=10_000).contains(&rate) => NonZeroU32::new(rate).ok_or_else(String::new),
        Ok(_) | Err(_) => Err("write it as 100 or 100/s, between 1/s and 10000/s".to_owned()),
    }
}

fn sample(text: &str) -> Result<NonZeroU32, String> {
    text.strip_prefix("1/")
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| "write it as 1/10: one of ten".to_owned())
}

fn label(text: &str) -> Result<Label, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok(Label { key: key.to_owned(), value: value.to_owned() }),
        _ => Err("write it as key=value".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn labels_need_a_key() {
        assert_eq!(label("a=b=c"), Ok(Label { key: "a".into(), value: "b=c".into() }));
        assert_eq!(label("a="), Ok(Label { key: "a".into(), value: String::new() }));
        assert!(label("=b").is_err() && label("a").is_err());
    }

    #[test]
    fn a_trace_is_bounded() {
        assert_eq!(rate("100/s").unwrap().get(), 100);
        assert_eq!(rate("10000").unwrap().get(), 10_000);
        for bad in ["0", "10001", "-1", "x/s", "100/m", ""] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        assert_eq!(sample("1/10").unwrap().get(), 10);
        for bad in ["1/0", "2/3", "10", ""] {
            assert!(sample(bad).is_err(), "{bad}");
        }
        assert!(trace_length("24h").is_ok() && trace_length("25h").is_err() && trace_length("1ms").is_err());
    }

    #[test]
    fn a_deadline_is_never_zero() {
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert!(duration("0s").is_err() && duration("10").is_err());
        assert!(wait("1s").is_ok() && wait("5m").is_ok() && wait("301s").is_err() && wait("1ms").is_err());
    }

    #[test]
    fn a_described_workload_needs_runtime_and_name() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["pillion", "explain"], args].concat());
        for (args, good) in [
            (&["process/x"][..], true),
            (&["--subject", "-"][..], true),
            (&["--runtime", "process", "--name", "x", "--policy", "p"][..], true),
            (&["--runtime", "process"][..], false),
            (&[][..], false),
            (&["process/x", "--subject", "-"][..], false),
            (&["--subject", "-", "--name", "x"][..], false),
        ] {
            assert_eq!(parse(args).is_ok(), good, "{args:?}");
        }
    }
}
