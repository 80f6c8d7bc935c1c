//! Ordered rules as tables that are looked at in a time that does not grow with their number. Pure.
//!
//! Destinations are put into classes: all addresses for which the same rules can match, in the same order, are one class. A
//! longest-prefix lookup of the address gives the class, one of class, protocol and port the rule: two lookups, however
//! many rules there are. What the rules mean is [`RedirectSpec::route`]; the property test below compares.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
};

use ipnet::IpNet;
use pillion_common::Route;
use pillion_workload::{DNS_PORT, PortSet, Protocol, RedirectSpec, Target};

use crate::RedirectError;

/// How many entries one workload's table may have: as much as some ten megabytes of the kernel's memory.
pub(crate) const MOST_ENTRIES: usize = 131_072;

/// The ports from `port` on whose first `length` bits are equal, of one class and protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ports {
    pub(crate) class: u32,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    pub(crate) length: u32,
}

/// What the kernel side looks at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tables {
    /// The class of each network; all other addresses are of class 0.
    pub(crate) networks: BTreeMap<IpNet, u32>,
    /// What is not there passes, as does a route without flags.
    pub(crate) routes: BTreeMap<Ports, Route>,
}

/// A rule as it can be compared: what it matches, and where that goes.
struct Candidate<'a> {
    route: Route,
    cidrs: &'a [IpNet],
    ports: Option<&'a PortSet>,
    protocols: &'a BTreeSet<Protocol>,
    excluded_ports: Option<&'a PortSet>,
    excluded_cidrs: &'a [IpNet],
}

/// What a network adds to the rules of the networks around it.
#[derive(Default)]
struct Change {
    includes: BTreeSet<u32>,
    excludes: BTreeSet<u32>,
    excludes_all: bool,
}

/// Which rules can match in a network.
#[derive(Clone, Default)]
struct Matching {
    included: Rc<BTreeSet<u32>>,
    excluded: Rc<BTreeSet<u32>>,
    none: bool,
}

impl Tables {
    /// `port_of` tells the port of a target.
    pub(crate) fn new(
        spec: &RedirectSpec,
        mut port_of: impl FnMut(&Target, &BTreeSet<Protocol>) -> Result<u16, RedirectError>,
    ) -> Result<Self, RedirectError> {
        let both = BTreeSet::from([Protocol::Tcp, Protocol::Udp]);
        let dns_port = PortSet::from([DNS_PORT]);
        let mut candidates = Vec::new();
        if let Some(to) = &spec.dns {
            candidates.push(Candidate {
                route: Route {
                    companion_port: port_of(to, &both)?,
                    flags: Route::REDIRECT | Route::DNS,
                    rule: Route::DNS_RULE,
                },
                cidrs: &[],
                ports: Some(&dns_port),
                protocols: &both,
                excluded_ports: None,
                excluded_cidrs: &[],
            });
        }
        for (rule, index) in spec.outbound.iter().zip(0..) {
            candidates.push(Candidate {
                route: Route {
                    companion_port: port_of(&rule.to, &rule.protocols)?,
                    flags: Route::REDIRECT,
                    rule: index,
                },
                cidrs: &rule.cidrs,
                ports: Some(&rule.ports).filter(|ports| !ports.is_empty()),
                protocols: &rule.protocols,
                excluded_ports: Some(&rule.exclude.ports),
                excluded_cidrs: &rule.exclude.cidrs,
            });
        }
        Compiler {
            candidates,
            everywhere: &spec.exclude.destinations.ports,
            classes: HashMap::new(),
            tables: Self::default(),
        }
        .compile(&spec.exclude.destinations.cidrs)
    }
}

struct Compiler<'a> {
    candidates: Vec<Candidate<'a>>,
    everywhere: &'a PortSet,
    /// By the rules that can match, in order.
    classes: HashMap<Vec<u32>, u32>,
    tables: Tables,
}

