//! `pillion run`: what a user and the command itself see of it, from exit codes to what is left after kill -9.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    EchoServer, Finished, Machine, NetNs, PillionRun, ProcessGuard, on_machine, programs,
    run::{self, Way, dial},
    wait_until,
};

const SOON: Duration = Duration::from_secs(20);

/// The policy that the first page of the manual has.
fn smallest() -> PathBuf {
    programs::checkout().join("packaging/policies/smallest.yaml")
}

/// A policy with a relay whose port is left out.
fn relayed(machine: &Machine, on_failure: &str) -> Result<PathBuf> {
    machine.file(
        "relayed.yaml",
        &format!(
            "spec:\n  select: {{ runtimes: [process] }}\n  companions: [{{ name: r, builtin: relay }}]\n  \
             redirect: {{ outbound: [{{ to: r }}] }}\n  onFailure: {on_failure}\n"
        ),
    )
}

/// A relay and a companion `extra`, with lines of its own at the right indentation.
fn with_extra(machine: &Machine, on_failure: &str, extra: &str) -> Result<PathBuf> {
    machine.file(
        "with-extra.yaml",
        &format!(
            "spec:\n  select: {{ runtimes: [process] }}\n  companions:\n  - {{ name: r, builtin: relay }}\n  \
             - name: extra\n{extra}\n  redirect: {{ outbound: [{{ to: r }}] }}\n  onFailure: {on_failure}\n"
        ),
    )
}

/// `pillion run` with a command line, to its end.
fn finish(netns: &NetNs, policy: &Path, options: &[&str], command: &[&str]) -> Result<Finished> {
    let mut line = run::command(policy, options)?;
    netns.run(|| ProcessGuard::finish("pillion run", line.args(command), SOON))
}

/// Whether any thread of it runs: the first one may be a zombie while others still hold the sockets.
fn exists(pid: u32) -> bool {
    let Ok(process) = procfs::process::Process::new(i32::try_from(pid).unwrap_or(0)) else { return false };
    let threads = process.tasks().map_or(0, Iterator::count);
    threads > 1 || process.stat().is_ok_and(|stat| stat.state != 'Z')
}

fn slay(pid: u32) -> Result<()> {
    Ok(kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?)
}

#[test]
fn the_exit_code_is_the_commands() -> Result<()> {
    on_machine(|machine| {
        let netns = NetNs::new()?;
        let plain = machine.file("plain", "no program")?;
        let plain = plain.to_str().context("UTF-8")?;
        for (command, code) in [
            (&["true"][..], 0),
            (&["sh", "-c", "exit 7"], 7),
            (&["sh", "-c", "exit 255"], 255),
            (&["sh", "-c", "kill -KILL $$"], 128 + 9),
            (&["sh", "-c", "kill -TERM $$"], 128 + 15),
            (&["pillion-no-such-program"], 127),
            (&[plain], 126),
        ] {
            let done = finish(&netns, &smallest(), &[], command)?;
            assert_eq!(done.status.code(), Some(code), "{command:?}: {}", done.stderr);
            assert_eq!(done.stdout, "", "{command:?}");
        }
        Ok(())
    })
}

#[test]
fn streams_pass_through_unchanged() -> Result<()> {
    on_machine(|machine| {
        let directory = machine.directory();
        let (input, output) = (directory.join("input"), directory.join("output"));
        let script = r#"set -e
            head -c 3000000 /dev/urandom >"$0"
            cat "$0" | "$2" run --policy "$3" -- sh -c 'cat; echo said >&2' >"$1""#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).args([&input, &output]).arg(programs::pillion()?).arg(smallest());
        let netns = NetNs::new()?;
        let done = netns.run(|| ProcessGuard::finish("a pipeline", &mut command, SOON))?.success()?;
        ensure!(fs::read(&input)? == fs::read(&output)?, "what went through is not what came");
        assert_eq!(done.stderr, "said\n");
        Ok(())
    })
}

