//! A plan in words, for `explain` and `describe`. Pure.

use std::{fmt::Write as _, time::Duration};

use pillion_workload::{
    CompanionKind, CompanionSpec, ExistingConnections, ExternalSpec, FailureMode, Plan, PortSet, Probe,
    Protocol, RedirectSpec, Resources, Target,
};

use crate::render::{plain, span};

/// What will be started, what will be redirected, and what happens when that fails.
pub(crate) fn in_words(plan: &Plan) -> String {
    let mut out = format!("policy {}\n", plan.policy);
    for companion in &plan.companions {
        let _ = write!(out, "{}", companion_in_words(companion));
    }
    outbound_in_words(&plan.redirect, &mut out);
    for rule in &plan.redirect.inbound {
        let ports = ports(&rule.ports.iter().copied().collect());
        let _ = writeln!(out, "connections from outside to {ports} go to {}", target(&rule.to));
    }
    if !plan.redirect.redirects_outbound() && plan.redirect.inbound.is_empty() {
        out.push_str("no connection is redirected\n");
    }
    out.push_str(match plan.on_failure {
        FailureMode::Open => {
            "while a companion is not ready, connections pass as if there were no companion (open)\n"
        }
        FailureMode::Closed => "while a companion is not ready, new connections are refused (closed)\n",
    });
    match plan.existing_connections {
        ExistingConnections::Keep => {}
        ExistingConnections::Reset => out.push_str(
            "connections that are open when this comes into force are reset, if they would have gone to a companion\n",
        ),
    }
    out
}

fn companion_in_words(companion: &CompanionSpec) -> String {
    let what = match &companion.kind {
        CompanionKind::Relay => "the embedded relay".to_owned(),
        CompanionKind::Exec(exec) => {
            exec.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
        }
        CompanionKind::External(external) => format!("external, run by others: {}", known_by(external)),
    };
    let mut out = format!("companion {}: {what}\n", companion.name);
    if !companion.is_external() {
        let group = companion.user.group.as_ref();
        let group = group.map(|group| format!(", group {}", plain(group))).unwrap_or_default();
        let _ = writeln!(out, "  as user {}{group}", plain(&companion.user.user));
    }
    if let CompanionKind::Exec(exec) = &companion.kind {
        for template in &exec.templates {
            let _ = writeln!(out, "  with {} filled in", plain(&template.display().to_string()));
        }
    }
    let probe = match &companion.ready.probe {
        None => "when every redirected port accepts a connection".to_owned(),
        Some(Probe::Tcp { port }) => format!("when port {port} accepts a connection"),
        Some(Probe::Http { port, path }) => {
            format!("when GET {} on port {port} answers 200-399", plain(path))
        }
        Some(Probe::Exec { command }) => {
            let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
            format!("when this exits with 0: {}", words.join(" "))
        }
    };
    if companion.is_external() {
        let _ = writeln!(out, "  ready {probe}; it is neither started nor stopped");
        return out;
    }
    let _ = writeln!(out, "  ready {probe}, within {}", exact(companion.ready.timeout));
    if let Some(limits) = limits(&companion.resources) {
        let _ = writeln!(out, "  limited to {limits}");
    }
    let _ = writeln!(out, "  {} between SIGTERM and SIGKILL", exact(companion.stop_grace));
    out
}

/// What its process must be.
fn known_by(external: &ExternalSpec) -> String {
    let joined = |items: &[String]| items.join(" or ");
    let executables: Vec<String> = external.executables.iter().map(|glob| quoted(glob.as_str())).collect();
    let users: Vec<String> = external.users.iter().map(|user| plain(user).clone()).collect();
    let mut parts = Vec::new();
    if !executables.is_empty() {
        parts.push(format!("program {}", joined(&executables)));
    }
    if !users.is_empty() {
        parts.push(format!("user {}", joined(&users)));
    }
    parts.extend(external.container.as_ref().map(|name| format!("container {}", plain(name))));
    parts.extend(external.cgroup.as_ref().map(|glob| format!("cgroup {}", quoted(glob.as_str()))));
    parts.join(", ")
}