impl Compiler<'_> {
    fn compile(mut self, excluded: &[IpNet]) -> Result<Tables, RedirectError> {
        let mut changes: BTreeMap<IpNet, Change> = BTreeMap::new();
        let change = |changes: &mut BTreeMap<IpNet, Change>, network: &IpNet, apply: &dyn Fn(&mut Change)| {
            apply(changes.entry(network.trunc()).or_default());
        };
        for (candidate, id) in self.candidates.iter().zip(0..) {
            for network in candidate.cidrs {
                change(&mut changes, network, &|it| {
                    it.includes.insert(id);
                });
            }
            for network in candidate.excluded_cidrs {
                change(&mut changes, network, &|it| {
                    it.excludes.insert(id);
                });
            }
        }
        for network in excluded {
            change(&mut changes, network, &|it| it.excludes_all = true);
        }
        let root = Matching::default();
        let root_class = self.class(&root)?;
        debug_assert_eq!(root_class, 0);
        // In order of address and then length, a network comes after all that contain it.
        let mut around: Vec<(IpNet, Matching, u32)> = Vec::new();
        for (network, change) in changes {
            while around.last().is_some_and(|(outer, ..)| !outer.contains(&network)) {
                around.pop();
            }
            let (outer, outer_class) =
                around.last().map_or((&root, 0), |(_, matching, class)| (matching, *class));
            let matching = outer.changed(&change);
            let class = self.class(&matching)?;
            if class != outer_class {
                self.tables.networks.insert(network, class);
                self.check()?;
            }
            around.push((network, matching, class));
        }
        Ok(self.tables)
    }

    /// The class of destinations for which these rules can match; makes its routes when it is new.
    fn class(&mut self, matching: &Matching) -> Result<u32, RedirectError> {
        let possible: Vec<u32> = if matching.none {
            Vec::new()
        } else {
            let all = self.candidates.iter().zip(0..);
            all.filter(|(candidate, id)| {
                (candidate.cidrs.is_empty() || matching.included.contains(id))
                    && !matching.excluded.contains(id)
            })
            .map(|(_, id)| id)
            .collect()
        };
        if let Some(class) = self.classes.get(&possible) {
            return Ok(*class);
        }
        let class = u32::try_from(self.classes.len()).unwrap_or(u32::MAX);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            self.routes(class, protocol, &possible)?;
        }
        self.classes.insert(possible, class);
        Ok(class)
    }

    fn routes(&mut self, class: u32, protocol: Protocol, possible: &[u32]) -> Result<(), RedirectError> {
        let whole = PortSet::from_ranges([0..=u16::MAX]);
        let mut free = whole.without(self.everywhere);
        let mut taken: Vec<(u16, u16, Route)> = Vec::new();
        for id in possible {
            let Some(candidate) = usize::try_from(*id).ok().and_then(|id| self.candidates.get(id)) else {
                continue;
            };
            if free.is_empty() || !candidate.protocols.contains(&protocol) {
                continue;
            }
            let mut matched = match candidate.ports {
                Some(ports) => ports.within(&free),
                None => free.clone(),
            };
            if let Some(excluded) = candidate.excluded_ports {
                matched = matched.without(excluded);
            }
            taken.extend(matched.ranges().map(|range| (*range.start(), *range.end(), candidate.route)));
            free = free.without(&matched);
        }
        if taken.is_empty() {
            return Ok(());
        }
        // What passes is told where it is an exception from what most ports do.
        let passes = whole.without(&taken.iter().map(|(first, last, _)| *first..=*last).collect());
        taken.extend(passes.ranges().map(|range| (*range.start(), *range.end(), Route::default())));
        taken.sort_unstable();
        let mut width: BTreeMap<Route, u32> = BTreeMap::new();
        for (first, last, route) in &taken {
            *width.entry(*route).or_default() += u32::from(*last) - u32::from(*first) + 1;
        }
        let usual =
            width.into_iter().max_by_key(|(_, width)| *width).map_or_else(Route::default, |(route, _)| route);
        let mut put = |port, length, route| {
            self.tables.routes.insert(Ports { class, protocol, port, length }, route);
        };
        if usual != Route::default() {
            put(0, 0, usual);
        }
        for (first, last, route) in taken {
            if route != usual {
                prefixes(first, last, |port, length| put(port, length, route));
            }
        }
        self.check()
    }

    fn check(&self) -> Result<(), RedirectError> {
        let entries = self.tables.networks.len() + self.tables.routes.len();
        if entries > MOST_ENTRIES { Err(RedirectError::TooManyRules { most: MOST_ENTRIES }) } else { Ok(()) }
    }
}

