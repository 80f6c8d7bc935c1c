//! Another kernel: Linux 6.1, the oldest that is supported, in a virtual machine with systemd and cgroup2 alone. What the rest of the suites see
//! on this machine's kernel holds there, too, and what they cannot see here, where cgroup2 has no controllers, holds at all: limits.
//!
//! One boot for everything, as the machine is emulated: `tests/vm/guest.sh` does it there and prints, this judges.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use pillion_tests::{ProcessGuard, first, lab, on_machine, programs};
use serde_json::Value;

/// Where the guest's server is, see `guest.sh`.
const SERVER: &str = "10.77.0.2:8080";
/// An emulated processor is slow, and the machine may be busy. Below the limit of a test.
const BOOT_AND_RUN: Duration = Duration::from_secs(440);

const KIND: &str = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\n";

#[test]
fn everything_on_another_kernel() -> Result<()> {
    on_machine(|machine| {
        let directory = machine.directory();
        let mut files = vec![strip(&programs::pillion()?, directory)?, strip(&programs::hook()?, directory)?];
        let program = first::build(directory, "first", SERVER.parse()?)?;
        let image = directory.join("first.tar");
        fs::copy(lab::image("first:1", &program)?, &image)?;
        files.extend([program, image]);
        for (name, text) in policies() {
            files.push(machine.file(name, &text)?);
        }
        let printed = run(&files)?;
        let guest = Guest::parse(&printed)?;
        guest.judge().with_context(|| format!("the guest printed:\n{printed}"))
    })
}