#[test]
fn signals_reach_the_command() -> Result<()> {
    on_machine(|_| {
        let netns = NetNs::new()?;
        let script = "trap 'echo INT' INT; trap 'echo TERM' TERM; trap 'echo USR1' USR1; trap 'exit 5' USR2
            echo ready; while :; do sleep 0.02; done";
        let mut command = run::command(&smallest(), &[])?;
        let mut process = ProcessGuard::spawn_in(&netns, "pillion run", command.args(["sh", "-c", script]))?;
        process.stdout_line(SOON, |line| line == "ready")?;
        for (signal, word) in [(Signal::SIGINT, "INT"), (Signal::SIGTERM, "TERM"), (Signal::SIGUSR1, "USR1")]
        {
            process.signal(signal)?;
            process.stdout_line(SOON, |line| line == word)?;
        }
        process.signal(Signal::SIGUSR2)?;
        assert_eq!(process.exit(SOON)?.code(), Some(5), "{}", process.stderr()?);
        assert_eq!(process.stdout()?, "ready\nINT\nTERM\nUSR1\n", "each of them once");

        // One that does not catch it dies of it, and all is taken away.
        let mut command = run::command(&smallest(), &[])?;
        let mut process = ProcessGuard::spawn_in(
            &netns,
            "pillion run",
            command.args(["sh", "-c", "echo ready; exec sleep 99"]),
        )?;
        process.stdout_line(SOON, |line| line == "ready")?;
        let relay = run::companion(process.pid(), "r")?;
        process.stop(SOON)?.code(128 + 15)?;
        ensure!(!exists(relay), "the relay runs on");
        Ok(())
    })
}

#[test]
fn a_policy_that_does_not_fit_is_an_error() -> Result<()> {
    on_machine(|machine| {
        let netns = NetNs::new()?;
        let text = "spec:\n  select: { runtimes: [process], executables: [/usr/bin/other] }\n  \
                    companions: [{ name: r, builtin: relay }]\n  redirect: { outbound: [{ to: r }] }\n  \
                    onFailure: open\n";
        let other = machine.file("other.yaml", text)?;
        let done = finish(&netns, &other, &[], &["echo", "ran"])?.code(1)?;
        assert_eq!(done.stdout, "");
        for word in ["no policy selects", "echo", "executables", "/usr/bin/other", "--allow-unmatched"] {
            ensure!(done.stderr.contains(word), "{word} is not in: {}", done.stderr);
        }
        let done = finish(&netns, &other, &["--allow-unmatched"], &["echo", "ran"])?.success()?;
        assert_eq!(done.stdout, "ran\n");
        ensure!(done.stderr.contains("runs without companions"), "{}", done.stderr);

        let invalid = machine.file("invalid.yaml", &text.replace("to: r", "to: nobody"))?;
        let done = finish(&netns, &invalid, &[], &["echo", "ran"])?.code(3)?;
        assert_eq!(done.stdout, "");
        ensure!(done.stderr.contains("invalid.yaml") && done.stderr.contains("nobody"), "{}", done.stderr);
        Ok(())
    })
}

#[test]
fn a_companion_that_cannot_start_is_decided_by_the_policy() -> Result<()> {
    on_machine(|machine| {
        let netns = NetNs::new()?;
        let (busy, deaf) = ("[/bin/sleep, '99']", "[/usr/bin/false]");
        for (extra, why) in [
            ("    exec: { command: [/usr/bin/pillion-no-such-program] }".to_owned(), "no-such-program"),
            (
                format!("    exec: {{ command: {deaf} }}\n    ready: {{ tcp: {{ port: 9000 }} }}"),
                "exit code 1",
            ),
            ("    exec: { command: [/bin/sleep, '99'], user: pillion-nobody }".to_owned(), "pillion-nobody"),
            (
                format!(
                    "    exec: {{ command: {busy} }}\n    ready: {{ tcp: {{ port: 9000 }}, timeout: 300ms }}"
                ),
                "300ms",
            ),
            (
                format!(
                    "    exec: {{ command: {busy} }}\n    ready: {{ http: {{ port: 9000 }}, timeout: 300ms }}"
                ),
                "300ms",
            ),
            (
                format!(
                    "    exec: {{ command: {busy} }}\n    \
                     ready: {{ exec: {{ command: [/usr/bin/false] }}, timeout: 300ms }}"
                ),
                "300ms",
            ),
        ] {
            let done =
                finish(&netns, &with_extra(machine, "closed", &extra)?, &[], &["echo", "ran"])?.code(1)?;
            assert_eq!(done.stdout, "", "{extra}: {}", done.stderr);
            for word in ["was not started", "companion extra", why, "Pillion", "with-extra", "closed"] {
                ensure!(done.stderr.contains(word), "{word} is not in: {}", done.stderr);
            }
            let done =
                finish(&netns, &with_extra(machine, "open", &extra)?, &[], &["echo", "ran"])?.success()?;
            assert_eq!(done.stdout, "ran\n");
            for word in ["companion extra", why, "with-extra", "open"] {
                ensure!(done.stderr.contains(word), "{word} is not in: {}", done.stderr);
            }
        }
        Ok(())
    })
}

