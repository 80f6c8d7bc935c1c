//! The launcher's own process: one thread, from its control socket to the exec.

use std::{
    ffi::{CString, OsStr, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    process::ExitCode,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        stat::{Mode, umask},
    },
    unistd::{self, Gid, Pid, Uid},
};

use super::{
    handover, raw,
    spec::{
        Identity, InputSpec, LaunchFailure, LaunchSpec, Limit, LimitKind, NamespaceSpec, OutputSpec,
        ParentDeath, Privileges, Program, Session,
    },
};
use crate::{
    netns,
    relay::{self, RelayConfig},
};

/// Longer specifications are not ours. The kernel takes a few MiB of arguments; JSON of raw bytes is up to five times
/// as long.
const LONGEST_SPECIFICATION: u64 = 64 << 20;

/// Body of the hidden `pillion launch`: becomes what the control socket on standard input asks for.
///
/// Must be called before any thread is started: namespaces, capabilities and `PR_SET_PDEATHSIG` belong to a thread.
/// Exits with 127 when the program does not exist and with 126 when anything else fails; as the relay, with its code.
pub fn main() -> ExitCode {
    // Descriptor 0 becomes the program's standard input; the control socket must not be in its way.
    let control = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(control) => UnixStream::from(control),
        Err(error) => return give_up(None, &failure("take the control socket", error)),
    };
    match run(&control) {
        Ok(Become::Relay { config, alone }) => relay(control, *config, alone),
        Ok(Become::Nothing) => ExitCode::SUCCESS,
        Err(reason) => give_up(Some(&control), &reason),
    }
}

/// What is left to do when there was no exec.
enum Become {
    /// The parent has gone, or wants nothing.
    Nothing,
    /// With every other descriptor closed, or not.
    Relay { config: Box<RelayConfig>, alone: bool },
}

/// The control socket closes when the relay listens: the parent need not ask in vain whether it is ready.
fn relay(control: UnixStream, config: RelayConfig, alone: bool) -> ExitCode {
    let prepare = || {
        if alone {
            raw::close_all_but(control.as_fd())?;
        }
        raw::ignore_broken_pipes()
    };
    if let Err(error) = prepare() {
        return give_up(Some(&control), &failure("become the relay", error));
    }
    // What `ps -o comm` shows, and the kernel's messages.
    let _ = prctl::set_name(c"pillion-relay");
    relay::main(config, || drop(control))
}

fn give_up(control: Option<&UnixStream>, reason: &LaunchFailure) -> ExitCode {
    let told = control.is_some_and(|mut control| {
        let mut message = vec![b'E'];
        serde_json::to_writer(&mut message, reason).is_ok() && control.write_all(&message).is_ok()
    });
    if !told {
        // The parent has gone; whoever looks at standard error gets the reason.
        let _ = writeln!(io::stderr(), "pillion launch: {reason}");
    }
    ExitCode::from(u8::try_from(reason.exit_code).unwrap_or(u8::MAX))
}