impl Matching {
    fn changed(&self, change: &Change) -> Self {
        let with = |set: &Rc<BTreeSet<u32>>, more: &BTreeSet<u32>| {
            if more.is_empty() { Rc::clone(set) } else { Rc::new(set.union(more).copied().collect()) }
        };
        Self {
            included: with(&self.included, &change.includes),
            excluded: with(&self.excluded, &change.excludes),
            none: self.none || change.excludes_all,
        }
    }
}

/// The fewest prefixes that make up a range of ports.
fn prefixes(first: u16, last: u16, mut put: impl FnMut(u16, u32)) {
    let (mut next, last) = (u32::from(first), u32::from(last));
    while next <= last {
        let mut size = if next == 0 { 1 << 16 } else { 1 << next.trailing_zeros() };
        while next + size - 1 > last {
            size /= 2;
        }
        put(u16::try_from(next).unwrap_or(u16::MAX), 16 - size.trailing_zeros());
        next += size;
    }
}

impl Tables {
    /// The answer of the kernel side, for tests and explanations: the lookups that it makes, on these tables.
    #[cfg(test)]
    pub(crate) fn lookup(&self, protocol: Protocol, address: std::net::IpAddr, port: u16) -> Route {
        let longest = self
            .networks
            .iter()
            .filter(|(network, _)| network.contains(&address))
            .max_by_key(|(network, _)| network.prefix_len());
        let class = longest.map_or(0, |(_, class)| *class);
        let matches = |ports: &Ports| {
            ports.class == class
                && ports.protocol == protocol
                && u32::from(ports.port ^ port).checked_shr(16 - ports.length).unwrap_or(0) == 0
        };
        let routes = self.routes.iter().filter(|(ports, _)| matches(ports));
        routes.max_by_key(|(ports, _)| ports.length).map_or_else(Route::default, |(_, route)| *route)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use pillion_workload::{Exclusions, OutboundRule, Passes};
    use proptest::prelude::*;

    use super::*;

    fn tables(spec: &RedirectSpec) -> Tables {
        Tables::new(spec, |to, _| to.port.ok_or_else(|| RedirectError::NoPort(to.companion.clone()))).unwrap()
    }

    fn network() -> impl Strategy<Value = IpNet> {
        // Few bits, so that networks lie in each other and addresses in them.
        prop_oneof![
            (0..4_u8, 0..4_u8, prop::sample::select(vec![0_u8, 7, 8, 15, 16, 32]))
                .prop_map(|(a, b, length)| IpNet::new([a, b, 0, 1].into(), length).unwrap().trunc()),
            (0..4_u16, 0..4_u16, prop::sample::select(vec![0_u8, 15, 16, 32, 128])).prop_map(
                |(a, b, length)| IpNet::new([a, b, 0, 0, 0, 0, 0, 1].into(), length).unwrap().trunc()
            ),
        ]
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0..5_u8, 0..5_u8, 0..3_u8).prop_map(|(a, b, c)| IpAddr::from([a, b, 0, c])),
            (0..5_u16, 0..5_u16, 1..3_u16).prop_map(|(a, b, c)| IpAddr::from([a, b, 0, 0, 0, 0, 0, c])),
        ]
    }

    fn ports() -> impl Strategy<Value = PortSet> {
        let range = (prop::sample::select(vec![1_u16, 52, 53, 54, 80, 4000, 65530]), 0..5_u16);
        proptest::collection::vec(range, 0..3).prop_map(|ranges| {
            PortSet::from_ranges(ranges.into_iter().map(|(first, more)| first..=first + more))
        })
    }

    fn rule() -> impl Strategy<Value = OutboundRule> {
        let some = || proptest::collection::vec(network(), 0..3);
        (1..9_u16, some(), ports(), 1..4_u8, some(), ports()).prop_map(
            |(to, cidrs, ports, protocols, excluded, excluded_ports)| OutboundRule {
                cidrs,
                ports,
                protocols: [Protocol::Tcp, Protocol::Udp]
                    .into_iter()
                    .zip([1, 2])
                    .filter_map(|(protocol, bit)| (protocols & bit != 0).then_some(protocol))
                    .collect(),
                exclude: Exclusions { ports: excluded_ports, cidrs: excluded },
                ..OutboundRule::all_tcp(Target { companion: "a".parse().unwrap(), port: Some(to) })
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn tables_say_what_the_rules_mean(
            outbound in proptest::collection::vec(rule(), 0..8),
            dns in any::<bool>(),
            cidrs in proptest::collection::vec(network(), 0..3),
            ports in ports(),
            questions in proptest::collection::vec((address(), any::<prop::sample::Index>()), 40),
        ) {
            let spec = RedirectSpec {
                outbound,
                dns: dns.then(|| Target { companion: "dns".parse().unwrap(), port: Some(5353) }),
                exclude: pillion_workload::Exemptions {
                    destinations: Exclusions { ports, cidrs },
                    ..Default::default()
                },
                inbound: Vec::new(),
            };
            let tables = tables(&spec);
            let interesting = [1_u16, 2, 51, 52, 53, 54, 58, 79, 80, 84, 85, 3999, 4000, 4004, 65529, 65530, 65535];
            for (address, port) in questions {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let port = interesting[port.index(interesting.len())];
                    let expected = match spec.route(protocol, address, port) {
                        pillion_workload::Route::Dns(_) => Some(Route::DNS_RULE),
                        pillion_workload::Route::Rule(index, _) => u32::try_from(index).ok(),
                        // The programs look at loopback before the tables.
                        pillion_workload::Route::Pass(Passes::Local) => continue,
                        pillion_workload::Route::Pass(_) => None,
                    };
                    let route = tables.lookup(protocol, address, port);
                    let got = (route.flags & Route::REDIRECT != 0).then_some(route.rule);
                    prop_assert_eq!(got, expected, "{:?} {} {}: {:?}", protocol, address, port, tables);
                }
            }
        }

        #[test]
        fn a_range_is_its_prefixes(first in any::<u16>(), last in any::<u16>()) {
            let mut ports = 0_u32;
            let mut next = u32::from(first);
            let mut whole = true;
            prefixes(first, last, |port, length| {
                whole &= u32::from(port) == next;
                next += 1 << (16 - length);
                ports += 1 << (16 - length);
            });
            prop_assert!(whole);
            prop_assert_eq!(ports, (u32::from(last) + 1).saturating_sub(u32::from(first)));
        }
    }

    #[test]
    fn many_rules_take_few_entries() {
        let to = |port| Target { companion: "a".parse().unwrap(), port: Some(port) };
        let rule = |index: u32| OutboundRule {
            cidrs: vec![IpNet::new(IpAddr::from((0x0a00_0000 + (index << 8)).to_be_bytes()), 24).unwrap()],
            ..OutboundRule::all_tcp(to(15001))
        };
        let spec = RedirectSpec { outbound: (0..10_000).map(rule).collect(), ..RedirectSpec::default() };
        let many = tables(&spec);
        assert_eq!((many.networks.len(), many.routes.len()), (10_000, 10_000));
        // One rule with as many networks is one class.
        let mut one = OutboundRule::all_tcp(to(15001));
        one.cidrs = spec.outbound.iter().flat_map(|rule| rule.cidrs.clone()).collect();
        let one = tables(&RedirectSpec { outbound: vec![one], ..RedirectSpec::default() });
        assert_eq!((one.networks.len(), one.routes.len()), (10_000, 1));
    }

    #[test]
    fn what_is_too_much_is_refused() {
        let to = Target { companion: "a".parse().unwrap(), port: Some(15001) };
        let odd: PortSet = (0..1000).map(|port| port * 2 + 1).collect();
        let rule = |index: u32| OutboundRule {
            cidrs: vec![IpNet::new(IpAddr::from((0x0a00_0000 + (index << 8)).to_be_bytes()), 24).unwrap()],
            ports: odd.clone(),
            ..OutboundRule::all_tcp(to.clone())
        };
        let spec = RedirectSpec { outbound: (0..200).map(rule).collect(), ..RedirectSpec::default() };
        let error = Tables::new(&spec, |_, _| Ok(15001)).unwrap_err();
        assert!(error.to_string().contains("131072"), "{error}");
    }
}
