//! Other kernels in a virtual machine with systemd and cgroup2 alone: Linux 6.1, and 5.10, the oldest that is supported. What the
//! rest of the suites see on this machine's kernel holds there, too, and what they cannot see here, where cgroup2 has no
//! controllers, holds at all: limits.
//!
//! One boot for everything of a kernel, as the machine is emulated: `tests/vm/guest.sh` and `older.sh` do it there and print, this judges.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pillion_tests::{
    on_machine,
    vm::{Guest, Kernel, SERVER, records},
};
use serde_json::Value;

/// An emulated processor is slow, and the machine may be busy. Below the limit of a test.
const BOOT_AND_RUN: Duration = Duration::from_secs(440);

/// What Linux 5.10 lacks, in the order of the kernels that brought it.
const FALLBACKS_OF_5_10: [&str; 5] = [
    "bpf_ktime_get_coarse_ns",
    "cmpxchg",
    "bpf_get_netns_cookie in getsockopt",
    "bpf_sk_lookup.ingress_ifindex",
    "bpf_set_retval",
];

const KIND: &str = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\n";

#[test]
fn everything_on_another_kernel() -> Result<()> {
    on_machine(|machine| {
        let files = policies().into_iter().map(|(name, text)| machine.file(name, &text));
        let files = files.collect::<Result<_>>()?;
        let guest = Guest::run(machine, Kernel::Debian12, "guest.sh", files, BOOT_AND_RUN)?;
        Story(&guest).judge().with_context(|| format!("the guest printed:\n{}", guest.printed))
    })
}

#[test]
fn redirection_on_the_oldest_kernel() -> Result<()> {
    on_machine(|machine| {
        let files = [("redirect.yaml", redirect()), ("programs.yaml", programs())];
        let files = files.into_iter().map(|(name, text)| machine.file(name, &text));
        let files = files.collect::<Result<_>>()?;
        let guest = Guest::run(machine, Kernel::Oldest, "older.sh", files, BOOT_AND_RUN)?;
        Story(&guest).judge_older().with_context(|| format!("the guest printed:\n{}", guest.printed))
    })
}

/// Both directions, for what `redirects` in `tests/vm/lib.sh` starts.
fn redirect() -> String {
    format!(
        "{KIND}metadata: {{ name: redirect }}\nspec:\n  select: {{ runtimes: [process] }}\n  \
         companions: [{{ name: r, builtin: relay }}]\n  redirect:\n    outbound: [{{ to: r, exclude: {{ ports: [81] }} }}]\n    \
         inbound: [{{ ports: [9000], to: r }}]\n  onFailure: closed\n"
    )
}

/// For a program that is held at its exec.
fn programs() -> String {
    format!(
        "{KIND}metadata: {{ name: programs }}\nspec:\n  \
         select: {{ runtimes: [process], executables: [/usr/local/bin/first-held] }}\n  \
         companions: [{{ name: r, builtin: relay }}]\n  redirect: {{ outbound: [{{ to: r }}] }}\n  onFailure: closed\n"
    )
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
        ("redirect.yaml", redirect()),
        ("web.yaml", containers.join("---\n")),
        ("late.yaml", relay("late", &labelled("late"), "", "open")),
    ]
}

/// What it printed, and what that must be.
struct Story<'a>(&'a Guest);

