//! `pillion admit --offline`: decides about one held workload when there is no agent, by the policies that were in force last.
//!
//! Started by `pillion-hook`, with the request on standard input and the answer on standard output, both as on the agent's socket. Owns
//! the putting together; who a container is and what a policy selects is answered by the code that the agent runs. Never
//! attaches anything: without an agent, what a policy wants is not there, and its `onFailure` decides.

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use pillion_common::hook::{Answer, HEADER, Message as _, Question, Request, body_length, decode, encode};
use pillion_policy::PolicySet;
use pillion_runtime::{
    ContainerdConfig, ContainerdResolver, Engine, EngineConfig, EngineKind, EngineLookup, Engines,
    PodmanFiles, Resolved, Unidentified, unit_subject,
};
use pillion_workload::{FailureMode, RuntimeKind, Subject, WorkloadId};

use crate::{cli::AdmitArgs, config::OrNone, journal, last_good, sources};

/// For each question to systemd.
const BUS_LIMIT: Duration = Duration::from_secs(5);

/// `pillion admit`.
pub(crate) async fn main(args: AdmitArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.offline, "pillion-hook asks the agent itself; only --offline is for this command");
    let request = read_request()?;
    let answer = match decide(&args, request.question).await {
        Ok(answer) => answer,
        Err(error) => Answer::Undecided { message: format!("{error:#}"), leaving: false },
    };
    io::stdout().lock().write_all(&encode(&answer)?)?;
    Ok(ExitCode::SUCCESS)
}

fn read_request() -> anyhow::Result<Request> {
    const WHAT: &str = "a request of pillion-hook is expected on standard input";
    let mut input = io::stdin().lock().take(u64::try_from(HEADER + Request::LIMIT)?);
    let mut header = [0; HEADER];
    input.read_exact(&mut header).context(WHAT)?;
    let mut body = vec![0; body_length::<Request>(&header).context(WHAT)?];
    input.read_exact(&mut body).context(WHAT)?;
    decode(&body).context(WHAT)
}

async fn decide(args: &AdmitArgs, question: Question) -> anyhow::Result<Answer> {
    let policies = last_good::copied(&args.state_dir)?;
    let mut partly = None;
    let (id, subject) = match question {
        Question::Container(container) => {
            let containerd = match args.containerd_socket.get() {
                Some(socket) => Some(ContainerdResolver::connect(&ContainerdConfig::at(socket)).await),
                None => None,
            };
            let docker = sources::docker_socket(args.docker_socket.as_ref(), false).map(|socket| {
                let engine = EngineConfig::at(EngineKind::Docker, socket);
                Arc::new(EngineLookup::new(&engine)) as Arc<dyn Engine>
            });
            let podman = args.podman_socket != Some(OrNone(None));
            let podman = podman.then(|| Arc::new(PodmanFiles::usual()) as Arc<dyn Engine>);
            let engines = Engines { containerd, docker, podman, units: None };
            match engines.resolve(&container).await {
                Ok(Resolved::Container(workload) | Resolved::Member(workload)) => {
                    (workload.id, workload.subject)
                }
                Ok(Resolved::Partly(workload, what)) => {
                    partly = Some(what);
                    (workload.id, workload.subject)
                }
                // Its containers are asked for one by one.
                Ok(Resolved::Sandbox(_) | Resolved::Nothing(_)) => {
                    return Ok(Answer::Admit { message: None });
                }
                Ok(Resolved::Unreachable(what)) => return Ok(without_identity(&policies, &what)),
                Err(error) => {
                    let what = engines.unresolved(&container, &format!("{:#}", anyhow::Error::from(error)));
                    return Ok(without_identity(&policies, &what));
                }
            }
        }
        Question::Unit(unit) => {
            // A drop-in for a prefix of names reaches more units than policies select.
            if !policies.policies().iter().any(|policy| policy.selector().may_match_unit(&unit.name)) {
                return Ok(Answer::Admit { message: None });
            }
            of_unit(args, &unit.name).await?
        }
        Question::Stopped(_) => return Ok(Answer::Admit { message: None }),
    };
    let detached = journal::held_detached(&args.state_dir)
        .map_err(|reason| anyhow::anyhow!("cannot read which workloads are held detached: {reason}"))?;
    if detached.contains(&id) {
        return Ok(Answer::Admit { message: None });
    }
    match partly {
        // What is known selects it for no policy; what is not known may.
        Some(what) if policies.plan_for(&subject).is_none() => Ok(without_identity(&policies, &what)),
        Some(_) | None => Ok(by_policy(&policies, &subject)),
    }
}

