//! What the command line makes of an agent's answers, by exit code and stream. The agent here is a socket that gives one
//! answer, so that every outcome can be had, also those that are rare with a real one.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixListener,
    process::{Command, Stdio},
    thread::JoinHandle,
};

use serde_json::{Value, json};
use tempfile::TempDir;

struct Agent {
    directory: TempDir,
    served: JoinHandle<String>,
}

/// Answers one request; what was asked comes back from [`Agent::asked`].
fn agent(status: &str, body: &str) -> Agent {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let listener = UnixListener::bind(directory.path().join("admin.sock")).expect("bindable");
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let served = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        let mut reader = BufReader::new(&stream);
        let (mut request, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a line");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line == "\r\n" {
                break;
            }
            request.push_str(&line);
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("the body");
        (&stream).write_all(answer.as_bytes()).expect("it listens");
        format!("{} {}", request.lines().next().unwrap_or_default(), String::from_utf8_lossy(&body))
    });
    Agent { directory, served }
}

impl Agent {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pillion"));
        command.args(arguments).arg("--run-dir").arg(self.directory.path()).stdin(Stdio::null());
        command
    }

    fn asked(self) -> String {
        self.served.join().expect("it served")
    }
}

/// Exit code, stdout, stderr and what the agent was asked.
fn outcome(arguments: &[&str], status: &str, answer: &Value) -> (i32, String, String, String) {
    let agent = agent(status, &answer.to_string());
    let output = agent.command(arguments).output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let code = output.status.code().expect("not killed");
    (code, text(output.stdout), text(output.stderr), agent.asked())
}

fn workload(id: &str, verdict: &str) -> Value {
    json!({
        "id": id, "runtime": "containerd", "name": "web", "namespace": "default", "pid": 4711,
        "verdict": verdict, "since": "2026-01-02T03:04:05.678Z", "reason": null, "policy": "relay-all",
        "companions": [{ "name": "r", "state": "ready", "pid": 4712, "restarts": 0, "error": null }],
        "firstInstruction": "before", "attachMillis": 17,
    })
}

fn status(health: &str, problems: &Value) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"), "pid": 1, "startedAt": "2026-01-02T03:04:05.678Z",
        "health": health, "problems": problems,
        "policies": {
            "directory": "/etc/pillion/policy.d", "generation": 1, "ofEarlierAgent": false, "loadedAt": "2026-01-02T03:04:05.678Z",
            "policies": [{ "name": "relay-all", "priority": 7, "workloads": 1 }], "refused": null,
        },
        "sources": [{ "name": "containerd", "state": "up", "since": "2026-01-02T03:04:05.678Z", "error": null, "workloads": 2 }],
        "dataplane": { "pinRoot": "/sys/fs/bpf/pillion", "counters": { "passed": 3 } },
        "workloads": { "attached": 1, "notMatched": 1 },
    })
}

#[test]
fn health_is_the_exit_code_of_status() {
    let (code, stdout, stderr, asked) = outcome(&["status"], "200 OK", &status("ok", &json!([])));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(asked.starts_with("GET /v1/status "), "{asked}");
    assert!(
        stdout.contains("1 in force") && stdout.contains("relay-all") && stdout.contains("containerd"),
        "{stdout}"
    );
    assert!(!stdout.contains("COUNTER"), "{stdout}");

    let problems = json!([{ "area": "source", "message": "containerd is down\u{1b}[2J" }]);
    let (code, stdout, ..) = outcome(&["status", "-o", "wide"], "200 OK", &status("degraded", &problems));
    assert_eq!(code, 5);
    assert!(stdout.contains("containerd is down\\u{1b}[2J") && stdout.contains("COUNTER"), "{stdout}");

    let (code, stdout, ..) = outcome(&["status", "-o", "json"], "200 OK", &status("degraded", &problems));
    let printed: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, printed), (5, status("degraded", &problems)));
}

#[test]
fn lists_have_stable_columns() {
    let answer = json!({ "workloads": [workload("containerd/default/web", "attached"), workload("process/1-2", "failed")] });
    let (code, stdout, stderr, _) = outcome(&["list"], "200 OK", &answer);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let mut lines = stdout.lines();
    let head: Vec<_> = lines.next().expect("a head").split_whitespace().collect();
    assert_eq!(head, ["WORKLOAD", "VERDICT", "SINCE", "POLICY", "COMPANIONS", "GATE", "ATTACHED"]);
    assert!(lines.next().expect("a row").starts_with("containerd/default/web  attached  "), "{stdout}");

    let (_, stdout, ..) = outcome(&["list", "-o", "name"], "200 OK", &answer);
    assert_eq!(stdout, "containerd/default/web\nprocess/1-2\n");

    let (code, stdout, stderr, _) = outcome(&["ls"], "200 OK", &json!({ "workloads": [] }));
    assert_eq!((code, stdout.lines().count()), (0, 1), "the head alone");
    assert!(stderr.contains("no workloads"), "{stderr}");
}

