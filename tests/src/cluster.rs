//! A Kubernetes cluster with Pillion's DaemonSet in it, driven by kubectl alone: the one that `KUBECONFIG` names, or one that a
//! script brings up for the test and takes down after it.
//!
//! Owns bringing it up, its images, and asking it. Knows nothing of what Pillion should do there.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::Value;

use crate::{Machine, ProcessGuard, lab, process::Finished, programs, wait_for};

/// Names a script that brings a cluster up (`SCRIPT up`, which prints `KEY=VALUE`) and down; set by `cargo xtask test --cluster`.
pub const SCRIPT_VARIABLE: &str = "PILLION_CLUSTER";
/// Names the archive of Pillion's image; set by `cargo xtask test`.
pub const IMAGE_VARIABLE: &str = "PILLION_IMAGE_ARCHIVE";
/// Where the DaemonSet is.
pub const NAMESPACE: &str = "pillion-system";

/// A control plane and a node, from programs that are there.
const UP_LIMIT: Duration = Duration::from_secs(180);
const DOWN_LIMIT: Duration = Duration::from_secs(60);
/// What one kubectl may take.
const KUBECTL_LIMIT: Duration = Duration::from_secs(120);
/// Until something in the cluster is as it should be: a pod takes some seconds.
const SOON: Duration = Duration::from_secs(90);

/// A cluster. Taken down when dropped, if the test has brought it up.
#[derive(Debug)]
pub struct Cluster {
    /// In front of kubectl's arguments.
    kubectl: Vec<PathBuf>,
    script: Option<PathBuf>,
    /// Of a node on this machine.
    containerd: Option<PathBuf>,
}

impl Cluster {
    /// The cluster that the environment names. One that a script brings up has `pillion-hook` in front of runc.
    pub fn open(machine: &Machine) -> Result<Self> {
        if let Some(script) = env::var_os(SCRIPT_VARIABLE) {
            return Self::up(machine, script.into());
        }
        if env::var_os("KUBECONFIG").is_none() {
            bail!(
                "no cluster is named: set KUBECONFIG (and KUBECTL, CONTAINERD_ADDRESS), \
                 or run: cargo xtask test --suite kubernetes --cluster SCRIPT"
            );
        }
        let kubectl = match env::var_os("KUBECTL") {
            Some(path) => path.into(),
            None => programs::system("kubectl").context("KUBECTL names no kubectl")?,
        };
        let containerd = env::var_os("CONTAINERD_ADDRESS").map(PathBuf::from);
        Ok(Self { kubectl: vec![kubectl], script: None, containerd })
    }

    fn up(machine: &Machine, script: PathBuf) -> Result<Self> {
        ensure!(
            script.is_file(),
            "no cluster can be brought up: there is no {}; name one that is up by KUBECONFIG, or another script by \
             --cluster",
            script.display()
        );
        // The wrapper goes by its name for the runtime that it stands for.
        let wrapper = machine.directory().join("pillion-runc");
        symlink(programs::hook()?, &wrapper).context("a link to pillion-hook")?;
        let mut cluster =
            Self { kubectl: vec![script.clone(), "kubectl".into()], script: Some(script), containerd: None };
        let mut command = cluster.command_of_script("up")?;
        command.env("RUNTIME_WRAPPER", wrapper);
        let done = ProcessGuard::finish("the cluster", &mut command, UP_LIMIT)?.success()?;
        let values: BTreeMap<&str, &str> =
            done.stdout.lines().filter_map(|line| line.split_once('=')).collect();
        cluster.containerd = values.get("CONTAINERD_ADDRESS").map(PathBuf::from);
        Ok(cluster)
    }

    fn command_of_script(&self, what: &str) -> Result<Command> {
        let script = self.script.as_ref().context("the cluster was not brought up here")?;
        let mut command = Command::new(script);
        let hook = programs::hook()?;
        command.arg(what).current_dir(programs::checkout());
        command.env("LAB", lab::DIRECTORY).env("LAB_BIND", hook.parent().unwrap_or(Path::new("/")));
        Ok(command)
    }

