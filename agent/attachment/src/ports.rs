//! Which ports companions listen on: as the policy says, or the defaults, or free ones of the namespace.
//!
//! Pure: the question whether a port is free goes through a closure. Never looks at a socket (`namespace` does).

use std::collections::{BTreeMap, BTreeSet};

use pillion_companion::ResolvedPorts;
use pillion_workload::{CompanionName, Plan, Probe, Protocol, RedirectSpec, Target};

/// Where outbound connections go when the policy leaves the port out: what service meshes use.
pub const DEFAULT_OUTBOUND: u16 = 15001;
/// Where inbound connections go when the policy leaves the port out.
pub const DEFAULT_INBOUND: u16 = 15006;
/// Where questions to resolvers go when the policy leaves the port out.
pub(crate) const DEFAULT_DNS: u16 = 15053;
/// Tried when a default is taken. Below the range of ephemeral ports (32768 and up), so that no outgoing connection
/// of the workload can be in the way.
const FALLBACKS: std::ops::RangeInclusive<u16> = 15100..=15999;

/// A plan's redirection with every port filled in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    /// Every target has a port.
    pub redirect: RedirectSpec,
    /// For each companion of the plan.
    pub companions: BTreeMap<CompanionName, ResolvedPorts>,
    /// Those that the policy left out.
    pub allocated: BTreeSet<u16>,
}

impl Resolved {
    /// What [`resolve`] had answered for `plan` when it gave `redirect`.
    pub(crate) fn recall(plan: &Plan, redirect: &RedirectSpec) -> Self {
        let mut resolved = Self { redirect: redirect.clone(), ..Self::default() };
        for spec in &plan.companions {
            resolved.companions.entry(spec.name.clone()).or_default();
        }
        let planned: Vec<Option<u16>> = targets(&plan.redirect).map(|wanted| wanted.to.port).collect();
        let mut allocated = BTreeSet::new();
        for (wanted, planned) in targets(redirect).zip(planned) {
            let Some(port) = wanted.to.port else { continue };
            wanted.note(port, &mut resolved.companions);
            if planned.is_none() {
                allocated.insert(port);
            }
        }
        resolved.allocated = allocated;
        resolved
    }
}

/// What a companion listens for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    Dns,
    Outbound,
    Inbound,
}

impl Direction {
    fn preferred(self) -> u16 {
        match self {
            Self::Dns => DEFAULT_DNS,
            Self::Outbound => DEFAULT_OUTBOUND,
            Self::Inbound => DEFAULT_INBOUND,
        }
    }
}

/// One target of a redirection.
struct Wanted<'a> {
    direction: Direction,
    to: &'a Target,
    protocols: BTreeSet<Protocol>,
}

impl Wanted<'_> {
    /// Tells the companion of its port.
    fn note(&self, port: u16, companions: &mut BTreeMap<CompanionName, ResolvedPorts>) {
        let ports = companions.entry(self.to.companion.clone()).or_default();
        let place = match self.direction {
            Direction::Dns => &mut ports.dns,
            Direction::Outbound => &mut ports.outbound,
            Direction::Inbound => &mut ports.inbound,
        };
        place.get_or_insert(port);
        ports.listening.extend(self.protocols.iter().map(|protocol| (port, *protocol)));
    }
}

/// All targets, in the order in which ports are given to them.
fn targets(redirect: &RedirectSpec) -> impl Iterator<Item = Wanted<'_>> {
    let wanted = |direction, to, protocols| Wanted { direction, to, protocols };
    let outbound = redirect
        .outbound
        .iter()
        .map(move |rule| wanted(Direction::Outbound, &rule.to, rule.protocols.clone()));
    let tcp = BTreeSet::from([Protocol::Tcp]);
    let inbound = redirect.inbound.iter().map(move |rule| wanted(Direction::Inbound, &rule.to, tcp.clone()));
    let both = BTreeSet::from([Protocol::Tcp, Protocol::Udp]);
    let dns = redirect.dns.iter().map(move |to| wanted(Direction::Dns, to, both.clone()));
    outbound.chain(inbound).chain(dns)
}

/// Why ports cannot be settled.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Everything that was tried is taken.
    #[error(
        "no free port for companion {companion} in the workload's network namespace: {preferred} and {} to {} are taken",
        FALLBACKS.start(), FALLBACKS.end()
    )]
    NoneFree {
        /// Whose.
        companion: CompanionName,
        /// The default.
        preferred: u16,
    },
}

