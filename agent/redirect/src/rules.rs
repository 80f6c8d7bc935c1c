//! Turns a redirect specification into map entries. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    path::{Component, PathBuf},
};

use pillion_common::{
    ExecutableKey, InboundRule, PATH_NAME_BYTES, PATH_NAMES, PortKey, Route, WorkloadConfig, flags,
};
use pillion_workload::{
    CompanionName, FailureMode, LONGEST_EXECUTABLE_NAME, MOST_EXECUTABLE_NAMES, OutboundRule, Protocol,
    RedirectSpec, Target,
};

use crate::{RedirectError, Sources, tables::Tables};

const _: () = assert!(LONGEST_EXECUTABLE_NAME < PATH_NAME_BYTES && MOST_EXECUTABLE_NAMES == PATH_NAMES);

/// Everything that the kernel side is told about one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) config: WorkloadConfig,
    pub(crate) tables: Tables,
    /// Users that are left alone.
    pub(crate) users: BTreeSet<u32>,
    /// Programs that are left alone, as the kernel side compares them.
    pub(crate) executables: BTreeMap<ExecutableKey, u32>,
    /// Inbound ports of the workload.
    pub(crate) inbound: BTreeMap<u16, InboundRule>,
    /// Listening ports of each companion.
    pub(crate) companion_ports: BTreeMap<CompanionName, BTreeSet<(u16, Protocol)>>,
}

/// Of the two tables that a workload has by turns, the one with even number comes first.
pub(crate) fn first_table(workload: u32) -> u32 {
    workload.wrapping_mul(2)
}

impl Rules {
    /// `table` is one of the two of the workload; see [`first_table`].
    pub(crate) fn new(
        table: u32,
        spec: &RedirectSpec,
        on_failure: FailureMode,
        sources: &Sources,
    ) -> Result<Self, RedirectError> {
        let closed = match on_failure {
            FailureMode::Open => 0,
            FailureMode::Closed => flags::FAIL_CLOSED,
        };
        let mut rules = Self {
            config: WorkloadConfig {
                flags: closed,
                workload: table / 2,
                table,
                route: Route::default(),
                source4: words4(sources.v4),
                source6: words6(sources.v6),
                exempt_levels: 0,
            },
            tables: Tables::default(),
            users: spec.exclude.users.clone(),
            executables: executables(table, &spec.exclude.executables)?,
            inbound: BTreeMap::new(),
            companion_ports: BTreeMap::new(),
        };
        if spec.redirects_outbound() {
            rules.outbound(spec)?;
        }
        for rule in &spec.inbound {
            let companion_port = rules.listens(&rule.to, Protocol::Tcp)?;
            for port in &rule.ports {
                rules.inbound.insert(*port, InboundRule { companion_port, pad: 0, flags: closed });
            }
        }
        Ok(rules)
    }

    fn outbound(&mut self, spec: &RedirectSpec) -> Result<(), RedirectError> {
        let mut set = flags::OUTBOUND;
        if let Some(rule) = only_rule(spec) {
            let companion_port = self.listens(&rule.to, Protocol::Tcp)?;
            self.config.route = Route { companion_port, flags: Route::REDIRECT, rule: 0 };
            set |= flags::ONE_ROUTE;
        } else {
            self.tables = Tables::new(spec, |to, protocols| {
                let mut port = Err(RedirectError::NoPort(to.companion.clone()));
                for protocol in protocols {
                    port = self.listens(to, *protocol);
                }
                port
            })?;
        }
        for network in self.tables.networks.keys() {
            set |= if network.addr().is_ipv4() { flags::NETWORKS4 } else { flags::NETWORKS6 };
        }
        for (flag, wanted) in [
            (flags::USERS, !self.users.is_empty()),
            (flags::EXECUTABLES, !self.executables.is_empty()),
            (flags::DNS, spec.dns.is_some()),
            (flags::DATAGRAMS, spec.redirects_udp()),
            (flags::ANSWERS, spec.outbound.iter().any(|rule| rule.protocols.contains(&Protocol::Udp))),
        ] {
            if wanted {
                set |= flag;
            }
        }
        self.config.flags |= set;
        Ok(())
    }

