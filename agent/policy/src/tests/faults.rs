//! What is refused, and in which words.

use std::{fs, path::Path, time::Instant};

use super::{file, one, policy};
use crate::{MAX_FILE_BYTES, SourceFile, parse};

/// With `PILLION_UPDATE_SNAPSHOTS=1` the texts are written instead of compared: read the difference before it is committed.
#[test]
fn the_texts_are_those_on_record() {
    let update = std::env::var_os("PILLION_UPDATE_SNAPSHOTS").is_some();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/faults");
    for name in ["everything", "several-documents", "conflicts", "ports"] {
        let text = fs::read_to_string(directory.join(format!("{name}.yaml"))).expect("the file is there");
        let faults = parse(&[SourceFile { path: format!("{name}.yaml").into(), text }]).expect_err("refused");
        let (shown, kept) = (format!("{faults}\n"), directory.join(format!("{name}.txt")));
        if update {
            fs::write(&kept, &shown).expect("the directory can be written");
        }
        let recorded = fs::read_to_string(&kept).expect("the text is there");
        for (line, (shown, recorded)) in shown.lines().zip(recorded.lines()).enumerate() {
            assert_eq!(shown, recorded, "{name}.txt, line {}", line + 1);
        }
        assert_eq!(shown.lines().count(), recorded.lines().count(), "{name}.txt");
    }
}

/// Each with the line and column that it must point at, and a part of message and cure.
#[test]
fn one_slip_is_one_fault() {
    for (spec, place, message, cure) in [
        ("select: { runtimes: [nri] }", (4, 73), "unknown runtime", "did you mean `containerd`?"),
        ("select: { runtimes: process }", (4, 72), "must be a list", "[process]"),
        ("select: { labels: {} }", (4, 70), "is empty", "add a label"),
        ("select: { labels: { a: true } }", (4, 75), "must be a text, found `true`", "\"true\""),
        ("select: { labels: { 1.10: x } }", (4, 72), "name must be a text", "in quotes"),
        ("select: { names: [~] }", (4, 70), "found nothing", "write a text"),
        ("select: { names: [a, a] }", (4, 73), "lists `a` twice", "remove one"),
        ("select: { names: [\"a[0-9]\"] }", (4, 70), "holds '['", "item of its own"),
        ("select: { names: [a] }, priority: {{ x }}", (4, 86), "whole number", "from -1000000"),
        ("select: { names: [{{ name }}] }", (4, 70), "found a mapping", "{{ … }}"),
        ("select: { names: [a] }, rollout: { percent: 10 }", (4, 76), "not supported", "remove it"),
        (
            "select: { names: [a] }, priority: \"5\"",
            (4, 86),
            "found a text",
            "without quotes or leading zeros: 5",
        ),
        ("select: { names: [a] }, priority: 1.5", (4, 86), "whole number", "from -1000000 to 1000000"),
        ("select: { names: [a] }, redirect: {}", (4, 86), "neither", "outbound"),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: \"r:http\" }] }",
            (4, 105),
            "`http` is no port",
            "1 to 65535",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: \"r:+80\" }] }",
            (4, 105),
            "`+80` is no port",
            "1 to 65535",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: q }] }",
            (4, 105),
            "no companion",
            "named `r`",
        ),
        (
            "select: { names: [a] }, redirect: { inbound: [{ ports: [0x50000], to: r }] }",
            (4, 108),
            "out of range",
            "1 to 65535",
        ),
        ("select: { names: [a] }, <<: { priority: 1 }", (4, 76), "unknown field `<<`", "merge keys"),
        ("select: { names: [a] }, runtimes: [process]", (4, 76), "unknown field", "belongs in spec.select"),
    ] {
        let text = policy("p", spec);
        let faults = one(&text).expect_err(spec);
        let fault = &faults.faults[0];
        assert_eq!(faults.len(), 1, "{faults}");
        assert_eq!((fault.line, fault.column), place, "{fault}");
        assert!(fault.message.contains(message), "{fault}");
        assert!(fault.cure.contains(cure), "{fault}");
    }
}

