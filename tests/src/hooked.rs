//! Containers whose start goes through `pillion-hook`, by each way that there is with containerd and with runc alone.
//!
//! Owns links, bundles and specifications. Knows nothing of what the hook should do.

use std::{
    fs,
    net::SocketAddrV4,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Result;

use crate::{
    Agent, Containerd, Finished, Machine, ProcessGuard, cgroup,
    containerd::{Container, NAMESPACE},
    first, image, programs,
};

/// Longer than a hold.
const DEADLINE: Duration = Duration::from_secs(90);

/// The program in every container here whose first instruction connects; see [`first`].
pub const FIRST: &str = "/bin/first";

/// By which way a container's start comes to the hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// containerd, whose runtime is the wrapper.
    Wrapper,
    /// containerd, with an OCI hook in the container's specification.
    Hook,
    /// runc alone, through the wrapper.
    PlainWrapper,
    /// runc alone, with an OCI hook in the bundle's specification.
    PlainHook,
    /// containerd with runc, by no hook at all: what others are compared with.
    Bare,
}

impl Way {
    /// All that come to the hook.
    pub const ALL: [Self; 4] = [Self::Wrapper, Self::Hook, Self::PlainWrapper, Self::PlainHook];

    /// The gate that it comes to, as the agent names it.
    pub fn gate(self) -> &'static str {
        match self {
            Self::Wrapper | Self::PlainWrapper => "wrapper",
            Self::Hook | Self::PlainHook => "hook",
            Self::Bare => "none",
        }
    }

    fn has_hook(self) -> bool {
        matches!(self, Self::Hook | Self::PlainHook)
    }
}

/// What containers are made from.
#[derive(Debug)]
pub struct Hooks {
    directory: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Hooks {
    /// A root file system with [`FIRST`], which connects to `server`, and the wrapper. At most one a test.
    pub fn new(machine: &Machine, agent: &Agent, server: SocketAddrV4) -> Result<Self> {
        let directory = machine.directory().join("hooked");
        fs::create_dir(&directory)?;
        image::fill(&directory.join("root"))?;
        first::build(&directory.join("root/bin"), "first", server)?;
        symlink(programs::hook()?, directory.join("pillion-runc"))?;
        Ok(Self { directory, environment: agent.environment() })
    }

    /// The wrapper: a link to `pillion-hook` that stands for runc.
    pub fn wrapper(&self) -> PathBuf {
        self.directory.join("pillion-runc")
    }

    /// A command that runs the container to its end and removes it. With runc alone its labels are annotations.
    pub fn run(&self, way: Way, containerd: &Containerd, container: &Container<'_>) -> Result<Command> {
        match way {
            Way::Wrapper | Way::Bare => {
                let mut command = containerd.ctr_command()?;
                command.args(["run", "--rm"]);
                if way == Way::Wrapper {
                    command.arg("--runc-binary").arg(self.wrapper());
                }
                let program = self.directory.join("root/bin/first");
                command.args([
                    "--mount",
                    &format!("type=bind,src={},dst={FIRST},options=bind:ro", program.display()),
                ]);
                container.finish(&mut command);
                Ok(command)
            }
            Way::Hook => {
                let bundle = self.bundle(way, container)?;
                let mut command = containerd.ctr_command()?;
                command.args(["run", "--rm", "--config"]).arg(bundle.join("config.json"));
                for (name, value) in container.labels {
                    command.args(["--label", &format!("{name}={value}")]);
                }
                command.arg(container.id);
                Ok(command)
            }
            Way::PlainWrapper | Way::PlainHook => {
                let bundle = self.bundle(way, container)?;
                let runtime = match way {
                    Way::PlainWrapper => self.wrapper(),
                    Way::Wrapper | Way::Hook | Way::PlainHook | Way::Bare => programs::system("runc")?,
                };
                // Created, started and waited for as an engine does it. runc's own `delete` reaps nothing: the container is the
                // shell's child only by adoption, and its end is seen by its cgroup.
                let script = "set -e; trap '\"$1\" --root \"$2\" delete --force \"$4\" >/dev/null 2>&1' EXIT\n\
                    \"$1\" --root \"$2\" create --bundle \"$3\" \"$4\" </dev/null\n\
                    \"$1\" --root \"$2\" start \"$4\"\n\
                    while \"$1\" --root \"$2\" state \"$4\" | grep -q '\"status\": \"running\"'; do sleep 0.05; done";
                let mut command = Command::new("/bin/sh");
                command.args(["-c", script, "sh"]).arg(runtime).arg(self.directory.join("runc"));
                command.arg(bundle).arg(container.id).envs(self.environment.iter().cloned());
                Ok(command)
            }
        }
    }

    /// Runs it to its end.
    pub fn finish(&self, way: Way, containerd: &Containerd, container: &Container<'_>) -> Result<Finished> {
        let mut command = self.run(way, containerd, container)?;
        ProcessGuard::finish(&format!("{way:?} {}", container.id), &mut command, DEADLINE)
    }

    /// The pid of a container's first process, once its runtime has created it: the process that its cgroup has.
    pub fn pid(&self, id: &str) -> Option<i32> {
        let procs = cgroup::cgroup2_mount().ok()?.join(NAMESPACE).join(id).join("cgroup.procs");
        fs::read_to_string(procs).ok()?.lines().next()?.parse().ok()
    }

    /// A bundle, its specification calling the hook where the way is such.
    fn bundle(&self, way: Way, container: &Container<'_>) -> Result<PathBuf> {
        let bundle = self.directory.join(format!("bundle.{}", container.id));
        fs::create_dir_all(&bundle)?;
        let specification = self.specification(way, container)?;
        fs::write(bundle.join("config.json"), specification.to_string())?;
        Ok(bundle)
    }

    fn specification(&self, way: Way, container: &Container<'_>) -> Result<serde_json::Value> {
        let hook = programs::hook()?;
        let environment: Vec<String> =
            self.environment.iter().map(|(name, value)| format!("{name}={}", value.display())).collect();
        let hook = |mode: &str| serde_json::json!([{ "path": hook, "args": ["pillion-hook", mode], "env": environment, "timeout": 80 }]);
        let hooks = if way.has_hook() {
            serde_json::json!({ "createRuntime": hook("createRuntime"), "poststop": hook("poststop") })
        } else {
            serde_json::json!({})
        };
        let netns = match container.netns {
            Some(netns) => serde_json::json!({ "type": "network", "path": netns.path() }),
            None => serde_json::json!({ "type": "network" }),
        };
        let annotations: serde_json::Map<String, serde_json::Value> =
            container.labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        Ok(serde_json::json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": container.command, "cwd": "/", "env": ["PATH=/bin"] },
            "root": { "path": self.directory.join("root"), "readonly": true },
            // What the runtime makes in /dev is not to be made in a directory that containers share.
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            ],
            "hooks": hooks,
            "annotations": annotations,
            "linux": {
                "cgroupsPath": format!("/{NAMESPACE}/{}", container.id),
                "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, netns],
            },
        }))
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        // A test that failed leaves containers of runc alone, which no daemon looks after.
        let Ok(runc) = programs::system("runc") else { return };
        let root = self.directory.join("runc");
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            let _ = Command::new(&runc)
                .arg("--root")
                .arg(&root)
                .args(["delete", "--force"])
                .arg(entry.file_name())
                .status();
        }
        remove_cgroups();
    }
}

fn remove_cgroups() {
    for (_, mount) in cgroup::mounts().into_iter().flatten() {
        let parent: &Path = &mount.join(NAMESPACE);
        if parent.is_dir() {
            cgroup::remove(parent);
        }
    }
}
