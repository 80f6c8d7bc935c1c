//! What is accepted, and what becomes of it.

use std::{fs, path::Path, time::Duration};

use pillion_workload::{CompanionKind, ExistingConnections, FailureMode, Plan, Probe};

use super::{file, one, policy};
use crate::{PolicySet, SourceFile, parse};

fn example(name: &str) -> PolicySet {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging").join(name);
    let text = fs::read_to_string(&path).expect("the example is there");
    parse(&[SourceFile { path, text }]).unwrap_or_else(|faults| panic!("{faults}"))
}

fn plan(set: &PolicySet) -> &Plan {
    assert_eq!(set.policies().len(), 1);
    set.policies()[0].plan()
}

#[test]
fn the_smallest_policy_stands_as_it_is() {
    let text = "spec: { select: { runtimes: [process] }, companions: [{ name: r, builtin: relay }], \
                redirect: { outbound: [{ to: \"r:15001\" }] }, onFailure: open }";
    let set = parse(&[file("/etc/pillion/policy.d/smallest.yaml", text)]).expect("valid");
    assert_eq!(set, example("policies/smallest.yaml"), "the shipped file says the same");
    let plan = plan(&set);
    assert_eq!(plan.policy.as_str(), "smallest");
    assert_eq!(plan.on_failure, FailureMode::Open);
    let companion = &plan.companions[0];
    assert_eq!(companion.kind, CompanionKind::Relay);
    assert_eq!((companion.user.user.as_str(), companion.user.group.as_deref()), ("65534", Some("65534")));
    assert_eq!(
        (companion.ready.timeout, companion.stop_grace),
        (Duration::from_secs(10), Duration::from_secs(10))
    );
    let outbound = plan.redirect.outbound.first().expect("an outbound rule");
    assert_eq!((outbound.to.companion.as_str(), outbound.to.port), ("r", Some(15001)));
    assert!(plan.redirect.inbound.is_empty());
}

#[test]
fn every_field_arrives() {
    let set = example("companions/envoy/policy.yaml");
    let plan = plan(&set);
    let envoy = &plan.companions[0];
    let CompanionKind::Exec(exec) = &envoy.kind else { panic!("a program") };
    assert_eq!(exec.command[..3], ["/usr/bin/envoy", "-c", "{{ dir }}/envoy.yaml"]);
    assert_eq!(exec.command[4..6], ["--concurrency", "1"]);
    assert_eq!(exec.templates, [Path::new("/etc/pillion/envoy.yaml")]);
    assert_eq!(envoy.ready.timeout, Duration::from_secs(20));
    assert_eq!(envoy.ready.probe, Some(Probe::Http { port: 9901, path: "/ready".into() }));
    assert_eq!(envoy.stop_grace, Duration::from_secs(30));
    let resources = &envoy.resources;
    assert_eq!(
        (resources.memory, resources.cpu_millis, resources.pids),
        (Some(256 << 20), Some(1000), Some(64))
    );
    let outbound = plan.redirect.outbound.first().expect("an outbound rule");
    assert_eq!(outbound.exclude.ports, [22].into());
    assert_eq!(outbound.exclude.cidrs[0].to_string(), "169.254.0.0/16");
    assert_eq!(plan.redirect.inbound[0].ports.iter().copied().collect::<Vec<_>>(), [8080]);
    assert_eq!(plan.redirect.inbound[0].to.companion.as_str(), "envoy");
    assert_eq!(set.policies()[0].priority(), 100);
}

#[test]
fn the_other_examples_are_valid() {
    assert_eq!(plan(&example("policies/relay-in-and-out.yaml")).redirect.inbound[0].to.port, None);
    assert_eq!(plan(&example("policies/closed.yaml")).on_failure, FailureMode::Closed);
    let haproxy = example("companions/haproxy/policy.yaml");
    let outbound = plan(&haproxy).redirect.outbound.first().expect("an outbound rule");
    assert_eq!(outbound.exclude.cidrs[1].to_string(), "::/0");
    let dnsmasq = example("companions/dnsmasq/policy.yaml");
    let redirect = &plan(&dnsmasq).redirect;
    let dns = redirect.dns.as_ref().expect("questions to resolvers");
    assert_eq!((dns.companion.as_str(), dns.port), ("dnsmasq", None));
    assert!(redirect.outbound.is_empty() && redirect.inbound.is_empty());
}

#[test]
fn open_connections_stay_unless_it_says_so() {
    for (field, expected) in [
        ("", ExistingConnections::Keep),
        (", existingConnections: keep", ExistingConnections::Keep),
        (", existingConnections: reset", ExistingConnections::Reset),
    ] {
        let set = one(&policy("p", &format!("select: {{ names: [a] }}{field}"))).expect("valid");
        assert_eq!(plan(&set).existing_connections, expected, "{field:?}");
    }
}

#[test]
fn less_usual_spellings_are_accepted() {
    for spec in [
        "select: { names: [\"*\"] }",
        "select: { names: [a] }, onFailure: closed, priority: -1000000",
        "select: { names: [a] }, redirect: { inbound: [{ ports: [80], to: \"r:15006\" }, { ports: [81], to: \"r:15006\" }] }",
        "select: { units: [\"payments-*\", \"foo@1.service\"] }",
        "select: { labels: { \"app.kubernetes.io/name\": web, \"1\": \"2\" } }",
        "\"select\": { names: &n [a], images: *n }",
    ] {
        one(&policy("p", spec)).unwrap_or_else(|faults| panic!("{spec}: {faults}"));
    }
    for text in ["", "# nothing yet\n", "---\n---\n", "\u{feff}---\n..."] {
        assert_eq!(one(text), Ok(PolicySet::empty()), "{text:?}");
    }
    let windows = policy("p", "select: { names: [a] }").replace('\n', "\r\n");
    assert_eq!(one(&windows), one(&policy("p", "select: { names: [a] }")));
    let marked = format!("\u{feff}%YAML 1.2\n---\n{windows}");
    assert_eq!(one(&marked), one(&windows));
    let command = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nspec:\n  select: { names: [a] }\n  \
                   companions:\n  - name: c\n    exec: { command: [/bin/c, '', a, a, '{\"a\":{\"b\":1}}'], user: 1000, group: 0 }\n    \
                   ready: { exec: { command: [/bin/ok, '{{name}}'] } }\n    resources: { cpu: 0.5, memory: 1048576 }\n";
    let set = one(command).unwrap_or_else(|faults| panic!("{faults}"));
    let companion = &plan(&set).companions[0];
    assert_eq!((companion.user.user.as_str(), companion.user.group.as_deref()), ("1000", Some("0")));
    assert_eq!(companion.resources.cpu_millis, Some(500));
}

#[test]
fn moved_lines_change_nothing_and_other_words_do() {
    let text = policy("p", "select: { names: [a] }");
    let moved = format!("# a comment\n\n{text}");
    assert_eq!(one(&text), one(&moved));
    assert_eq!(one(&moved).expect("valid").policies()[0].place().line, 5);
    assert_ne!(one(&text), one(&policy("p", "select: { names: [b] }")));
    assert_ne!(one(&text), one(&policy("p", "select: { names: [a] }, priority: 1")));
    assert_ne!(one(&text), one(&policy("p", "select: { names: [a] }, onFailure: closed")));
}