    fn listens(&mut self, target: &Target, protocol: Protocol) -> Result<u16, RedirectError> {
        let port = target.port.ok_or_else(|| RedirectError::NoPort(target.companion.clone()))?;
        self.companion_ports.entry(target.companion.clone()).or_default().insert((port, protocol));
        Ok(port)
    }

    pub(crate) fn port_key(&self, port: u16) -> PortKey {
        PortKey { workload: self.config.workload, port, pad: 0 }
    }
}

/// The rule that takes all TCP connections, where there is no other and no exclusion by destination.
fn only_rule(spec: &RedirectSpec) -> Option<&OutboundRule> {
    let destinations = &spec.exclude.destinations;
    match &spec.outbound[..] {
        [rule] if spec.dns.is_none() && destinations.ports.is_empty() && destinations.cidrs.is_empty() => {
            (*rule == OutboundRule::all_tcp(rule.to.clone())).then_some(rule)
        }
        _ => None,
    }
}

/// The paths as a tree of names, from the programs' files towards the root: the kernel side walks that way.
fn executables(table: u32, paths: &BTreeSet<PathBuf>) -> Result<BTreeMap<ExecutableKey, u32>, RedirectError> {
    let mut tree = BTreeMap::new();
    let mut nodes = 0;
    for path in paths {
        let too_long = || RedirectError::PathTooLong(path.clone());
        let mut node = table;
        let mut last = None;
        let mut names = 0;
        for part in path.components().rev() {
            let Component::Normal(part) = part else { continue };
            let part = part.as_encoded_bytes();
            let mut name = [0; PATH_NAME_BYTES];
            name[..PATH_NAME_BYTES - 1].get_mut(..part.len()).ok_or_else(too_long)?.copy_from_slice(part);
            let key = ExecutableKey { table, node, name };
            let next = tree.entry(key).or_insert_with(|| {
                nodes += 1;
                nodes | ExecutableKey::INNER
            });
            node = *next & !ExecutableKey::END;
            last = Some(key);
            names += 1;
        }
        if names > PATH_NAMES {
            return Err(too_long());
        }
        if let Some(next) = last.and_then(|key| tree.get_mut(&key)) {
            *next |= ExecutableKey::END;
        }
    }
    Ok(tree)
}