/// What it runs is a thing that policies select on, and only systemd knows it.
async fn of_unit(args: &AdmitArgs, name: &str) -> anyhow::Result<(WorkloadId, Subject)> {
    let id = WorkloadId::try_from(format!("{}/{name}", RuntimeKind::Systemd))?;
    let bus = args.systemd.bus().context("this agent leaves systemd alone")?;
    let subject = unit_subject(&bus, name, BUS_LIMIT).await?;
    Ok((id, subject))
}

/// By what is known.
fn without_identity(policies: &PolicySet, what: &Unidentified) -> Answer {
    let Some(policy) = policies.strictest_for(&what.sightings) else {
        return Answer::Admit { message: None };
    };
    let reason = &what.reason;
    let name = policy.name();
    match policy.plan().on_failure {
        FailureMode::Open => Answer::Admit {
            message: Some(format!(
                "pillion: {reason}; it runs without, as policy {name} says onFailure: open"
            )),
        },
        FailureMode::Closed => Answer::Refuse {
            message: format!(
                "pillion: {reason}; refused, as policy {name} says onFailure: closed; start `pillion agent`"
            ),
        },
    }
}

fn by_policy(policies: &PolicySet, subject: &Subject) -> Answer {
    let Some(plan) = policies.plan_for(subject) else {
        return Answer::Admit { message: None };
    };
    let policy = &plan.policy;
    match plan.on_failure {
        FailureMode::Open => Answer::Admit {
            message: Some(format!(
                "pillion: policy {policy} says onFailure: open: it runs without until an agent is there"
            )),
        },
        FailureMode::Closed => Answer::Refuse {
            message: format!(
                "pillion: refused, as policy {policy} says onFailure: closed; start `pillion agent`"
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use pillion_policy::SourceFile;

    use super::*;

    #[test]
    fn the_policys_failure_mode_decides() {
        let policy = |unit: &str, mode: &str| {
            format!(
                "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: {{ name: {mode} }}\n\
                 spec: {{ select: {{ units: [{unit}] }}, companions: [{{ name: r, builtin: relay }}], \
                 redirect: {{ outbound: [{{ to: r }}] }}, onFailure: {mode} }}\n"
            )
        };
        let text = policy("a.service", "open") + "---\n" + &policy("b.service", "closed");
        let policies = pillion_policy::parse(&[SourceFile { path: "p.yaml".into(), text }]).unwrap();
        for (name, admits, word) in [
            ("a.service", true, Some("policy open")),
            ("b.service", false, Some("policy closed")),
            ("c.service", true, None),
        ] {
            let subject = Subject { unit: Some(name.into()), ..Subject::new(RuntimeKind::Systemd, name) };
            let (admitted, message) = match by_policy(&policies, &subject) {
                Answer::Admit { message } => (true, message),
                Answer::Refuse { message } => (false, Some(message)),
                Answer::Undecided { message, .. } => panic!("{message}"),
            };
            assert_eq!(admitted, admits, "{name}");
            assert_eq!(message.is_some(), word.is_some(), "{name}: {message:?}");
            assert!(message.iter().all(|message| message.contains(word.unwrap_or_default())), "{message:?}");
        }
    }
}
