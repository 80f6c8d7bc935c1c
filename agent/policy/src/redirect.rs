//! `spec.redirect`: which sockets go to which companion.
//!
//! Owns reading it and checking it against the companions: what comes out names only companions that exist and ports
//! that they can listen on, all in one network namespace.

use std::collections::BTreeSet;

use ipnet::IpNet;
use pillion_workload::{
    CompanionKind, CompanionName, Exclusions, InboundRule, OutboundRule, RedirectSpec, Target,
};

use crate::{
    companion::{Companion, nearest_name},
    fault::{any_of, quoted},
    reader::{At, Fields, list, port, text, texts},
    source::Report,
    tree::Node,
};

/// Reads `spec.redirect`. Targets that name no companion are reported, and left out.
pub(crate) fn read(node: &Node, companions: &[Companion], report: &mut Report<'_>) -> RedirectSpec {
    let Some(fields) = Fields::open(node, "spec.redirect", &["outbound", "inbound"], &["dns"], report) else {
        return RedirectSpec::default();
    };
    if fields.present(&["outbound", "inbound"]).is_empty() {
        let message = "spec.redirect has neither `outbound` nor `inbound`";
        report.fault(
            fields.at(),
            message,
            "add one, such as outbound: [{ to: \"relay:15001\" }], or remove the field",
        );
    }
    let outbound = fields.get("outbound").and_then(|node| outbound(node, companions, report));
    let inbound = fields.get("inbound").map(|node| inbound(node, companions, report)).unwrap_or_default();
    let outbound_target = outbound.as_ref().map(|(_, target)| target);
    let inbound_targets: Vec<&At<Target>> = inbound.iter().map(|rule| &rule.to).collect();
    check_listeners(outbound_target, &inbound_targets, companions, report);
    check_inbound_ports(outbound_target, &inbound, report);
    check_variables(outbound_target, &inbound_targets, companions, report);
    RedirectSpec {
        outbound: outbound.map(|(rule, _)| rule),
        inbound: inbound
            .into_iter()
            .map(|rule| InboundRule {
                ports: rule.ports.into_iter().map(|port| port.value).collect(),
                to: rule.to.value,
            })
            .collect(),
    }
}

struct Inbound {
    ports: Vec<At<u16>>,
    to: At<Target>,
}

fn outbound(
    node: &Node,
    companions: &[Companion],
    report: &mut Report<'_>,
) -> Option<(OutboundRule, At<Target>)> {
    let items = list(node, "spec.redirect.outbound", report);
    if let Some(second) = items.get(1) {
        report.fault(
            &second.at,
            "a second outbound rule is not supported in this version",
            "keep one rule; it takes all connections but those under `exclude`",
        );
    }
    let mut rule = None;
    for (index, item) in items.iter().enumerate() {
        let what = format!("spec.redirect.outbound[{index}]");
        let Some(fields) = Fields::open(item, &what, &["to", "exclude"], &[], report) else { continue };
        let to = target(&fields, &what, "to: \"relay:15001\"", companions, report);
        let exclude = fields
            .get("exclude")
            .map(|node| exclusions(node, &format!("{what}.exclude"), report))
            .unwrap_or_default();
        if let (Some(to), None) = (to, &rule) {
            rule = Some((OutboundRule { to: to.value.clone(), exclude }, to));
        }
    }
    rule
}