pub(crate) fn words4(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

pub(crate) fn words6(address: Ipv6Addr) -> [u32; 4] {
    let octets = address.octets();
    std::array::from_fn(|word| {
        u32::from_ne_bytes([
            octets[word * 4],
            octets[word * 4 + 1],
            octets[word * 4 + 2],
            octets[word * 4 + 3],
        ])
    })
}

#[cfg(test)]
mod tests {
    use pillion_workload::{Exclusions, InboundRule as Inbound};

    use super::*;

    fn to(name: &str, port: Option<u16>) -> Target {
        Target { companion: name.parse().unwrap(), port }
    }

    fn spec() -> RedirectSpec {
        let exclude = Exclusions {
            ports: [22, 443].into(),
            cidrs: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
        };
        RedirectSpec {
            outbound: vec![OutboundRule { exclude, ..OutboundRule::all_tcp(to("envoy", Some(15001))) }],
            inbound: vec![
                Inbound { ports: [80, 8080].into(), to: to("envoy", Some(15006)) },
                Inbound { ports: [9000].into(), to: to("waf", Some(9001)) },
            ],
            ..RedirectSpec::default()
        }
    }

    #[test]
    fn a_specification_becomes_entries() {
        let sources = Sources { v4: [10, 0, 0, 2].into(), v6: "fd00::2".parse().unwrap() };
        let rules = Rules::new(15, &spec(), FailureMode::Closed, &sources).unwrap();
        assert_eq!((rules.config.workload, rules.config.table), (7, 15));
        assert_eq!(rules.config.source4.to_ne_bytes(), [10, 0, 0, 2]);
        assert_eq!(
            rules.config.flags,
            flags::OUTBOUND | flags::FAIL_CLOSED | flags::NETWORKS4 | flags::NETWORKS6
        );
        assert_eq!(rules.inbound.keys().copied().collect::<Vec<_>>(), [80, 8080, 9000]);
        assert_eq!(rules.inbound[&9000].companion_port, 9001);
        assert_eq!(rules.inbound[&80].flags, flags::FAIL_CLOSED);
        let ports: Vec<_> = rules.companion_ports[&"envoy".parse().unwrap()].iter().copied().collect();
        assert_eq!(ports, [(15001, Protocol::Tcp), (15006, Protocol::Tcp)]);
    }

    #[test]
    fn one_rule_for_all_needs_no_table() {
        let mut spec = RedirectSpec {
            outbound: vec![OutboundRule::all_tcp(to("envoy", Some(15001)))],
            ..RedirectSpec::default()
        };
        let rules =
            |spec: &RedirectSpec| Rules::new(2, spec, FailureMode::Open, &Sources::default()).unwrap();
        let one = rules(&spec);
        assert_eq!(one.config.flags, flags::OUTBOUND | flags::ONE_ROUTE);
        assert_eq!(one.config.route.companion_port, 15001);
        assert_eq!(one.tables, Tables::default());
        spec.exclude.users = [1337].into();
        spec.exclude.executables = ["/usr/bin/curl".into()].into();
        let with_users = rules(&spec);
        assert_eq!(
            with_users.config.flags,
            flags::OUTBOUND | flags::ONE_ROUTE | flags::USERS | flags::EXECUTABLES
        );
        spec.dns = Some(to("dns", Some(5353)));
        let dns = rules(&spec);
        assert_eq!(
            dns.config.flags & (flags::ONE_ROUTE | flags::DNS | flags::DATAGRAMS),
            flags::DNS | flags::DATAGRAMS
        );
        let asked: Vec<_> = dns.companion_ports[&"dns".parse().unwrap()].iter().copied().collect();
        assert_eq!(asked, [(5353, Protocol::Tcp), (5353, Protocol::Udp)]);
    }

    #[test]
    fn paths_are_a_tree_from_the_file_on() {
        let paths = ["/usr/bin/curl", "/opt/bin/curl", "/curl", "/bin/sh"].map(PathBuf::from);
        let tree = executables(7, &paths.clone().into()).unwrap();
        let walk = |path: &str| {
            let mut node = 7;
            for part in path.trim_start_matches('/').rsplit('/') {
                let mut name = [0; PATH_NAME_BYTES];
                name[..part.len()].copy_from_slice(part.as_bytes());
                node = *tree.get(&ExecutableKey { table: 7, node: node & !ExecutableKey::END, name })?;
            }
            Some(node & ExecutableKey::END != 0)
        };
        for path in &paths {
            assert_eq!(walk(path.to_str().unwrap()), Some(true), "{}", path.display());
        }
        for (path, expected) in
            [("/usr/bin/sh", None), ("/bin/curl", Some(false)), ("/sh", Some(false)), ("/usr/curl", None)]
        {
            assert_eq!(walk(path), expected, "{path}");
        }
        for path in [format!("/{}", "a".repeat(PATH_NAME_BYTES)), "/a".repeat(PATH_NAMES + 1)] {
            let error = executables(7, &[PathBuf::from(&path)].into()).unwrap_err();
            assert!(matches!(error, RedirectError::PathTooLong(_)), "{path}");
        }
    }

    #[test]
    fn nothing_is_redirected_without_rules() {
        let rules = Rules::new(2, &RedirectSpec::default(), FailureMode::Open, &Sources::default()).unwrap();
        assert_eq!(rules.config.flags, 0);
    }

    #[test]
    fn a_target_needs_its_port() {
        let mut spec = spec();
        spec.inbound[1].to.port = None;
        let error = Rules::new(2, &spec, FailureMode::Open, &Sources::default()).unwrap_err();
        assert!(matches!(error, RedirectError::NoPort(name) if name.as_str() == "waf"));
    }
}
