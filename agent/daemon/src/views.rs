//! How the agent's answers look to people. Pure: text in, text out. JSON and YAML come from the API's own types.

use std::fmt::Write as _;

use pillion_workload::{FirstInstruction, Gate, Subject};

use crate::{
    api::{
        CompanionState, CompanionStatus, EventKind, EventRecord, Health, PolicyStatus, ReasonInfo,
        ReasonOutcome, SourceState, StatusResponse, Timestamp, Verdict, WorkloadDetail, WorkloadSummary,
        WorkloadsResponse,
    },
    conflicts, plan_text,
    render::{self, Cell, Paint, Table, Tone, View, facts, indent, plain_lines, span},
};

impl View for StatusResponse {
    fn text(&self, wide: bool, paint: Paint) -> String {
        let health = match self.health {
            Health::Ok => Cell::toned("ok", Tone::Good),
            Health::Degraded => Cell::toned("degraded", Tone::Warn),
        };
        let mut out = facts(
            &[
                ("Health", health),
                ("Agent", format!("{}, pid {}, up {}", self.version, self.pid, age(self.started_at)).into()),
                ("Policies", policies_line(&self.policies).into()),
                ("Pins", self.dataplane.pin_root.display().into()),
            ],
            paint,
        );
        for problem in &self.problems {
            let area = paint.tone(Tone::Warn, &render::plain(&problem.area));
            let message = indent(&plain_lines(&problem.message), 4);
            let _ = write!(out, "\nProblem: {area}\n{message}");
        }
        out.push('\n');
        out.push_str(&sources_table(self).render(paint));
        if !self.policies.policies.is_empty() {
            let mut table = Table::new(&["POLICY", "PRIORITY", "WORKLOADS"]);
            for policy in &self.policies.policies {
                table.row(vec![(&policy.name).into(), policy.priority.into(), policy.workloads.into()]);
            }
            out.push('\n');
            out.push_str(&table.render(paint));
        }
        let mut table = Table::new(&["VERDICT", "WORKLOADS"]);
        for (&verdict, &number) in self.workloads.iter().filter(|(_, number)| wide || **number > 0) {
            table.row(vec![verdict_cell(verdict), number.into()]);
        }
        out.push('\n');
        out.push_str(&table.render(paint));
        if wide && !self.dataplane.counters.is_empty() {
            let mut table = Table::new(&["COUNTER", "VALUE"]);
            for (name, value) in &self.dataplane.counters {
                table.row(vec![name.into(), value.into()]);
            }
            out.push('\n');
            out.push_str(&table.render(paint));
        }
        out
    }

    fn names(&self) -> Vec<String> {
        self.policies.policies.iter().map(|policy| policy.name.to_string()).collect()
    }
}

fn policies_line(policies: &PolicyStatus) -> String {
    let loaded = policies.loaded_at.map_or_else(
        || "none loaded".to_owned(),
        |at| format!("{} in force, loaded {} ago", policies.policies.len(), age(at)),
    );
    let directory = policies.directory.display();
    match &policies.refused {
        None => format!("{loaded} from {directory}"),
        Some(refused) if policies.of_earlier_agent => format!(
            "{} in force, an earlier agent's; those in {directory} were refused {} ago",
            policies.policies.len(),
            age(refused.at)
        ),
        Some(refused) => format!("{loaded} from {directory}; a reload was refused {} ago", age(refused.at)),
    }
}

fn sources_table(status: &StatusResponse) -> Table {
    let mut table = Table::new(&["SOURCE", "STATE", "SINCE", "WORKLOADS", "ERROR"]);
    for source in &status.sources {
        let tone = match source.state {
            SourceState::Up => Tone::Good,
            SourceState::Connecting => Tone::Plain,
            SourceState::Down => Tone::Warn,
        };
        table.row(vec![
            (&source.name).into(),
            Cell::toned(source.state, tone),
            age(source.since).into(),
            source.workloads.into(),
            Cell::optional(source.error.as_ref()),
        ]);
    }
    table
}