/// Exclusions first, as they are applied, then the rules in order.
fn outbound_in_words(redirect: &RedirectSpec, out: &mut String) {
    let exclude = &redirect.exclude;
    let mut except: Vec<String> = exclude.destinations.cidrs.iter().map(ToString::to_string).collect();
    if !exclude.destinations.ports.is_empty() {
        except.push(ports(&exclude.destinations.ports));
    }
    if !except.is_empty() {
        let _ = writeln!(out, "what it sends to {} is left alone", except.join(", "));
    }
    for user in &exclude.users {
        let _ = writeln!(out, "what user {user} sends is left alone");
    }
    for path in &exclude.executables {
        let _ = writeln!(out, "what {} sends is left alone", plain(&path.display().to_string()));
    }
    if let Some(to) = &redirect.dns {
        let _ = writeln!(out, "questions to resolvers (port 53, udp and tcp) go to {}", target(to));
    }
    for (index, rule) in redirect.outbound.iter().enumerate() {
        let sent: Vec<&str> = rule.protocols.iter().map(|protocol| sent(*protocol)).collect();
        let mut where_to: Vec<String> = rule.cidrs.iter().map(ToString::to_string).collect();
        if !rule.ports.is_empty() {
            where_to.push(ports(&rule.ports));
        }
        let where_to =
            if where_to.is_empty() { String::new() } else { format!(" to {}", where_to.join(", ")) };
        let mut except = vec!["loopback".to_owned()];
        if !rule.exclude.ports.is_empty() {
            except.push(ports(&rule.exclude.ports));
        }
        except.extend(rule.exclude.cidrs.iter().map(ToString::to_string));
        let _ = writeln!(
            out,
            "rule {}: {}{where_to} go to {}, except to {}",
            index + 1,
            sent.join(" and "),
            target(&rule.to),
            except.join(", ")
        );
    }
}

fn sent(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "connections that it makes",
        Protocol::Udp => "datagrams that it sends",
    }
}

fn target(target: &Target) -> String {
    match target.port {
        Some(port) => format!("{}:{port}", target.companion),
        None => format!("{} (port allocated)", target.companion),
    }
}

fn ports(ports: &PortSet) -> String {
    let one = ports.ranges().len() == 1 && ports.ranges().all(|range| range.start() == range.end());
    format!("{} {ports}", if one { "port" } else { "ports" })
}

fn limits(resources: &Resources) -> Option<String> {
    let memory = resources.memory.map(|bytes| format!("{} of memory", byte_size(bytes)));
    let cpu = resources.cpu_millis.map(|millis| format!("{millis}m of CPU"));
    let pids = resources.pids.map(|pids| format!("{pids} tasks"));
    let limits: Vec<String> = memory.into_iter().chain(cpu).chain(pids).collect();
    (!limits.is_empty()).then(|| limits.join(", "))
}

fn byte_size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// Milliseconds are said when there are any.
fn exact(duration: Duration) -> String {
    if duration.subsec_nanos() == 0 {
        span(duration)
    } else {
        humantime::format_duration(duration).to_string()
    }
}

