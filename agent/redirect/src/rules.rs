//! Turns a redirect specification into map entries. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use pillion_common::{InboundRule, PortKey, WorkloadConfig, flags};
use pillion_workload::{CompanionName, FailureMode, RedirectSpec, Target};

use crate::{RedirectError, Sources};

/// An IPv4 or IPv6 network as words in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Network {
    V4 { address: u32, length: u32 },
    V6 { address: [u32; 4], length: u32 },
}

/// Everything that the kernel side is told about one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) config: WorkloadConfig,
    pub(crate) excluded_ports: BTreeSet<u16>,
    pub(crate) excluded_networks: BTreeSet<Network>,
    /// Inbound ports of the workload.
    pub(crate) inbound: BTreeMap<u16, InboundRule>,
    /// Listening ports of each companion.
    pub(crate) companion_ports: BTreeMap<CompanionName, BTreeSet<u16>>,
}

impl Rules {
    pub(crate) fn new(
        number: u32,
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
                workload: number,
                outbound_port_be: 0,
                pad: 0,
                source4: words4(sources.v4),
                source6: words6(sources.v6),
            },
            excluded_ports: BTreeSet::new(),
            excluded_networks: BTreeSet::new(),
            inbound: BTreeMap::new(),
            companion_ports: BTreeMap::new(),
        };
        if let Some(outbound) = &spec.outbound {
            rules.config.outbound_port_be = rules.listens(&outbound.to)?.to_be();
            rules.config.flags |= flags::OUTBOUND;
            rules.excluded_ports.clone_from(&outbound.exclude.ports);
            rules.excluded_networks = outbound.exclude.cidrs.iter().map(network).collect();
            if !rules.excluded_ports.is_empty() {
                rules.config.flags |= flags::EXCLUDES_PORTS;
            }
            for network in &rules.excluded_networks {
                rules.config.flags |= match network {
                    Network::V4 { .. } => flags::EXCLUDES_NETWORKS4,
                    Network::V6 { .. } => flags::EXCLUDES_NETWORKS6,
                };
            }
        }
        for rule in &spec.inbound {
            let companion_port = rules.listens(&rule.to)?;
            for port in &rule.ports {
                rules.inbound.insert(*port, InboundRule { companion_port, pad: 0, flags: closed });
            }
        }
        Ok(rules)
    }

    fn listens(&mut self, target: &Target) -> Result<u16, RedirectError> {
        let port = target.port.ok_or_else(|| RedirectError::NoPort(target.companion.clone()))?;
        self.companion_ports.entry(target.companion.clone()).or_default().insert(port);
        Ok(port)
    }

    pub(crate) fn port_key(&self, port: u16) -> PortKey {
        PortKey { workload: self.config.workload, port, pad: 0 }
    }
}

fn network(cidr: &IpNet) -> Network {
    match cidr.trunc() {
        IpNet::V4(net) => Network::V4 { address: words4(net.addr()), length: u32::from(net.prefix_len()) },
        IpNet::V6(net) => Network::V6 { address: words6(net.addr()), length: u32::from(net.prefix_len()) },
    }
}

fn words4(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

fn words6(address: Ipv6Addr) -> [u32; 4] {
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
    use pillion_workload::{Exclusions, InboundRule as Inbound, OutboundRule};

    use super::*;

    fn to(name: &str, port: Option<u16>) -> Target {
        Target { companion: name.parse().unwrap(), port }
    }

    fn spec() -> RedirectSpec {
        RedirectSpec {
            outbound: Some(OutboundRule {
                to: to("envoy", Some(15001)),
                exclude: Exclusions {
                    ports: [22, 443].into(),
                    cidrs: vec!["10.1.2.3/8".parse().unwrap(), "fd00::1/8".parse().unwrap()],
                },
            }),
            inbound: vec![
                Inbound { ports: [80, 8080].into(), to: to("envoy", Some(15006)) },
                Inbound { ports: [9000].into(), to: to("waf", Some(9001)) },
            ],
        }
    }

    #[test]
    fn a_specification_becomes_entries() {
        let sources = Sources { v4: [10, 0, 0, 2].into(), v6: "fd00::2".parse().unwrap() };
        let rules = Rules::new(7, &spec(), FailureMode::Closed, &sources).unwrap();
        assert_eq!(rules.config.workload, 7);
        assert_eq!(rules.config.outbound_port_be.to_ne_bytes(), [0x3a, 0x99]);
        assert_eq!(rules.config.source4.to_ne_bytes(), [10, 0, 0, 2]);
        assert_eq!(
            rules.config.flags,
            flags::OUTBOUND
                | flags::FAIL_CLOSED
                | flags::EXCLUDES_PORTS
                | flags::EXCLUDES_NETWORKS4
                | flags::EXCLUDES_NETWORKS6
        );
        let v4 = Network::V4 { address: u32::from_ne_bytes([10, 0, 0, 0]), length: 8 };
        assert!(rules.excluded_networks.contains(&v4), "host bits are cut: {:?}", rules.excluded_networks);
        assert_eq!(rules.inbound.keys().copied().collect::<Vec<_>>(), [80, 8080, 9000]);
        assert_eq!(rules.inbound[&9000].companion_port, 9001);
        assert_eq!(rules.inbound[&80].flags, flags::FAIL_CLOSED);
        let ports: Vec<_> = rules.companion_ports[&"envoy".parse().unwrap()].iter().copied().collect();
        assert_eq!(ports, [15001, 15006]);
    }

    #[test]
    fn nothing_is_redirected_without_rules() {
        let rules = Rules::new(1, &RedirectSpec::default(), FailureMode::Open, &Sources::default()).unwrap();
        assert_eq!(rules.config.flags, 0);
    }

    #[test]
    fn a_target_needs_its_port() {
        let mut spec = spec();
        spec.inbound[1].to.port = None;
        let error = Rules::new(1, &spec, FailureMode::Open, &Sources::default()).unwrap_err();
        assert!(matches!(error, RedirectError::NoPort(name) if name.as_str() == "waf"));
    }
}
