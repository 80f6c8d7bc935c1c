//! The command line from outside: exit codes, which stream gets what, and the formats, on the real binary.
//!
//! Needs neither an agent nor root. What the kernel does is tested in the `tests` crate.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

const GOOD: &str = "\
apiVersion: pillion.dev/v1alpha1
kind: InjectionPolicy
metadata: { name: relay-all }
spec:
  priority: 7
  select: { runtimes: [process], labels: { app: api } }
  companions: [{ name: r, builtin: relay }]
  redirect: { outbound: [{ to: \"r:15001\" }] }
  onFailure: open
";

fn pillion(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pillion"));
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PILLION_")) {
        command.env_remove(name);
    }
    command
}

#[track_caller]
fn run(arguments: &[&str], code: i32) -> (String, String) {
    finish(pillion(arguments).output().expect("the binary runs"), code)
}

#[track_caller]
fn with_stdin(arguments: &[&str], text: &str, code: i32) -> (String, String) {
    let mut child = pillion(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads its standard input");
    finish(child.wait_with_output().expect("it ends"), code)
}

#[track_caller]
fn finish(output: Output, code: i32) -> (String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "stdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

fn file(directory: &TempDir, name: &str, text: &str) -> String {
    let path = directory.path().join(name);
    fs::write(&path, text).expect("writable");
    path.to_string_lossy().into_owned()
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_wrong() {
    for arguments in [
        &["no-such-command"][..],
        &["list", "-o", "xml"],
        &["describe"],
        &["describe", "not a workload id"],
        &["run", "--", "true"],
        &["run", "--policy", "p.yaml"],
        &["validate"],
        &["explain"],
        &["explain", "--runtime", "lxc", "--name", "x"],
        &["attach", "process/1-2", "--wait", "1h"],
        &["completion", "tcl"],
    ] {
        let (stdout, stderr) = run(arguments, 2);
        assert!(stdout.is_empty() && stderr.contains("error:"), "{arguments:?}: {stderr}");
    }
    let (stdout, stderr) = run(&[], 2);
    assert!(stdout.is_empty() && stderr.contains("Usage:"), "{stderr}");
}

#[test]
fn every_command_has_help_with_an_example_that_parses() {
    let (help, _) = run(&["--help"], 0);
    let commands = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let names: Vec<&str> =
        commands.map_while(|line| line.strip_prefix("  ")?.split_whitespace().next()).collect();
    assert_eq!(names.len(), 18, "{names:?}");
    for name in names {
        let (help, _) = run(&[name, "--help"], 0);
        assert!(help.contains("Usage: pillion"), "{name}: {help}");
        assert!(name == "version" || help.contains("Example"), "{name}: {help}");
        let examples = help.lines().map(str::trim).filter(|line| line.starts_with("pillion "));
        for example in examples {
            // Up to the first pipe or redirection; a wrong flag or a missing argument would be exit code 2.
            let words = example.split(['|', '>']).next().unwrap_or_default();
            let mut words: Vec<&str> = words.split_whitespace().skip(1).collect();
            let behind_separator = match words[0] {
                // What follows it is another command's.
                "on-node" => 1,
                _ => words.iter().position(|word| *word == "--").unwrap_or(words.len()),
            };
            words.insert(behind_separator, "--help");
            run(&words, 0);
        }
    }
}

#[test]
fn the_hidden_commands_are_hidden_and_harmless() {
    let (help, _) = run(&["--help"], 0);
    for command in ["launch", "companion"] {
        assert!(!help.lines().any(|line| line.trim_start().starts_with(command)), "{help}");
        let (stdout, stderr) = run(&[command], 126);
        assert!(stdout.is_empty() && stderr.contains("not for use by hand"), "{stderr}");
    }
}

#[test]
fn valid_policies_get_a_line_each() {
    let directory = directory();
    let path = file(&directory, "a.yaml", GOOD);
    let (stdout, stderr) = run(&["validate", shown(directory.path())], 0);
    assert!(stdout.starts_with(&format!("ok: relay-all (priority 7) {path}:")), "{stdout}");
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    assert!(stderr.is_empty(), "{stderr}");
    assert_eq!(run(&["validate", "-o", "name", &path], 0).0, "relay-all\n");
    assert!(with_stdin(&["validate", "-"], GOOD, 0).0.contains(" <stdin>:"));

    let (_, stderr) = run(&["validate", shown(&directory.path().join("absent"))], 1);
    assert!(stderr.contains("cannot read") && stderr.contains("absent"), "{stderr}");
    fs::remove_file(path).expect("removable");
    let (stdout, stderr) = run(&["validate", shown(directory.path())], 0);
    assert!(stdout.is_empty() && stderr.contains("no *.yaml"), "{stderr}");
}

#[test]
fn faults_go_to_stderr_all_at_once_with_exit_code_3() {
    let directory = directory();
    let bad = GOOD.replace("onFailure: open", "onFailure: opne").replace("r:15001", "q:15001");
    let path = file(&directory, "bad.yaml", &bad);
    let (stdout, stderr) = run(&["validate", &path], 3);
    assert!(stdout.is_empty(), "{stdout}");
    assert!(stderr.contains("bad.yaml:8:") && stderr.contains("bad.yaml:9:"), "{stderr}");
    assert!(stderr.trim_end().ends_with("2 faults in 1 file"), "{stderr}");

    let (stdout, stderr) = run(&["validate", "-o", "json", &path], 3);
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert!(stderr.is_empty(), "{stderr}");
    assert_eq!(report["valid"], false);
    assert_eq!(report["faults"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["faults"][0]["line"], 8);
}

#[test]
fn one_policy_in_two_files_is_a_fault() {
    let directory = directory();
    file(&directory, "a.yaml", GOOD);
    file(&directory, "b.yaml", GOOD);
    let (_, stderr) = run(&["validate", shown(directory.path())], 3);
    assert!(stderr.contains("a.yaml") && stderr.contains("b.yaml"), "{stderr}");
}

#[test]
fn explain_says_what_matched_and_what_did_not() {
    let directory = directory();
    let policy = file(&directory, "p.yaml", GOOD);
    let described = ["explain", "--policy", &policy, "--runtime", "process", "--name", "curl"];

    let (stdout, _) = run(&[&described[..], &["--label", "app=api"]].concat(), 0);
    assert!(stdout.starts_with("policy relay-all applies\n"), "{stdout}");
    assert!(
        stdout.contains("rule 1: connections that it makes go to r:15001, except to loopback"),
        "{stdout}"
    );

    let (stdout, _) = run(&[&described[..], &["--label", "app=web"]].concat(), 0);
    assert!(stdout.starts_with("no policy applies\n"), "{stdout}");
    let failed =
        stdout.lines().find(|line| line.trim_start().starts_with("labels")).expect("the field is listed");
    assert!(failed.contains("no") && failed.contains("app=api") && failed.contains("web"), "{failed}");

    let (stdout, _) = run(&[&described[..], &["-o", "json"]].concat(), 0);
    let answer: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(answer["plan"], Value::Null);
    assert_eq!(answer["reasons"][0]["outcome"], "notMatched");
}

#[test]
fn a_workload_can_be_described_in_a_file() {
    let directory = directory();
    let policy = file(&directory, "p.yaml", GOOD);
    let subject = file(&directory, "w.yaml", "runtime: process\nname: curl\nlabels: { app: api }\n");
    let (stdout, _) = run(&["explain", "--policy", &policy, "--subject", &subject, "-o", "name"], 0);
    assert_eq!(stdout, "relay-all\n");
    let json = r#"{ "runtime": "process", "name": "curl", "labels": { "app": "api" } }"#;
    let (stdout, _) = with_stdin(&["explain", "--policy", &policy, "--subject", "-", "-o", "yaml"], json, 0);
    assert!(stdout.contains("policy: relay-all"), "{stdout}");

    let wrong = "runtime: process\nname: curl\nlabel: { app: api }\n";
    let (stdout, stderr) = with_stdin(&["explain", "--policy", &policy, "--subject", "-"], wrong, 1);
    assert!(stdout.is_empty() && stderr.contains("label") && stderr.contains("line 3"), "{stderr}");

    let bad = file(&directory, "bad.yaml", "kind: Nothing\n");
    run(&["explain", "--policy", &bad, "--subject", &subject], 3);
}

#[test]
fn without_an_agent_it_is_exit_code_4_with_the_cure() {
    let directory = directory();
    let run_dir = shown(directory.path());
    for arguments in [
        &["status"][..],
        &["list"],
        &["describe", "process/1-2"],
        &["attach", "process/1-2"],
        &["detach", "process/1-2"],
        &["events"],
        &["explain", "process/1-2"],
    ] {
        let (stdout, stderr) = run(&[arguments, &["--run-dir", run_dir]].concat(), 4);
        assert!(stdout.is_empty(), "{arguments:?}: {stdout}");
        assert!(stderr.contains("cannot reach the agent") && stderr.contains("pillion agent"), "{stderr}");
    }
    let output = pillion(&["list"]).env("PILLION_RUN_DIR", run_dir).output().expect("the binary runs");
    assert!(finish(output, 4).1.contains(run_dir));
}

#[test]
fn an_agent_that_never_answers_is_given_up() {
    let directory = directory();
    let _listener =
        std::os::unix::net::UnixListener::bind(directory.path().join("admin.sock")).expect("bindable");
    let (_, stderr) = run(&["list", "--run-dir", shown(directory.path()), "--timeout", "100ms"], 4);
    assert!(stderr.contains("silent for 100ms"), "{stderr}");
}

#[test]
fn versions_are_told_without_an_agent() {
    let directory = directory();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(run(&["--version"], 0).0, format!("pillion {version}\n"));
    let (stdout, stderr) = run(&["version", "--run-dir", shown(directory.path()), "-o", "json"], 0);
    let answer: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&answer["client"], &answer["agent"]), (&Value::from(version), &Value::Null));
    assert!(stderr.is_empty(), "{stderr}");
    assert_eq!(run(&["version", "--client", "-o", "name"], 0).0, format!("{version}\n"));
}

#[test]
fn completion_scripts_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (script, _) = run(&["completion", shell], 0);
        assert!(script.contains("describe") && !script.contains("launch"), "{shell}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = pillion(&["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut line = String::new();
    let mut reader = BufReader::with_capacity(16, child.stdout.take().expect("piped"));
    reader.read_line(&mut line).expect("a line");
    drop(reader);
    let output = child.wait_with_output().expect("it ends");
    let (_, stderr) = finish(output, 0);
    assert!(stderr.is_empty(), "{stderr}");
}

#[test]
fn there_is_no_colour_for_a_pipe() {
    let directory = directory();
    let policy = file(&directory, "p.yaml", GOOD);
    let (stdout, _) = run(&["validate", &policy], 0);
    assert!(!stdout.contains('\x1b'), "{stdout:?}");
}

#[test]
fn check_gives_cause_and_cure_for_all_that_is_not_ok() {
    let directory = directory();
    let paths = places(&directory);
    let mut arguments = vec!["check", "-o", "json", "--containerd-socket", "none", "--policy-dir"];
    let absent = directory.path().join("policies");
    arguments.push(shown(&absent));
    arguments.extend(paths.iter().map(String::as_str));
    let output = pillion(&arguments).output().expect("the binary runs");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("a list");
    let of = |name: &str| checks.iter().find(|check| check["check"] == name).expect("checked");
    for name in ["kernel", "btf", "bpffs", "cgroup2", "pidfd", "capabilities", "policies", "local ports"] {
        of(name);
    }
    assert_eq!(of("policies")["verdict"], "warn");
    assert!(checks.iter().all(|check| check["check"] != "containerd"));
    for check in checks.iter().filter(|check| check["verdict"] != "ok") {
        let text = |field: &str| check[field].as_str().is_some_and(|text| !text.is_empty());
        assert!(text("cause") && text("cure"), "{check}");
    }
    let code = match report["verdict"].as_str() {
        Some("ok") => 0,
        Some("warn") => 5,
        _ => 1,
    };
    assert_eq!(output.status.code(), Some(code), "{report}");
}

/// Directories of an instance that nobody else uses.
fn places(directory: &TempDir) -> Vec<String> {
    [("--run-dir", "run"), ("--state-dir", "state"), ("--pin-root", "pins")]
        .into_iter()
        .flat_map(|(flag, name)| [flag.to_owned(), shown(&directory.path().join(name)).to_owned()])
        .collect()
}

#[test]
fn cleanup_removes_what_is_pillions_and_nothing_else() {
    let directory = directory();
    let state = directory.path().join("state");
    fs::create_dir_all(state.join("companions/process+1-2/r")).expect("writable");
    fs::write(state.join("held.json"), "{}").expect("writable");
    fs::create_dir(directory.path().join("run")).expect("writable");
    fs::write(directory.path().join("run/agent.lock"), "1\n").expect("writable");
    fs::write(state.join("precious"), "").expect("writable");
    let paths = places(&directory);
    let cleanup = |more: &[&str]| {
        let mut arguments = vec!["cleanup"];
        arguments.extend(more);
        arguments.extend(paths.iter().map(String::as_str));
        pillion(&arguments).output().expect("the binary runs")
    };
    if !nix::unistd::geteuid().is_root() {
        let (_, stderr) = finish(cleanup(&["--yes"]), 1);
        assert!(stderr.contains("as root"), "{stderr}");
        return;
    }
    let (stdout, _) = finish(cleanup(&["--dry-run", "-o", "name"]), 0);
    assert!(stdout.contains("held.json") && stdout.contains("agent.lock"), "{stdout}");
    let (_, stderr) = finish(cleanup(&[]), 1);
    assert!(stderr.contains("--yes"), "{stderr}");
    assert!(state.join("held.json").exists(), "nothing is removed unasked");

    let (stdout, stderr) = finish(cleanup(&["--yes", "-o", "json"]), 0);
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    // The files and directories: run with its lock; companions, its two directories below, held.json.
    assert_eq!(report["before"]["counts"]["file"], 6, "{stdout}");
    assert_eq!(report["after"]["counts"]["file"], 0, "{stdout}");
    assert_eq!(report["remaining"], Value::Array(Vec::new()));
    assert!(stderr.contains("precious is not of Pillion"), "{stderr}");
    assert!(!directory.path().join("run").exists());
    let left: Vec<PathBuf> =
        fs::read_dir(&state).expect("still there").map(|entry| entry.expect("readable").path()).collect();
    assert_eq!(left, [state.join("precious")]);

    let (_, stderr) = finish(cleanup(&["--yes"]), 0);
    assert!(stderr.contains("nothing to remove"), "{stderr}");
}

#[test]
fn cleanup_refuses_while_an_agent_holds_the_lock() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let directory = directory();
    fs::create_dir(directory.path().join("run")).expect("writable");
    let lock = directory.path().join("run/agent.lock");
    fs::write(&lock, "4711\n").expect("writable");
    let held = nix::fcntl::Flock::lock(
        fs::File::open(&lock).expect("readable"),
        nix::fcntl::FlockArg::LockExclusiveNonblock,
    )
    .expect("free");
    let paths = places(&directory);
    let arguments: Vec<&str> =
        ["cleanup", "--yes"].into_iter().chain(paths.iter().map(String::as_str)).collect();
    let (_, stderr) = run(&arguments, 1);
    assert!(stderr.contains("an agent is running (pid 4711)"), "{stderr}");
    assert!(lock.exists());
    drop(held);
    run(&arguments, 0);
    assert!(!lock.exists());
}

#[test]
fn cleanup_does_not_take_the_systems_directories_for_its_own() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    for (flag, path) in [("--pin-root", "/sys"), ("--state-dir", "relative"), ("--run-dir", "/run/../etc")] {
        let (_, stderr) = run(&["cleanup", "--dry-run", flag, path], 1);
        assert!(stderr.contains(flag), "{stderr}");
    }
}