/// A word as a shell would need it.
fn quoted(word: &str) -> String {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=,@%+{}".contains(&byte);
    if !word.is_empty() && word.bytes().all(safe) {
        word.to_owned()
    } else {
        format!("'{}'", plain(word).replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::{
        Exclusions, ExecSpec, Exemptions, Glob, InboundRule, OutboundRule, Readiness, UserSpec,
    };

    use super::*;

    fn envoy() -> CompanionSpec {
        CompanionSpec {
            name: "envoy".parse().unwrap(),
            kind: CompanionKind::Exec(ExecSpec {
                command: vec!["/usr/bin/envoy".into(), "-c".into(), "a b.yaml".into()],
                templates: vec!["/etc/pillion/envoy.yaml".into()],
            }),
            user: UserSpec { user: "envoy".into(), group: None },
            ready: Readiness {
                probe: Some(Probe::Http { port: 9901, path: "/ready".into() }),
                timeout: Duration::from_millis(1500),
            },
            resources: Resources { memory: Some(256 << 20), cpu_millis: Some(500), pids: Some(64) },
            stop_grace: Duration::from_secs(10),
        }
    }

    #[test]
    fn every_part_of_a_plan_is_said() {
        let envoy = envoy();
        let to = |port| Target { companion: envoy.name.clone(), port };
        let plan = Plan {
            policy: "payments".parse().unwrap(),
            redirect: RedirectSpec {
                outbound: vec![
                    OutboundRule {
                        cidrs: vec!["10.0.0.0/8".parse().unwrap()],
                        ports: PortSet::from_ranges([443..=443, 8000..=8999]),
                        protocols: [Protocol::Tcp, Protocol::Udp].into(),
                        ..OutboundRule::all_tcp(to(None))
                    },
                    OutboundRule {
                        exclude: Exclusions {
                            ports: [22, 53].into(),
                            cidrs: vec!["169.254.0.0/16".parse().unwrap()],
                        },
                        ..OutboundRule::all_tcp(to(Some(15001)))
                    },
                ],
                exclude: Exemptions {
                    destinations: Exclusions {
                        ports: [9100].into(),
                        cidrs: vec!["192.0.2.0/24".parse().unwrap()],
                    },
                    users: [1337].into(),
                    executables: ["/usr/bin/backup".into()].into(),
                },
                dns: Some(to(Some(15053))),
                inbound: vec![InboundRule { ports: [8080].into(), to: to(None) }],
            },
            on_failure: FailureMode::Closed,
            existing_connections: ExistingConnections::Reset,
            companions: vec![envoy.clone()],
        };
        assert_eq!(
            in_words(&plan),
            "policy payments\n\
             companion envoy: /usr/bin/envoy -c 'a b.yaml'\n\
             \x20 as user envoy\n\
             \x20 with /etc/pillion/envoy.yaml filled in\n\
             \x20 ready when GET /ready on port 9901 answers 200-399, within 1s 500ms\n\
             \x20 limited to 256 MiB of memory, 500m of CPU, 64 tasks\n\
             \x20 10s between SIGTERM and SIGKILL\n\
             what it sends to 192.0.2.0/24, port 9100 is left alone\n\
             what user 1337 sends is left alone\n\
             what /usr/bin/backup sends is left alone\n\
             questions to resolvers (port 53, udp and tcp) go to envoy:15053\n\
             rule 1: connections that it makes and datagrams that it sends to 10.0.0.0/8, ports 443, 8000-8999 go to envoy (port allocated), except to loopback\n\
             rule 2: connections that it makes go to envoy:15001, except to loopback, ports 22, 53, 169.254.0.0/16\n\
             connections from outside to port 8080 go to envoy (port allocated)\n\
             while a companion is not ready, new connections are refused (closed)\n\
             connections that are open when this comes into force are reset, if they would have gone to a companion\n"
        );
    }

    #[test]
    fn what_others_run_is_told_by_what_it_is() {
        let mut mesh = envoy();
        mesh.kind = CompanionKind::External(ExternalSpec {
            executables: vec![Glob::new("*/envoy").unwrap()],
            users: vec!["1337".into(), "envoy".into()],
            container: Some("istio-proxy".into()),
            cgroup: Some(Glob::new("/kubepods*").unwrap()),
        });
        assert_eq!(
            companion_in_words(&mesh),
            "companion envoy: external, run by others: program '*/envoy', user 1337 or envoy, container istio-proxy, \
             cgroup '/kubepods*'\n\
             \x20 ready when GET /ready on port 9901 answers 200-399; it is neither started nor stopped\n"
        );
    }

    #[test]
    fn sizes_are_never_rounded() {
        for (bytes, text) in [(1 << 30, "1 GiB"), (3 << 19, "1536 KiB"), (1000, "1000 bytes"), (0, "0 bytes")]
        {
            assert_eq!(byte_size(bytes), text);
        }
    }
}