fn run(control: &UnixStream) -> Result<Become, LaunchFailure> {
    let handed = handover::receive(control.as_fd())
        .map_err(|e| failure("receive the specification (pillion launch is not for use by hand)", e))?;
    let Some(handed) = handed else { return Ok(Become::Nothing) };
    let mut handed = handed.into_iter();
    let mut next = |what: &str| handed.next().ok_or_else(|| failure(what, "the descriptor is missing"));
    let spec = read_spec(next("receive the specification")?)?;
    let namespace = if spec.namespace == NamespaceSpec::Join {
        Some(next("receive the network namespace")?)
    } else {
        None
    };
    let mut stream = |given: bool, what: &str| given.then(|| next(what)).transpose();
    let input = stream(spec.input == InputSpec::Given, "receive the standard input")?;
    let output = stream(spec.output == OutputSpec::Given, "receive the standard output")?;
    let errors = stream(spec.errors == OutputSpec::Given, "receive the standard error")?;

    for file in &spec.cgroups {
        fs::write(file, "0").map_err(|e| failure(format!("join the cgroup {}", file.display()), e))?;
    }
    enter_namespace(spec.namespace, namespace)?;
    for limit in &spec.limits {
        set_limit(limit)?;
    }
    let input = match input {
        Some(input) => input,
        None => nothing()?,
    };
    rustix::stdio::dup2_stdin(input).map_err(|e| failure("set the standard input", e))?;
    if let Some(output) = output_of(spec.output, output)? {
        rustix::stdio::dup2_stdout(output).map_err(|e| failure("set the standard output", e))?;
    }
    if let Some(errors) = output_of(spec.errors, errors)? {
        rustix::stdio::dup2_stderr(errors).map_err(|e| failure("set the standard error", e))?;
    }
    if let Some(directory) = &spec.directory {
        unistd::chdir(directory).map_err(|e| failure(format!("enter {}", directory.display()), e))?;
    }
    match spec.session {
        Session::Keep => {}
        Session::Group => {
            unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))
                .map_err(|e| failure("make a process group", e))?;
        }
        Session::Session => {
            unistd::setsid().map_err(|e| failure("make a session", e))?;
        }
    }
    if let Some(mask) = spec.umask {
        umask(Mode::from_bits_truncate(mask));
    }
    drop_privileges(&spec)?;
    // After the change of user, which clears it.
    if let Some(parent_death) = spec.parent_death {
        follow_parent(parent_death)?;
    }
    if spec.close_descriptors && matches!(spec.program, Program::Path(_)) {
        raw::close_all_on_exec().map_err(|e| failure("mark descriptors close-on-exec", e))?;
    }
    raw::reset_signals(spec.reset_signals).map_err(|e| failure("reset signals", e))?;
    SigSet::empty().thread_set_mask().map_err(|e| failure("empty the signal mask", e))?;
    if spec.gate {
        wait_at_gate(control)?;
    }
    match &spec.program {
        Program::Path(path) => Err(execute(&spec, path)),
        Program::Relay(config) => Ok(Become::Relay { config: config.clone(), alone: spec.close_descriptors }),
    }
}

fn nothing() -> Result<OwnedFd, LaunchFailure> {
    let nothing = File::options().read(true).write(true).open("/dev/null");
    nothing.map(OwnedFd::from).map_err(|e| failure("open /dev/null", e))
}

/// What takes the place of the launcher's own, if anything.
fn output_of(what: OutputSpec, given: Option<OwnedFd>) -> Result<Option<OwnedFd>, LaunchFailure> {
    match what {
        OutputSpec::Keep => Ok(None),
        OutputSpec::Null => nothing().map(Some),
        OutputSpec::Given => Ok(given),
    }
}

fn read_spec(file: OwnedFd) -> Result<LaunchSpec, LaunchFailure> {
    let mut text = Vec::new();
    File::from(file)
        .take(LONGEST_SPECIFICATION)
        .read_to_end(&mut text)
        .map_err(|e| failure("read the specification", e))?;
    serde_json::from_slice(&text).map_err(|e| failure("parse the specification", e))
}

fn enter_namespace(what: NamespaceSpec, given: Option<OwnedFd>) -> Result<(), LaunchFailure> {
    match (what, given) {
        (NamespaceSpec::Join, Some(namespace)) => setns(namespace, CloneFlags::CLONE_NEWNET)
            .map_err(|e| failure("enter the workload's network namespace", e)),
        (NamespaceSpec::New, _) => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| failure("make a network namespace", e))?;
            netns::bring_loopback_up().map_err(|e| failure("bring up the loopback interface", e))
        }
        (NamespaceSpec::Keep | NamespaceSpec::Join, _) => Ok(()),
    }
}

fn set_limit(limit: &Limit) -> Result<(), LaunchFailure> {
    let (resource, name) = match limit.kind {
        LimitKind::Descriptors => (Resource::RLIMIT_NOFILE, "descriptors"),
        LimitKind::Core => (Resource::RLIMIT_CORE, "core files"),
    };
    let set = || -> nix::Result<()> {
        let (_, present) = getrlimit(resource)?;
        let hard = limit.hard.unwrap_or(present);
        setrlimit(resource, limit.soft.unwrap_or(hard).min(hard), hard)
    };
    set().map_err(|e| failure(format!("set the limit on {name}"), e))
}