impl Story<'_> {
    fn judge(&self) -> Result<()> {
        let kernel = self.0.ok("kernel")?;
        ensure!(
            kernel.starts_with("6.1.") && kernel.contains("cgroup2fs") && kernel.contains("systemd"),
            "{kernel}"
        );
        ensure!(self.fallbacks()?.is_empty(), "6.1 has everything: {:?}", self.fallbacks()?);
        self.redirects()?;
        self.runs()?;
        self.limits()?;
        self.containers()?;
        self.without_an_agent()?;
        self.nothing_left()
    }

    fn judge_older(&self) -> Result<()> {
        ensure!(self.0.ok("kernel")?.starts_with("5.10."), "{}", self.0.ok("kernel")?);
        let fallbacks = self.fallbacks()?;
        ensure!(fallbacks == FALLBACKS_OF_5_10, "{fallbacks:?}");
        self.redirects()?;
        self.0.ok("exec")?;
        self.0.ok("none-left")?;
        let log = self.0.ok("agent-log")?;
        let records = records(log);
        ensure!(records.len() == 1 && records[0]["destination"] == SERVER, "{log}");
        ensure!(self.0.json("status")?["dataplane"]["counters"].is_object(), "no counters");
        self.nothing_is_left()
    }

    /// The features for which `pillion check` tells of a fallback. Nothing of the kernel may fail; warnings, such as no policy
    /// directory, are not of the kernel.
    fn fallbacks(&self) -> Result<Vec<String>> {
        let check = self.0.section("check")?;
        ensure!(
            [0, 5].contains(&check.code) && !check.text.contains(r#""verdict": "fail""#),
            "{}",
            check.text
        );
        let report: Value = serde_json::from_str(&check.text)?;
        let checks = report["checks"].as_array().context("checks")?;
        let found =
            |check: &Value, start| check["found"].as_str().is_some_and(|found| found.starts_with(start));
        let there = checks.iter().filter(|check| found(check, "there: ")).count();
        let fallbacks = checks.iter().filter(|check| found(check, "fallback: "));
        let fallbacks: Vec<String> =
            fallbacks.filter_map(|check| check["check"].as_str()).map(str::to_owned).collect();
        ensure!(there + fallbacks.len() >= 11, "features are not told: {report}");
        Ok(fallbacks)
    }

    /// Outbound by IPv4 and IPv6, inbound, each by its original destination, and a refusal while the companion is gone.
    fn redirects(&self) -> Result<()> {
        for (section, destination, direction) in [
            ("out4", SERVER, "outbound"),
            ("out6", "[fd77::2]:8080", "outbound"),
            ("in", "10.77.0.1:9000", "inbound"),
        ] {
            let text = self.0.ok(section)?;
            // Who dials before the application listens has a record of a failure.
            let records = records(text).into_iter().filter(|record| record["outcome"] == "ok");
            let records: Vec<Value> = records.collect();
            ensure!(records.len() == 1, "{section}: {text}");
            let record = &records[0];
            ensure!(record["destination"] == destination && record["direction"] == direction, "{text}");
            ensure!(record["bytes_received"].as_u64() > Some(0), "{text}");
        }
        self.0.ok("ipvs-up")?;
        let (service, excluded) = (self.0.ok("ipvs-80")?, self.0.ok("ipvs-81")?);
        ensure!(service.contains("service\n") || service.contains("service\r"), "{service}");
        ensure!(excluded.contains("service\n") || excluded.contains("service\r"), "{excluded}");
        let to_service = records(service);
        ensure!(
            to_service.len() == 1
                && to_service[0]["destination"] == "10.96.0.10:80"
                && to_service[0]["outcome"] == "ok",
            "{service}"
        );
        ensure!(records(excluded).is_empty(), "{excluded}");
        let refused = self.0.ok("refused")?;
        for server in ["10.77.0.2", "fd77::2"] {
            ensure!(refused.contains(&format!("{server} ended with 1")), "{refused}");
        }
        ensure!(refused.matches("Connection refused").count() == 2, "{refused}");
        Ok(())
    }

    /// `pillion run`: the first instruction is captured.
    fn runs(&self) -> Result<()> {
        let run = self.0.ok("run")?;
        let records = records(run);
        ensure!(records.len() == 1 && records[0]["destination"] == SERVER, "{run}");
        ensure!(records[0]["outcome"] == "ok" && records[0]["bytes_received"] == 1, "{run}");
        Ok(())
    }

    fn limits(&self) -> Result<()> {
        let limits = self.0.ok("limits")?;
        for line in ["memory.max=67108864", "pids.max=32", "cpu.max=50000 100000", "processes=1"] {
            ensure!(limits.lines().any(|found| found.trim_end() == line), "no {line} in {limits}");
        }
        // And they are enforced.
        let memory = self.0.ok("memory")?;
        ensure!(memory.contains("out of memory"), "{memory}");
        let pids = self.0.ok("pids")?;
        ensure!(pids.contains("Cannot fork"), "{pids}");
        let cpu = self.0.ok("cpu")?;
        let throttled =
            cpu.lines().find_map(|line| line.trim_end().strip_prefix("nr_throttled ")?.parse::<u64>().ok());
        ensure!(throttled.is_some_and(|times| times > 0), "{cpu}");
        Ok(())
    }

    /// Held by the wrapper, on runc and on crun; and attached while it runs.
    fn containers(&self) -> Result<()> {
        let log = self.0.ok("agent-log")?;
        let of = |name: &str| {
            let id = format!("containerd/default/{name}");
            records(log).into_iter().filter(|record| record["workload"] == *id).collect::<Vec<_>>()
        };
        for runtime in ["runc", "crun"] {
            self.0.ok(runtime)?;
            let records = of(&format!("by-{runtime}"));
            ensure!(records.len() == 1 && records[0]["outcome"] == "ok", "{runtime}: {records:?} in {log}");
            let attached =
                log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).any(|line| {
                    line["kind"] == "Attached"
                        && line["workload"] == format!("containerd/default/by-{runtime}")
                });
            ensure!(attached, "{runtime} in {log}");
        }
        self.0.ok("late")?;
        ensure!(!of("late").is_empty(), "{log}");
        let list = self.0.json("list")?;
        let late =
            list["workloads"].as_array().into_iter().flatten().find(|workload| workload["name"] == "late");
        ensure!(
            late.is_some_and(|late| late["verdict"] == "attached" && late["firstInstruction"] == "after"),
            "{list}"
        );
        let status = self.0.json("status")?;
        ensure!(status["dataplane"]["counters"].is_object(), "{status}");
        Ok(())
    }

    fn without_an_agent(&self) -> Result<()> {
        self.0.ok("open")?;
        let closed = self.0.with_code("closed", 1)?;
        ensure!(
            closed.contains("pillion") && closed.contains("web") && closed.contains("onFailure: closed"),
            "{closed}"
        );
        Ok(())
    }

    fn nothing_left(&self) -> Result<()> {
        // The wrapper without Pillion is the runtime.
        self.0.ok("after")?;
        self.nothing_is_left()
    }

    fn nothing_is_left(&self) -> Result<()> {
        let cleanup = self.0.ok("cleanup")?;
        for line in cleanup.lines().skip_while(|line| !line.starts_with("KIND")).skip(1) {
            ensure!(line.split_whitespace().next_back().is_none_or(|after| after == "0"), "{cleanup}");
        }
        let left: Vec<&str> = self
            .0
            .ok("left")?
            .lines()
            .filter(|line| !line.trim().is_empty() && !line.starts_with("ls:"))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    }
}
