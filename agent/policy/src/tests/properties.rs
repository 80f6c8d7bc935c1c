//! What holds for every text: the parser ends without a panic, and what it accepts is what was written.

use std::{collections::BTreeMap, fmt::Write as _};

use pillion_workload::{FailureMode, RuntimeKind, Subject};
use proptest::prelude::*;

use super::{file, one};
use crate::{Verdict, parse};

const EVERYTHING: &str = include_str!("../../testdata/faults/everything.yaml");
const ENVOY: &str = include_str!("../../../../packaging/companions/envoy/policy.yaml");

/// A policy's content, to be written as YAML and compared with what comes back.
#[derive(Debug, Clone)]
struct Model {
    priority: i32,
    name: String,
    pattern: String,
    labels: BTreeMap<String, String>,
    port: Option<u16>,
    excluded: Vec<u16>,
    arguments: Vec<String>,
    closed: bool,
}

fn model() -> impl Strategy<Value = Model> {
    (
        -1_000_000..=1_000_000_i32,
        "[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}",
        "[a-z*?:/.@√-]{1,20}",
        proptest::collection::btree_map("[a-z./]{1,10}", "[^\u{0}]{1,10}", 0..4),
        proptest::option::of(1..=u16::MAX),
        proptest::collection::btree_set(1..=u16::MAX, 1..5),
        proptest::collection::vec("[^{\u{0}]{0,20}", 0..5),
        any::<bool>(),
    )
        .prop_map(|(priority, name, pattern, labels, port, excluded, arguments, closed)| Model {
            priority,
            name,
            pattern,
            labels,
            port,
            excluded: excluded.into_iter().collect(),
            arguments,
            closed,
        })
}

/// JSON strings are YAML strings, but for characters that YAML wants escaped.
fn yaml(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            ' '..='~' if c != '"' && c != '\\' => out.push(c),
            // Writing to a String cannot fail.
            c => _ = write!(out, "\\U{:08x}", c as u32),
        }
    }
    out.push('"');
    out
}

fn render(model: &Model) -> String {
    let mut text = format!(
        "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: {{ name: {} }}\nspec:\n  priority: {}\n  \
         select:\n    names: [{}]\n",
        yaml(&model.name),
        model.priority,
        yaml(&model.pattern)
    );
    if !model.labels.is_empty() {
        text.push_str("    labels:\n");
        for (key, value) in &model.labels {
            let _ = writeln!(text, "      {}: {}", yaml(key), yaml(value));
        }
    }
    let arguments: Vec<String> =
        model.arguments.iter().map(|argument| format!(", {}", yaml(argument))).collect();
    let _ = writeln!(
        text,
        "  companions:\n  - name: c\n    exec: {{ command: [/c, \"{{{{ outboundPort }}}}\"{}] }}",
        arguments.concat()
    );
    let port = model.port.map(|port| format!(":{port}")).unwrap_or_default();
    let _ = writeln!(
        text,
        "  redirect: {{ outbound: [{{ to: \"c{port}\", exclude: {{ ports: {:?} }} }}] }}",
        model.excluded
    );
    let _ = writeln!(text, "  onFailure: {}", if model.closed { "closed" } else { "open" });
    text
}

fn anybody(name: String) -> Subject {
    Subject::new(RuntimeKind::Process, name)
}

proptest! {
    #[test]
    fn any_text_ends_in_a_set_or_in_faults(text in any::<String>()) {
        if let Err(faults) = one(&text) {
            prop_assert!(!faults.is_empty());
            prop_assert!(faults.iter().all(|fault| !fault.message.is_empty() && !fault.cure.is_empty()));
        }
    }

    #[test]
    fn yaml_like_text_ends_too(text in "([a-z]{1,3}: |- |\\[|\\]|\\{|\\}|, |\"|'|\n  |\n|---\n|&a |\\*a|!x |\\||>|#|\t|é|: |\\? |%Y|\u{85}){0,60}") {
        let _ = one(&text).map_err(|faults| faults.to_string());
    }

    #[test]
    fn damaged_policies_end_too(
        envoy in any::<bool>(),
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..20_usize, "[a-z:{}\\[\\]\", \n*&-]{0,6}"), 1..6),
    ) {
        let mut text: Vec<char> = if envoy { ENVOY } else { EVERYTHING }.chars().collect();
        for (at, length, instead) in cuts {
            let start = at.index(text.len());
            let end = (start + length).min(text.len());
            text.splice(start..end, instead.chars());
            if text.is_empty() {
                break;
            }
        }
        let text: String = text.into_iter().collect();
        if let Err(faults) = one(&text) {
            let lines = text.lines().count() + 1;
            prop_assert!(faults.iter().all(|fault| fault.line <= lines && fault.column >= 1), "{}", faults);
            let _ = faults.to_string();
        }
    }

    #[test]
    fn what_is_written_is_what_is_read(model in model()) {
        let set = one(&render(&model)).map_err(|faults| TestCaseError::fail(faults.to_string()))?;
        let policy = &set.policies()[0];
        let plan = policy.plan();
        prop_assert_eq!(policy.name().as_str(), &model.name);
        prop_assert_eq!(policy.priority(), model.priority);
        prop_assert_eq!(plan.on_failure == FailureMode::Closed, model.closed);
        let outbound = plan.redirect.outbound.first().expect("an outbound rule");
        prop_assert_eq!(outbound.to.port, model.port);
        prop_assert_eq!(outbound.exclude.ports.clone(), model.excluded.into_iter().collect::<pillion_workload::PortSet>());
        let pillion_workload::CompanionKind::Exec(exec) = &plan.companions[0].kind else { panic!("a program") };
        prop_assert_eq!(&exec.command[2..], &model.arguments[..]);
        // The labels as they were written, and a name that the pattern matches.
        let mut subject = anybody(model.pattern.replace('*', "").replace('?', "x"));
        subject.labels = model.labels;
        prop_assert!(set.plan_for(&subject).is_some());
    }

    #[test]
    fn the_highest_priority_wins_whatever_the_order_of_files(
        priorities in proptest::collection::btree_set(-50..50_i32, 1..12),
        patterns in proptest::collection::vec("[ab*?]{1,3}", 12),
        name in "[ab]{1,3}",
        turn in any::<prop::sample::Index>(),
    ) {
        let mut files: Vec<_> = priorities
            .iter()
            .zip(&patterns)
            .enumerate()
            .map(|(at, (priority, pattern))| {
                let spec = format!("select: {{ names: [\"{pattern}\"] }}, priority: {priority}");
                file(&format!("{at}.yaml"), &super::policy(&format!("p{at}"), &spec))
            })
            .collect();
        let set = parse(&files).expect("priorities differ");
        let count = files.len();
        files.rotate_left(turn.index(count));
        prop_assert_eq!(&parse(&files).expect("priorities differ"), &set);
        let decision = set.decide(&anybody(name.clone()));
        prop_assert_eq!(&set.decide(&anybody(name)), &decision);
        let matched: Vec<_> = decision.reasons.iter().filter(|reason| reason.verdict != Verdict::NotMatched).collect();
        prop_assert_eq!(decision.plan.as_ref().map(|plan| &plan.policy), matched.first().map(|reason| &reason.policy));
        let highest = matched.iter().map(|reason| reason.priority).max();
        prop_assert_eq!(matched.first().map(|reason| reason.priority), highest);
    }
}