/// Fills in the ports of `plan`. What `previous` allocated for the same companion and direction is kept.
///
/// `claim` says whether a port is free, and claims it if so.
pub(crate) fn resolve(
    plan: &Plan,
    previous: Option<&Resolved>,
    mut claim: impl FnMut(u16) -> bool,
) -> Result<Resolved, PortError> {
    let mut resolved = Resolved { redirect: plan.redirect.clone(), ..Resolved::default() };
    let mut spoken_for = named_ports(plan);
    let probed = probed_ports(plan);
    let mut allocate = |companion: &CompanionName, preferred: u16, kept: Option<u16>| {
        // A port that its own probe asks is the companion's to listen on, and nobody else's.
        let may_have = |port: &u16| {
            !spoken_for.contains(port) && probed.get(port).is_none_or(|owner| *owner == companion)
        };
        let port = kept
            .filter(may_have)
            .or_else(|| {
                std::iter::once(preferred).chain(FALLBACKS).find(|port| may_have(port) && claim(*port))
            })
            .ok_or_else(|| PortError::NoneFree { companion: companion.clone(), preferred })?;
        spoken_for.insert(port);
        resolved.allocated.insert(port);
        Ok::<u16, PortError>(port)
    };

    let mut companions: BTreeMap<CompanionName, ResolvedPorts> =
        plan.companions.iter().map(|spec| (spec.name.clone(), ResolvedPorts::default())).collect();
    // A companion has one allocated port for each direction.
    let mut given: BTreeMap<(&CompanionName, Direction), u16> = BTreeMap::new();
    let mut ports = Vec::new();
    for wanted in targets(&plan.redirect) {
        let name = &wanted.to.companion;
        let port = match (wanted.to.port, given.get(&(name, wanted.direction))) {
            (Some(port), _) | (None, Some(&port)) => port,
            (None, None) => {
                let kept = kept(previous, name, wanted.direction);
                let port = allocate(name, wanted.direction.preferred(), kept)?;
                given.insert((name, wanted.direction), port);
                port
            }
        };
        wanted.note(port, &mut companions);
        ports.push(port);
    }
    let redirect = &mut resolved.redirect;
    let outbound = redirect.outbound.iter_mut().map(|rule| &mut rule.to);
    let inbound = redirect.inbound.iter_mut().map(|rule| &mut rule.to);
    for (target, port) in outbound.chain(inbound).chain(&mut redirect.dns).zip(ports) {
        target.port = Some(port);
    }
    resolved.companions = companions;
    Ok(resolved)
}

/// Ports that the plan names and that therefore are nobody else's.
fn named_ports(plan: &Plan) -> BTreeSet<u16> {
    targets(&plan.redirect)
        .filter_map(|wanted| wanted.to.port)
        .chain(plan.redirect.inbound.iter().flat_map(|rule| rule.ports.iter().copied()))
        .collect()
}

/// Ports that readiness probes ask, with whose they are.
fn probed_ports(plan: &Plan) -> BTreeMap<u16, &CompanionName> {
    let probed = plan.companions.iter().filter_map(|spec| match &spec.ready.probe {
        Some(Probe::Tcp { port } | Probe::Http { port, .. }) => Some((*port, &spec.name)),
        Some(Probe::Exec { .. }) | None => None,
    });
    probed.collect()
}

fn kept(previous: Option<&Resolved>, companion: &CompanionName, direction: Direction) -> Option<u16> {
    let previous = previous?;
    targets(&previous.redirect)
        .filter(|wanted| wanted.to.companion == *companion && wanted.direction == direction)
        .filter_map(|wanted| wanted.to.port)
        .find(|port| previous.allocated.contains(port))
}

#[cfg(test)]
mod tests {
    use pillion_workload::Target;

    use super::*;
    use crate::testing::{inbound, outbound, plan};

