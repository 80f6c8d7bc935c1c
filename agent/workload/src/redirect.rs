//! Which sockets go to which companion, and the decision for one connection.
//!
//! [`RedirectSpec::route`] is what the rules mean; the tables that the kernel side looks at must say the same.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{CompanionName, PortSet};

/// Where resolvers are asked, by UDP and TCP (RFC 1035).
pub const DNS_PORT: u16 = 53;

/// How many bytes one name in the path of an excluded program may have: what the kernel side compares.
pub const LONGEST_EXECUTABLE_NAME: usize = 46;
/// How many names the path may have.
pub const MOST_EXECUTABLE_NAMES: usize = 16;

/// Which sockets of the workload go to which companion.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RedirectSpec {
    /// What the workload sends, in order: the first rule that matches decides. What none matches passes. Records of
    /// earlier agents have at most one, without a list.
    #[serde(default, deserialize_with = "one_or_many")]
    pub outbound: Vec<OutboundRule>,
    /// What no rule takes. Absent in records of earlier agents.
    #[serde(default)]
    pub exclude: Exemptions,
    /// Where questions to resolvers go: everything to port 53, by UDP and TCP, on loopback too. Before all rules.
    #[serde(default)]
    pub dns: Option<Target>,
    /// Connections that the workload accepts. No port is in two rules.
    pub inbound: Vec<InboundRule>,
}

/// What the workload sends to some destinations; never loopback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutboundRule {
    /// Where it goes.
    pub to: Target,
    /// Destination networks; empty for all.
    #[serde(default)]
    pub cidrs: Vec<IpNet>,
    /// Destination ports; empty for all.
    #[serde(default)]
    pub ports: PortSet,
    /// Transport protocols.
    #[serde(default = "tcp")]
    pub protocols: BTreeSet<Protocol>,
    /// What this rule does not match; a later one may.
    pub exclude: Exclusions,
}

impl OutboundRule {
    /// All TCP connections.
    pub fn all_tcp(to: Target) -> Self {
        Self {
            to,
            cidrs: Vec::new(),
            ports: PortSet::default(),
            protocols: tcp(),
            exclude: Exclusions::default(),
        }
    }

    fn matches(&self, protocol: Protocol, address: IpAddr, port: u16) -> bool {
        self.protocols.contains(&protocol)
            && (self.ports.is_empty() || self.ports.contains(port))
            && (self.cidrs.is_empty() || self.cidrs.iter().any(|network| network.contains(&address)))
            && !self.exclude.contains(address, port)
    }
}

/// A transport protocol whose sockets can be redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl Protocol {
    /// Its number in the IP header (IANA).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// `tcp` or `udp`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Destinations that are left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exclusions {
    /// Destination ports.
    pub ports: PortSet,
    /// Destination networks.
    pub cidrs: Vec<IpNet>,
}

impl Exclusions {
    /// Whether the destination is among them.
    pub fn contains(&self, address: IpAddr, port: u16) -> bool {
        self.ports.contains(port) || self.cidrs.iter().any(|network| network.contains(&address))
    }
}

/// What no rule takes: some destinations, and everything that some processes of the workload send.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exemptions {
    /// By destination.
    #[serde(flatten)]
    pub destinations: Exclusions,
    /// By real user id, as the host numbers it.
    #[serde(default)]
    pub users: BTreeSet<u32>,
    /// By the absolute path of the program, as the workload sees it.
    #[serde(default)]
    pub executables: BTreeSet<PathBuf>,
}

/// Connections from outside the network namespace to `ports`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InboundRule {
    /// The ports that the application listens on.
    pub ports: BTreeSet<u16>,
    /// Where they go.
    pub to: Target,
}

/// A companion and its listening port, written `name:port` or `name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// A companion of the same plan.
    pub companion: CompanionName,
    /// Its listening port; allocated in the workload's namespace when absent.
    pub port: Option<u16>,
}

/// What becomes of something that a workload sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route<'a> {
    /// To the companion's resolver.
    Dns(&'a Target),
    /// By the outbound rule with this index.
    Rule(usize, &'a Target),
    /// On, as if there were no Pillion.
    Pass(Passes),
}

/// Why something passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    /// Loopback, or an address that connect(2) takes for this host.
    Local,
    /// Excluded by `redirect.exclude`.
    Excluded,
    /// No rule matches.
    NoRule,
}

impl RedirectSpec {
    /// Whether anything that the workload sends may be redirected.
    pub fn redirects_outbound(&self) -> bool {
        !self.outbound.is_empty() || self.dns.is_some()
    }

    /// Whether datagrams are redirected.
    pub fn redirects_udp(&self) -> bool {
        self.dns.is_some() || self.outbound.iter().any(|rule| rule.protocols.contains(&Protocol::Udp))
    }

    /// Every target of what the workload sends.
    pub fn outbound_targets(&self) -> impl Iterator<Item = &Target> {
        self.dns.iter().chain(self.outbound.iter().map(|rule| &rule.to))
    }

