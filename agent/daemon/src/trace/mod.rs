//! `pillion trace`: the kernel side's decisions about one workload, as they are made.
//!
//! `serve` is the agent's end, `line` how a decision looks. A trace ends with its client: whoever goes away, in whatever
//! way, turns it off.

mod line;
mod serve;

use std::{process::ExitCode, time::Duration};

use pillion_redirect::{Because, Caller, DecidedBy, Decision, Outcome, Rule};
use pillion_workload::Protocol;
use serde::{Deserialize, Serialize};

pub(crate) use serve::stream;

use crate::{
    api::{self, Timestamp},
    cli::TraceArgs,
    inspect,
    render::{self, Format, Paint, Reader, note},
};

/// One line of the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub(crate) enum TraceLine {
    /// From now on decisions are told.
    Started,
    /// One decision.
    Decision(Box<DecisionInfo>),
    /// So many more there were since the line before.
    LeftOut {
        /// How many.
        count: u64,
    },
    /// Nothing more is told.
    Ended {
        /// Why.
        reason: EndReason,
    },
}

/// Why a trace ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum EndReason {
    /// The time that was asked for is over.
    Deadline,
    /// Nothing of the workload is redirected any more.
    Detached,
    /// The kernel's maps cannot be read.
    Failed,
}

/// A decision in the words of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DecisionInfo {
    /// When.
    pub(crate) at: Timestamp,
    /// `out` or `in`.
    pub(crate) direction: Direction,
    /// Which program decided.
    pub(crate) by: DecidedBy,
    /// TCP or UDP.
    pub(crate) protocol: Protocol,
    /// The process; `null` for arriving connections.
    pub(crate) process: Option<Caller>,
    /// The source's address, if the socket is bound to one.
    pub(crate) source_address: Option<std::net::IpAddr>,
    /// The source's port, if it is known yet.
    pub(crate) source_port: Option<u16>,
    /// Where it was to go.
    pub(crate) original: std::net::SocketAddr,
    /// Where it goes.
    pub(crate) effective: std::net::SocketAddr,
    /// Number of the table that decided; 0 for arriving connections.
    pub(crate) table: u32,
    /// `dns`, `inbound` or `outbound`; `null` when none decided.
    pub(crate) rule: Option<RuleKind>,
    /// Which of the outbound rules, counted from 1.
    pub(crate) rule_number: Option<usize>,
    /// What of the rule the destination matches, such as `cidr 10.0.0.0/8`.
    pub(crate) matched: Option<String>,
    /// The companion that it goes to, or should have.
    pub(crate) companion: Option<String>,
    /// Its port.
    pub(crate) companion_port: Option<u16>,
    /// What became of it.
    pub(crate) verdict: Outcome,
    /// Why it was not redirected.
    pub(crate) because: Option<Because>,
    /// The error number that the application gets.
    pub(crate) errno: Option<i32>,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Direction {
    /// The workload sends.
    Out,
    /// It is sent to.
    In,
}

/// Which kind of rule decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum RuleKind {
    /// Questions to resolvers.
    Dns,
    /// An outbound rule.
    Outbound,
    /// An inbound rule.
    Inbound,
}

impl From<Decision> for DecisionInfo {
    fn from(decision: Decision) -> Self {
        let spec = decision.spec.as_deref();
        let (rule, rule_number, target) = match decision.rule {
            Rule::Dns => (Some(RuleKind::Dns), None, spec.and_then(|spec| spec.dns.as_ref())),
            Rule::Outbound(index) => {
                let rule = spec.and_then(|spec| spec.outbound.get(index));
                (Some(RuleKind::Outbound), Some(index + 1), rule.map(|rule| &rule.to))
            }
            Rule::Inbound => {
                let port = decision.original.port();
                let rule = spec.and_then(|spec| spec.inbound.iter().find(|rule| rule.ports.contains(&port)));
                (Some(RuleKind::Inbound), None, rule.map(|rule| &rule.to))
            }
            Rule::None => (None, None, None),
        };
        let matched = match (spec, decision.rule) {
            (Some(spec), Rule::Outbound(index)) => {
                spec.outbound.get(index).and_then(|rule| line::matched(rule, decision.original))
            }
            _ => None,
        };
        Self {
            at: decision.at.into(),
            direction: if decision.by == DecidedBy::Steer { Direction::In } else { Direction::Out },
            by: decision.by,
            protocol: decision.protocol,
            source_address: decision.source_address,
            source_port: decision.source_port,
            original: decision.original,
            effective: decision.effective,
            table: decision.table,
            rule,
            rule_number,
            matched,
            companion: target.map(|target| target.companion.to_string()),
            companion_port: target.and_then(|target| target.port),
            verdict: decision.outcome,
            because: decision.because,
            errno: decision.errno,
            process: decision.caller,
        }
    }
}

/// `pillion trace`.
pub(crate) async fn main(args: TraceArgs) -> anyhow::Result<ExitCode> {
    let path = format!(
        "{}?workload={}&rate={}&sample={}&seconds={}",
        api::path::TRACE,
        args.workload,
        args.rate,
        args.sample,
        args.length.as_secs()
    );
    let mut lines = inspect::client(&args.reach).lines(&path).await?;
    let paint = Paint::for_stdout();
    while let Some(line) = lines.next::<TraceLine>().await? {
        match &line {
            TraceLine::Started => note(started(&args)),
            TraceLine::Ended { reason: EndReason::Deadline } => {
                note("the time is over; a longer one: --for TIME");
                return Ok(ExitCode::SUCCESS);
            }
            TraceLine::Ended { reason: EndReason::Detached } => {
                let id = &args.workload;
                note(format_args!("{id} is not redirected any more: see pillion describe {id}"));
                return Ok(ExitCode::FAILURE);
            }
            TraceLine::Ended { reason: EndReason::Failed } => {
                anyhow::bail!("the kernel's maps cannot be read any more: look at the agent's log")
            }
            TraceLine::Decision(_) | TraceLine::LeftOut { .. } => {
                if render::stdout(&text(&line, args.output.format, paint)?)? == Reader::Gone {
                    return Ok(ExitCode::SUCCESS);
                }
            }
        }
    }
    note("the agent has stopped");
    Ok(ExitCode::from(4))
}

fn started(args: &TraceArgs) -> String {
    let sample = if args.sample.get() > 1 { format!(", one of {}", args.sample) } else { String::new() };
    format!(
        "tracing {}: at most {} decisions a second{sample}, for {}; the rest is counted",
        args.workload,
        args.rate,
        humantime::format_duration(Duration::from_secs(args.length.as_secs()))
    )
}

fn text(line: &TraceLine, format: Format, paint: Paint) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table | Format::Wide => line::text(line, format == Format::Wide, paint),
        Format::Json => serde_json::to_string(line)? + "\n",
        Format::Yaml => format!("---\n{}", render::yaml(line)?),
        Format::Name => match line {
            TraceLine::Decision(decision) => format!("{}\n", decision.original),
            TraceLine::Started | TraceLine::LeftOut { .. } | TraceLine::Ended { .. } => String::new(),
        },
    })
}
