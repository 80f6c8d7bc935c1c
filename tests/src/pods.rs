//! Pods, made as the kubelet makes them: by CRI, in a containerd that [`Lab`] has brought up.
//!
//! Owns pods and their removal. Each pod is removed with its guard; what stays goes with the containerd.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest, CreateContainerRequest,
    ImageSpec, LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest, VersionRequest, runtime_service_client::RuntimeServiceClient,
};
use nix::{sys::signal::Signal, unistd::Pid};
use tokio::{runtime, time::timeout};
use tonic::{Status, transport::Channel};

use crate::{Lab, NetNs, ProcessGuard, wait_for, wait_until};

/// What one question to containerd may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// The bridge's address, which pods reach and at which the instance's own listeners are.
pub const GATEWAY: &str = "10.88.0.1";
/// Where a pod's containers have [`PodSpec::program`].
pub const PROGRAM: &str = "/program";
/// The runtime class of containerd that calls what `RUNTIME_WRAPPER` named when it was brought up.
pub const WRAPPED: &str = "wrapped";
const IMAGE: &str = "localhost/busybox:1";

/// A containerd with CRI.
#[derive(Debug)]
pub struct Pods {
    runtime: runtime::Runtime,
    channel: Channel,
    parent: String,
    directory: PathBuf,
    number: AtomicU32,
    /// A containerd that was started again.
    daemon: Mutex<Option<ProcessGuard>>,
}

/// A pod to run.
#[derive(Debug, Clone, Copy, Default)]
pub struct PodSpec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its labels, besides those that the kubelet gives every pod.
    pub labels: &'a [(&'a str, &'a str)],
    /// In containerd's own network namespace.
    pub host_network: bool,
    /// It and its containers have all capabilities and devices.
    pub privileged: bool,
    /// Without a cgroup of its own: its containers share one with those of all other such pods.
    pub shared_cgroup: bool,
    /// Its runtime class; containerd's default one when empty.
    pub runtime: &'a str,
    /// A program of the machine's, below `/tmp`, that its containers have as [`PROGRAM`].
    pub program: Option<&'a Path>,
}

/// A pod with its sandbox. Stopped and removed when dropped.
#[derive(Debug)]
pub struct Pod<'a> {
    pods: &'a Pods,
    config: PodSandboxConfig,
    sandbox: String,
    mounts: Vec<Mount>,
}

impl Pods {
    /// Those of this containerd.
    pub fn of(lab: &Lab) -> Result<Self> {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let address = lab.value("CONTAINERD_ADDRESS")?.to_owned();
        let channel = runtime.block_on(containerd_client::connect(&address))?;
        let directory = PathBuf::from(lab.value("CNI_CONF_DIR")?);
        let directory = directory.parent().context("a directory of the instance's own")?.to_owned();
        let parent = lab.value("CGROUP_PARENT")?.to_owned();
        let pods =
            Self { runtime, channel, parent, directory, number: AtomicU32::new(0), daemon: Mutex::new(None) };
        // CRI is up somewhat later than containerd.
        wait_until("CRI", DEADLINE, || pods.version().is_ok())?;
        Ok(pods)
    }

    /// The network namespace that containerd and its bridge are in.
    pub fn netns(&self) -> Result<NetNs> {
        NetNs::of(fs::read_to_string(self.directory.join("holder.pid"))?.trim().parse()?)
    }

    /// Kills containerd beneath its pods and starts it again.
    pub fn restart(&self) -> Result<()> {
        let file = self.directory.join("containerd.pid");
        let pid = Pid::from_raw(fs::read_to_string(&file)?.trim().parse()?);
        let mut daemon = self.daemon.lock().expect("nobody panics with it");
        match &mut *daemon {
            Some(daemon) => daemon.signal(Signal::SIGKILL)?,
            None => nix::sys::signal::kill(pid, Signal::SIGKILL)?,
        }
        // As a client sees it: what runs as a zombie answers no more.
        wait_until("the end of containerd", DEADLINE, || self.version().is_err())?;
        let mut command = Command::new("bash");
        command.arg(self.directory.join("cmd-containerd"));
        *daemon = Some(ProcessGuard::spawn("containerd", &mut command)?);
        wait_until("CRI", DEADLINE, || self.version().is_ok())
    }

    fn version(&self) -> Result<String> {
        let answer = self.ask(async |mut client| client.version(VersionRequest::default()).await)?;
        Ok(answer.runtime_version)
    }