#[test]
fn fields_of_a_newer_agent_are_no_error() {
    let mut newer = workload("process/1-2", "attached");
    newer["colour"] = json!("blue");
    assert_eq!(outcome(&["list"], "200 OK", &json!({ "workloads": [newer] })).0, 0);
}

#[test]
fn attach_and_detach_say_what_came_of_it() {
    for (command, verdict, code) in [
        ("attach", "attached", 0),
        ("attach", "attaching", 1),
        ("attach", "degraded", 5),
        ("attach", "failed", 1),
        ("attach", "notMatched", 1),
        ("detach", "held", 0),
        ("detach", "detaching", 1),
        ("detach", "attached", 1),
    ] {
        let (exit, stdout, stderr, asked) =
            outcome(&[command, "process/1-2", "--wait", "5s"], "200 OK", &workload("process/1-2", verdict));
        assert_eq!(exit, code, "{command} {verdict}: {stderr}");
        assert!(stdout.contains(verdict), "{stdout}");
        assert_eq!(stderr.is_empty(), code != 1, "{command} {verdict}: {stderr}");
        assert!(asked.starts_with(&format!("POST /v1/{command} ")), "{asked}");
        assert!(asked.ends_with(r#"{"workload":"process/1-2","waitSeconds":5}"#), "{asked}");
    }
}

#[test]
fn what_the_agent_refuses_is_a_failure_in_its_own_words() {
    let answer = json!({ "error": "no workload process/1-2 is known" });
    let (code, stdout, stderr, asked) = outcome(&["describe", "process/1-2"], "404 Not Found", &answer);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(stderr, "error: no workload process/1-2 is known\n");
    assert!(asked.starts_with("GET /v1/workloads/process/1-2 "), "{asked}");

    let (code, _, stderr, _) = outcome(&["list"], "200 OK", &json!({ "jobs": [] }));
    assert_eq!(code, 1);
    assert!(stderr.contains("cannot be read") && stderr.contains("pillion version"), "{stderr}");
}

#[test]
fn versions_that_differ_are_noted() {
    let mut answer = status("ok", &json!([]));
    answer["version"] = json!("99.0.0");
    let (code, stdout, stderr, _) = outcome(&["version"], "200 OK", &answer);
    assert_eq!(code, 0);
    assert!(stdout.contains("99.0.0") && stderr.contains("different versions"), "{stdout}{stderr}");
}

fn event(sequence: u64, kind: &str) -> String {
    let event = json!({
        "sequence": sequence, "at": "2026-01-02T03:04:05.678Z", "kind": kind, "message": "companions ready",
        "workload": "process/1-2", "firstInstruction": "before", "attachMillis": 17,
    });
    format!("{event}\n")
}

#[test]
fn events_come_line_by_line() {
    let body = event(1, "attaching") + &event(2, "attached");
    let agent_of = |body: &str| agent("200 OK", body);

    let agent = agent_of(&body);
    let output = agent.command(&["events"]).output().expect("the binary runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(
        text.starts_with("2026-01-02T03:04:05.678Z  attaching        process/1-2: companions ready\n"),
        "{text}"
    );
    assert!(agent.asked().starts_with("GET /v1/events?follow=false "));

    let agent = agent_of(&body);
    let output = agent.command(&["events", "-f", "-o", "json"]).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(4), "an agent that ends the stream has stopped");
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    for line in lines.lines() {
        assert_eq!(serde_json::from_str::<Value>(line).expect("JSON")["workload"], "process/1-2");
    }
    assert_eq!(lines.lines().count(), 2);
}

#[test]
fn a_reader_that_has_seen_enough_ends_events_quietly() {
    let many: String = (1..20_000).map(|sequence| event(sequence, "attached")).collect();
    let agent = agent("200 OK", &many);
    let errors = agent.directory.path().join("errors");
    let mut child = agent
        .command(&["events", "-o", "json"])
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&errors).expect("writable"))
        .spawn()
        .expect("the binary runs");
    let mut line = String::new();
    let mut reader = BufReader::with_capacity(64, child.stdout.take().expect("piped"));
    reader.read_line(&mut line).expect("a line");
    drop(reader);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_eq!(fs::read_to_string(errors).expect("readable"), "");
}