#[test]
fn the_command_waits_until_its_companions_are_ready() -> Result<()> {
    on_machine(|machine| {
        let netns = NetNs::new()?;
        let sign = machine.directory().join("sign");
        let extra = format!(
            "    exec: {{ command: [/bin/sleep, '99'] }}\n    \
             ready: {{ exec: {{ command: [/usr/bin/test, -e, {}] }}, timeout: 20s }}",
            sign.display()
        );
        let mut command = run::command(&with_extra(machine, "closed", &extra)?, &[])?;
        // It tells whether the sign was there at its first instruction.
        command.args(["sh", "-c", "test -e $0 && echo after || echo before"]).arg(&sign);
        let mut process = ProcessGuard::spawn_in(&netns, "pillion run", &mut command)?;
        run::companion(process.pid(), "extra")?;
        assert_eq!(process.stdout()?, "");
        ensure!(!process.has_ended(), "{}", process.stderr()?);
        fs::write(&sign, "")?;
        assert_eq!(process.exit(SOON)?.code(), Some(0), "{}", process.stderr()?);
        assert_eq!(process.stdout()?, "after\n");

        // A signal while it waits ends it, and the command never runs.
        fs::remove_file(&sign)?;
        let mut process = ProcessGuard::spawn_in(&netns, "pillion run", &mut command)?;
        let extra = run::companion(process.pid(), "extra")?;
        process.signal(Signal::SIGTERM)?;
        assert_eq!(process.exit(SOON)?.code(), Some(128 + 15), "{}", process.stderr()?);
        assert_eq!(process.stdout()?, "");
        ensure!(!exists(extra), "the companion runs on");
        Ok(())
    })
}

#[test]
fn probes_of_all_kinds_find_a_real_server_ready() -> Result<()> {
    on_machine(|machine| {
        let (near, _far) = NetNs::pair()?;
        let page = machine.file(
            "haproxy.cfg",
            "defaults\n  mode http\n  timeout client 5s\n  timeout server 5s\n  timeout connect 5s\n\
             frontend f\n  bind 127.0.0.1:9000\n  monitor-uri /ready\n",
        )?;
        let haproxy = programs::system("haproxy")?;
        let server = format!("    exec: {{ command: [{}, -db, -f, {}] }}", haproxy.display(), page.display());
        for (ready, code) in [
            ("tcp: { port: 9000 }", 0),
            ("http: { port: 9000, path: /ready }", 0),
            ("exec: { command: [/usr/bin/test, -d, '{{ dir }}'] }", 0),
            // It answers 503 there.
            ("http: { port: 9000, path: /other }, timeout: 500ms", 1),
        ] {
            let policy = with_extra(machine, "closed", &format!("{server}\n    ready: {{ {ready} }}"))?;
            let mut command = run::command(&policy, &[])?;
            let done = near
                .run(|| ProcessGuard::finish("pillion run", command.args(["echo", "ran"]), SOON))?
                .code(code)
                .context(ready)?;
            assert_eq!(done.stdout, if code == 0 { "ran\n" } else { "" }, "{ready}");
            ensure!(code == 0 || done.stderr.contains("503"), "{}", done.stderr);
        }
        Ok(())
    })
}

#[test]
fn the_command_is_in_the_callers_namespace_or_a_new_one() -> Result<()> {
    on_machine(|_| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        for (options, own) in
            [(&[][..], true), (&["--netns", "host"][..], true), (&["--netns", "new"][..], false)]
        {
            let mut run = PillionRun::start_with(&near, &smallest(), options, &[])?;
            let relay = run.companion("r")?;
            let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net"));
            let inode = of(relay)?.to_string_lossy().into_owned();
            assert_eq!(inode == format!("net:[{}]", near.inode()?), own, "{options:?}: {inode}");
            let said = run.app.converse(server.address(), "hello")?;
            let records = run.wait_for_records(1)?;
            assert_eq!(records[0].destination, Some(server.address()));
            if own {
                assert_eq!(said, Ok("hello".to_owned()));
                assert_eq!((records[0].outcome.as_str(), records[0].bytes_sent), ("ok", 5));
            } else {
                // There is nothing but loopback, and the relay is where the command is.
                ensure!(said.is_err(), "{said:?}");
                assert_eq!(records[0].outcome, "connect_unreachable");
                ensure!(records[0].source.ip().is_unspecified(), "{}", records[0].source);
            }
            let (status, stderr) = run.finish()?;
            ensure!(status.success(), "{stderr}");
        }
        Ok(())
    })
}

