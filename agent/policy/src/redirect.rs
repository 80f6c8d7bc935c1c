//! `spec.redirect`: which sockets go to which companion.
//!
//! Owns reading it and checking it against the companions: what comes out names only companions that exist and ports
//! that they can listen on, all in one network namespace.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Component, Path, PathBuf},
};

use ipnet::IpNet;
use pillion_workload::{
    CompanionKind, CompanionName, Exclusions, Exemptions, InboundRule, LONGEST_EXECUTABLE_NAME,
    MOST_EXECUTABLE_NAMES, OutboundRule, PortSet, Protocol, RedirectSpec, Target,
};

use crate::{
    companion::{Companion, nearest_name},
    fault::{any_of, quoted},
    reader::{At, Fields, found, integer, list, long_list, port, text},
    source::Report,
    tree::{Node, Value},
};

/// Outbound rules, and networks of one rule: some deployments list every service.
const MOST_RULES: usize = 16_384;

/// Which of the three parts of a redirection names a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Outbound,
    Inbound,
    Dns,
}

impl Direction {
    fn rule(self) -> &'static str {
        match self {
            Self::Outbound => "outbound rule",
            Self::Inbound => "inbound rule",
            Self::Dns => "`dns`",
        }
    }

    fn with_article(self) -> &'static str {
        match self {
            Self::Outbound => "an outbound rule",
            Self::Inbound => "an inbound rule",
            Self::Dns => "`dns`",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            Self::Outbound => "outboundPort",
            Self::Inbound => "inboundPort",
            Self::Dns => "dnsPort",
        }
    }
}

type Targets<'a> = [(Direction, &'a At<Target>)];

/// Reads `spec.redirect`. Targets that name no companion are reported, and left out.
pub(crate) fn read(node: &Node, companions: &[Companion], report: &mut Report<'_>) -> RedirectSpec {
    let known = ["outbound", "inbound", "dns", "exclude"];
    let Some(fields) = Fields::open(node, "spec.redirect", &known, &[], report) else {
        return RedirectSpec::default();
    };
    if fields.present(&["outbound", "inbound", "dns"]).is_empty() {
        let message = "spec.redirect has neither `outbound` nor `inbound` nor `dns`";
        report.fault(
            fields.at(),
            message,
            "add one, such as outbound: [{ to: \"relay:15001\" }], or remove the field",
        );
    }
    let outbound = fields.get("outbound").map(|node| outbound(node, companions, report)).unwrap_or_default();
    let inbound = fields.get("inbound").map(|node| inbound(node, companions, report)).unwrap_or_default();
    let dns = fields.get("dns").and_then(|node| dns(node, companions, report));
    let exclude = fields.get("exclude").map(|node| exemptions(node, report)).unwrap_or_default();
    if let Some(node) = fields.get("exclude")
        && fields.present(&["outbound", "dns"]).is_empty()
    {
        report.fault(
            &node.at,
            "spec.redirect.exclude has nothing to be excluded from",
            "add `outbound` or `dns`, or remove it; what is not in `inbound` is left alone anyway",
        );
    }
    let targets: Vec<(Direction, &At<Target>)> = outbound
        .iter()
        .map(|rule| (Direction::Outbound, &rule.to))
        .chain(inbound.iter().map(|rule| (Direction::Inbound, &rule.to)))
        .chain(dns.iter().map(|to| (Direction::Dns, to)))
        .collect();
    check_reached(&outbound, report);
    check_listeners(&targets, report);
    check_relays(&targets, companions, report);
    check_inbound_ports(&targets, &inbound, report);
    check_variables(&targets, companions, report);
    RedirectSpec {
        outbound: outbound.into_iter().map(|rule| rule.rule).collect(),
        exclude,
        dns: dns.map(|to| to.value),
        inbound: inbound
            .into_iter()
            .map(|rule| InboundRule {
                ports: rule.ports.into_iter().map(|port| port.value).collect(),
                to: rule.to.value,
            })
            .collect(),
    }
}

struct Outbound {
    rule: OutboundRule,
    to: At<Target>,
}

struct Inbound {
    ports: Vec<At<u16>>,
    to: At<Target>,
}

