//! A real containerd with runc, private to a test: its own mount and network namespaces, root, state and socket.
//!
//! A holder process keeps the namespaces, so that the daemon can be stopped and started again beneath running containers.
//! CRI is off: it is not needed here, and wants more capabilities than test machines have.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use procfs::process::all_processes;

use crate::{
    Finished, Machine, NetNs, ProcessGuard, cgroup, image,
    process::{MARK, descendants},
    programs, wait_for, wait_until,
};

/// containerd's namespace for a test's containers; also the name of their parent cgroup.
pub const NAMESPACE: &str = "pillion-test";
/// A daemon that is not up, or down, by then is broken.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running containerd. Dropping it ends all its processes and containers and removes their cgroups.
#[derive(Debug)]
pub struct Containerd {
    directory: PathBuf,
    holder: ProcessGuard,
    daemon: Option<ProcessGuard>,
    environment: Vec<(&'static str, PathBuf)>,
}

/// A container to run.
#[derive(Debug, Clone, Default)]
pub struct Container<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its labels.
    pub labels: &'a [(&'a str, &'a str)],
    /// The network namespace it joins; a new one without any device up when absent.
    pub netns: Option<&'a NetNs>,
    /// Program and arguments.
    pub command: &'a [&'a str],
}

impl Containerd {
    /// Brings one up, with the image [`image::REFERENCE`]. At most one a test.
    pub fn start(machine: &Machine) -> Result<Self> {
        Self::start_with(machine, Vec::new())
    }

    /// Where the socket of a test's containerd is going to be.
    pub fn socket_of(machine: &Machine) -> PathBuf {
        machine.directory().join("containerd/containerd.sock")
    }