#[test]
fn all_that_the_command_starts_is_covered_and_ends_with_it() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        let pidfile = machine.directory().join("left");
        // A grandchild in a session and in a cgroup of its own, with a process that stays behind.
        let script = format!(
            "cgroup={}$(grep ^0:: /proc/self/cgroup | cut -d: -f3)/nested; mkdir $cgroup || exit
             setsid sleep 98 </dev/null >/dev/null 2>&1 & echo $! >{}
             sh -c 'echo $$ >$0/cgroup.procs && setsid --wait \"$@\"; exit 3' $cgroup \"$@\"",
            pillion_tests::cgroup::cgroup2_mount()?.display(),
            pidfile.display()
        );
        let mut run = PillionRun::start_with(&near, &smallest(), &[], &["sh", "-c", &script, "sh"])?;
        let nested = run.cgroup("workload")?.join("nested/cgroup.procs");
        ensure!(!fs::read_to_string(&nested)?.is_empty(), "nobody is in {}", nested.display());
        assert_eq!(run.app.converse(server.address(), "nested")?, Ok("nested".to_owned()));
        assert_eq!(run.wait_for_records(1)?[0].outcome, "ok");
        let left: u32 = fs::read_to_string(&pidfile)?.trim().parse()?;
        ensure!(exists(left));
        let (status, stderr) = run.finish()?;
        assert_eq!(status.code(), Some(3), "{stderr}");
        ensure!(!exists(left), "what the command left runs on");
        Ok(())
    })
}

#[test]
fn after_kill_9_nothing_runs_and_the_rest_is_swept() -> Result<()> {
    on_machine(|_| {
        let (near, _far) = NetNs::pair()?;
        for by_cleanup in [false, true] {
            let run = PillionRun::start(&near, &smallest())?;
            let (killed, relay) = (run.pid(), run.companion("r")?);
            let workload = run.cgroup("workload")?;
            let procs = fs::read_to_string(workload.join("cgroup.procs"))?;
            let app: u32 = procs.trim().parse().context("the puppet alone")?;
            slay(killed)?;
            wait_until("the end of command and companion", SOON, || !exists(app) && !exists(relay))?;
            drop(run);
            let files = || -> Result<Vec<String>> {
                let names = fs::read_dir("/var/lib/pillion/run").into_iter().flatten();
                let names = names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
                names
                    .filter(|name| !matches!(name, Ok(name) if !name.starts_with(&format!("run-{killed}-"))))
                    .collect()
            };
            assert_eq!(files()?.len(), 1, "this test needs something to be swept");
            ensure!(workload.exists());
            if by_cleanup {
                let mut cleanup = Command::new(programs::pillion()?);
                ProcessGuard::finish("pillion cleanup", cleanup.args(["cleanup", "--yes"]), SOON)?
                    .success()?;
            } else {
                finish(&near, &smallest(), &[], &["true"])?.success()?;
            }
            assert_eq!(files()?, Vec::<String>::new());
            ensure!(!workload.exists(), "{} is left", workload.display());
        }
        // The rest of the proof, from programs to mounts, is the inventory's.
        Ok(())
    })
}

#[test]
fn two_at_once_in_one_namespace_stay_apart() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        let policy = relayed(machine, "closed")?;
        let start = || PillionRun::start(&near, &policy);
        let (one, other) = std::thread::scope(|scope| {
            let (one, other) = (scope.spawn(start), scope.spawn(start));
            (one.join().expect("no panic"), other.join().expect("no panic"))
        });
        let mut runs = [one?, other?];
        for (run, connections) in runs.iter_mut().zip([3, 5]) {
            for _ in 0..connections {
                assert_eq!(run.app.converse(server.address(), "hello")?, Ok("hello".to_owned()));
            }
        }
        let mut workloads = Vec::new();
        for (run, connections) in runs.iter().zip([3, 5]) {
            let records = run.wait_for_records(connections)?;
            let workload = records[0].workload.clone();
            ensure!(records.iter().all(|record| record.workload == workload && record.outcome == "ok"));
            workloads.push(workload);
        }
        ensure!(workloads[0] != workloads[1], "{workloads:?}");
        // The end of one is not the end of the other.
        let [one, mut other] = runs;
        ensure!(one.finish()?.0.success());
        assert_eq!(other.app.converse(server.address(), "still")?, Ok("still".to_owned()));
        ensure!(other.finish()?.0.success());
        Ok(())
    })
}

