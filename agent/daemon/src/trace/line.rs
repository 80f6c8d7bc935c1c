//! One decision on one line. Pure. Whatever a workload may have chosen, such as a process's name, is shown plain.

use std::{fmt::Write as _, net::SocketAddr};

use pillion_redirect::{Because, Outcome};
use pillion_workload::OutboundRule;

use super::{DecisionInfo, Direction, RuleKind, TraceLine};
use crate::render::{Paint, Tone, plain};

/// What of a rule a destination matches: the narrowest of its networks, and its ports.
pub(super) fn matched(rule: &OutboundRule, to: SocketAddr) -> Option<String> {
    let address = to.ip().to_canonical();
    let network = rule
        .cidrs
        .iter()
        .filter(|network| network.contains(&address))
        .max_by_key(|network| network.prefix_len())
        .map(|network| format!("cidr {network}"));
    let port = (!rule.ports.is_empty()).then(|| format!("port {}", to.port()));
    let parts: Vec<String> = network.into_iter().chain(port).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// A line for people; `wide` adds the program that decided, its table and where the connection goes.
pub(super) fn text(line: &TraceLine, wide: bool, paint: Paint) -> String {
    match line {
        TraceLine::Decision(decision) => of_decision(decision, wide, paint),
        TraceLine::LeftOut { count } => paint.tone(Tone::Warn, &format!("{count} left out")) + "\n",
        TraceLine::Started | TraceLine::Ended { .. } => String::new(),
    }
}

fn of_decision(decision: &DecisionInfo, wide: bool, paint: Paint) -> String {
    let way = match decision.direction {
        Direction::Out => "OUT",
        Direction::In => "IN ",
    };
    let address = match decision.source_address {
        Some(std::net::IpAddr::V6(address)) => format!("[{address}]"),
        Some(std::net::IpAddr::V4(address)) => address.to_string(),
        None => "*".to_owned(),
    };
    let port = decision.source_port.map_or_else(|| "*".to_owned(), |port| port.to_string());
    let ends = format!("{address}:{port} → {}", decision.original);
    let verdict = match decision.verdict {
        Outcome::Redirected => "redirected",
        Outcome::Passed => "passed",
        Outcome::FailedOpen => "failed open",
        Outcome::Refused => "refused",
    };
    let tone = match decision.verdict {
        Outcome::Redirected => Tone::Good,
        Outcome::Passed => Tone::Plain,
        Outcome::FailedOpen => Tone::Warn,
        Outcome::Refused => Tone::Bad,
    };
    let mut out = format!(
        "{}  {way} {}  {ends:<40}  {:<44}  {}",
        decision.at,
        decision.protocol.as_str(),
        rule(decision),
        paint.tone(tone, verdict)
    );
    if let Some(errno) = decision.errno {
        let _ = write!(out, " ({})", nix::errno::Errno::from_raw(errno));
    }
    if let Some(because) = decision.because {
        let _ = write!(out, ": {}", reason(because));
    }
    if let Some(process) = &decision.process {
        let who = format!("{}[{}] uid {}", plain(&process.command), process.pid, process.user);
        let _ = write!(out, "  {}", paint.tone(Tone::Dim, &who));
    }
    if wide {
        let by = serde_json::to_value(decision.by).ok();
        let by = by.as_ref().and_then(serde_json::Value::as_str).unwrap_or("?");
        let _ = write!(out, "  ({by}, table {}, to {})", decision.table, decision.effective);
    }
    out.push('\n');
    out
}

fn rule(decision: &DecisionInfo) -> String {
    let mut text = match decision.rule {
        Some(RuleKind::Dns) => "dns".to_owned(),
        Some(RuleKind::Inbound) => "inbound".to_owned(),
        Some(RuleKind::Outbound) => format!("rule {}", decision.rule_number.unwrap_or(0)),
        None => return "-".to_owned(),
    };
    if let Some(matched) = &decision.matched {
        let _ = write!(text, " ({matched})");
    }
    if let Some(companion) = &decision.companion {
        let port = decision.companion_port.map_or_else(String::new, |port| format!(":{port}"));
        let _ = write!(text, " → {}{port}", plain(companion));
    }
    text
}

fn reason(because: Because) -> &'static str {
    match because {
        Because::NoRule => "no rule matches",
        Because::Excluded => "its destination is excluded",
        Because::Local => "for this host itself",
        Because::Multicast => "multicast or broadcast",
        Because::User => "its user is excluded",
        Because::Executable => "its program is excluded",
        Because::NoListener => "the companion does not listen",
        Because::Exhausted => "no slot is free",
        Because::Unbindable => "its socket cannot be bound for it",
        Because::Interface => "bound to one interface",
        Because::Answer => "an answer",
        Because::OtherDestination => "its socket has another destination",
        Because::Own => "from this host itself",
        Because::Cgroup => "from a workload or companion within",
    }
}