    /// The same, with an environment that it hands down to the runtimes that it calls.
    pub fn start_with(machine: &Machine, environment: Vec<(&'static str, PathBuf)>) -> Result<Self> {
        let directory = machine.directory().join("containerd");
        fs::create_dir(&directory)?;
        let config = format!(
            "version = 2\nroot = '{root}/root'\nstate = '{root}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri']\n[grpc]\naddress = '{root}/containerd.sock'\n",
            root = directory.display()
        );
        fs::write(directory.join("config.toml"), config)?;

        // Shims and runc keep fixed paths below /run; a fresh one hides the machine's own containerd from them.
        let mut hold = Command::new("unshare");
        hold.args(["--mount", "--net", "--propagation", "private", "--", "/bin/sh", "-ec"])
            .arg("ip link set lo up; mount -t tmpfs -o mode=755 none /run; echo held; exec sleep infinity");
        let mut holder = ProcessGuard::spawn("containerd's namespaces", &mut hold)?;
        holder.stdout_line(DEADLINE, |line| line == "held")?;

        let mut containerd = Self { directory, holder, daemon: None, environment };
        containerd.start_daemon()?;
        let image = machine.directory().join("image");
        fs::create_dir(&image)?;
        let archive = image::archive(&image)?;
        let archive = archive.to_str().context("a temporary path is UTF-8")?;
        containerd.ctr(&["images", "import", "--snapshotter", "native", archive])?.success()?;
        fs::remove_dir_all(&image)?;
        Ok(containerd)
    }

    /// The daemon's socket; reachable from the machine's own namespaces.
    pub fn address(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Starts the daemon after [`Containerd::stop_daemon`] and waits until it answers.
    pub fn start_daemon(&mut self) -> Result<()> {
        let mut command = self.inside(&programs::system("containerd")?);
        command.arg("--config").arg(self.directory.join("config.toml"));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut daemon = ProcessGuard::spawn("containerd", &mut command)?;
        wait_until("an answer from containerd", DEADLINE, || {
            daemon.has_ended() || self.ctr(&["version"]).is_ok_and(|done| done.status.success())
        })?;
        if daemon.has_ended() {
            anyhow::bail!("containerd does not start: {}", daemon.stderr()?);
        }
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Ends the daemon with `signal`; its containers run on.
    pub fn stop_daemon(&mut self, signal: Signal) -> Result<()> {
        let mut daemon = self.daemon.take().context("containerd is down already")?;
        daemon.signal(signal)?;
        daemon.exit(DEADLINE).map(drop)
    }

    /// `ctr ARGUMENTS` in the test's containerd namespace, to its end.
    pub fn ctr(&self, arguments: &[&str]) -> Result<Finished> {
        ProcessGuard::finish("ctr", self.ctr_command()?.args(arguments), DEADLINE)
    }

    /// `ctr`, to be completed; for [`crate::Puppet::under`] and the like.
    pub fn ctr_command(&self) -> Result<Command> {
        let mut command = self.inside(&programs::system("ctr")?);
        command.arg("--address").arg(self.address()).args(["--namespace", NAMESPACE]);
        Ok(command)
    }

    /// Runs a container in the background and returns the pid of its first process. What it prints is in
    /// [`Containerd::output`].
    pub fn run(&self, container: &Container<'_>) -> Result<u32> {
        let log = format!("file://{}", self.output_file(container.id).display());
        let mut command = self.ctr_command()?;
        command.args(["run", "--detach", "--log-uri", &log]);
        container.finish(&mut command);
        ProcessGuard::finish("ctr run", &mut command, DEADLINE)?.success()?;
        self.pid(container.id)
    }

    /// Runs a container in the background by another shim.
    pub fn run_by(&self, shim: &Path, container: &Container<'_>) -> Result<()> {
        let mut command = self.ctr_command()?;
        command.args(["run", "--detach", "--runtime"]).arg(shim);
        container.finish(&mut command);
        ProcessGuard::finish("ctr run", &mut command, DEADLINE)?.success().map(drop)
    }

    /// A command that runs a container with this process's stdin and stdout until it ends, and then removes it.
    pub fn run_attached(&self, container: &Container<'_>) -> Result<Command> {
        let mut command = self.ctr_command()?;
        command.args(["run", "--rm"]);
        container.finish(&mut command);
        Ok(command)
    }

    /// Runs a command in a running container, to its end.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<Finished> {
        let mut arguments = vec!["task", "exec", "--exec-id", "once", id];
        arguments.extend(command);
        self.ctr(&arguments)
    }

    /// The pid of a container's first process.
    pub fn pid(&self, id: &str) -> Result<u32> {
        let tasks = self.ctr(&["task", "ls"])?.success()?.stdout;
        let mut fields = tasks.lines().map(str::split_whitespace);
        fields
            .find_map(|mut line| (line.next() == Some(id)).then(|| line.next()?.parse().ok())?)
            .with_context(|| format!("no container {id} is running: {tasks}"))
    }

    /// Kills and removes a container.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.ctr(&["task", "rm", "--force", id])?.success()?;
        wait_for("the removal of a container", DEADLINE, || {
            let removed = self.ctr(&["container", "rm", id]);
            removed.is_ok_and(|done| done.status.success()).then_some(())
        })
    }

    /// All that a container run by [`Containerd::run`] has printed.
    pub fn output(&self, id: &str) -> Result<String> {
        let file = self.output_file(id);
        fs::read_to_string(&file).with_context(|| format!("no output in {}", file.display()))
    }

    fn output_file(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.log"))
    }

    /// A command within the namespaces of the daemon.
    fn inside(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.pid().to_string(), "--mount", "--net", "--"]).arg(program);
        command.env(MARK, "1");
        command
    }

    /// Everything that runs for this containerd: what is in its mount namespace, which are daemon and shims, with all
    /// descendants, which are the containers.
    fn members(&self) -> BTreeSet<i32> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let Some(own) = i32::try_from(self.holder.pid()).ok().and_then(namespace) else {
            return BTreeSet::new();
        };
        let roots = all_processes()
            .into_iter()
            .flatten()
            .flatten()
            .map(|process| process.pid)
            .filter(|pid| namespace(*pid).as_ref() == Some(&own));
        let mut members: BTreeSet<i32> = descendants(roots).into_iter().collect();
        // Last, by its guard: it is what the others are known by.
        members.retain(|pid| u32::try_from(*pid) != Ok(self.holder.pid()));
        members
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = wait_until("the end of containerd and its containers", DEADLINE, || {
            let members = self.members();
            for pid in &members {
                // One that ended meanwhile is what is wanted.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            // Reaps it: a zombie is still a member.
            if let Some(daemon) = &mut self.daemon {
                daemon.has_ended();
            }
            members.is_empty()
        });
        for (_, mount) in cgroup::mounts().into_iter().flatten() {
            let parent = mount.join(NAMESPACE);
            if parent.is_dir() {
                cgroup::remove(&parent);
            }
        }
    }
}

impl Container<'_> {
    /// The rest of `ctr run`'s arguments.
    pub(crate) fn finish(&self, command: &mut Command) {
        command.args(["--snapshotter", "native"]);
        for (name, value) in self.labels {
            command.args(["--label", &format!("{name}={value}")]);
        }
        if let Some(netns) = self.netns {
            command.args(["--with-ns", &format!("network:{}", netns.path().display())]);
        }
        command.args([image::REFERENCE, self.id]).args(self.command);
    }
}
