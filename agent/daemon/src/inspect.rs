//! The commands that talk to the agent: status, list, describe, attach, detach, events, version.
//!
//! Owns which question each of them asks and which exit code the answer means. How answers look is in `views`.

use std::{process::ExitCode, time::Duration};

use serde::Serialize;

use crate::{
    api::{self, EventRecord, Health, OverrideRequest, StatusResponse, Verdict, WorkloadSummary},
    cli::{
        AttachArgs, DescribeArgs, DetachArgs, EventsArgs, ListArgs, Output, Reach, StatusArgs, VersionArgs,
    },
    client::{Client, ClientError},
    render::{self, Cell, Format, Paint, Reader, View, note},
    views,
};

/// Exit code 5.
pub(crate) const DEGRADED: u8 = 5;

/// `pillion status`.
pub(crate) async fn status(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let status: StatusResponse = client(&args.reach).get(api::path::STATUS).await?;
    render::print(&status, args.output.format)?;
    Ok(match status.health {
        Health::Ok => ExitCode::SUCCESS,
        Health::Degraded => ExitCode::from(DEGRADED),
    })
}

/// `pillion list`.
pub(crate) async fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let answer: api::WorkloadsResponse = client(&args.reach).get(api::path::WORKLOADS).await?;
    if answer.workloads.is_empty() {
        note("the agent knows no workloads");
    }
    render::print(&answer, args.output.format)?;
    Ok(ExitCode::SUCCESS)
}

/// `pillion describe`.
pub(crate) async fn describe(args: DescribeArgs) -> anyhow::Result<ExitCode> {
    let path = format!("{}/{}", api::path::WORKLOADS, args.workload);
    let detail: api::WorkloadDetail = client(&args.reach).get(&path).await?;
    render::print(&detail, args.output.format)?;
    Ok(ExitCode::SUCCESS)
}

/// `pillion attach`.
pub(crate) async fn attach(args: AttachArgs) -> anyhow::Result<ExitCode> {
    let request = OverrideRequest { workload: args.workload, wait_seconds: Some(whole_seconds(args.wait)) };
    settle(&args.reach, &args.output, api::path::ATTACH, &request, Verdict::Attached).await
}

/// `pillion detach`.
pub(crate) async fn detach(args: DetachArgs) -> anyhow::Result<ExitCode> {
    let request = OverrideRequest { workload: args.workload, wait_seconds: Some(whole_seconds(args.wait)) };
    settle(&args.reach, &args.output, api::path::DETACH, &request, Verdict::Held).await
}

async fn settle(
    reach: &Reach,
    output: &Output,
    path: &str,
    request: &OverrideRequest,
    wanted: Verdict,
) -> anyhow::Result<ExitCode> {
    let wait = Duration::from_secs(request.wait_seconds.unwrap_or_default().into());
    let outcome: WorkloadSummary = client(reach).with_more_patience(wait).post(path, request).await?;
    render::print(&outcome, output.format)?;
    if outcome.verdict == wanted {
        return Ok(ExitCode::SUCCESS);
    }
    let id = &request.workload;
    Ok(match outcome.verdict {
        Verdict::Attaching | Verdict::Detaching => {
            let after = humantime::format_duration(wait);
            note(format_args!(
                "still {} after {after}; it goes on: see pillion describe {id}",
                outcome.verdict
            ));
            ExitCode::FAILURE
        }
        Verdict::Degraded => ExitCode::from(DEGRADED),
        Verdict::NotMatched => {
            note(format_args!("no policy selects {id}: see pillion explain {id}"));
            ExitCode::FAILURE
        }
        Verdict::Attached | Verdict::Failed | Verdict::Held | Verdict::Refused | Verdict::CannotAttach => {
            note(format_args!("{id} is {}: see pillion describe {id}", outcome.verdict));
            ExitCode::FAILURE
        }
    })
}

/// `pillion events`.
pub(crate) async fn events(args: EventsArgs) -> anyhow::Result<ExitCode> {
    let path = format!("{}?follow={}", api::path::EVENTS, args.follow);
    let mut lines = client(&args.reach).lines(&path).await?;
    let paint = Paint::for_stdout();
    while let Some(event) = lines.next::<EventRecord>().await? {
        if render::stdout(&event_text(&event, args.output.format, paint)?)? == Reader::Gone {
            return Ok(ExitCode::SUCCESS);
        }
    }
    if args.follow {
        note("the agent has stopped");
        return Ok(ExitCode::from(4));
    }
    Ok(ExitCode::SUCCESS)
}

fn event_text(event: &EventRecord, format: Format, paint: Paint) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table | Format::Wide => views::event_line(event, format == Format::Wide, paint),
        Format::Json => serde_json::to_string(event)? + "\n",
        Format::Yaml => format!("---\n{}", render::yaml(event)?),
        Format::Name => event.workload.as_ref().map(|id| format!("{id}\n")).unwrap_or_default(),
    })
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    client: &'static str,
    /// Absent when it was not asked or cannot be reached.
    agent: Option<String>,
}

impl View for Versions {
    fn text(&self, _wide: bool, paint: Paint) -> String {
        let mut facts = vec![("pillion", Cell::from(self.client))];
        if let Some(agent) = &self.agent {
            facts.push(("agent", agent.into()));
        }
        render::facts(&facts, paint)
    }

    fn names(&self) -> Vec<String> {
        vec![self.client.to_owned()]
    }
}

/// `pillion version`. That no agent runs is worth a note, not a failure.
pub(crate) async fn version(args: VersionArgs) -> anyhow::Result<ExitCode> {
    let agent = if args.client {
        None
    } else {
        match client(&args.reach).get::<StatusResponse>(api::path::STATUS).await {
            Ok(status) => Some(status.version),
            Err(ClientError::Unreachable { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
                None
            }
            Err(error) => {
                note(format_args!("the agent's version is not known: {error}"));
                None
            }
        }
    };
    let client = env!("CARGO_PKG_VERSION");
    if agent.as_deref().is_some_and(|agent| agent != client) {
        note(
            "this program and the running agent are of different versions: restart the agent after an upgrade",
        );
    }
    render::print(&Versions { client, agent }, args.output.format)?;
    Ok(ExitCode::SUCCESS)
}

/// The client that `reach` describes.
pub(crate) fn client(reach: &Reach) -> Client {
    Client::new(&reach.run_dir, reach.timeout)
}

fn whole_seconds(wait: Duration) -> u16 {
    u16::try_from(wait.as_secs()).unwrap_or(u16::MAX)
}