#[cfg(test)]
mod tests {
    use pillion_redirect::{Caller, DecidedBy};
    use pillion_workload::Protocol;

    use super::*;

    fn decision() -> DecisionInfo {
        DecisionInfo {
            at: std::time::UNIX_EPOCH.into(),
            direction: Direction::Out,
            by: DecidedBy::Connect4,
            protocol: Protocol::Tcp,
            process: Some(Caller { pid: 7, user: 1000, command: "\x1b[31mcurl".into() }),
            source_address: Some([10, 0, 0, 5].into()),
            source_port: Some(43210),
            original: ([10, 1, 2, 3], 443).into(),
            effective: ([127, 0, 0, 1], 15001).into(),
            table: 5,
            rule: Some(RuleKind::Outbound),
            rule_number: Some(2),
            matched: Some("cidr 10.0.0.0/8".into()),
            companion: Some("envoy".into()),
            companion_port: Some(15001),
            verdict: Outcome::Redirected,
            because: None,
            errno: None,
        }
    }

    #[test]
    fn a_decision_is_one_line_without_control_characters() {
        let line = text(&TraceLine::Decision(Box::new(decision())), false, Paint::OFF);
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words[1..].join(" "),
            "OUT tcp 10.0.0.5:43210 → 10.1.2.3:443 rule 2 (cidr 10.0.0.0/8) → envoy:15001 redirected \
             \\u{1b}[31mcurl[7] uid 1000"
        );
        assert!(!line.trim_end_matches('\n').contains(char::is_control));
        let wide = text(&TraceLine::Decision(Box::new(decision())), true, Paint::OFF);
        assert!(wide.ends_with("(connect4, table 5, to 127.0.0.1:15001)\n"), "{wide}");
    }

    #[test]
    fn what_is_not_redirected_tells_why() {
        let refused = DecisionInfo {
            verdict: Outcome::Refused,
            because: Some(Because::NoListener),
            errno: Some(111),
            source_address: None,
            source_port: None,
            ..decision()
        };
        let line = text(&TraceLine::Decision(Box::new(refused)), false, Paint::OFF);
        assert!(line.contains("*:* → 10.1.2.3:443"), "{line}");
        assert!(
            line.contains("refused (ECONNREFUSED: Connection refused): the companion does not listen"),
            "{line}"
        );
        let left = text(&TraceLine::LeftOut { count: 12 }, false, Paint::OFF);
        assert_eq!(left, "12 left out\n");
    }

    #[test]
    fn the_narrowest_network_is_what_matched() {
        let to = pillion_workload::Target { companion: "a".parse().unwrap(), port: None };
        let mut rule = OutboundRule::all_tcp(to);
        let address = "[::ffff:10.1.2.3]:443".parse().unwrap();
        assert_eq!(matched(&rule, address), None);
        rule.cidrs = vec!["10.0.0.0/8".parse().unwrap(), "10.1.0.0/16".parse().unwrap()];
        assert_eq!(matched(&rule, address).as_deref(), Some("cidr 10.1.0.0/16"));
        rule.ports = [443].into();
        assert_eq!(matched(&rule, address).as_deref(), Some("cidr 10.1.0.0/16, port 443"));
    }

    #[test]
    fn json_lines_are_read_back() {
        let line = TraceLine::Decision(Box::new(decision()));
        let text = serde_json::to_string(&line).unwrap();
        assert!(text.starts_with(r#"{"type":"decision","at":"1970-01-01T00:00:00"#), "{text}");
        assert_eq!(serde_json::from_str::<TraceLine>(&text).unwrap(), line);
    }
}