fn outbound(node: &Node, companions: &[Companion], report: &mut Report<'_>) -> Vec<Outbound> {
    let mut rules = Vec::new();
    for (index, item) in long_list(node, "spec.redirect.outbound", MOST_RULES, report).iter().enumerate() {
        let what = format!("spec.redirect.outbound[{index}]");
        let known = ["to", "cidrs", "ports", "protocols", "exclude"];
        let Some(fields) = Fields::open(item, &what, &known, &[], report) else { continue };
        let to = target(&fields, &what, "to: \"relay:15001\"", companions, report);
        let cidrs =
            fields.get("cidrs").map(|node| cidrs(node, &format!("{what}.cidrs"), report)).unwrap_or_default();
        let ports = fields
            .get("ports")
            .map(|node| port_ranges(node, &format!("{what}.ports"), report))
            .unwrap_or_default();
        let protocols = match fields.get("protocols") {
            Some(node) => protocols(node, &format!("{what}.protocols"), report),
            None => BTreeSet::from([Protocol::Tcp]),
        };
        let exclude = fields
            .get("exclude")
            .map(|node| rule_exclusions(node, &format!("{what}.exclude"), report))
            .unwrap_or_default();
        if let Some(to) = to {
            let rule = OutboundRule { to: to.value.clone(), cidrs, ports, protocols, exclude };
            rules.push(Outbound { rule, to });
        }
    }
    rules
}

/// Both transport protocols, or one.
fn protocols(node: &Node, what: &str, report: &mut Report<'_>) -> BTreeSet<Protocol> {
    let mut out = BTreeSet::new();
    for (index, item) in list(node, what, report).iter().enumerate() {
        let Some(item) = text(item, &format!("{what}[{index}]"), report) else { continue };
        match item.value.as_str() {
            "tcp" => out.insert(Protocol::Tcp),
            "udp" => out.insert(Protocol::Udp),
            other => {
                let message = format!("{} is no protocol that can be redirected", quoted(other));
                report.fault(&item.at, message, "write tcp or udp");
                false
            }
        };
    }
    out
}

/// `name:port`, or `name`, written as the other targets are or alone.
fn dns(node: &Node, companions: &[Companion], report: &mut Report<'_>) -> Option<At<Target>> {
    let fields = Fields::open(node, "spec.redirect.dns", &["to"], &[], report)?;
    target(&fields, "spec.redirect.dns", "to: \"dnsmasq:5353\"", companions, report)
}

/// A rule after one that takes all of its protocol is a mistake in the order.
fn check_reached(rules: &[Outbound], report: &mut Report<'_>) {
    let mut taken: Vec<(Protocol, &At<Target>)> = Vec::new();
    for Outbound { rule, to } in rules {
        let who_takes = |protocol: &Protocol| taken.iter().find(|(of, _)| of == protocol);
        if let Some((_, first)) = rule
            .protocols
            .iter()
            .map(who_takes)
            .collect::<Option<Vec<_>>>()
            .and_then(|all| all.first().copied())
        {
            report.fault_with_note(
                &to.at,
                "this rule is never reached",
                "rules are looked at in order: put those for some destinations before the one for all",
                (&first.at, "the rule before it that takes everything"),
            );
        }
        let takes_all =
            rule.cidrs.is_empty() && rule.ports.is_empty() && rule.exclude == Exclusions::default();
        if takes_all {
            taken.extend(rule.protocols.iter().map(|protocol| (*protocol, to)));
        }
    }
}

