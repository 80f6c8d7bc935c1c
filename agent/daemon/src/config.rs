//! The flags of `pillion agent` and `pillion run`, as clap reads them, and the paths that follow from them.
//!
//! Every path can be moved by a flag or an environment variable, so that several agents can run on one machine (each
//! test has its own). Never touches the file system.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, ValueEnum};
use pillion_runtime::{DropIns, RUNTIME_DIRECTORY, SYSTEM_BUS, is_booted_by_systemd};

/// `pillion agent`.
#[derive(Debug, Clone, Args)]
pub(crate) struct AgentConfig {
    /// Where the paths are.
    #[command(flatten)]
    pub(crate) paths: Paths,
    /// Directory of policy files (*.yaml, *.yml); they and it must be root's and writable by nobody else
    #[arg(long, env = "PILLION_POLICY_DIR", value_name = "DIR", default_value = "/etc/pillion/policy.d")]
    pub(crate) policy_dir: PathBuf,
    /// containerd's socket, or 'none' to leave containerd alone
    #[arg(
        long,
        env = "PILLION_CONTAINERD_SOCKET",
        value_name = "PATH",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub(crate) containerd_socket: OrNone<PathBuf>,
    /// Docker Engine's socket, or 'none' to leave Docker alone [default: /run/docker.sock, when it is there]
    #[arg(long, env = "PILLION_DOCKER_SOCKET", value_name = "PATH")]
    pub(crate) docker_socket: Option<OrNone<PathBuf>>,
    /// The socket of Podman's API service, or 'none' to leave Podman alone [default: /run/podman/podman.sock, when it is there; else
    /// Podman's files are read]
    #[arg(long, env = "PILLION_PODMAN_SOCKET", value_name = "PATH")]
    pub(crate) podman_socket: Option<OrNone<PathBuf>>,
    /// containerd's NRI socket, at which pods' containers are held before their start; used as soon as it is there. 'none' holds nothing here
    #[arg(long, env = "PILLION_NRI_SOCKET", value_name = "PATH", default_value = "/var/run/nri/nri.sock")]
    pub(crate) nri_socket: OrNone<PathBuf>,
    /// How long a container or unit is held at most until its companions are ready; then its policy's onFailure decides
    #[arg(long, env = "PILLION_HOLD_LIMIT", value_name = "TIME", default_value = "30s", value_parser = hold_limit)]
    pub(crate) hold_limit: Duration,
    /// systemd's bus: its socket, 'auto' for the machine's if systemd is its init, or 'none' to leave systemd alone
    #[arg(long, env = "PILLION_SYSTEMD", value_name = "auto|none|PATH", default_value = "auto")]
    pub(crate) systemd: SystemdChoice,
    /// Where /livez, /readyz and /metrics answer, or 'none'
    #[arg(long, env = "PILLION_HTTP_ADDR", value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub(crate) http_addr: OrNone<SocketAddr>,
    /// How logs look
    #[command(flatten)]
    pub(crate) log: LogConfig,
}

impl AgentConfig {
    /// The admin API's socket.
    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.paths.run_dir.join("admin.sock")
    }

    /// The socket of `pillion-hook`.
    pub(crate) fn gate_socket(&self) -> PathBuf {
        self.paths.run_dir.join(pillion_common::hook::SOCKET)
    }

    /// Locked while an agent runs.
    pub(crate) fn lock_file(&self) -> PathBuf {
        self.paths.run_dir.join(pillion_common::hook::LOCK)
    }
}

/// Which systemd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SystemdChoice {
    /// The machine's, if it was booted by one.
    Auto,
    /// None.
    None,
    /// The one on this bus.
    Bus(PathBuf),
}

impl SystemdChoice {
    /// The bus's socket, if there is a systemd to be watched.
    pub(crate) fn bus(&self) -> Option<PathBuf> {
        match self {
            Self::Auto => is_booted_by_systemd().then(|| SYSTEM_BUS.into()),
            Self::None => None,
            Self::Bus(path) => Some(path.clone()),
        }
    }
}

impl fmt::Display for SystemdChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::Bus(path) => path.display().fmt(f),
        }
    }
}

impl FromStr for SystemdChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            path if path.starts_with('/') => Ok(Self::Bus(path.into())),
            _ => Err("must be 'auto', 'none' or the absolute path of a bus's socket"),
        }
    }
}

/// Directories that the agent and `pillion run` write to.
#[derive(Debug, Clone, Args)]
pub(crate) struct Paths {
    /// Journal and companions' files
    #[arg(long, env = "PILLION_STATE_DIR", value_name = "DIR", default_value = "/var/lib/pillion")]
    pub(crate) state_dir: PathBuf,
    /// Lock and admin socket
    #[arg(long, env = "PILLION_RUN_DIR", value_name = "DIR", default_value = "/run/pillion")]
    pub(crate) run_dir: PathBuf,
    /// Where the agent's eBPF links and maps are pinned, below a bpffs mount; `pillion run` makes a directory of its own in it
    #[arg(long, env = "PILLION_PIN_ROOT", value_name = "DIR", default_value = "/sys/fs/bpf/pillion")]
    pub(crate) pin_root: PathBuf,
}

impl Paths {
    /// Whether run and state directory are those that `pillion-hook` knows by itself.
    pub(crate) fn are_usual(&self) -> bool {
        self.run_dir == Path::new("/run/pillion") && self.state_dir == Path::new("/var/lib/pillion")
    }