    /// Takes it down, if it was brought up here; an error when something of it stays.
    pub fn close(self) -> Result<()> {
        let result = self.take_down();
        std::mem::forget(self);
        result
    }

    fn take_down(&self) -> Result<()> {
        if self.script.is_none() {
            return Ok(());
        }
        ProcessGuard::finish("down", &mut self.command_of_script("down")?, DOWN_LIMIT)?.success().map(drop)
    }

    /// Brings an archive of an image to the node. Where no node is on this machine, it must be there already.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let Some(address) = &self.containerd else { return Ok(()) };
        let mut command = Command::new(programs::system("ctr")?);
        command.arg("-a").arg(address).args(["-n", "k8s.io", "images", "import"]).arg(archive);
        ProcessGuard::finish("ctr", &mut command, KUBECTL_LIMIT)?.success().map(drop)
    }

    /// Makes `localhost/NAME` of a static program, and brings it to the node.
    pub fn import_program(&self, name: &str, program: &Path) -> Result<()> {
        self.import(&lab::image(name, program)?)
    }

    /// kubectl, whatever its exit code.
    pub fn run(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(&self.kubectl[0]);
        command.args(&self.kubectl[1..]).args(arguments).current_dir(programs::checkout());
        command.env("LAB", lab::DIRECTORY);
        ProcessGuard::finish("kubectl", &mut command, KUBECTL_LIMIT)
    }

    /// What kubectl prints; an error when it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let done =
            self.run(arguments)?.success().with_context(|| format!("kubectl {}", arguments.join(" ")))?;
        Ok(done.stdout)
    }

    /// `kubectl get … -o json`.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], arguments].concat())?;
        serde_json::from_str(&text).context("kubectl prints JSON")
    }

    /// Writes a manifest into the test's directory and applies it.
    pub fn apply(&self, machine: &Machine, name: &str, manifest: &str) -> Result<()> {
        let file = machine.file(name, manifest)?;
        self.kubectl(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// Looks at pods until `look` finds what it looks for.
    pub fn pods<T>(&self, what: &str, selector: &str, look: impl Fn(&[Value]) -> Option<T>) -> Result<T> {
        let mut last = String::new();
        let found = wait_for(what, SOON, || match self.get(&["pods", "-l", selector]) {
            Ok(answer) => {
                let found = answer["items"].as_array().and_then(|pods| look(pods));
                last = answer.to_string();
                found
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        found.with_context(|| format!("last seen: {last}"))
    }

    /// What the kubelet and others have said of an object, the messages of its events.
    pub fn events_of(&self, name: &str) -> Result<Vec<String>> {
        let events = self.get(&["events", "--field-selector", &format!("involvedObject.name={name}")])?;
        let message = |event: &Value| Some(event["message"].as_str()?.to_owned());
        Ok(events["items"]
            .as_array()
            .map(|list| list.iter().filter_map(message).collect())
            .unwrap_or_default())
    }

    /// The root directory as the node's container runtime sees it, where the node is on this machine.
    pub fn node_root(&self) -> Result<Option<PathBuf>> {
        let Some(address) = &self.containerd else { return Ok(None) };
        let connection = UnixStream::connect(address).context("the node's containerd")?;
        let pid = getsockopt(&connection, PeerCredentials)?.pid();
        Ok(Some(PathBuf::from(format!("/proc/{pid}/root"))))
    }

    /// The mounts of the node, as `/proc/PID/mountinfo` has them, where the node is on this machine.
    pub fn node_mounts(&self) -> Result<String> {
        let Some(root) = self.node_root()? else { return Ok(String::new()) };
        Ok(fs::read_to_string(root.with_file_name("mountinfo"))?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The inventory tells what stays.
        let _ = self.take_down();
    }
}
