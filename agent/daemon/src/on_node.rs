//! `pillion on-node`: from a container to the node that it runs on, for the agent's DaemonSet.
//!
//! Owns the way there: which process stands for the node, its mount and cgroup namespaces, and the copies of the programs
//! there. Never does anything on the node itself: it becomes the command that it was given.
//!
//! What the agent makes must outlive its pod, which is replaced at every upgrade: companions are programs of the node,
//! pins are in the node's BPF file system, cgroups in its hierarchy. So the agent does not work through a container's
//! mounts, but leaves the container's mount and cgroup namespaces, and runs as on the node itself. It stays in the
//! pod's cgroup, so that the pod's end is its end, and in the pod's network namespace.
//!
//! Which node, is told by a process on it. The server of a container runtime's socket is one: containers are made where
//! it runs, also where that is not where process 1 runs, as with a node that is a container itself.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::{
        fs::{
            DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
        },
        net::UnixStream,
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

use crate::cli::OnNodeArgs;

/// Of the image and of the copies. The hook need not be there.
const PROGRAMS: [&str; 2] = ["pillion", "pillion-hook"];
/// Its own program is needed for as long as companions are to be started, so it is run from a copy.
const LONG_LIVED: &str = "agent";
/// Below the state directory.
const COPIES: &str = "bin";

/// Becomes the command, on the node. Must be called before any thread is started.
pub(crate) fn main(args: &OnNodeArgs) -> anyhow::Result<ExitCode> {
    let node = Node::find(&args.node)?;
    // The image's files are out of sight afterwards.
    let programs = open_programs()?;
    node.enter()?;
    let program = if args.command.first().is_some_and(|command| command == LONG_LIVED) {
        let directory = args.state_dir.join(COPIES);
        install(&programs, &directory)
            .with_context(|| format!("cannot copy the programs to {} of the node", directory.display()))?;
        directory.join(PROGRAMS[0])
    } else {
        PathBuf::from("/proc/self/exe")
    };
    Err(become_command(&program, &args.command)).with_context(|| {
        format!(
            "cannot run {} on the node; is it statically linked, or are its libraries there?",
            program.display()
        )
    })
}

/// The namespaces of a process on the node.
#[derive(Debug)]
struct Node {
    mounts: File,
    cgroups: File,
}

impl Node {
    fn find(path: &Path) -> anyhow::Result<Self> {
        let metadata =
            path.metadata().with_context(|| format!("cannot find the node by {}", path.display()))?;
        let process = if metadata.file_type().is_socket() { server_of(path)? } else { path.to_owned() };
        let open = |namespace: &str| {
            let path = process.join("ns").join(namespace);
            File::open(&path).with_context(|| {
                format!(
                    "cannot open {} (it takes the node's PID namespace and CAP_SYS_PTRACE: hostPID: true, privileged: true)",
                    path.display()
                )
            })
        };
        Ok(Self { mounts: open("mnt")?, cgroups: open("cgroup")? })
    }

    fn enter(&self) -> anyhow::Result<()> {
        setns(&self.cgroups, CloneFlags::CLONE_NEWCGROUP)
            .context("cannot enter the node's cgroup namespace")?;
        // A process cannot enter the mount namespace that it is in and keep its directories: look first.
        let own =
            fs::metadata("/proc/self/ns/mnt").context("cannot look at this process's mount namespace")?;
        let nodes = self.mounts.metadata().context("cannot look at the node's mount namespace")?;
        if (own.dev(), own.ino()) != (nodes.dev(), nodes.ino()) {
            setns(&self.mounts, CloneFlags::CLONE_NEWNS)
                .context("cannot enter the node's mount namespace")?;
        }
        Ok(())
    }
}

/// `/proc/PID` of who listens on a Unix socket (`SO_PEERCRED`, unix(7)).
fn server_of(socket: &Path) -> anyhow::Result<PathBuf> {
    let connection = UnixStream::connect(socket).with_context(|| {
        format!("cannot connect to {}, whose server tells which node this is", socket.display())
    })?;
    let pid = getsockopt(&connection, PeerCredentials)
        .with_context(|| format!("cannot tell who serves {}", socket.display()))?
        .pid();
    // The kernel says 0 of a process that has no number here.
    ensure!(
        pid > 0,
        "the server of {} is in another PID namespace: the pod needs hostPID: true",
        socket.display()
    );
    // Connected still: the number is that process's.
    Ok(PathBuf::from(format!("/proc/{pid}")))
}

