//! Which runtimes the agent watches: what its flags say, or what is there.
//!
//! Wires the sources, the gates that belong to one of them, and what gates ask engines. Never interprets what they tell.

use std::{path::PathBuf, sync::Arc};

use pillion_runtime::{
    ContainerdConfig, ContainerdSource, EngineConfig, EngineKind, EngineLookup, EngineSource, Engines,
    FirstInstructionProbe, Gatekeeper, NriConfig, NriGate, PodmanFiles, PodmanSource, RuntimeEvent,
    SourceName,
};
use pillion_workload::RuntimeKind;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::config::{AgentConfig, OrNone};

/// The sources that run, and what else their connections are good for.
pub(crate) struct Sources {
    /// Sources that are going to speak, and for which kind of workload.
    pub(crate) names: Vec<(SourceName, RuntimeKind)>,
    /// Says whether a container of containerd has begun.
    pub(crate) probe: Option<FirstInstructionProbe>,
    /// Say which workload a held container is.
    pub(crate) engines: Engines,
    /// The gates that belong to a source, each to its end.
    pub(crate) gates: Vec<JoinHandle<()>>,
    /// Docker's socket, where Docker is watched.
    pub(crate) docker: Option<PathBuf>,
}

impl Sources {
    /// Starts them. They tell `events` until `stop`. `attached` are the runtimes whose workloads an earlier agent has attached: these are
    /// watched even when they are not there now, since what nobody speaks for has ended.
    pub(crate) fn start(
        config: &AgentConfig,
        attached: &[RuntimeKind],
        events: &mpsc::Sender<RuntimeEvent>,
        gatekeeper: &Gatekeeper,
        stop: &CancellationToken,
    ) -> Self {
        let mut sources = Self {
            names: Vec::new(),
            probe: None,
            engines: Engines::default(),
            gates: Vec::new(),
            docker: None,
        };
        let docker = docker_socket(config.docker_socket.as_ref(), attached.contains(&RuntimeKind::Docker));
        if let Some(socket) = &docker {
            let engine = EngineConfig::at(EngineKind::Docker, socket);
            sources.engines.docker = Some(Arc::new(EngineLookup::new(&engine)));
            sources.names.push((SourceName::DOCKER, RuntimeKind::Docker));
            EngineSource::spawn(engine, events.clone(), stop.clone());
        }
        sources.podman(config, events, stop);
        if let Some(socket) = config.containerd_socket.get() {
            let mut containerd = ContainerdConfig::at(socket);
            if docker.is_some() {
                containerd.left_alone.insert(ContainerdConfig::DOCKERS.to_owned());
            }
            let (_task, probe, resolver) = ContainerdSource::spawn(containerd, events.clone(), stop.clone());
            sources.names.push((SourceName::CONTAINERD, RuntimeKind::Containerd));
            if let Some(socket) = config.nri_socket.get() {
                let (gatekeeper, events) = (gatekeeper.clone(), events.clone());
                let (nri, resolver) = (NriConfig::at(socket), resolver.clone());
                sources.gates.push(NriGate::spawn(nri, gatekeeper, resolver, events, stop.clone()));
                sources.names.push((SourceName::NRI, RuntimeKind::Containerd));
            }
            (sources.probe, sources.engines.containerd) = (Some(probe), Some(resolver));
        }
        sources.docker = docker;
        sources
    }

    /// Podman has a service or none; its files are there in any case, and are what gates ask: the service waits for the start.
    fn podman(
        &mut self,
        config: &AgentConfig,
        events: &mpsc::Sender<RuntimeEvent>,
        stop: &CancellationToken,
    ) {
        let files = PodmanFiles::usual();
        let usual = PathBuf::from(EngineKind::Podman.default_socket());
        let service = match &config.podman_socket {
            Some(OrNone(None)) => return,
            Some(OrNone(Some(socket))) => Some(socket.clone()),
            None => Some(usual).filter(|socket| socket.exists()),
        };
        match service {
            Some(socket) => {
                let engine = EngineConfig::at(EngineKind::Podman, socket);
                EngineSource::spawn(engine, events.clone(), stop.clone());
            }
            None if files.exist() => {
                PodmanSource::spawn(files.clone(), events.clone(), stop.clone());
            }
            None => return,
        }
        self.names.push((SourceName::PODMAN, RuntimeKind::Podman));
        self.engines.podman = Some(Arc::new(files));
    }
}

/// Docker's socket: the one that was named, or else the usual one, when it is there or `must` be.
pub(crate) fn docker_socket(named: Option<&OrNone<PathBuf>>, must: bool) -> Option<PathBuf> {
    let usual = PathBuf::from(EngineKind::Docker.default_socket());
    named.map_or(Some(usual).filter(|usual| must || usual.exists()), |named| named.get().cloned())
}