    /// What the rules mean for one destination, whoever sends: users and executables are not looked at.
    pub fn route(&self, protocol: Protocol, address: IpAddr, port: u16) -> Route<'_> {
        let address = address.to_canonical();
        if self.exclude.destinations.contains(address, port) {
            return Route::Pass(Passes::Excluded);
        }
        if let (Some(dns), DNS_PORT) = (&self.dns, port) {
            return Route::Dns(dns);
        }
        if is_local(address) {
            return Route::Pass(Passes::Local);
        }
        let rules = self.outbound.iter().enumerate();
        rules
            .filter(|(_, rule)| rule.matches(protocol, address, port))
            .map(|(index, rule)| Route::Rule(index, &rule.to))
            .next()
            .unwrap_or(Route::Pass(Passes::NoRule))
    }
}

/// 127.0.0.0/8, `::1`, and the addresses that connect(2) takes for this host.
pub fn is_local(address: IpAddr) -> bool {
    address.is_loopback() || address.is_unspecified()
}

fn tcp() -> BTreeSet<Protocol> {
    BTreeSet::from([Protocol::Tcp])
}

fn one_or_many<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<OutboundRule>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Rules {
        Many(Vec<OutboundRule>),
        One(Box<OutboundRule>),
        None(()),
    }
    Ok(match Rules::deserialize(source)? {
        Rules::Many(rules) => rules,
        Rules::One(rule) => vec![*rule],
        Rules::None(()) => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(name: &str) -> Target {
        Target { companion: name.parse().unwrap(), port: Some(15001) }
    }

    fn spec() -> RedirectSpec {
        let rule = |name, cidrs: &[&str], ports: &[u16], protocols: &[Protocol]| OutboundRule {
            cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            ports: ports.iter().copied().collect(),
            protocols: protocols.iter().copied().collect(),
            ..OutboundRule::all_tcp(to(name))
        };
        let mut first = rule("a", &["10.0.0.0/8"], &[], &[Protocol::Tcp]);
        first.exclude.ports = [22].into();
        first.exclude.cidrs = vec!["10.9.0.0/16".parse().unwrap()];
        RedirectSpec {
            outbound: vec![
                first,
                rule("b", &[], &[22, 443], &[Protocol::Tcp, Protocol::Udp]),
                rule("c", &["fd00::/8"], &[], &[Protocol::Udp]),
            ],
            exclude: Exemptions {
                destinations: Exclusions {
                    ports: [9100].into(),
                    cidrs: vec!["169.254.0.0/16".parse().unwrap()],
                },
                ..Exemptions::default()
            },
            dns: Some(to("dns")),
            inbound: Vec::new(),
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let spec = spec();
        for (protocol, address, port, expected) in [
            (Protocol::Tcp, "10.1.1.1", 80, "0"),
            (Protocol::Tcp, "::ffff:10.1.1.1", 80, "0"),
            (Protocol::Tcp, "10.1.1.1", 22, "1"),
            (Protocol::Tcp, "10.9.1.1", 80, "NoRule"),
            (Protocol::Tcp, "10.9.1.1", 443, "1"),
            (Protocol::Udp, "10.1.1.1", 80, "NoRule"),
            (Protocol::Udp, "10.1.1.1", 443, "1"),
            (Protocol::Udp, "fd00::1", 80, "2"),
            (Protocol::Tcp, "fd00::1", 80, "NoRule"),
            (Protocol::Tcp, "10.1.1.1", 9100, "Excluded"),
            (Protocol::Tcp, "169.254.169.254", 443, "Excluded"),
            (Protocol::Udp, "169.254.169.254", 53, "Excluded"),
            (Protocol::Udp, "8.8.8.8", 53, "dns"),
            (Protocol::Tcp, "127.0.0.53", 53, "dns"),
            (Protocol::Tcp, "127.0.0.53", 443, "Local"),
            (Protocol::Udp, "::1", 443, "Local"),
            (Protocol::Udp, "::", 443, "Local"),
        ] {
            let got = match spec.route(protocol, address.parse().unwrap(), port) {
                Route::Dns(_) => "dns".to_owned(),
                Route::Rule(index, _) => index.to_string(),
                Route::Pass(why) => format!("{why:?}"),
            };
            assert_eq!(got, expected, "{protocol:?} {address} {port}");
        }
    }

    #[test]
    fn records_of_earlier_agents_are_read() {
        let one = r#"{"outbound":{"to":{"companion":"a","port":1},"exclude":{"ports":[22],"cidrs":[]}},"inbound":[]}"#;
        let spec: RedirectSpec = serde_json::from_str(one).unwrap();
        assert_eq!(spec.outbound.len(), 1);
        assert_eq!(spec.outbound[0].protocols, tcp());
        assert!(spec.outbound[0].exclude.ports.contains(22));
        let none: RedirectSpec = serde_json::from_str(r#"{"outbound":null,"inbound":[]}"#).unwrap();
        assert_eq!(none, RedirectSpec::default());
        let full = self::spec();
        let text = serde_json::to_string(&full).unwrap();
        assert_eq!(serde_json::from_str::<RedirectSpec>(&text).unwrap(), full);
    }
}