fn drop_privileges(spec: &LaunchSpec) -> Result<(), LaunchFailure> {
    if spec.privileges == Privileges::None {
        // First, as it needs CAP_SETPCAP itself.
        caps::clear(None, caps::CapSet::Bounding).map_err(|e| failure("empty the bounding set", e))?;
        caps::clear(None, caps::CapSet::Ambient).map_err(|e| failure("clear the ambient set", e))?;
    }
    if let Some(Identity { uid, gid, groups }) = &spec.identity {
        let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
        let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
        unistd::setgroups(&groups).map_err(|e| failure("set the supplementary groups", e))?;
        unistd::setresgid(gid, gid, gid).map_err(|e| failure(format!("become group {gid}"), e))?;
        unistd::setresuid(uid, uid, uid).map_err(|e| failure(format!("become user {uid}"), e))?;
        // setresuid(2) takes -1 for "leave it as it is" and succeeds.
        if (unistd::getuid(), unistd::getgid()) != (uid, gid) {
            return Err(failure("change user and group", "they are still others"));
        }
    }
    if spec.privileges == Privileges::None {
        for set in [caps::CapSet::Inheritable, caps::CapSet::Effective, caps::CapSet::Permitted] {
            caps::clear(None, set).map_err(|e| failure("clear the capability sets", e))?;
        }
        // A kernel newer than the caps crate may have capabilities that were not dropped above.
        for set in [caps::CapSet::Bounding, caps::CapSet::Ambient, caps::CapSet::Inheritable] {
            let left = caps::read(None, set).map_err(|e| failure("read the capability sets", e))?;
            if !left.is_empty() {
                return Err(failure("drop all capabilities", format!("{left:?} are left")));
            }
        }
    }
    if spec.privileges == Privileges::None {
        prctl::set_no_new_privs().map_err(|e| failure("forbid new privileges", e))?;
    }
    Ok(())
}

fn follow_parent(parent_death: ParentDeath) -> Result<(), LaunchFailure> {
    let step = "arrange to die with the parent";
    let signal = Signal::try_from(parent_death.signal).map_err(|e| failure(step, e))?;
    prctl::set_pdeathsig(signal).map_err(|e| failure(step, e))?;
    // A parent that died before the call above sends nothing any more.
    if unistd::getppid().as_raw() != parent_death.parent {
        return Err(failure(step, "the parent has died already"));
    }
    Ok(())
}

fn wait_at_gate(mut control: &UnixStream) -> Result<(), LaunchFailure> {
    control.write_all(b"H").map_err(|e| failure("report to the parent", e))?;
    let mut answer = [0];
    match control.read(&mut answer) {
        Ok(1) if answer == *b"G" => Ok(()),
        Ok(0) => Err(failure("wait for the parent", "the parent gave up")),
        Ok(_) => Err(failure("wait for the parent", "the parent said something unknown")),
        Err(error) => Err(failure("wait for the parent", error)),
    }
}

/// Returns only when it cannot.
fn execute(spec: &LaunchSpec, program: &OsStr) -> LaunchFailure {
    let terminated = |text: &OsStr| {
        CString::new(text.as_bytes()).map_err(|e| failure(format!("pass {} on", text.display()), e))
    };
    let entry = |(name, value): &(OsString, OsString)| {
        let mut entry = name.clone();
        entry.push("=");
        entry.push(value);
        terminated(&entry)
    };
    let prepared = || {
        let arguments = spec.arguments.iter().map(|a| terminated(a)).collect::<Result<Vec<_>, _>>()?;
        let environment = spec.environment.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        Ok((terminated(program)?, arguments, environment))
    };
    let (path, arguments, environment) = match prepared() {
        Ok(prepared) => prepared,
        Err(reason) => return reason,
    };
    let Err(error) = unistd::execve(&path, &arguments, &environment);
    let mut reason = failure(format!("execute {}", program.display()), error);
    if error == Errno::ENOENT {
        reason.exit_code = 127;
    }
    reason
}

#[expect(clippy::needless_pass_by_value, reason = "callers hand over the error of a result")]
fn failure(step: impl Into<String>, error: impl ToString) -> LaunchFailure {
    LaunchFailure { step: step.into(), error: error.to_string(), exit_code: 126 }
}