fn inbound(node: &Node, companions: &[Companion], report: &mut Report<'_>) -> Vec<Inbound> {
    let mut rules: Vec<Inbound> = Vec::new();
    let mut taken: Vec<At<u16>> = Vec::new();
    let items = list(node, "spec.redirect.inbound", report);
    for (index, item) in items.iter().enumerate() {
        let what = format!("spec.redirect.inbound[{index}]");
        let Some(fields) = Fields::open(item, &what, &["ports", "to"], &[], report) else { continue };
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

fn exclusions(node: &Node, what: &str, report: &mut Report<'_>) -> Exclusions {
    let Some(fields) = Fields::open(node, what, &["ports", "cidrs"], &[], report) else {
        return Exclusions::default();
    };
    if fields.present(&["ports", "cidrs"]).is_empty() {
        report.fault(&node.at, format!("{what} is empty"), "add ports or cidrs, or remove the field");
    }
    let ports =
        fields.get("ports").map(|node| ports(node, &format!("{what}.ports"), report)).unwrap_or_default();
    let mut cidrs: Vec<At<IpNet>> = Vec::new();
    if let Some(node) = fields.get("cidrs") {
        let what = format!("{what}.cidrs");
        for item in texts(node, &what, report) {
            let Some(net) = cidr(&item, report) else { continue };
            if let Some(first) = cidrs.iter().find(|first| first.value == net) {
                let message = format!("{what} lists {net} twice");
                report.fault_with_note(
                    &item.at,
                    message,
                    "remove one of the two",
                    (&first.at, "first listed here"),
                );
            } else {
                cidrs.push(At { at: item.at, value: net });
            }
        }
    }
    Exclusions {
        ports: ports.into_iter().map(|port| port.value).collect(),
        cidrs: cidrs.into_iter().map(|cidr| cidr.value).collect(),
    }
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
fn check_listeners(
    outbound: Option<&At<Target>>,
    inbound: &[&At<Target>],
    companions: &[Companion],
    report: &mut Report<'_>,
) {
    let mut seen: Vec<&At<Target>> = Vec::new();
    for target in outbound.into_iter().chain(inbound.iter().copied()) {
        let Some(port) = target.value.port else { continue };
        let other = seen
            .iter()
            .find(|other| other.value.port == Some(port) && other.value.companion != target.value.companion);
        if let Some(other) = other {
            report.fault_with_note(
                &target.at,
                format!("two companions cannot both listen on port {port}"),
                "they share the workload's network namespace: give each a port of its own",
                (&other.at, "the other one"),
            );
        }
        seen.push(target);
    }
    let is_relay = |name: &CompanionName| {
        companions
            .iter()
            .any(|companion| companion.name.value == *name && companion.spec.kind == CompanionKind::Relay)
    };
    if let Some(outbound) = outbound
        && outbound.value.port.is_some()
        && is_relay(&outbound.value.companion)
        && let Some(same) = inbound.iter().find(|target| target.value == outbound.value)
    {
        report.fault_with_note(
            &same.at,
            "the relay needs one port for outbound and another for inbound connections",
            "give them different ports, such as 15001 and 15006, or leave the port out",
            (&outbound.at, "the outbound rule"),
        );
    }
    for (index, target) in inbound.iter().enumerate() {
        let different = inbound[..index].iter().find(|other| {
            other.value.companion == target.value.companion && other.value.port != target.value.port
        });
        if let Some(other) = different
            && is_relay(&target.value.companion)
        {
            report.fault_with_note(
                &target.at,
                "the relay takes all inbound connections on one port",
                "send all inbound rules to the same port; it keeps the original ports apart",
                (&other.at, "the other rule"),
            );
        }
    }
}

/// The application cannot listen where a companion does.
fn check_inbound_ports(outbound: Option<&At<Target>>, inbound: &[Inbound], report: &mut Report<'_>) {
    for port in inbound.iter().flat_map(|rule| &rule.ports) {
        let mut targets = outbound.into_iter().chain(inbound.iter().map(|rule| &rule.to));
        if let Some(target) = targets.find(|target| target.value.port == Some(port.value)) {
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
fn check_variables(
    outbound: Option<&At<Target>>,
    inbound: &[&At<Target>],
    companions: &[Companion],
    report: &mut Report<'_>,
) {
    for companion in companions {
        let name = &companion.name.value;
        let goes_here = |target: &&At<Target>| target.value.companion == *name;
        let outbound: Vec<&At<Target>> = outbound.into_iter().filter(goes_here).collect();
        let inbound: Vec<&At<Target>> = inbound.iter().copied().filter(goes_here).collect();
        for (variable, direction, targets) in
            [("outboundPort", "outbound", &outbound), ("inboundPort", "inbound", &inbound)]
        {
            let used = companion.variables.iter().find(|used| used.value == variable);
            if let (Some(used), []) = (used, &targets[..]) {
                report.fault(
                    &used.at,
                    format!(
                        "{{{{ {variable} }}}} has no value: no {direction} rule goes to {}",
                        quoted(name.as_str())
                    ),
                    format!("add an {direction} rule to spec.redirect, or write the port out"),
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