    /// The drop-ins by which units of systemd are held; they name the hook beside `program`, the agent's own.
    pub(crate) fn drop_ins(&self, program: &Path) -> DropIns {
        DropIns {
            runtime_dir: RUNTIME_DIRECTORY.into(),
            hook: program.with_file_name("pillion-hook"),
            run_dir: self.run_dir.clone(),
            state_dir: self.state_dir.clone(),
        }
    }

    /// Companions' files, of the agent.
    pub(crate) fn companions(&self) -> PathBuf {
        self.state_dir.join("companions")
    }

    /// Holds a state directory for each `pillion run`.
    pub(crate) fn runs(&self) -> PathBuf {
        self.state_dir.join("run")
    }
}

/// How logs look.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogConfig {
    /// Format of the logs on stderr
    #[arg(
        long,
        env = "PILLION_LOG_FORMAT",
        value_name = "FORMAT",
        value_enum,
        default_value_t = LogFormat::Text
    )]
    pub(crate) log_format: LogFormat,
    /// What is logged: a level such as 'info', or a tracing filter
    #[arg(long, env = "PILLION_LOG_LEVEL", value_name = "FILTER", default_value = "info")]
    pub(crate) log_level: String,
}

/// Format of the logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line for humans.
    Text,
    /// One JSON object a line.
    Json,
}

/// A value, or the word `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OrNone<T>(pub(crate) Option<T>);

impl<T> OrNone<T> {
    /// The value, if there is one.
    pub(crate) fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }
}

impl<T: FromStr> FromStr for OrNone<T> {
    type Err = T::Err;
    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|value| Self(Some(value))) }
    }
}

impl fmt::Display for OrNone<PathBuf> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(path) => path.display().fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// `pillion run`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunConfig {
    /// Where the paths are.
    #[command(flatten)]
    pub(crate) paths: Paths,
    /// Policy file; given several times, all are taken together
    #[arg(long, value_name = "FILE", required = true)]
    pub(crate) policy: Vec<PathBuf>,
    /// Network namespace of the command: the caller's, or a new one with nothing but loopback
    #[arg(long, value_enum, default_value_t = NetnsChoice::Host)]
    pub(crate) netns: NetnsChoice,
    /// Run the command as it is, with a warning, when no policy selects it
    #[arg(long)]
    pub(crate) allow_unmatched: bool,
    /// Labels of the process, for policies to select on
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
    /// Format of Pillion's own logs on stderr
    #[arg(long, env = "PILLION_LOG_FORMAT", value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// What Pillion itself logs; 'warn' lets the command speak alone
    #[arg(long, env = "PILLION_LOG_LEVEL", value_name = "FILTER", default_value = "warn")]
    pub(crate) log_level: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

/// The network namespace of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetnsChoice {
    /// The caller's.
    Host,
    /// A new one, with loopback up and nothing else.
    New,
}

/// The kubelet gives a runtime two minutes and systemd a unit 90 seconds, unless they are told otherwise.
fn hold_limit(text: &str) -> Result<Duration, String> {
    let limit = humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 30s"))?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(600);
    if allowed.contains(&limit) { Ok(limit) } else { Err("must be between 1s and 10m".to_owned()) }
}

fn label(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is KEY=VALUE"),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser};

    use super::*;

    #[derive(Parser)]
    struct Agent {
        #[command(flatten)]
        config: AgentConfig,
    }

    #[derive(Parser)]
    struct Run {
        #[command(flatten)]
        config: RunConfig,
    }

    #[test]
    fn none_turns_a_listener_off() {
        let Agent { config } =
            Agent::parse_from(["agent", "--http-addr", "none", "--containerd-socket", "/x.sock"]);
        assert_eq!(config.http_addr, OrNone(None));
        assert_eq!(config.containerd_socket.get(), Some(&PathBuf::from("/x.sock")));
        assert_eq!(config.admin_socket(), Path::new("/run/pillion/admin.sock"));
    }

    #[test]
    fn a_hold_has_its_limits() {
        assert_eq!(hold_limit("30s"), Ok(Duration::from_secs(30)));
        for bad in ["0s", "11m", "5", "999ms"] {
            assert!(hold_limit(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn systemd_is_found_named_or_left_alone() {
        for (given, wanted) in [
            ("auto", SystemdChoice::Auto),
            ("none", SystemdChoice::None),
            ("/run/bus", SystemdChoice::Bus("/run/bus".into())),
        ] {
            let Agent { config } = Agent::parse_from(["agent", "--systemd", given]);
            assert_eq!(config.systemd, wanted);
            assert_eq!(config.systemd.to_string(), given);
        }
        assert!(Agent::try_parse_from(["agent", "--systemd", "bus"]).is_err());
        assert_eq!(SystemdChoice::None.bus(), None);
        assert_eq!(SystemdChoice::Bus("/run/bus".into()).bus(), Some("/run/bus".into()));
    }

    #[test]
    fn flags_behind_the_command_belong_to_the_command() {
        let matches =
            Run::command().get_matches_from(["run", "--policy", "p.yaml", "curl", "--policy", "x", "-v"]);
        let Run { config } = Run::from_arg_matches(&matches).unwrap();
        assert_eq!(config.command, ["curl", "--policy", "x", "-v"]);
        assert_eq!(config.netns, NetnsChoice::Host);
    }

    #[test]
    fn labels_need_a_key() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("=b").is_err());
        assert!(label("a").is_err());
    }
}