fn inbound(node: &Node, companions: &[Companion], report: &mut Report<'_>) -> Vec<Inbound> {
    let mut rules: Vec<Inbound> = Vec::new();
    let mut taken: Vec<At<u16>> = Vec::new();
    let items = list(node, "spec.redirect.inbound", report);
    for (index, item) in items.iter().enumerate() {
        let what = format!("spec.redirect.inbound[{index}]");
        let Some(fields) = Fields::open(item, &what, &["ports", "to", "protocols"], &[], report) else {
            continue;
        };
        if let Some(node) = fields.get("protocols")
            && protocols(node, &format!("{what}.protocols"), report).contains(&Protocol::Udp)
        {
            report.fault(
                &node.at,
                "datagrams that arrive cannot be redirected",
                "remove udp: the answers would come from the companion's port, which clients throw away, and to mend \
                 that each packet of the workload's namespace would have to be rewritten; let the companion listen \
                 on the port itself",
            );
        }
        let ports = fields
            .need("ports", "ports: [8080], the ports that the application listens on", report)
            .map(|node| ports(node, &format!("{what}.ports"), report))
            .unwrap_or_default();
        for port in &ports {
            if let Some(first) = taken.iter().find(|first| first.value == port.value) {
                report.fault_with_note(
                    &port.at,
                    format!("port {} is in two inbound rules", port.value),
                    "keep it in one of them",
                    (&first.at, "the other rule"),
                );
            }
        }
        taken.extend(ports.iter().cloned());
        if let Some(to) = target(&fields, &what, "to: \"relay:15006\"", companions, report) {
            rules.push(Inbound { ports, to });
        }
    }
    rules
}

/// What one rule does not match.
fn rule_exclusions(node: &Node, what: &str, report: &mut Report<'_>) -> Exclusions {
    let later = ["users", "executables"];
    let Some(fields) = Fields::open(node, what, &["ports", "cidrs", "users", "executables"], &[], report)
    else {
        return Exclusions::default();
    };
    for name in fields.present(&later) {
        if let Some(key) = fields.key(name) {
            report.fault(
                &key.at,
                format!("{what} cannot have `{name}`"),
                format!("move it to spec.redirect.exclude: {{ {name}: […] }}, which holds for all rules"),
            );
        }
    }
    if fields.present(&["ports", "cidrs", "users", "executables"]).is_empty() {
        report.fault(&node.at, format!("{what} is empty"), "add ports or cidrs, or remove the field");
    }
    exclusions(&fields, what, report)
}

/// What no rule takes.
fn exemptions(node: &Node, report: &mut Report<'_>) -> Exemptions {
    let what = "spec.redirect.exclude";
    let known = ["ports", "cidrs", "users", "executables"];
    let Some(fields) = Fields::open(node, what, &known, &[], report) else { return Exemptions::default() };
    if fields.present(&known).is_empty() {
        let cure = "add ports, cidrs, users or executables, or remove the field";
        report.fault(&node.at, format!("{what} is empty"), cure);
    }
    let mut users = BTreeSet::new();
    if let Some(node) = fields.get("users") {
        let what = format!("{what}.users");
        for (index, item) in list(node, &what, report).iter().enumerate() {
            let what = format!("{what}[{index}]");
            if let Value::Text(name) = &item.value {
                report.fault(
                    &item.at,
                    format!("{what} must be a number, found the name {}", quoted(name)),
                    "write the user id as the host sees it (id -u NAME); a container has names of its own",
                );
            } else if let Some(user) = integer(item, &what, 0..=i128::from(u32::MAX - 1), report)
                && let Ok(user) = u32::try_from(user)
            {
                users.insert(user);
            }
        }
    }
    let mut executables = BTreeSet::new();
    if let Some(node) = fields.get("executables") {
        let what = format!("{what}.executables");
        for (index, item) in list(node, &what, report).iter().enumerate() {
            let Some(item) = text(item, &format!("{what}[{index}]"), report) else { continue };
            executables.extend(executable(&item, report));
        }
    }
    Exemptions { destinations: exclusions(&fields, what, report), users, executables }
}

/// A whole path, which the kernel side compares.
fn executable(item: &At<String>, report: &mut Report<'_>) -> Option<PathBuf> {
    let path = Path::new(&item.value);
    let names = path.components().filter(|part| matches!(part, Component::Normal(_))).count();
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let written = quoted(&item.value);
    let (message, cure) = if !path.is_absolute() || !plain || names == 0 {
        (
            format!("{written} is no absolute path of a program"),
            "write one such as /usr/bin/backup".to_owned(),
        )
    } else if item.value.contains(['*', '?']) {
        (
            format!("{written} is a pattern, which cannot be compared at each connect"),
            "write the whole path of each program".to_owned(),
        )
    } else if names > MOST_EXECUTABLE_NAMES
        || item.value.split('/').any(|name| name.len() > LONGEST_EXECUTABLE_NAME)
    {
        (
            format!("{written} is too long"),
            format!(
                "at most {MOST_EXECUTABLE_NAMES} names of at most {LONGEST_EXECUTABLE_NAME} bytes can be \
                 compared; exclude the program's user instead"
            ),
        )
    } else {
        return Some(path.components().collect());
    };
    report.fault(&item.at, message, cure);
    None
}

