//! Which policy a workload gets, and why.

use std::{collections::BTreeMap, time::Instant};

use pillion_workload::{Facet, RuntimeKind, Sighting, Subject};

use super::{file, one, policy};
use crate::{PolicySet, Verdict, parse};

fn subject() -> Subject {
    Subject {
        namespace: Some("payments".into()),
        labels: BTreeMap::from([("app".into(), "api".into()), ("tier".into(), "back".into())]),
        image: Some("docker.io/acme/payments-api:1.0".into()),
        executable: Some("/usr/bin/payments".into()),
        ..Subject::new(RuntimeKind::Containerd, "web-1")
    }
}

#[test]
fn every_field_given_must_match_and_a_list_is_any_of() {
    for (select, wanted) in [
        ("runtimes: [containerd]", true),
        ("runtimes: [process, containerd]", true),
        ("runtimes: [process]", false),
        ("namespaces: [shop, payments]", true),
        ("namespaces: [shop]", false),
        ("labels: { app: api }", true),
        ("labels: { app: api, tier: back }", true),
        ("labels: { app: api, tier: front }", false),
        ("labels: { zone: a }", false),
        ("images: [\"*/payments-api:*\"]", true),
        ("images: [\"payments-api:*\"]", false),
        ("executables: [\"/usr/bin/payments*\"]", true),
        ("names: [\"web-?\"]", true),
        ("names: [\"web\"]", false),
        ("runtimes: [containerd], names: [\"web*\"], labels: { app: api }", true),
        ("runtimes: [containerd], names: [\"db*\"], labels: { app: api }", false),
        // What a workload does not have matches nothing, not even `*`.
        ("units: [\"*\"]", false),
    ] {
        let set = one(&policy("p", &format!("select: {{ {select} }}"))).expect("valid");
        let decision = set.decide(&subject());
        assert_eq!(decision.plan.is_some(), wanted, "{select}");
        assert_eq!(decision.plan.as_ref(), set.plan_for(&subject()), "{select}");
        assert_eq!(decision.reasons[0].verdict == Verdict::Chosen, wanted, "{select}");
    }
}

#[test]
fn units_that_may_match_are_known_by_name() {
    for (select, unit, may, patterns) in [
        ("units: [\"pay-*.service\", a.service]", "pay-1.service", true, &["pay-*.service", "a.service"][..]),
        ("units: [\"pay-*.service\"]", "web.service", false, &["pay-*.service"]),
        ("runtimes: [systemd]", "web.service", true, &["*"]),
        ("runtimes: [systemd], executables: [/bin/x]", "web.service", true, &["*"]),
        ("executables: [/bin/x]", "web.service", true, &[]),
        ("names: [\"web*\"]", "web.service", true, &[]),
        ("names: [\"web-*.service\"]", "web-1.service", true, &["web-*.service"]),
        ("runtimes: [systemd], names: [\"web-*\"]", "db.service", false, &["web-*"]),
        ("runtimes: [containerd]", "web.service", false, &[]),
        ("units: [\"*\"], namespaces: [x]", "web.service", false, &[]),
        ("labels: { a: b }", "web.service", false, &[]),
        ("images: [x]", "web.service", false, &[]),
    ] {
        let set = one(&policy("p", &format!("select: {{ {select} }}"))).expect("valid");
        let selector = set.policies()[0].selector();
        assert_eq!(selector.may_match_unit(unit), may, "{select}");
        assert_eq!(selector.unit_patterns(), patterns, "{select}");
    }
}

#[test]
fn the_explanation_names_every_field() {
    let set = parse(&[
        file("a.yaml", &policy("low", "select: { names: [\"web*\"] }, priority: -1")),
        file(
            "b.yaml",
            &policy("high", "select: { runtimes: [containerd], labels: { app: api } }, priority: 7"),
        ),
        file(
            "c.yaml",
            &policy(
                "other",
                "select: { units: [\"w*.service\"], labels: { app: web, zone: a } }, priority: 9",
            ),
        ),
    ])
    .expect("valid");
    assert_eq!(
        set.decide(&subject()).to_string(),
        "policy high applies\n\
         \n\
         other (priority 9): not matched\n  \
           labels      failed  wanted app=web; is app=api\n  \
           labels      failed  wanted zone=a; is not set\n  \
           units       failed  wanted w*.service; is not set\n\
         \n\
         high (priority 7): chosen\n  \
           runtimes    matched wanted containerd; is containerd\n  \
           labels      matched wanted app=api; is app=api\n\
         \n\
         low (priority -1): matched, but high has a higher priority\n  \
           names       matched wanted web*; is web-1\n"
    );
    let json = serde_json::to_value(set.decide(&subject())).expect("serialisable");
    assert_eq!(json["plan"]["policy"], "high");
    assert_eq!(json["reasons"][2]["verdict"]["shadowed"]["by"], "high");
    assert_eq!(json["reasons"][0]["fields"][0]["actual"], "app=api");
    assert_eq!(PolicySet::empty().decide(&subject()).to_string(), "no policy applies: there are none\n");
}

