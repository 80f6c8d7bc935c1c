//! Companions that somebody else runs.

use pillion_workload::{CompanionKind, ExternalSpec, Glob};

use super::one;

fn text(companion: &str, to: &str) -> String {
    format!(
        "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: {{ name: p }}\n\
         spec: {{ select: {{ names: [a] }}, companions: [{{ name: mesh, {companion} }}], \
         redirect: {{ outbound: [{{ to: \"{to}\" }}] }} }}\n"
    )
}

#[test]
fn every_field_arrives() {
    let external = "external: { executables: [/usr/local/bin/envoy, \"*/envoy\"], users: [1337, envoy], \
                    container: istio-proxy, cgroup: \"/kubepods*\" }, ready: { tcp: { port: 15021 } }";
    let set = one(&text(external, "mesh:15001")).unwrap_or_else(|faults| panic!("{faults}"));
    let glob = |pattern| Glob::new(pattern).expect("a pattern");
    let wanted = ExternalSpec {
        executables: vec![glob("/usr/local/bin/envoy"), glob("*/envoy")],
        users: vec!["1337".to_owned(), "envoy".to_owned()],
        container: Some("istio-proxy".to_owned()),
        cgroup: Some(glob("/kubepods*")),
    };
    let plan = set.policies()[0].plan();
    assert_eq!(plan.companions[0].kind, CompanionKind::External(wanted));
    assert!(plan.companions[0].is_external());
    // As the journal keeps it.
    let kept = serde_json::to_string(&plan).expect("JSON");
    assert_eq!(serde_json::from_str::<pillion_workload::Plan>(&kept).expect("a plan"), **plan);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_cure() {
    for (companion, to, message, cure) in [
        ("external: {}", "mesh:1", "does not say which process", "users: [envoy]"),
        ("external: { users: [] }", "mesh:1", "external.users", "remove"),
        ("external: { users: [a] }", "mesh", "none can be chosen for it", "\"mesh:PORT\""),
        ("external: { user: a }", "mesh:1", "does not start", "users: [NAME]"),
        ("external: { users: [a], templates: [/a] }", "mesh:1", "does not start", "exec"),
        (
            "external: { users: [a] }, resources: { pids: 1 }",
            "mesh:1",
            "`resources` says nothing",
            "remove it",
        ),
        ("external: { users: [a] }, stopGrace: 1s", "mesh:1", "`stopGrace` says nothing", "remove it"),
        ("external: { executables: [envoy] }", "mesh:1", "matches no executable", "\"*/envoy\""),
        ("external: { cgroup: envoy }", "mesh:1", "matches no cgroup", "\"*/envoy\""),
        ("external: { cgroup: \"/a[0-9]\" }", "mesh:1", "external.cgroup: the pattern", "?"),
        ("external: { container: Istio_Proxy }", "mesh:1", "no container of a pod", "istio-proxy"),
        ("external: { users: [\"a b\"] }", "mesh:1", "external.users[0]", "1000"),
        ("external: { pids: [1] }", "mesh:1", "unknown field `pids`", "one of"),
        ("external: { users: [a] }, builtin: relay", "mesh:1", "has both `builtin` and `external`", "one of"),
    ] {
        let faults = one(&text(companion, to)).expect_err(companion);
        let told = faults.to_string();
        let fault = faults.iter().find(|fault| fault.message.contains(message));
        assert!(fault.is_some_and(|fault| fault.cure.contains(cure)), "{companion}: {told}");
    }
}