fn exclusions(fields: &Fields<'_>, what: &str, report: &mut Report<'_>) -> Exclusions {
    Exclusions {
        ports: fields
            .get("ports")
            .map(|node| port_ranges(node, &format!("{what}.ports"), report))
            .unwrap_or_default(),
        cidrs: fields
            .get("cidrs")
            .map(|node| cidrs(node, &format!("{what}.cidrs"), report))
            .unwrap_or_default(),
    }
}

fn cidrs(node: &Node, what: &str, report: &mut Report<'_>) -> Vec<IpNet> {
    let mut seen = HashMap::new();
    let mut cidrs = Vec::new();
    for (index, item) in long_list(node, what, MOST_RULES, report).iter().enumerate() {
        let Some(item) = text(item, &format!("{what}[{index}]"), report) else { continue };
        let Some(net) = cidr(&item, report) else { continue };
        if let Some(first) = seen.insert(net, item.at.clone()) {
            let message = format!("{what} lists {net} twice");
            report.fault_with_note(&item.at, message, "remove one of the two", (&first, "first listed here"));
        } else {
            cidrs.push(net);
        }
    }
    cidrs
}

/// Ports, and ranges of them: `8080` or `"8000-8999"`.
fn port_ranges(node: &Node, what: &str, report: &mut Report<'_>) -> PortSet {
    let mut set = PortSet::default();
    let mut seen: Vec<At<PortSet>> = Vec::new();
    for (index, item) in list(node, what, report).iter().enumerate() {
        let place = format!("{what}[{index}]");
        let range = match &item.value {
            Value::Text(written) => {
                let range = written.split_once('-').and_then(|(first, last)| {
                    let port = |text: &str| {
                        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
                        text.parse::<u16>().ok().filter(|port| digits && *port > 0)
                    };
                    let (first, last) = (port(first)?, port(last)?);
                    (first <= last).then_some(first..=last)
                });
                if range.is_none() {
                    report.fault(
                        &item.at,
                        format!("{place} must be a port or a range of ports, found {}", found(item, report)),
                        "write a number from 1 to 65535, or a range such as \"8000-8999\"",
                    );
                }
                range
            }
            _ => port(item, &place, report).map(|port| port..=port),
        };
        let Some(range) = range else { continue };
        let one = PortSet::from_ranges([range.clone()]);
        if let Some(first) = seen.iter().find(|first| !first.value.within(&one).is_empty()) {
            report.fault_with_note(
                &item.at,
                format!("{what} lists {} twice", first.value.within(&one)),
                "remove one of the two",
                (&first.at, "first listed here"),
            );
        }
        seen.push(At { at: item.at.clone(), value: one });
        set.insert(range);
    }
    set
}

fn ports(node: &Node, what: &str, report: &mut Report<'_>) -> Vec<At<u16>> {
    let items = list(node, what, report);
    let mut out: Vec<At<u16>> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Some(value) = port(item, &format!("{what}[{index}]"), report) else { continue };
        if let Some(first) = out.iter().find(|first| first.value == value) {
            let message = format!("{what} lists {value} twice");
            report.fault_with_note(
                &item.at,
                message,
                "remove one of the two",
                (&first.at, "first listed here"),
            );
        } else {
            out.push(At { at: item.at.clone(), value });
        }
    }
    out
}