#[test]
fn a_killed_relay_is_restarted_and_the_policy_holds_meanwhile() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        for on_failure in ["open", "closed"] {
            let mut run = PillionRun::start(&near, &relayed(machine, on_failure)?)?;
            let mut relayed = 0;
            for round in 0..2 {
                assert_eq!(
                    dial(&mut run.app, &server, server.address())?,
                    Ok(Way::Relayed),
                    "round {round}, {on_failure}"
                );
                relayed += 1;
                // Records of what is over must not die with it.
                run.wait_for_records(relayed)?;
                let relay = run.companion("r")?;
                slay(relay)?;
                wait_until("the end of the relay", SOON, || !exists(relay))?;
                // The restart takes at least 100 ms, this a fraction of one.
                let expected = match on_failure {
                    "open" => Ok(Way::Direct),
                    _ => Err(Errno::ECONNREFUSED),
                };
                assert_eq!(
                    dial(&mut run.app, &server, server.address())?,
                    expected,
                    "round {round}, {on_failure}"
                );
                // Until then it stays so.
                let mut said = expected;
                wait_until("another relay", SOON, || {
                    said = dial(&mut run.app, &server, server.address()).expect("the application is there");
                    said != expected
                })?;
                assert_eq!(said, Ok(Way::Relayed), "round {round}, {on_failure}");
                relayed += 1;
            }
            run.wait_for_records(relayed)?;
            let (status, stderr) = run.finish()?;
            ensure!(status.success() && stderr.contains("the companion has ended"), "{stderr}");
        }
        Ok(())
    })
}

#[test]
fn companions_are_confined_as_the_policy_says() -> Result<()> {
    on_machine(|machine| {
        let (near, _far) = NetNs::pair()?;
        let extra = "    exec: { command: [/bin/sleep, '99'], user: daemon }\n    \
                     resources: { memory: 64Mi, cpu: 500m, pids: 16 }";
        let run = PillionRun::start(&near, &with_extra(machine, "closed", extra)?)?;
        for (name, uid) in [("r", 65534), ("extra", 1)] {
            let pid = run.companion(name)?;
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let field = |name: &str| -> Result<Vec<&str>> {
                let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                Ok(line.with_context(|| format!("no {name}"))?.split_whitespace().collect())
            };
            let id = uid.to_string();
            assert_eq!(field("Uid")?, [&*id; 4], "{name}");
            assert_eq!(field("Gid")?, [&*id; 4], "{name}");
            ensure!(field("Groups")?.iter().all(|group| **group == *id), "{name}: {:?}", field("Groups")?);
            assert_eq!(field("NoNewPrivs")?, ["1"], "{name}");
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(field(set)?, ["0000000000000000"], "{set} of {name}");
            }
            let netns = fs::read_link(format!("/proc/{pid}/ns/net"))?;
            assert_eq!(netns.to_string_lossy(), format!("net:[{}]", near.inode()?));
        }
        for (controller, v1, v2, wanted_v1, wanted_v2) in [
            ("memory", "memory.limit_in_bytes", "memory.max", "67108864", "67108864"),
            ("pids", "pids.max", "pids.max", "16", "16"),
            ("cpu", "cpu.cfs_quota_us", "cpu.max", "50000", "50000 100000"),
        ] {
            let limit = run.limit("companion-extra", controller, v1, v2)?;
            ensure!([wanted_v1, wanted_v2].contains(&&*limit), "{controller}: {limit}");
            let free = run.limit("companion-r", controller, v1, v2)?;
            ensure!(![wanted_v1, wanted_v2].contains(&&*free), "{controller} of the other: {free}");
        }
        ensure!(run.finish()?.0.success());

        // A limit is not only written down: this one needs more memory than it may have.
        let hog = "    exec: { command: [/usr/bin/tail, /dev/zero] }\n    resources: { memory: 16Mi }\n    \
                   ready: { tcp: { port: 9000 }, timeout: 20s }";
        let done = finish(&near, &with_extra(machine, "closed", hog)?, &[], &["echo", "ran"])?.code(1)?;
        ensure!(done.stderr.contains("memory") && done.stdout.is_empty(), "{}", done.stderr);
        Ok(())
    })
}
