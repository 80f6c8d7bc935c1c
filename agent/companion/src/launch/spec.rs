//! What the launcher is told, and what it says when it fails. JSON, internal to one build of the binary.

use std::{ffi::OsString, fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::relay::RelayConfig;

/// What to do before the exec, in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// `cgroup.procs` files to join; v2 and v1.
    pub cgroups: Vec<PathBuf>,
    /// The network namespace.
    pub namespace: NamespaceSpec,
    /// Resource limits.
    pub limits: Vec<Limit>,
    /// Standard input of the program.
    pub input: InputSpec,
    /// Standard output.
    pub output: OutputSpec,
    /// Standard error.
    pub errors: OutputSpec,
    /// Working directory, entered before privileges are dropped; the launcher's own when absent.
    pub directory: Option<PathBuf>,
    /// Session or process group.
    pub session: Session,
    /// File mode creation mask; the launcher's own when absent.
    pub umask: Option<u32>,
    /// User and groups; the launcher's own when absent.
    pub identity: Option<Identity>,
    /// What it may do beyond its user.
    pub privileges: Privileges,
    /// A signal when the parent dies.
    pub parent_death: Option<ParentDeath>,
    /// Every descriptor above 2 is closed (Linux 5.11). Else those that the agent itself has inherited stay
    /// open; its own are close-on-exec in any case.
    pub close_descriptors: bool,
    /// Every signal back to its default; else only SIGPIPE, which the launcher itself had changed. The signal mask is
    /// emptied in either case.
    pub reset_signals: bool,
    /// Wait for the parent before the exec.
    pub gate: bool,
    /// What to become.
    pub program: Program,
    /// Arguments; the first is the name under which the program runs.
    pub arguments: Vec<OsString>,
    /// The whole environment.
    pub environment: Vec<(OsString, OsString)>,
}

impl LaunchSpec {
    /// The program just as if this process had become it: nothing is dropped, joined or limited, and there is no gate.
    pub fn new(program: Program, arguments: Vec<OsString>, environment: Vec<(OsString, OsString)>) -> Self {
        Self {
            cgroups: Vec::new(),
            namespace: NamespaceSpec::Keep,
            limits: Vec::new(),
            input: InputSpec::Null,
            output: OutputSpec::Keep,
            errors: OutputSpec::Keep,
            directory: None,
            session: Session::Keep,
            umask: None,
            identity: None,
            privileges: Privileges::Keep,
            parent_death: None,
            close_descriptors: false,
            reset_signals: false,
            gate: false,
            program,
            arguments,
            environment,
        }
    }
}

/// The network namespace to run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceSpec {
    /// The launcher's.
    Keep,
    /// One that was handed over.
    Join,
    /// A new one with its loopback interface up.
    New,
}

/// Standard input of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputSpec {
    /// `/dev/null`.
    Null,
    /// A descriptor that was handed over.
    Given,
}

/// Standard output or error of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputSpec {
    /// The launcher's.
    Keep,
    /// `/dev/null`.
    Null,
    /// A descriptor that was handed over.
    Given,
}

/// One resource limit; what is absent becomes the present hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Of what.
    pub kind: LimitKind,
    /// Soft limit.
    pub soft: Option<u64>,
    /// Hard limit; can only be lowered without `CAP_SYS_RESOURCE`.
    pub hard: Option<u64>,
}

/// The resources that are limited per process rather than by a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LimitKind {
    /// `RLIMIT_NOFILE`, in descriptors.
    Descriptors,
    /// `RLIMIT_CORE`, in bytes.
    Core,
}

/// Whose process group the program is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Session {
    /// The launcher's: signals of its terminal reach it.
    Keep,
    /// A process group of its own in the same session.
    Group,
    /// A session of its own, without a terminal.
    Session,
}

/// User and groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Real, effective and saved user id.
    pub uid: u32,
    /// Real, effective and saved group id.
    pub gid: u32,
    /// Supplementary groups; replaces all that there were.
    pub groups: Vec<u32>,
}

/// What a program may do beyond its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Privileges {
    /// What the launcher may.
    Keep,
    /// Nothing: all capability sets are emptied, the bounding set included, so that not even uid 0 gains any by an
    /// exec, and `PR_SET_NO_NEW_PRIVS` is set.
    None,
}

/// `PR_SET_PDEATHSIG`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentDeath {
    /// Signal number.
    pub signal: i32,
    /// Pid of the parent: when it is another by then, the parent has died already.
    pub parent: i32,
}

/// What to become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// The program at an absolute path, which need not be text, by an exec.
    Path(OsString),
    /// The embedded relay, without an exec: it is in this binary. What the launcher was started with stays in its
    /// process list, and it is not dumpable (prctl(2), `PR_SET_DUMPABLE`), as after any change of user.
    Relay(Box<RelayConfig>),
}

/// Why the program does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchFailure {
    /// What was tried, for example `join the cgroup /sys/fs/cgroup/…`.
    pub step: String,
    /// The system's answer.
    pub error: String,
    /// 127 when the program does not exist, else 126: what a shell would exit with.
    pub exit_code: i32,
}

impl fmt::Display for LaunchFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.step, self.error)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_specification_survives_json_even_when_it_is_not_text() {
        let spec = LaunchSpec {
            cgroups: vec![PathBuf::from("/sys/fs/cgroup/x/cgroup.procs")],
            namespace: NamespaceSpec::New,
            limits: vec![Limit { kind: LimitKind::Core, soft: Some(0), hard: None }],
            input: InputSpec::Given,
            output: OutputSpec::Null,
            errors: OutputSpec::Given,
            directory: None,
            session: Session::Session,
            umask: Some(0o027),
            identity: Some(Identity { uid: 1, gid: 2, groups: vec![3] }),
            privileges: Privileges::None,
            parent_death: Some(ParentDeath { signal: 9, parent: 1 }),
            close_descriptors: true,
            reset_signals: true,
            gate: true,
            program: Program::Path(OsString::from_vec(vec![b'/', 0xff])),
            arguments: vec![OsString::from_vec(vec![b'a', 0xfe])],
            environment: vec![("A".into(), OsString::from_vec(vec![0xfd]))],
        };
        let json = serde_json::to_string(&spec).expect("serializable");
        assert_eq!(serde_json::from_str::<LaunchSpec>(&json).expect("readable"), spec);
        let unknown = json.replacen('{', "{\"surprise\":1,", 1);
        assert!(serde_json::from_str::<LaunchSpec>(&unknown).is_err());
    }
}
