//! The policy parser on arbitrary files: it never panics, always ends, and what it accepts keeps its promises.
//!
//! Run from the repository's root, with nightly and cargo-fuzz:
//! `cargo +nightly fuzz run policy fuzz/corpus/policy fuzz/seeds/policy -- -max_len=8192 -timeout=10`

#![no_main]

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use libfuzzer_sys::fuzz_target;
use pillion_policy::{SourceFile, Verdict, parse};
use pillion_workload::{RuntimeKind, Subject};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // A byte 0x1c, which YAML refuses, cuts the input into several files.
    let files: Vec<SourceFile> = text
        .split('\u{1c}')
        .enumerate()
        .map(|(at, text)| SourceFile { path: format!("f{at}.yaml").into(), text: text.to_owned() })
        .collect();
    let set = match parse(&files) {
        Ok(set) => set,
        Err(faults) => {
            assert!(!faults.is_empty());
            let lines: HashMap<&Path, usize> = files
                .iter()
                .map(|file| {
                    (file.path.as_path(), file.text.bytes().filter(|byte| b"\r\n".contains(byte)).count() + 1)
                })
                .collect();
            for fault in &faults {
                assert!(!fault.message.is_empty() && !fault.cure.is_empty());
                assert!(fault.line <= lines[fault.path.as_path()]);
                assert!(!fault.snippet.contains('\u{1b}') && !fault.message.contains('\u{1b}'));
            }
            let _ = faults.to_string();
            return;
        }
    };
    assert_eq!(parse(&files).as_ref(), Ok(&set), "the same text gives the same set");
    for policy in set.policies() {
        let plan = policy.plan();
        assert!(!plan.companions.is_empty());
        let targets = plan.redirect.outbound.iter().map(|rule| &rule.to);
        for target in targets.chain(plan.redirect.inbound.iter().map(|rule| &rule.to)) {
            assert!(plan.companions.iter().any(|companion| companion.name == target.companion));
        }
    }
    for runtime in RuntimeKind::ALL {
        let subject = Subject {
            runtime,
            name: "web".to_owned(),
            namespace: Some("payments".to_owned()),
            labels: BTreeMap::from([("app".to_owned(), "api".to_owned())]),
            annotations: BTreeMap::new(),
            image: Some("docker.io/payments-api:1".to_owned()),
            unit: None,
            executable: Some("/usr/bin/curl".into()),
        };
        let decision = set.decide(&subject);
        assert_eq!(decision.plan.as_ref(), set.plan_for(&subject));
        let winners: Vec<_> =
            decision.reasons.iter().filter(|reason| reason.verdict != Verdict::NotMatched).collect();
        if let [first, second, ..] = winners[..] {
            assert!(first.priority > second.priority, "no tie is left to chance");
        }
    }
});