/// A network, written with its first address and its prefix length.
fn cidr(item: &At<String>, report: &mut Report<'_>) -> Option<IpNet> {
    let written = item.value.as_str();
    let Ok(net) = written.parse::<IpNet>() else {
        let (message, cure) = if let Ok(address) = written.parse::<std::net::IpAddr>() {
            (
                format!("{} is an address, not a network", quoted(written)),
                format!("write {}", IpNet::from(address)),
            )
        } else if let Some((address, prefix)) = written.split_once('/')
            && let Ok(address) = address.parse::<std::net::IpAddr>()
        {
            let most = if address.is_ipv4() { 32 } else { 128 };
            (
                format!("{} is no prefix length of {}", quoted(prefix), quoted(written)),
                format!("write a number from 0 to {most} after the `/`"),
            )
        } else {
            (
                format!("{} is not a network", quoted(written)),
                "write one such as 10.0.0.0/8 or fd00::/8".to_owned(),
            )
        };
        report.fault(&item.at, message, cure);
        return None;
    };
    if net.trunc() != net {
        let message = format!("{} has bits set beyond its prefix length", quoted(written));
        let cure = format!(
            "write {} for the network, or {} for the one address",
            net.trunc(),
            IpNet::from(net.addr())
        );
        report.fault(&item.at, message, cure);
        return None;
    }
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(prefix) = v6.prefix_len().checked_sub(96)
    {
        let message = format!("{} is an IPv4 network in IPv6 clothes", quoted(written));
        report.fault(&item.at, message, format!("write {v4}/{prefix}; it covers v4-mapped sockets too"));
        return None;
    }
    Some(net)
}

/// `name:port` or `name`.
fn target(
    fields: &Fields<'_>,
    what: &str,
    example: &str,
    companions: &[Companion],
    report: &mut Report<'_>,
) -> Option<At<Target>> {
    let to = text(fields.need("to", example, report)?, &format!("{what}.to"), report)?;
    let (name, port) = match to.value.split_once(':') {
        None => (to.value.as_str(), None),
        Some((name, port)) => {
            let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
            let Some(port) = port.parse::<u16>().ok().filter(|port| digits && *port > 0) else {
                let message = format!("{} is no port", quoted(port));
                report.fault(&to.at, message, format!("write \"{name}:PORT\" with a port from 1 to 65535"));
                return None;
            };
            (name, Some(port))
        }
    };
    if let Some(companion) = companions.iter().find(|companion| companion.name.value.as_str() == name) {
        return Some(At { at: to.at, value: Target { companion: companion.name.value.clone(), port } });
    }
    let mut names: Vec<&str> = companions.iter().map(|companion| companion.name.value.as_str()).collect();
    // A name that is given twice is a fault of its own.
    let mut told = BTreeSet::new();
    names.retain(|name| told.insert(*name));
    let cure = match (nearest_name(name, companions), &names[..]) {
        (Some(near), _) => format!("did you mean {}?", quoted(near)),
        (None, []) => format!("add a companion named {}", quoted(name)),
        (None, names) => format!("this policy's companions are named {}", any_of(names)),
    };
    report.fault(&to.at, format!("no companion is named {}", quoted(name)), cure);
    None
}

/// All companions of a workload listen in one network namespace.
fn check_listeners(targets: &Targets<'_>, report: &mut Report<'_>) {
    let mut seen: HashMap<u16, &At<Target>> = HashMap::new();
    for (_, target) in targets {
        let Some(port) = target.value.port else { continue };
        let first = seen.entry(port).or_insert(target);
        if first.value.companion != target.value.companion {
            report.fault_with_note(
                &target.at,
                format!("two companions cannot both listen on port {port}"),
                "they share the workload's network namespace: give each a port of its own",
                (&first.at, "the other one"),
            );
        }
    }
}