/// Likewise.
#[test]
fn one_slip_in_a_redirection_is_one_fault() {
    for (spec, place, message, cure) in [
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: r }], dns: { to: r } }",
            (4, 122),
            "which is no resolver",
            "name a companion that answers DNS",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: r, protocols: [icmp] }] }",
            (4, 120),
            "no protocol that can be redirected",
            "tcp or udp",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: r, ports: [\"9-\"] }] }",
            (4, 116),
            "a port or a range of ports",
            "8000-8999",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: \"r:1\" }, { to: \"r:1\", ports: [1] }] }",
            (4, 120),
            "never reached",
            "before the one for all",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: \"r:1\", ports: [1] }, { to: \"r:2\" }] }",
            (4, 132),
            "all outbound connections on one port",
            "the same port",
        ),
        (
            "select: { names: [a] }, redirect: { inbound: [{ ports: [1], to: r, protocols: [udp] }] }",
            (4, 130),
            "datagrams that arrive cannot be redirected",
            "remove udp",
        ),
        (
            "select: { names: [a] }, redirect: { inbound: [{ ports: [1], to: r }], exclude: { ports: [2] } }",
            (4, 131),
            "nothing to be excluded from",
            "add `outbound`",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: r, exclude: { executables: [/bin/a] } }] }",
            (4, 119),
            "cannot have `executables`",
            "spec.redirect.exclude",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: r }], exclude: { executables: [a/b] } }",
            (4, 136),
            "no absolute path",
            "/usr/bin/backup",
        ),
        (
            "select: { names: [a] }, redirect: { outbound: [{ to: r }], exclude: { users: [mesh] } }",
            (4, 130),
            "the name `mesh`",
            "id -u NAME",
        ),
    ] {
        let text = policy("p", spec);
        let faults = one(&text).expect_err(spec);
        let fault = &faults.faults[0];
        assert_eq!(faults.len(), 1, "{faults}");
        assert_eq!((fault.line, fault.column), place, "{fault}");
        assert!(fault.message.contains(message), "{fault}");
        assert!(fault.cure.contains(cure), "{fault}");
    }
}

#[test]
fn faults_of_all_files_are_told_in_their_order() {
    let faults = parse(&[
        file("b.yaml", "spec: []"),
        file("a.yaml", &policy("same", "select: { names: [a] }")),
        file("c.yaml", &policy("same", "select: { names: [a] }, priority: 1, x: 1")),
        file("relay two.yaml", "spec: { select: { names: [z] }, companions: [{ name: r, builtin: relay }] }"),
        file("d.yaml", "a: ["),
    ])
    .expect_err("refused");
    let told: Vec<_> =
        faults.iter().map(|fault| (fault.path.to_str().expect("UTF-8"), fault.message.as_str())).collect();
    assert_eq!(
        told,
        [
            ("b.yaml", "spec must be a mapping, found a list"),
            ("c.yaml", "two policies are named `same`"),
            ("c.yaml", "spec: unknown field `x`"),
            ("relay two.yaml", "the policy has no name, and the file's name `relay two` cannot serve as one"),
            ("d.yaml", "a bracket is never closed"),
        ]
    );
    assert!(faults.to_string().ends_with("5 faults in 4 files"));
}

#[test]
fn too_much_is_refused_in_time() {
    let relay = policy("p", "select: { names: [a] }");
    let many = |count: usize| format!("---\n{relay}").repeat(count);
    for (text, message) in [
        ("x".repeat(MAX_FILE_BYTES + 1), "4194305 bytes"),
        (many(1_001), "1001 policies"),
        ("---\na\n".repeat(170_000), "170000 policies"),
        (policy("p", &format!("select: {{ names: [{}] }}", "a,".repeat(5_000))), "5000 items"),
        (policy("p", &format!("select: {{ names: [{}] }}", "a,".repeat(500_000))), "too large"),
        (policy("p", &format!("select: {{ names: [a] }}, {}", "x: 1, ".repeat(3_000))), "unknown field `x`"),
    ] {
        let faults = one(&text).expect_err(message);
        assert!(faults.iter().any(|fault| fault.message.contains(message)), "{}", faults.faults[0]);
        assert!(faults.to_string().len() < 1 << 20);
    }
    let files: Vec<SourceFile> = (0..6).map(|at| file(&format!("{at}.yaml"), &many(900))).collect();
    let faults = parse(&files).expect_err("too many");
    assert!(faults.iter().any(|fault| fault.message.contains("all files together have 5400")));
    assert!(faults.omitted > 0);
}

/// 5,000 policies with patterns that only a thorough look can tell apart.
#[test]
fn comparing_hostile_patterns_is_bounded() {
    let files: Vec<SourceFile> = (0..5)
        .map(|at| {
            let text: Vec<String> = (0..1_000)
                .map(|n| {
                    let pattern = format!("*{}{:02}{n:04}*", "a?".repeat(60), at);
                    format!(
                        "---\n{}",
                        policy(
                            &format!("p{at}-{n}"),
                            &format!("select: {{ names: [\"{}\"] }}", &pattern[1..])
                        )
                    )
                })
                .collect();
            file(&format!("{at}.yaml"), &text.concat())
        })
        .collect();
    let begin = Instant::now();
    let faults = parse(&files).expect_err("too costly");
    assert!(faults.faults[0].message.starts_with("too many policies with priority 0"), "{faults}");
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
}