impl View for WorkloadsResponse {
    fn text(&self, wide: bool, paint: Paint) -> String {
        workloads_table(&self.workloads, wide).render(paint)
    }

    fn names(&self) -> Vec<String> {
        self.workloads.iter().map(|workload| workload.id.to_string()).collect()
    }
}

impl View for WorkloadSummary {
    fn text(&self, wide: bool, paint: Paint) -> String {
        let mut out = workloads_table(std::slice::from_ref(self), wide).render(paint);
        if let Some(reason) = self.reason.as_ref().filter(|_| !wide) {
            let _ = writeln!(out, "\n{}", plain_lines(reason));
        }
        out
    }

    fn names(&self) -> Vec<String> {
        vec![self.id.to_string()]
    }
}

fn workloads_table(workloads: &[WorkloadSummary], wide: bool) -> Table {
    let mut head = vec!["WORKLOAD", "VERDICT", "SINCE", "POLICY", "COMPANIONS", "GATE", "ATTACHED"];
    if wide {
        head.extend(["TOOK", "PID", "NAMESPACE", "REASON"]);
    }
    let mut table = Table::new(&head);
    for workload in workloads {
        let mut cells = vec![
            (&workload.id).into(),
            verdict_cell(workload.verdict),
            age(workload.since).into(),
            Cell::optional(workload.policy.as_ref()),
            companions_cell(&workload.companions),
            Cell::optional(gate(workload)),
            Cell::optional(workload.first_instruction.map(first_instruction)),
        ];
        if wide {
            cells.extend([
                Cell::optional(workload.attach_millis.map(|millis| format!("{millis}ms"))),
                workload.pid.into(),
                Cell::optional(workload.namespace.as_ref()),
                Cell::optional(workload.reason.as_ref()),
            ]);
        }
        table.row(cells);
    }
    table
}

fn companions_cell(companions: &[CompanionStatus]) -> Cell {
    let text: Vec<String> = companions
        .iter()
        .map(|companion| match (companion.state, companion.external) {
            (CompanionState::Ready, false) => companion.name.to_string(),
            (CompanionState::Ready, true) => format!("{}(external)", companion.name),
            (state @ (CompanionState::Starting | CompanionState::Down), false) => {
                format!("{}({state})", companion.name)
            }
            (state @ (CompanionState::Starting | CompanionState::Down), true) => {
                format!("{}(external, {state})", companion.name)
            }
        })
        .collect();
    let all_ready = companions.iter().all(|companion| companion.state == CompanionState::Ready);
    Cell::toned(text.join(","), if all_ready { Tone::Plain } else { Tone::Warn })
}

impl View for WorkloadDetail {
    fn text(&self, wide: bool, paint: Paint) -> String {
        let summary = &self.summary;
        let mut out = facts(&self.facts(), paint);
        if let Some(reason) = &summary.reason {
            let _ = write!(out, "\nReason:\n{}", indent(&plain_lines(reason), 2));
        }
        let _ = write!(out, "\nSubject:\n{}", indent(&subject(&self.subject, paint), 2));
        if !summary.companions.is_empty() {
            let mut table = Table::new(&["COMPANION", "RUN BY", "STATE", "PID", "RESTARTS", "ERROR"]);
            for companion in &summary.companions {
                let tone = match companion.state {
                    CompanionState::Ready => Tone::Good,
                    CompanionState::Starting => Tone::Plain,
                    CompanionState::Down => Tone::Bad,
                };
                table.row(vec![
                    (&companion.name).into(),
                    if companion.external { "others (external)" } else { "pillion" }.into(),
                    Cell::toned(companion.state, tone),
                    Cell::optional(companion.pid),
                    companion.restarts.into(),
                    Cell::optional(companion.error.as_ref()),
                ]);
            }
            let _ = write!(out, "\n{}", table.render(paint));
        }
        if let Some(plan) = &self.plan {
            let _ = write!(out, "\nPlan:\n{}", indent(&plan_text::in_words(plan), 2));
        }
        if !self.neighbours.is_empty() {
            let told = conflicts::table(&self.neighbours, paint);
            let _ = write!(out, "\nPrograms of others:\n{}", indent(&told, 2));
        }
        let _ = write!(out, "\nPolicies:\n{}", indent(&reasons(&self.reasons, paint), 2));
        if !self.events.is_empty() {
            out.push_str("\nEvents:\n");
            for event in &self.events {
                out.push_str(&indent(&event_line(event, wide, paint), 2));
            }
        }
        out
    }

