//! A container between `create` and `start`: its process is the runtime's own and waits, its first instruction is to come.
//!
//! `ctr` knows no such state, so this speaks to containerd's API.

use std::time::Duration;

use anyhow::{Context as _, Result};
use containerd_client::{
    services::v1::{
        CreateTaskRequest, StartRequest, snapshots::MountsRequest,
        snapshots::snapshots_client::SnapshotsClient, tasks_client::TasksClient,
    },
    with_namespace,
};
use tokio::{runtime, time::timeout};
use tonic::{Request, transport::Channel};

use crate::{
    Containerd, ProcessGuard,
    containerd::{Container, NAMESPACE},
};

const DEADLINE: Duration = Duration::from_secs(30);

/// A created container; see [`Held::start`].
#[derive(Debug)]
pub struct Held {
    runtime: runtime::Runtime,
    channel: Channel,
    id: String,
    pid: u32,
}

impl Held {
    /// Creates one. It is removed with its containerd.
    pub fn create(containerd: &Containerd, container: &Container<'_>) -> Result<Self> {
        let mut command = containerd.ctr_command()?;
        command.args(["container", "create"]);
        container.finish(&mut command);
        ProcessGuard::finish("ctr container create", &mut command, DEADLINE)?.success()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let id = container.id.to_owned();
        let work = async {
            let channel = containerd_client::connect(containerd.address()).await?;
            let mounts = MountsRequest { snapshotter: "native".to_owned(), key: id.clone() };
            let mounts =
                SnapshotsClient::new(channel.clone()).mounts(with_namespace!(mounts, NAMESPACE)).await?;
            let task = CreateTaskRequest {
                container_id: id.clone(),
                rootfs: mounts.into_inner().mounts,
                ..CreateTaskRequest::default()
            };
            let task = TasksClient::new(channel.clone()).create(with_namespace!(task, NAMESPACE)).await?;
            anyhow::Ok((channel, task.into_inner().pid))
        };
        let created = runtime.block_on(async { timeout(DEADLINE, work).await });
        let (channel, pid) = created.context("containerd creates no task in time")??;
        Ok(Self { runtime, channel, id, pid })
    }

    /// The process that is going to be the container's first.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets it run.
    pub fn start(self) -> Result<()> {
        let start = StartRequest { container_id: self.id, ..StartRequest::default() };
        let mut tasks = TasksClient::new(self.channel);
        let work = tasks.start(with_namespace!(start, NAMESPACE));
        let started = self.runtime.block_on(async { timeout(DEADLINE, work).await });
        started.context("containerd does not start the task in time")??;
        Ok(())
    }
}
