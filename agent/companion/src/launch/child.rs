//! The launcher's own process: one thread, from its control socket to the exec.

use std::{
    ffi::{CString, OsStr, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    process,
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
        Identity, InputSpec, LaunchFailure, LaunchSpec, Limit, LimitKind, NamespaceSpec, ParentDeath,
        Privileges, Program, Session,
    },
};
use crate::netns;

/// Longer specifications are not ours. The kernel takes a few MiB of arguments; JSON of raw bytes is up to five times
/// as long.
const LONGEST_SPECIFICATION: u64 = 64 << 20;

/// Body of the hidden `pillion launch`: becomes the program that the control socket on standard input asks for.
///
/// Must be called before any thread is started: namespaces, capabilities and `PR_SET_PDEATHSIG` belong to a thread.
/// Exits with 127 when the program does not exist and with 126 when anything else fails.
pub fn main() -> ! {
    // Descriptor 0 becomes the program's standard input; the control socket must not be in its way.
    let control = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(control) => UnixStream::from(control),
        Err(error) => give_up(None, &failure("take the control socket", error)),
    };
    let outcome = run(&control);
    match outcome {
        Ok(never) => match never {},
        Err(reason) => give_up(Some(&control), &reason),
    }
}

fn give_up(control: Option<&UnixStream>, reason: &LaunchFailure) -> ! {
    let told = control.is_some_and(|mut control| {
        let mut message = vec![b'E'];
        serde_json::to_writer(&mut message, reason).is_ok() && control.write_all(&message).is_ok()
    });
    if !told {
        // The parent has gone; whoever looks at standard error gets the reason.
        let _ = writeln!(io::stderr(), "pillion launch: {reason}");
    }
    process::exit(reason.exit_code)
}

enum Never {}

fn run(control: &UnixStream) -> Result<Never, LaunchFailure> {
    let mut handed = handover::receive(control.as_fd())
        .map_err(|e| failure("receive the specification (pillion launch is not for use by hand)", e))?
        .into_iter();
    let mut next = |what: &str| handed.next().ok_or_else(|| failure(what, "the descriptor is missing"));
    let spec = read_spec(next("receive the specification")?)?;
    let namespace = if spec.namespace == NamespaceSpec::Join {
        Some(next("receive the network namespace")?)
    } else {
        None
    };
    let input = if spec.input == InputSpec::Given { Some(next("receive the standard input")?) } else { None };
    let program = if spec.program == Program::Given { Some(next("receive the program")?) } else { None };

    for file in &spec.cgroups {
        fs::write(file, "0").map_err(|e| failure(format!("join the cgroup {}", file.display()), e))?;
    }
    enter_namespace(spec.namespace, namespace)?;
    for limit in &spec.limits {
        set_limit(limit)?;
    }
    let input = match input {
        Some(input) => input,
        None => File::open("/dev/null").map_err(|e| failure("open /dev/null", e))?.into(),
    };
    rustix::stdio::dup2_stdin(input).map_err(|e| failure("set the standard input", e))?;
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
    if spec.close_descriptors {
        raw::close_all_on_exec().map_err(|e| failure("mark descriptors close-on-exec", e))?;
    }
    raw::reset_signals(spec.reset_signals).map_err(|e| failure("reset signals", e))?;
    SigSet::empty().thread_set_mask().map_err(|e| failure("empty the signal mask", e))?;
    if spec.gate {
        wait_at_gate(control)?;
    }
    execute(&spec, program)
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

fn execute(spec: &LaunchSpec, given: Option<OwnedFd>) -> Result<Never, LaunchFailure> {
    let terminated = |text: &OsStr| {
        CString::new(text.as_bytes()).map_err(|e| failure(format!("pass {} on", text.display()), e))
    };
    let arguments = spec.arguments.iter().map(|a| terminated(a)).collect::<Result<Vec<_>, _>>()?;
    let environment = spec
        .environment
        .iter()
        .map(|(name, value)| {
            let mut entry = OsString::from(name);
            entry.push("=");
            entry.push(value);
            terminated(&entry)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let (result, name) = match (&spec.program, given) {
        (Program::Path(path), _) => {
            (unistd::execve(&terminated(path.as_os_str())?, &arguments, &environment), path.as_os_str())
        }
        (Program::Search(name), _) => {
            (unistd::execvpe(&terminated(name)?, &arguments, &environment), name.as_os_str())
        }
        (Program::Given, Some(file)) => (
            unistd::execveat(file, c"", &arguments, &environment, nix::fcntl::AtFlags::AT_EMPTY_PATH),
            OsStr::new("the given program"),
        ),
        (Program::Given, None) => (Err(Errno::EBADF), OsStr::new("the given program")),
    };
    let Err(error) = result;
    let mut reason = failure(format!("execute {}", name.display()), error);
    if error == Errno::ENOENT {
        reason.exit_code = 127;
    }
    Err(reason)
}

#[expect(clippy::needless_pass_by_value, reason = "callers hand over the error of a result")]
fn failure(step: impl Into<String>, error: impl ToString) -> LaunchFailure {
    LaunchFailure { step: step.into(), error: error.to_string(), exit_code: 126 }
}
