//! `pillion explain`: which policy a workload gets, and why, for a described workload or for one that the agent knows.
//!
//! Owns how a workload is described. The decision is the policy crate's: the same code that the agent runs.

use std::{collections::BTreeMap, fmt::Write as _, fs, io, path::Path, process::ExitCode};

use anyhow::Context as _;
use pillion_policy::{Reason, Verdict};
use pillion_workload::{Plan, Subject, WorkloadId};

use crate::{
    api::{
        self, ConnectionsRequest, ConnectionsResponse, ExplainRequest, ExplainResponse, FieldInfo,
        ReasonInfo, ReasonOutcome,
    },
    cli::{ExplainArgs, Reach},
    connection::{self, Connection, Sender},
    connection_text, inspect, plan_text,
    render::{self, Paint, Tone, View, indent, note},
    validate, views,
};

/// Where policies are looked for when none are named.
const POLICY_DIR: &str = "/etc/pillion/policy.d";

impl View for ExplainResponse {
    fn text(&self, _wide: bool, paint: Paint) -> String {
        let verdict = match &self.plan {
            Some(plan) => paint.tone(Tone::Good, &format!("policy {} applies", plan.policy)),
            None => paint.tone(Tone::Warn, "no policy applies"),
        };
        let mut out = format!(
            "{verdict}\n\nWorkload:\n{}\nPolicies:\n{}",
            indent(&views::subject(&self.subject, paint), 2),
            indent(&views::reasons(&self.reasons, paint), 2)
        );
        if let Some(plan) = &self.plan {
            out.push_str("\nPlan:\n");
            out.push_str(&indent(&plan_text::in_words(plan), 2));
        }
        for connection in &self.connections {
            let _ = write!(out, "\nConnection {}:\n", connection.connection);
            out.push_str(&indent(&connection_text::in_words(connection, paint), 2));
        }
        out
    }

    fn names(&self) -> Vec<String> {
        self.plan.iter().map(|plan| plan.policy.to_string()).collect()
    }
}

/// `pillion explain`.
pub(crate) async fn main(args: ExplainArgs) -> anyhow::Result<ExitCode> {
    if let Some(executable) = &args.executable {
        connection::absolute(executable)?;
    }
    let sender = Sender { user: args.user, executable: args.executable.clone() };
    let answer = if let Some(workload) = args.workload {
        anyhow::ensure!(
            args.executable.is_none() || !args.connections.is_empty(),
            "--executable tells who makes a --connection of a workload that the agent knows; it knows the workload's own"
        );
        of_known(&args.reach, workload, args.connections, sender).await?
    } else {
        let subject = match &args.subject {
            Some(path) => read_subject(path)?,
            None => described(&args)?,
        };
        let paths = if args.policies.is_empty() {
            note(format_args!("policies are those in {POLICY_DIR}; name others with --policy"));
            vec![POLICY_DIR.into()]
        } else {
            args.policies
        };
        match validate::load(&paths)? {
            Ok(policies) => {
                let decision = policies.decide(&subject);
                let plan = decision.plan.as_deref().cloned();
                let explain = |plan: &Plan| -> Vec<_> {
                    let explain = |it: &Connection| {
                        connection::explain(&plan.redirect, plan.on_failure, *it, &sender, None)
                    };
                    args.connections.iter().map(explain).collect()
                };
                ExplainResponse {
                    subject,
                    connections: plan.as_ref().map(explain).unwrap_or_default(),
                    plan,
                    reasons: decision.reasons.iter().map(reason).collect(),
                }
            }
            Err(code) => return Ok(code),
        }
    };
    render::print(&answer, args.output.format)?;
    Ok(ExitCode::SUCCESS)
}

/// Of a workload that the agent knows.
async fn of_known(
    reach: &Reach,
    workload: WorkloadId,
    connections: Vec<Connection>,
    sender: Sender,
) -> anyhow::Result<ExplainResponse> {
    let client = inspect::client(reach);
    let request = ExplainRequest::Workload(workload.clone());
    let mut answer: ExplainResponse = client.post(api::path::EXPLAIN, &request).await?;
    if !connections.is_empty() {
        let request = ConnectionsRequest { workload, connections, sender };
        let explained: ConnectionsResponse = client.post(api::path::CONNECTIONS, &request).await?;
        answer.connections = explained.connections;
    }
    Ok(answer)
}

/// A reason as the API has it.
fn reason(reason: &Reason) -> ReasonInfo {
    let (outcome, shadowed_by) = match &reason.verdict {
        Verdict::Chosen => (ReasonOutcome::Selected, None),
        Verdict::Shadowed { by } => (ReasonOutcome::Shadowed, Some(by.clone())),
        Verdict::NotMatched => (ReasonOutcome::NotMatched, None),
    };
    let fields = reason.fields.iter().map(|field| FieldInfo {
        field: field.field.to_owned(),
        matched: field.matched,
        wanted: field.wanted.clone(),
        actual: field.actual.clone(),
    });
    ReasonInfo {
        policy: reason.policy.clone(),
        priority: reason.priority.into(),
        outcome,
        shadowed_by,
        fields: fields.collect(),
    }
}

fn described(args: &ExplainArgs) -> anyhow::Result<Subject> {
    let labels: BTreeMap<String, String> =
        args.labels.iter().map(|label| (label.key.clone(), label.value.clone())).collect();
    anyhow::ensure!(labels.len() == args.labels.len(), "a label is given twice");
    Ok(Subject {
        // clap demands both when there is neither a workload nor a file.
        runtime: args.runtime.context("--runtime is missing")?,
        name: args.name.clone().context("--name is missing")?,
        namespace: args.namespace.clone(),
        labels,
        annotations: BTreeMap::new(),
        image: args.image.clone(),
        unit: args.unit.clone(),
        executable: args.executable.clone(),
    })
}

fn read_subject(path: &Path) -> anyhow::Result<Subject> {
    if path.as_os_str() == "-" {
        return parse_subject(&validate::text_of(io::stdin().lock(), Path::new("stdin"))?, "stdin");
    }
    let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_subject(&validate::text_of(file, path)?, &path.to_string_lossy())
}

/// JSON is YAML. The error has line, column and snippet.
fn parse_subject(text: &str, name: &str) -> anyhow::Result<Subject> {
    serde_saphyr::from_str(text).map_err(|error| {
        let error = render::plain_lines(&error.to_string());
        anyhow::anyhow!(
            "{}: not the description of a workload: {error}\nsee: pillion explain --help",
            render::plain(name)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_read_strictly() {
        let good = "runtime: containerd\nname: web\nlabels: { app: api }\nexecutable: /usr/bin/nginx\n";
        let subject = parse_subject(good, "w.yaml").unwrap();
        assert_eq!(subject.labels["app"], "api");
        assert_eq!(parse_subject(&serde_json::to_string(&subject).unwrap(), "w.json").unwrap(), subject);
        for (bad, wanted) in [
            ("runtime: containerd\nname: web\nimag: x\n", "line 3"),
            ("runtime: rkt\nname: web\n", "line 1"),
            ("runtime: process\nname: a\nname: b\n", "line 3"),
            ("name: a\n", "runtime"),
        ] {
            let error = parse_subject(bad, "w.yaml").unwrap_err().to_string();
            assert!(error.contains(wanted), "{bad}: {error}");
        }
    }
}