fn open_programs() -> anyhow::Result<Vec<(&'static str, File)>> {
    let own = std::env::current_exe().context("cannot find this program")?;
    let mut programs = vec![(PROGRAMS[0], File::open("/proc/self/exe").context("cannot open this program")?)];
    for name in &PROGRAMS[1..] {
        let path = own.with_file_name(name);
        match File::open(&path) {
            Ok(file) => programs.push((name, file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => bail!("cannot open {}: {error}", path.display()),
        }
    }
    Ok(programs)
}

/// Copies beside and renames: who runs the old one goes on, who starts it gets the old or the new, never half of one.
fn install(programs: &[(&'static str, File)], directory: &Path) -> io::Result<()> {
    // As the agent would make it: companions find their files below it under their own users.
    let state = directory.parent().unwrap_or(directory);
    DirBuilder::new().recursive(true).mode(0o711).create(state)?;
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    for (name, program) in programs {
        let target = directory.join(name);
        if same(program, &target)? {
            continue;
        }
        let aside = directory.join(format!("{name}.new"));
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o700).open(&aside)?;
        io::copy(&mut rewound(program)?, &mut copy)?;
        copy.set_permissions(Permissions::from_mode(0o755))?;
        copy.sync_all()?;
        fs::rename(&aside, &target)?;
    }
    Ok(())
}

/// Whether the copy is this program already: restarts of the agent need not write.
fn same(program: &File, copy: &Path) -> io::Result<bool> {
    let Ok(copy) = OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(copy) else {
        return Ok(false);
    };
    let (wanted, found) = (program.metadata()?, copy.metadata()?);
    if !found.is_file() || found.len() != wanted.len() || found.mode() & 0o7777 != 0o755 || found.uid() != 0 {
        return Ok(false);
    }
    let (mut one, mut other) = (io::BufReader::new(rewound(program)?), io::BufReader::new(copy));
    loop {
        let (a, b) = (io::BufRead::fill_buf(&mut one)?, io::BufRead::fill_buf(&mut other)?);
        let length = a.len().min(b.len());
        if length == 0 {
            return Ok(a.is_empty() && b.is_empty());
        }
        if a[..length] != b[..length] {
            return Ok(false);
        }
        io::BufRead::consume(&mut one, length);
        io::BufRead::consume(&mut other, length);
    }
}

fn rewound(mut file: &File) -> io::Result<&File> {
    io::Seek::rewind(&mut file)?;
    Ok(file)
}

/// Returns only when it failed.
fn become_command(program: &Path, command: &[OsString]) -> io::Error {
    Command::new(program).arg0(PROGRAMS[0]).args(command).current_dir("/").exec()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_server_of_a_socket_stands_for_the_node() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(server_of(&socket).unwrap(), PathBuf::from(format!("/proc/{}", std::process::id())));
        assert!(Node::find(&socket).is_ok());
        for nothing in [directory.path().join("nothing"), directory.path().to_owned()] {
            assert!(Node::find(&nothing).is_err(), "{}", nothing.display());
        }
    }

    #[test]
    fn programs_are_replaced_as_a_whole_and_only_when_they_differ() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        let target = directory.path().join("state/bin");
        let inode = |name: &str| target.join(name).metadata().unwrap().ino();
        let put = |text: &str| {
            fs::write(&source, text).unwrap();
            install(&[("pillion", File::open(&source).unwrap())], &target).unwrap();
            assert_eq!(fs::read_to_string(target.join("pillion")).unwrap(), text);
            assert_eq!(target.join("pillion").metadata().unwrap().mode() & 0o7777, 0o755);
            inode("pillion")
        };
        let first = put("one");
        if nix::unistd::geteuid().is_root() {
            assert_eq!(put("one"), first, "nothing to do");
        }
        assert_ne!(put("two"), first);
        // What an interrupted copy has left is no obstacle.
        fs::write(target.join("pillion.new"), "ha").unwrap();
        put("three");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    }
}