    fn names(&self) -> Vec<String> {
        self.summary.names()
    }
}

impl WorkloadDetail {
    fn facts(&self) -> Vec<(&'static str, Cell)> {
        let summary = &self.summary;
        let mut facts = vec![
            ("Workload", (&summary.id).into()),
            ("Verdict", verdict_cell(summary.verdict)),
            ("Since", format!("{} ({} ago)", summary.since, age(summary.since)).into()),
            ("Policy", Cell::optional(summary.policy.as_ref())),
        ];
        if let Some(instance) = &self.instance {
            let cgroup = format!("{} (id {})", instance.cgroup.path.display(), instance.cgroup.id.0);
            facts.extend([
                ("Process", instance.process.pid.into()),
                ("Cgroup", cgroup.into()),
                ("Network", instance.netns.into()),
            ]);
        }
        if let Some(when) = summary.first_instruction {
            let took = summary.attach_millis.map(|millis| format!(", after {millis}ms")).unwrap_or_default();
            let text = match when {
                FirstInstruction::Before => "before its first instruction",
                FirstInstruction::After => "after its first instruction",
                FirstInstruction::Unknown => "before or after its first instruction: not known",
            };
            if let Some(gate) = gate(summary) {
                facts.push(("Gate", gate.into()));
            }
            facts.push(("Attached", format!("{text}{took}").into()));
        }
        if let Some(ports) = &self.ports {
            let outbound = ports.outbound.iter().map(|port| format!("outbound to {port}"));
            let dns = ports.dns.map(|port| format!("dns to {port}"));
            let inbound = ports.inbound.iter().map(|(from, to)| format!("{from} to {to}"));
            let text: Vec<String> = outbound.chain(dns).chain(inbound).collect();
            facts.push(("Ports", text.join(", ").into()));
        }
        facts
    }
}

/// What policies select on, a line each.
pub(crate) fn subject(subject: &Subject, paint: Paint) -> String {
    let mut lines: Vec<(&str, Cell)> =
        vec![("runtime", subject.runtime.into()), ("name", (&subject.name).into())];
    let mut optional = |name, value: Option<String>| {
        if let Some(value) = value {
            lines.push((name, value.into()));
        }
    };
    optional("namespace", subject.namespace.clone());
    optional("image", subject.image.clone());
    optional("unit", subject.unit.clone());
    optional("executable", subject.executable.as_ref().map(|path| path.display().to_string()));
    let pairs = subject.labels.iter().map(|(key, value)| ("label", format!("{key}={value}")));
    let pairs =
        pairs.chain(subject.annotations.iter().map(|(key, value)| ("annotation", format!("{key}={value}"))));
    for (name, pair) in pairs {
        lines.push((name, pair.into()));
    }
    facts(&lines, paint)
}

/// Policy by policy, with every field of its selector.
pub(crate) fn reasons(reasons: &[ReasonInfo], paint: Paint) -> String {
    if reasons.is_empty() {
        return "there are no policies\n".to_owned();
    }
    let mut out = String::new();
    for reason in reasons {
        let outcome = match reason.outcome {
            ReasonOutcome::Selected => paint.tone(Tone::Good, "selected"),
            ReasonOutcome::NotMatched => paint.tone(Tone::Dim, "does not match"),
            ReasonOutcome::Shadowed => match &reason.shadowed_by {
                Some(winner) => paint.tone(Tone::Warn, &format!("matches, but {winner} comes first")),
                None => paint.tone(Tone::Warn, "matches, but another comes first"),
            },
        };
        let name = paint.tone(Tone::Strong, reason.policy.as_str());
        let _ = writeln!(out, "{name} (priority {}): {outcome}", reason.priority);
        if reason.fields.is_empty() {
            continue;
        }
        let mut table = Table::new(&["FIELD", "MATCHES", "WANTED", "ACTUAL"]);
        for field in &reason.fields {
            table.row(vec![
                (&field.field).into(),
                if field.matched { Cell::toned("yes", Tone::Good) } else { Cell::toned("no", Tone::Bad) },
                (&field.wanted).into(),
                Cell::optional(field.actual.as_ref()),
            ]);
        }
        out.push_str(&indent(&table.render(paint), 2));
    }
    out
}