/// The relay has one port for each direction, and is no resolver.
fn check_relays(targets: &Targets<'_>, companions: &[Companion], report: &mut Report<'_>) {
    let is_relay = |name: &CompanionName| {
        companions
            .iter()
            .any(|companion| companion.name.value == *name && companion.spec.kind == CompanionKind::Relay)
    };
    let relays = || targets.iter().filter(|(_, target)| is_relay(&target.value.companion));
    let first = |wanted: Direction, name: &CompanionName| {
        relays().find(|(direction, target)| *direction == wanted && target.value.companion == *name)
    };
    for (direction, target) in relays() {
        let name = &target.value.companion;
        let Some((_, same)) = first(*direction, name) else { continue };
        match direction {
            Direction::Dns => report.fault(
                &target.at,
                format!("{} is the relay, which is no resolver", quoted(name.as_str())),
                "name a companion that answers DNS, or send port 53 on by an outbound rule with protocols: [tcp, udp]",
            ),
            Direction::Inbound if same.value.port != target.value.port => report.fault_with_note(
                &target.at,
                "the relay takes all inbound connections on one port",
                "send all inbound rules to the same port; it keeps the original ports apart",
                (&same.at, "the other rule"),
            ),
            Direction::Outbound if same.value.port != target.value.port => report.fault_with_note(
                &target.at,
                "the relay takes all outbound connections on one port",
                "send all outbound rules to the same port; it keeps the destinations apart",
                (&same.at, "the other rule"),
            ),
            Direction::Inbound => {
                if let Some((_, outbound)) = first(Direction::Outbound, name)
                    && outbound.value.port.is_some()
                    && outbound.value == target.value
                {
                    report.fault_with_note(
                        &target.at,
                        "the relay needs one port for outbound and another for inbound connections",
                        "give them different ports, such as 15001 and 15006, or leave the port out",
                        (&outbound.at, "the outbound rule"),
                    );
                }
            }
            Direction::Outbound => {}
        }
    }
}

/// The application cannot listen where a companion does.
fn check_inbound_ports(targets: &Targets<'_>, inbound: &[Inbound], report: &mut Report<'_>) {
    for port in inbound.iter().flat_map(|rule| &rule.ports) {
        if let Some((_, target)) = targets.iter().find(|(_, target)| target.value.port == Some(port.value)) {
            report.fault_with_note(
                &port.at,
                format!("port {} cannot be both the application's and the companion's", port.value),
                "`ports` are those that the application listens on; give the companion another one",
                (&target.at, "the companion's port"),
            );
        }
    }
}

/// A program must be able to learn the port that it is to listen on, and a variable must have a value.
fn check_variables(targets: &Targets<'_>, companions: &[Companion], report: &mut Report<'_>) {
    for companion in companions {
        let name = &companion.name.value;
        for direction in [Direction::Outbound, Direction::Inbound, Direction::Dns] {
            let (variable, rule) = (direction.variable(), direction.rule());
            let here = |(of, target): &&(Direction, &At<Target>)| {
                *of == direction && target.value.companion == *name
            };
            let targets: Vec<&At<Target>> = targets.iter().filter(here).map(|(_, target)| *target).collect();
            let used = companion.variables.iter().find(|used| used.value == variable);
            if let (Some(used), []) = (used, &targets[..]) {
                report.fault(
                    &used.at,
                    format!("{{{{ {variable} }}}} has no value: no {rule} goes to {}", quoted(name.as_str())),
                    format!("add {} to spec.redirect, or write the port out", direction.with_article()),
                );
            }
            let different: BTreeSet<Option<u16>> = targets.iter().map(|target| target.value.port).collect();
            if let (Some(used), true) = (used, different.len() > 1) {
                report.fault(
                    &used.at,
                    format!("{{{{ {variable} }}}} has several values: the rules name different ports"),
                    "write the ports out in the command, or send all rules to one port",
                );
            }
            let Some(target) = targets.iter().find(|target| target.value.port.is_none()) else { continue };
            if matches!(companion.spec.kind, CompanionKind::External(_)) {
                report.fault(
                    &target.at,
                    format!(
                        "{} has no port, and none can be chosen for it: somebody else runs it",
                        quoted(name.as_str())
                    ),
                    format!("write \"{name}:PORT\" with the port that it listens on"),
                );
            }
            let is_exec = matches!(companion.spec.kind, CompanionKind::Exec(_));
            if is_exec && used.is_none() && !companion.has_templates {
                report.fault(
                    &target.at,
                    format!("{} cannot learn which port to listen on", quoted(name.as_str())),
                    format!(
                        "write \"{name}:PORT\", or use {{{{ {variable} }}}} in its command or in a template"
                    ),
                );
            }
        }
    }
}