    fn target(text: &str) -> Target {
        let (companion, port) = text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)));
        Target { companion: companion.parse().unwrap(), port: port.map(|port| port.parse().unwrap()) }
    }

    /// (outbound, inbound rules, taken ports) to (outbound port, inbound ports)
    #[test]
    fn given_then_default_then_free() {
        type Row<'a> = (Option<&'a str>, &'a [(&'a [u16], &'a str)], &'a [u16], Option<u16>, &'a [u16]);
        let table: &[Row<'_>] = &[
            (Some("a:9000"), &[], &[9000], Some(9000), &[]),
            (Some("a"), &[], &[], Some(15001), &[]),
            (Some("a"), &[], &[15001], Some(15100), &[]),
            (Some("a"), &[], &[15001, 15100, 15101], Some(15102), &[]),
            (Some("a"), &[(&[8080], "a")], &[], Some(15001), &[15006]),
            (None, &[(&[80], "a"), (&[443], "a")], &[], None, &[15006, 15006]),
            (None, &[(&[80], "a"), (&[443], "b")], &[], None, &[15006, 15100]),
            (None, &[(&[80], "a:1"), (&[443], "a:2")], &[], None, &[1, 2]),
            (None, &[(&[80], "a:1"), (&[443], "a")], &[], None, &[1, 15006]),
            // An application port, and a port given elsewhere in the plan, are never allocated.
            (Some("a"), &[(&[15001], "a:15006")], &[], Some(15100), &[15006]),
            (Some("a"), &[(&[80], "b:15001")], &[], Some(15100), &[15001]),
        ];
        for (out, ins, taken, wanted_out, wanted_ins) in table {
            let mut plan = plan(&["a", "b"]);
            plan.redirect.outbound = out.iter().map(|to| outbound(target(to))).collect();
            plan.redirect.inbound = ins.iter().map(|(ports, to)| inbound(ports, target(to))).collect();
            let resolved = resolve(&plan, None, |port| !taken.contains(&port)).unwrap();
            let got_out = resolved.redirect.outbound.first().and_then(|rule| rule.to.port);
            let got_ins: Vec<u16> =
                resolved.redirect.inbound.iter().filter_map(|rule| rule.to.port).collect();
            assert_eq!(
                (got_out, got_ins.as_slice()),
                (*wanted_out, *wanted_ins),
                "{out:?} {ins:?} {taken:?}"
            );
            assert_eq!(Resolved::recall(&plan, &resolved.redirect), resolved, "from a record");
        }
    }

    #[test]
    fn a_companion_learns_all_its_ports() {
        let mut plan = plan(&["a"]);
        plan.redirect.outbound = vec![outbound(target("a"))];
        plan.redirect.inbound = vec![inbound(&[80], target("a:81")), inbound(&[443], target("a"))];
        let resolved = resolve(&plan, None, |_| true).unwrap();
        let ports = &resolved.companions[&"a".parse().unwrap()];
        assert_eq!((ports.outbound, ports.inbound), (Some(15001), Some(81)));
        assert_eq!(ports.listening, [81, 15001, 15006].map(|port| (port, Protocol::Tcp)).into());
        assert_eq!(resolved.allocated, BTreeSet::from([15001, 15006]));
    }

    #[test]
    fn several_rules_and_a_resolver() {
        let mut plan = plan(&["a", "b"]);
        let both: BTreeSet<Protocol> = [Protocol::Tcp, Protocol::Udp].into();
        plan.redirect.outbound =
            vec![outbound(target("a:7000")), outbound(target("b")), outbound(target("b"))];
        plan.redirect.outbound[2].protocols = both.clone();
        plan.redirect.dns = Some(target("b"));
        let resolved = resolve(&plan, None, |_| true).unwrap();
        let got: Vec<_> = resolved.redirect.outbound.iter().map(|rule| rule.to.port).collect();
        assert_eq!(got, [Some(7000), Some(15001), Some(15001)]);
        assert_eq!(resolved.redirect.dns.as_ref().unwrap().port, Some(15053));
        let ports = &resolved.companions[&"b".parse().unwrap()];
        assert_eq!((ports.outbound, ports.dns), (Some(15001), Some(15053)));
        let listening = [15001, 15053].into_iter().flat_map(|port| both.iter().map(move |it| (port, *it)));
        assert_eq!(ports.listening, listening.collect());
        assert_eq!(Resolved::recall(&plan, &resolved.redirect), resolved, "from a record");
    }

    #[test]
    fn a_probed_port_is_for_its_own_companion() {
        for (owner, wanted) in [(0, 15001), (1, 15100)] {
            let mut plan = plan(&["a", "b"]);
            plan.companions[owner].ready.probe = Some(Probe::Tcp { port: DEFAULT_OUTBOUND });
            plan.redirect.outbound = vec![outbound(target("a"))];
            let resolved = resolve(&plan, None, |_| true).unwrap();
            assert_eq!(resolved.redirect.outbound[0].to.port, Some(wanted));
        }
    }

    #[test]
    fn a_changed_plan_keeps_what_was_allocated() {
        let mut plan = plan(&["a"]);
        plan.redirect.outbound = vec![outbound(target("a"))];
        plan.redirect.inbound = vec![inbound(&[80], target("a"))];
        let first = resolve(&plan, None, |port| port >= 15200).unwrap();
        plan.redirect.inbound[0].ports.insert(81);
        let asked = std::cell::Cell::new(0);
        let second = resolve(&plan, Some(&first), |_| {
            asked.set(asked.get() + 1);
            true
        })
        .unwrap();
        assert_eq!(second.companions, first.companions);
        assert_eq!(asked.get(), 0, "its own listeners are not in its way");
        // Unless the policy now claims that port for something else.
        plan.redirect.inbound[0].ports.insert(15200);
        let third = resolve(&plan, Some(&second), |_| true).unwrap();
        assert_eq!(third.redirect.outbound[0].to.port, Some(15001));
    }

    #[test]
    fn an_exhausted_namespace_is_an_error() {
        let mut plan = plan(&["a"]);
        plan.redirect.outbound = vec![outbound(target("a"))];
        let error = resolve(&plan, None, |_| false).unwrap_err();
        assert!(error.to_string().contains("15001 and 15100 to 15999 are taken"), "{error}");
    }
}