/// The files of policies in the guest.
fn policies() -> Vec<(&'static str, String)> {
    let relay = |name: &str, select: &str, more: &str, on_failure: &str| {
        format!(
            "{KIND}metadata: {{ name: {name} }}\nspec:\n  select: {{ {select} }}\n  \
             companions: [{{ name: r, builtin: relay{more} }}]\n  redirect: {{ outbound: [{{ to: r }}] }}\n  \
             onFailure: {on_failure}\n"
        )
    };
    let beside = |name: &str, command: &str, limit: &str| {
        format!(
            "{KIND}metadata: {{ name: {name} }}\nspec:\n  select: {{ runtimes: [process] }}\n  companions:\n  \
             - {{ name: r, builtin: relay }}\n  - {{ name: {name}, exec: {{ command: {command} }}, resources: {{ {limit} }} }}\n  \
             redirect: {{ outbound: [{{ to: r }}] }}\n  onFailure: open\n"
        )
    };
    let process = "runtimes: [process]";
    let labelled = |label: &str| format!("runtimes: [containerd], labels: {{ app: {label} }}");
    let containers =
        [relay("web", &labelled("web"), "", "closed"), relay("open", &labelled("open"), "", "open")];
    vec![
        (
            "limits.yaml",
            relay("limits", process, ", resources: { memory: 64Mi, cpu: 500m, pids: 32 }", "closed"),
        ),
        ("memory.yaml", beside("memory", "[/usr/bin/tail, /dev/zero]", "memory: 32Mi")),
        (
            "pids.yaml",
            beside(
                "pids",
                r#"[/bin/sh, -c, "for i in 1 2 3 4 5 6 7 8; do sleep 30 & done; wait"]"#,
                "pids: 4",
            ),
        ),
        ("cpu.yaml", beside("busy", r#"[/bin/sh, -c, "while :; do :; done"]"#, "cpu: 100m")),
        ("web.yaml", containers.join("---\n")),
        ("late.yaml", relay("late", &labelled("late"), "", "open")),
    ]
}

/// Without what only a debugger reads, which would be copied into the guest.
fn strip(program: &Path, directory: &Path) -> Result<std::path::PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let stripped = directory.join(name);
    let mut command = Command::new("strip");
    command.arg("-o").arg(&stripped).arg(program);
    ProcessGuard::finish("strip", &mut command, Duration::from_secs(60))?.success()?;
    Ok(stripped)
}

fn run(files: &[std::path::PathBuf]) -> Result<String> {
    let checkout = programs::checkout();
    let mut command = Command::new(checkout.join("tests/lab/vm.sh"));
    command.arg("run").arg(checkout.join("tests/vm/guest.sh")).args(files);
    command.env("LAB", lab::DIRECTORY).env("VM_TIMEOUT", (BOOT_AND_RUN.as_secs() - 10).to_string());
    Ok(ProcessGuard::finish("the virtual machine", &mut command, BOOT_AND_RUN)?.success()?.stdout)
}

/// What it printed, by section.
struct Guest(BTreeMap<String, Section>);

struct Section {
    code: i32,
    text: String,
}

impl Guest {
    fn parse(printed: &str) -> Result<Self> {
        let mut sections = BTreeMap::new();
        let mut text = String::new();
        for line in printed.lines() {
            let Some(mark) = line.trim_end().strip_prefix("== ") else {
                text.push_str(line);
                text.push('\n');
                continue;
            };
            if let Some((name, code)) = mark.strip_prefix("end ").and_then(|end| end.split_once(' ')) {
                let code = code.parse().with_context(|| format!("the exit code of {mark}"))?;
                sections.insert(name.to_owned(), Section { code, text: std::mem::take(&mut text) });
            } else {
                text.clear();
            }
        }
        Ok(Self(sections))
    }

    /// What a command printed that ended with `code`.
    fn with_code(&self, name: &str, code: i32) -> Result<&str> {
        let section = self.0.get(name).with_context(|| format!("the guest did not come to {name}"))?;
        ensure!(section.code == code, "{name} ended with {}, not {code}: {}", section.code, section.text);
        Ok(&section.text)
    }

    fn ok(&self, name: &str) -> Result<&str> {
        self.with_code(name, 0)
    }

    fn json(&self, name: &str) -> Result<Value> {
        let text = self.ok(name)?;
        // What went to stderr comes before.
        let from = text.find('{').with_context(|| format!("no JSON in {name}: {text}"))?;
        serde_json::Deserializer::from_str(&text[from..])
            .into_iter()
            .next()
            .with_context(|| format!("no JSON in {name}"))?
            .with_context(|| format!("{name}: {text}"))
    }

    fn judge(&self) -> Result<()> {
        let kernel = self.ok("kernel")?;
        ensure!(
            kernel.starts_with("6.1.") && kernel.contains("cgroup2fs") && kernel.contains("systemd"),
            "{kernel}"
        );
        // Warnings, such as no policy directory, are none of the kernel's.
        let check = self.0.get("check").context("pillion check")?;
        ensure!(
            [0, 5].contains(&check.code) && !check.text.contains(r#""verdict": "fail""#),
            "{}",
            check.text
        );

        self.runs()?;
        self.limits()?;
        self.containers()?;
        self.without_an_agent()?;
        self.nothing_left()
    }

    /// `pillion run`: the first instruction is captured.
    fn runs(&self) -> Result<()> {
        let run = self.ok("run")?;
        let records = records(run);
        ensure!(records.len() == 1 && records[0]["destination"] == SERVER, "{run}");
        ensure!(records[0]["outcome"] == "ok" && records[0]["bytes_received"] == 1, "{run}");
        Ok(())
    }

    fn limits(&self) -> Result<()> {
        let limits = self.ok("limits")?;
        for line in ["memory.max=67108864", "pids.max=32", "cpu.max=50000 100000", "processes=1"] {
            ensure!(limits.lines().any(|found| found.trim_end() == line), "no {line} in {limits}");
        }
        // And they are enforced.
        let memory = self.ok("memory")?;
        ensure!(memory.contains("out of memory"), "{memory}");
        let pids = self.ok("pids")?;
        ensure!(pids.contains("Cannot fork"), "{pids}");
        let cpu = self.ok("cpu")?;
        let throttled =
            cpu.lines().find_map(|line| line.trim_end().strip_prefix("nr_throttled ")?.parse::<u64>().ok());
        ensure!(throttled.is_some_and(|times| times > 0), "{cpu}");
        Ok(())
    }

    /// Held by the wrapper, on runc and on crun; and attached while it runs.
    fn containers(&self) -> Result<()> {
        let log = self.ok("agent-log")?;
        let of = |name: &str| {
            let id = format!("containerd/default/{name}");
            records(log).into_iter().filter(|record| record["workload"] == *id).collect::<Vec<_>>()
        };
        for runtime in ["runc", "crun"] {
            self.ok(runtime)?;
            let records = of(&format!("by-{runtime}"));
            ensure!(records.len() == 1 && records[0]["outcome"] == "ok", "{runtime}: {records:?} in {log}");
            let attached =
                log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).any(|line| {
                    line["kind"] == "Attached"
                        && line["workload"] == format!("containerd/default/by-{runtime}")
                });
            ensure!(attached, "{runtime} in {log}");
        }
        self.ok("late")?;
        ensure!(!of("late").is_empty(), "{log}");
        let list = self.json("list")?;
        let late =
            list["workloads"].as_array().into_iter().flatten().find(|workload| workload["name"] == "late");
        ensure!(
            late.is_some_and(|late| late["verdict"] == "attached" && late["firstInstruction"] == "after"),
            "{list}"
        );
        let status = self.json("status")?;
        ensure!(status["dataplane"]["counters"].is_object(), "{status}");
        Ok(())
    }

    fn without_an_agent(&self) -> Result<()> {
        self.ok("open")?;
        let closed = self.with_code("closed", 1)?;
        ensure!(
            closed.contains("pillion") && closed.contains("web") && closed.contains("onFailure: closed"),
            "{closed}"
        );
        Ok(())
    }

    fn nothing_left(&self) -> Result<()> {
        let cleanup = self.ok("cleanup")?;
        for line in cleanup.lines().skip_while(|line| !line.starts_with("KIND")).skip(1) {
            ensure!(line.split_whitespace().next_back().is_none_or(|after| after == "0"), "{cleanup}");
        }
        // The wrapper without Pillion is the runtime.
        self.ok("after")?;
        let left: Vec<&str> = self
            .ok("left")?
            .lines()
            .filter(|line| !line.trim().is_empty() && !line.starts_with("ls:"))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    }
}

/// The relay's records among other lines: bare, as `pillion run` prints them, or within a line of the agent's log.
fn records(text: &str) -> Vec<Value> {
    let parse = |text: &str| serde_json::from_str::<Value>(text).ok();
    text.lines()
        .filter_map(|line| {
            let line = parse(line.trim_end())?;
            let within = line["message"].as_str().and_then(parse);
            within.or(Some(line)).filter(|record| record["outcome"].is_string())
        })
        .collect()
}