    /// Runs a pod's sandbox.
    pub fn run(&self, spec: &PodSpec<'_>) -> Result<Pod<'_>> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let uid = format!("7f0b6e8a-4b5f-4a52-9d0e-{number:012}");
        let mut labels = HashMap::from([
            ("io.kubernetes.pod.name".to_owned(), spec.name.to_owned()),
            ("io.kubernetes.pod.namespace".to_owned(), "shop".to_owned()),
            ("io.kubernetes.pod.uid".to_owned(), uid.clone()),
        ]);
        labels.extend(spec.labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let network = if spec.host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
        let namespace_options = Some(namespaces(network));
        let parent = if spec.shared_cgroup { String::new() } else { format!("{}/pod{uid}", self.parent) };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: spec.name.to_owned(),
                uid,
                namespace: "shop".to_owned(),
                attempt: 0,
            }),
            hostname: if spec.host_network { String::new() } else { spec.name.to_owned() },
            labels,
            annotations: HashMap::from([("example.org/team".to_owned(), "a".to_owned())]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: parent,
                security_context: Some(LinuxSandboxSecurityContext {
                    privileged: spec.privileged,
                    namespace_options,
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        let mounts = spec.program.map(|program| Mount {
            container_path: PROGRAM.to_owned(),
            host_path: program.to_string_lossy().into_owned(),
            readonly: true,
            ..Mount::default()
        });
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: spec.runtime.to_owned() };
        let answer = self
            .ask(async |mut client| client.run_pod_sandbox(request).await)
            .with_context(|| format!("pod {} does not run", spec.name))?;
        Ok(Pod { pods: self, config, sandbox: answer.pod_sandbox_id, mounts: mounts.into_iter().collect() })
    }

    fn ask<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
        &self,
        question: impl FnOnce(RuntimeServiceClient<Channel>) -> F,
    ) -> Result<T> {
        let client = RuntimeServiceClient::new(self.channel.clone());
        let asked = self.runtime.block_on(async { timeout(DEADLINE, question(client)).await });
        match asked.context("containerd does not answer in time")? {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => bail!("{}", status.message()),
        }
    }
}

impl Pod<'_> {
    /// The pod's id as the agent has it.
    pub fn id(&self) -> String {
        workload(&self.sandbox)
    }

    /// Creates a container, not to be started yet.
    pub fn create(&self, name: &str, command: &[&str]) -> Result<String> {
        let labels = self.config.labels.iter().filter(|(key, _)| key.starts_with("io.kubernetes.pod."));
        let mut labels: HashMap<String, String> =
            labels.map(|(key, value)| (key.clone(), value.clone())).collect();
        labels.insert("io.kubernetes.container.name".to_owned(), name.to_owned());
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.to_owned(), ..ImageSpec::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            labels,
            mounts: self.mounts.clone(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    privileged: security.is_some_and(|security| security.privileged),
                    namespace_options: security.and_then(|security| security.namespace_options.clone()),
                    ..LinuxContainerSecurityContext::default()
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let answer = self
            .pods
            .ask(async |mut client| client.create_container(request).await)
            .with_context(|| format!("container {name} is not created"))?;
        Ok(answer.container_id)
    }

    /// Starts a created container; the error is containerd's.
    pub fn start(&self, container: &str) -> Result<()> {
        let request = StartContainerRequest { container_id: container.to_owned() };
        self.pods.ask(async |mut client| client.start_container(request).await).map(drop)
    }

    /// Creates a container and starts it.
    pub fn run(&self, name: &str, command: &[&str]) -> Result<String> {
        let container = self.create(name, command)?;
        self.start(&container).with_context(|| format!("container {name} is not started"))?;
        Ok(container)
    }

    /// The exit code of a container, when it has ended.
    pub fn exit_code(&self, container: &str) -> Result<i32> {
        wait_for("the end of a container", DEADLINE, || {
            let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
            let answer = self.pods.ask(async |mut client| client.container_status(request).await);
            let status = answer.ok()?.status?;
            (status.state == ContainerState::ContainerExited as i32).then_some(status.exit_code)
        })
    }

    /// Kills a running container.
    pub fn kill(&self, container: &str) -> Result<()> {
        let request = StopContainerRequest { container_id: container.to_owned(), timeout: 0 };
        self.pods.ask(async |mut client| client.stop_container(request).await).map(drop)
    }

    /// Stops it and removes it, as when a pod is deleted.
    pub fn delete(self) -> Result<()> {
        let result = self.take_away();
        std::mem::forget(self);
        result
    }

    /// Stops its sandbox and what runs in it.
    pub fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
        self.pods.ask(async |mut client| client.stop_pod_sandbox(request).await).map(drop)
    }

    fn take_away(&self) -> Result<()> {
        self.stop()?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
        self.pods.ask(async |mut client| client.remove_pod_sandbox(request).await).map(drop)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // What stays goes with its containerd.
        let _ = self.take_away();
    }
}

/// A container's or a sandbox's id as the agent has it.
pub fn workload(id: &str) -> String {
    format!("containerd/k8s.io/{id}")
}

fn namespaces(network: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        network: network as i32,
        pid: NamespaceMode::Container as i32,
        ipc: NamespaceMode::Pod as i32,
        ..NamespaceOption::default()
    }
}