/// One event on one line; `wide` adds its number and the companion and policy it is about.
pub(crate) fn event_line(event: &EventRecord, wide: bool, paint: Paint) -> String {
    let kind = serde_json::to_value(event.kind).ok();
    let kind = kind.as_ref().and_then(serde_json::Value::as_str).unwrap_or("?");
    let mut out = String::new();
    if wide {
        let _ = write!(out, "{:>6} ", event.sequence);
    }
    let _ = write!(out, "{}  {}", event.at, paint.tone(event_tone(event.kind), &format!("{kind:<16}")));
    if let Some(workload) = &event.workload {
        let _ = write!(out, " {workload}:");
    }
    let _ = write!(out, " {}", render::plain(&event.message));
    if wide {
        let about = [
            event.companion.as_ref().map(|name| format!("companion {name}")),
            event.policy.as_ref().map(|name| format!("policy {name}")),
            event.held_micros.map(|micros| format!("held {}.{:03}ms", micros / 1000, micros % 1000)),
            event.first_instruction.map(|when| format!("{} first instruction", first_instruction(when))),
            event.attach_millis.map(|millis| format!("{millis}ms")),
        ];
        let about: Vec<String> = about.into_iter().flatten().collect();
        if !about.is_empty() {
            let _ = write!(out, " ({})", about.join(", "));
        }
    }
    out.push('\n');
    out
}

fn event_tone(kind: EventKind) -> Tone {
    match kind {
        EventKind::Attached
        | EventKind::Adopted
        | EventKind::Recovered
        | EventKind::CompanionReady
        | EventKind::Admitted => Tone::Good,
        EventKind::PolicyRefused
        | EventKind::SourceDown
        | EventKind::Degraded
        | EventKind::CompanionExited
        | EventKind::AdmittedOpen
        | EventKind::ConnectionsKept
        | EventKind::JournalFault => Tone::Warn,
        EventKind::AttachFailed | EventKind::DetachFailed | EventKind::Refused | EventKind::CannotAttach => {
            Tone::Bad
        }
        EventKind::NotMatched => Tone::Dim,
        EventKind::AgentStarted
        | EventKind::AgentStopping
        | EventKind::PolicyLoaded
        | EventKind::SourceUp
        | EventKind::Attaching
        | EventKind::PlanChanged
        | EventKind::ConnectionsReset
        | EventKind::Detaching
        | EventKind::Detached
        | EventKind::Held
        | EventKind::Released
        | EventKind::WorkloadStopped => Tone::Plain,
    }
}

fn verdict_cell(verdict: Verdict) -> Cell {
    let tone = match verdict {
        Verdict::Attached => Tone::Good,
        Verdict::Degraded => Tone::Warn,
        Verdict::Failed | Verdict::Refused | Verdict::CannotAttach => Tone::Bad,
        Verdict::NotMatched => Tone::Dim,
        Verdict::Attaching | Verdict::Detaching | Verdict::Held => Tone::Plain,
    };
    Cell::toned(verdict, tone)
}

/// Which gate has held it; `late` when none has and it had begun, or may have.
fn gate(workload: &WorkloadSummary) -> Option<&'static str> {
    let late = workload.first_instruction.is_some_and(|when| when != FirstInstruction::Before);
    workload.gate.map(Gate::as_str).or(late.then_some("late"))
}

fn first_instruction(when: FirstInstruction) -> &'static str {
    match when {
        FirstInstruction::Before => "before",
        FirstInstruction::After => "after",
        FirstInstruction::Unknown => "unknown",
    }
}

fn age(since: Timestamp) -> String {
    span(since.age())
}