#[test]
fn a_workload_cannot_forge_a_line_of_the_explanation() {
    let set = one(&policy("p", "select: { names: [a] }")).expect("valid");
    let forged = Subject { name: "x\np (priority 9): chosen\u{1b}[2K".into(), ..subject() };
    let text = set.decide(&forged).to_string();
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn equal_priority_needs_proof_of_exclusion() {
    for (one_select, other_select, refused) in [
        ("runtimes: [process]", "runtimes: [containerd]", false),
        ("runtimes: [process]", "runtimes: [containerd, process]", true),
        ("runtimes: [process]", "names: [web]", true),
        ("namespaces: [a]", "namespaces: [b]", false),
        ("labels: { app: a }", "labels: { app: b }", false),
        ("labels: { app: a }", "labels: { tier: b }", true),
        ("names: [\"web-*\"]", "names: [\"db-*\"]", false),
        ("names: [\"web-*\"]", "names: [\"*-1\"]", true),
        ("names: [a, b]", "names: [c, \"?\"]", true),
        ("images: [\"*/web:*\"]", "images: [\"*/web\"]", true),
        ("executables: [\"/usr/bin/a\"]", "executables: [\"/usr/bin/b\"]", false),
    ] {
        let files = [("a.yaml", one_select), ("b.yaml", other_select)]
            .map(|(path, select)| file(path, &policy(&path[..1], &format!("select: {{ {select} }}"))));
        let result = parse(&files);
        assert_eq!(result.is_err(), refused, "{one_select} and {other_select}");
        if let Err(faults) = result {
            let fault = &faults.faults[0];
            assert_eq!((faults.len(), fault.path.to_str()), (1, Some("b.yaml")));
            assert_eq!(fault.note.as_ref().map(|note| note.path.to_str()), Some(Some("a.yaml")));
        }
        let [first, second] = files;
        let second = file("b.yaml", &second.text.replace("select:", "priority: 1, select:"));
        let set = parse(&[first, second]).expect("priorities decide");
        assert_eq!(set.policies()[0].name().as_str(), "b");
    }
}

#[test]
fn five_thousand_policies_are_no_matter() {
    let files: Vec<_> = (0..5)
        .map(|at| {
            let text: Vec<String> = (0..1_000)
                .map(|n| {
                    let select =
                        format!("select: {{ names: [\"app-{at}-{n}-*\"], images: [\"*/app-{n}:*\"] }}");
                    format!("---\n{}", policy(&format!("p-{at}-{n}"), &select))
                })
                .collect();
            file(&format!("{at}.yaml"), &text.concat())
        })
        .collect();
    let set = parse(&files).unwrap_or_else(|faults| panic!("{faults}"));
    let subject =
        Subject { name: "app-4-999-x".into(), image: Some("docker.io/app-999:1".into()), ..subject() };
    let begin = Instant::now();
    for _ in 0..100 {
        assert_eq!(set.plan_for(&subject).expect("a plan").policy.as_str(), "p-4-999");
    }
    // 0.1 ms each was measured; the bound only keeps the square of something out.
    assert!(begin.elapsed().as_millis() < 2_000, "{:?}", begin.elapsed() / 100);
    assert_eq!(set.decide(&subject).reasons.len(), 5_000);
}

#[test]
fn of_what_is_not_known_a_closed_policy_may_be_the_one() {
    let at = |name: &str, priority: i32, select: &str, mode: &str| {
        format!(
            "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: {{ name: {name} }}\nspec:\n  \
             priority: {priority}\n  select: {{ {select} }}\n  companions: [{{ name: r, builtin: relay }}]\n  \
             redirect: {{ outbound: [{{ to: r }}] }}\n  onFailure: {mode}\n"
        )
    };
    let text = [
        at("shop", 2, "namespaces: [shop]", "open"),
        at("api", 1, "labels: { app: api }", "closed"),
        at("payments", 0, "namespaces: [payments]", "open"),
    ];
    let set = parse(&[file("p.yaml", &text.join("---\n"))]).expect("valid");
    let known = |namespace: Option<&str>, labels: &[(&str, &str)]| Subject {
        namespace: namespace.map(str::to_owned),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..subject()
    };
    let labels = [Facet::Labels].as_slice();
    for (subject, unknown, strictest) in [
        (known(Some("payments"), &[("app", "api")]), [].as_slice(), Some("api")),
        (known(Some("payments"), &[("app", "web")]), &[], Some("payments")),
        (known(Some("other"), &[("app", "web")]), &[], None),
        (known(Some("payments"), &[]), labels, Some("api")),
        // An open policy that has it for certain is before the closed one.
        (known(Some("shop"), &[]), labels, Some("shop")),
        (known(None, &[]), &[Facet::Namespace, Facet::Labels], Some("api")),
        (known(None, &[("app", "web")]), &[Facet::Namespace], Some("shop")),
        (known(Some("other"), &[]), &[Facet::Image, Facet::Name, Facet::Executable], None),
    ] {
        let sightings = [Sighting { subject, unknown: unknown.to_vec() }];
        let found = set.strictest_for(&sightings).map(|policy| policy.name().as_str());
        assert_eq!(found, strictest, "{sightings:?}");
    }
    // It may be a pod or one of its containers.
    let either = [known(Some("other"), &[]), known(Some("payments"), &[("app", "api")])].map(Sighting::from);
    assert_eq!(set.strictest_for(&either).map(|policy| policy.name().as_str()), Some("api"));
    assert_eq!(set.strictest_for(&[]), None);
}
