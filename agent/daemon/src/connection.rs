//! `pillion explain --connection`: what the rules mean for one connection, step by step as the kernel decides, and what the
//! kernel's own tables say of it.
//!
//! Pure: what the kernel says is looked up by others and handed in. Who sends is known only as far as it is told.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
};

use pillion_redirect::{Rule, TableAnswer};
use pillion_workload::{
    DNS_PORT, FailureMode, OutboundRule, Passes, Protocol, RedirectSpec, Route, Target, is_local,
};
use serde::{Deserialize, Serialize};

/// A connection or a datagram, written `tcp:10.1.2.3:443`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Connection {
    pub(crate) protocol: Protocol,
    pub(crate) to: SocketAddr,
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.protocol.as_str(), self.to)
    }
}

impl FromStr for Connection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write it as tcp:10.1.2.3:443 or udp:[fd00::1]:53, with an address".to_owned();
        let (protocol, to) = text.split_once(':').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let to: SocketAddr = to.parse().map_err(|_| wrong())?;
        if to.port() == 0 {
            return Err("nobody can connect to port 0".to_owned());
        }
        Ok(Self { protocol, to })
    }
}

impl TryFrom<String> for Connection {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Connection> for String {
    fn from(connection: Connection) -> Self {
        connection.to_string()
    }
}

/// Who connects, as far as it is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sender {
    /// Real user id, as the host numbers it.
    #[serde(default)]
    pub(crate) user: Option<u32>,
    /// Its program, as the workload sees it.
    #[serde(default)]
    pub(crate) executable: Option<PathBuf>,
}

/// How a step came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum StepOutcome {
    /// It does not apply: the next step.
    NotMatched,
    /// It decides.
    Decides,
    /// It could, but what it depends on was not told; what follows holds if it does not.
    Unknown,
}

/// One thing that is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Step {
    /// A field of the policy below `redirect`, such as `exclude.ports` or `outbound[1]`.
    pub(crate) field: String,
    /// How it came out.
    pub(crate) outcome: StepOutcome,
    /// Why, in words.
    pub(crate) why: String,
}

/// What the kernel's tables say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct KernelInfo {
    /// Number of the table in force.
    pub(crate) table: u32,
    /// The class of the destination; `null` where no table is looked at.
    pub(crate) class: Option<u32>,
    /// `dns`, `rule 1`, or `none`.
    pub(crate) rule: String,
    /// The companion's port.
    pub(crate) companion_port: Option<u16>,
    /// Whether that is what the policy means.
    pub(crate) agrees: bool,
}

/// A connection explained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConnectionInfo {
    /// Which.
    pub(crate) connection: Connection,
    /// In the order in which they are looked at; the last one decides.
    pub(crate) steps: Vec<Step>,
    /// Whether it goes to a companion.
    pub(crate) redirected: bool,
    /// Which outbound rule, counted from 1; `null` for questions to resolvers and for what passes.
    pub(crate) rule: Option<usize>,
    /// The companion that it goes to.
    pub(crate) companion: Option<String>,
    /// Its port; `null` where it is allocated at the attach.
    pub(crate) companion_port: Option<u16>,
    /// Whether the companion listens there now; `null` where that is not known.
    pub(crate) listening: Option<bool>,
    /// What happens to it while the companion does not.
    pub(crate) on_failure: Option<FailureMode>,
    /// Where it was to go.
    pub(crate) original: SocketAddr,
    /// Where it goes; `null` where the companion's port is not known yet, and where it is refused.
    pub(crate) effective: Option<SocketAddr>,
    /// What the kernel says, for a workload that is attached.
    pub(crate) kernel: Option<KernelInfo>,
}

/// What `spec` means for a connection.
pub(crate) fn explain(
    spec: &RedirectSpec,
    on_failure: FailureMode,
    connection: Connection,
    sender: &Sender,
    kernel: Option<TableAnswer>,
) -> ConnectionInfo {
    let mut steps = Steps(Vec::new());
    let target = decide(spec, connection, sender, &mut steps);
    let agrees = |answer: &TableAnswer| agrees(spec, connection, answer);
    let info = kernel.as_ref().map(|answer| KernelInfo {
        table: answer.table,
        class: answer.class,
        rule: match answer.rule {
            Rule::Dns => "dns".to_owned(),
            Rule::Outbound(index) => format!("rule {}", index + 1),
            Rule::Inbound | Rule::None => "none".to_owned(),
        },
        companion_port: answer.companion_port,
        agrees: agrees(answer),
    });
    let listens = kernel.filter(|answer| answer.companion_port.is_some()).map(|answer| answer.listens);
    let listening = target.and(listens).map(|listens| can_take(connection, listens));
    let effective = match target {
        None => Some(connection.to),
        Some((_, to)) => match (listening, on_failure) {
            (Some(false), FailureMode::Open) => Some(connection.to),
            (Some(false), FailureMode::Closed) => None,
            (Some(true) | None, _) => {
                to.port.map(|port| SocketAddr::new(loopback(connection, listens), port))
            }
        },
    };
    ConnectionInfo {
        connection,
        steps: steps.0,
        redirected: target.is_some(),
        rule: target.and_then(|(index, _)| index.map(|index| index + 1)),
        companion: target.map(|(_, to)| to.companion.to_string()),
        companion_port: target.and_then(|(_, to)| to.port),
        listening,
        on_failure: target.map(|_| on_failure),
        original: connection.to,
        effective,
        kernel: info,
    }
}

struct Steps(Vec<Step>);

impl Steps {
    fn push(&mut self, field: impl Into<String>, outcome: StepOutcome, why: impl Into<String>) {
        self.0.push(Step { field: field.into(), outcome, why: why.into() });
    }
}

/// The rule's index (`None`: questions to resolvers) and its target; `None`: it passes.
fn decide<'a>(
    spec: &'a RedirectSpec,
    Connection { protocol, to }: Connection,
    sender: &Sender,
    steps: &mut Steps,
) -> Option<(Option<usize>, &'a Target)> {
    use StepOutcome::{Decides, NotMatched};
    let (address, port) = (to.ip().to_canonical(), to.port());
    if !spec.redirects_outbound() {
        steps.push("outbound", Decides, "nothing that the workload sends is redirected: it passes");
        return None;
    }
    if is_multicast(address) {
        steps.push("destination", Decides, "multicast and broadcast always pass");
        return None;
    }
    let resolver = spec.dns.as_ref().filter(|_| port == DNS_PORT);
    if is_local(address) && resolver.is_none() {
        steps.push("destination", Decides, format!("{address} is this host itself: it passes"));
        return None;
    }
    if protocol == Protocol::Udp && !spec.redirects_udp() {
        steps.push("outbound", Decides, "no rule is for udp: datagrams are not looked at, and pass");
        return None;
    }
    if is_sender_excluded(spec, sender, steps) {
        return None;
    }
    let excluded = &spec.exclude.destinations;
    if excluded.ports.contains(port) {
        steps.push("exclude.ports", Decides, format!("port {port} is excluded: it passes"));
        return None;
    } else if !excluded.ports.is_empty() {
        steps.push("exclude.ports", NotMatched, format!("port {port} is not among {}", excluded.ports));
    }
    if let Some(network) = excluded.cidrs.iter().find(|network| network.contains(&address)) {
        steps.push(
            "exclude.cidrs",
            Decides,
            format!("{address} is in {network}, which is excluded: it passes"),
        );
        return None;
    } else if !excluded.cidrs.is_empty() {
        steps.push(
            "exclude.cidrs",
            NotMatched,
            format!("{address} is in none of {}", joined(&excluded.cidrs)),
        );
    }
    if let Some(to) = resolver {
        let itself = is_local(address) && to.port == Some(port) && is_companions_own(address);
        if itself {
            steps.push("dns", Decides, "this is the companion's resolver itself: it passes");
            return None;
        }
        steps.push("dns", Decides, "port 53: a question to a resolver");
        return Some((None, to));
    } else if spec.dns.is_some() {
        steps.push("dns", NotMatched, format!("port {port} is not 53"));
    }
    for (index, rule) in spec.outbound.iter().enumerate() {
        let field = format!("outbound[{index}]");
        let Some(why) = mismatch(rule, protocol, address, port) else {
            steps.push(field, Decides, format!("rule {} matches", index + 1));
            return Some((Some(index), &rule.to));
        };
        steps.push(field, NotMatched, why);
    }
    steps.push("outbound", Decides, "no rule matches: it passes");
    None
}

fn is_sender_excluded(spec: &RedirectSpec, sender: &Sender, steps: &mut Steps) -> bool {
    use StepOutcome::{Decides, NotMatched, Unknown};
    let (users, executables) = (&spec.exclude.users, &spec.exclude.executables);
    if !users.is_empty() {
        let (outcome, why) = match sender.user {
            Some(user) if users.contains(&user) => (Decides, format!("user {user} is excluded: it passes")),
            Some(user) => (NotMatched, format!("user {user} is not among {}", joined(users))),
            None => (Unknown, format!("passes if user {} sends it: tell with --user", joined(users))),
        };
        steps.push("exclude.users", outcome, why);
        if outcome == Decides {
            return true;
        }
    }
    if !executables.is_empty() {
        let all = joined(executables.iter().map(|path| path.display()));
        let (outcome, why) = match &sender.executable {
            Some(path) if executables.contains(path) => {
                (Decides, format!("{} is excluded: it passes", path.display()))
            }
            Some(path) => (NotMatched, format!("{} is not among {all}", path.display())),
            None => (Unknown, format!("passes if {all} sends it: tell with --executable")),
        };
        steps.push("exclude.executables", outcome, why);
        return outcome == Decides;
    }
    false
}

/// Why a rule does not match.
fn mismatch(rule: &OutboundRule, protocol: Protocol, address: IpAddr, port: u16) -> Option<String> {
    if !rule.protocols.contains(&protocol) {
        let wanted = joined(rule.protocols.iter().map(|protocol| protocol.as_str()));
        return Some(format!("it is for {wanted}, not for {}", protocol.as_str()));
    }
    if !rule.cidrs.is_empty() && !rule.cidrs.iter().any(|network| network.contains(&address)) {
        return Some(format!("{address} is in none of {}", joined(&rule.cidrs)));
    }
    if !rule.ports.is_empty() && !rule.ports.contains(port) {
        return Some(format!("port {port} is not among {}", rule.ports));
    }
    if rule.exclude.ports.contains(port) {
        return Some(format!("it excludes port {port}"));
    }
    let excluded = rule.exclude.cidrs.iter().find(|network| network.contains(&address));
    excluded.map(|network| format!("it excludes {network}"))
}

/// Whether the tables say what the rules mean. Loopback and multicast pass whatever tables say.
fn agrees(spec: &RedirectSpec, connection: Connection, answer: &TableAnswer) -> bool {
    let (address, port) = (connection.to.ip().to_canonical(), connection.to.port());
    let (rule, to) = match spec.route(connection.protocol, address, port) {
        Route::Dns(to) => (Rule::Dns, to.port),
        Route::Rule(index, to) => (Rule::Outbound(index), to.port),
        Route::Pass(Passes::Local) => return true,
        Route::Pass(Passes::Excluded | Passes::NoRule) => (Rule::None, None),
    };
    is_multicast(address) || (answer.rule, answer.companion_port) == (rule, to)
}

/// An IPv4 listener takes what is for IPv6, too, but from sockets for IPv6 alone.
fn can_take(connection: Connection, [by4, by6]: [bool; 2]) -> bool {
    by4 || by6 && connection.to.ip().to_canonical().is_ipv6()
}

fn loopback(connection: Connection, listens: Option<[bool; 2]>) -> IpAddr {
    let only6 = listens.is_some_and(|[by4, by6]| by6 && !by4);
    if connection.to.ip().to_canonical().is_ipv6() && only6 {
        std::net::Ipv6Addr::LOCALHOST.into()
    } else {
        std::net::Ipv4Addr::LOCALHOST.into()
    }
}

fn is_companions_own(address: IpAddr) -> bool {
    address == std::net::Ipv4Addr::LOCALHOST || address == std::net::Ipv6Addr::LOCALHOST
}

fn is_multicast(address: IpAddr) -> bool {
    address.is_multicast() || address == std::net::Ipv4Addr::BROADCAST
}

fn joined<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// A program's path, which must be one.
pub(crate) fn absolute(path: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        path.is_absolute(),
        "--executable {}: must be an absolute path, as the workload sees it",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use pillion_workload::{Exclusions, Exemptions};

    use super::*;

    fn spec() -> RedirectSpec {
        let to = |name: &str, port| Target { companion: name.parse().unwrap(), port };
        let mut first = OutboundRule::all_tcp(to("a", Some(15001)));
        first.cidrs = vec!["10.0.0.0/8".parse().unwrap()];
        first.exclude.ports = [8080].into();
        let mut second = OutboundRule::all_tcp(to("b", None));
        second.ports = [443, 8080].into();
        RedirectSpec {
            outbound: vec![first, second],
            exclude: Exemptions {
                destinations: Exclusions { ports: [22].into(), cidrs: vec!["10.9.0.0/16".parse().unwrap()] },
                users: [1337].into(),
                executables: ["/usr/bin/envoy".into()].into(),
            },
            dns: Some(to("dns", Some(53))),
            inbound: Vec::new(),
        }
    }

    fn ask(text: &str, sender: &Sender, kernel: Option<TableAnswer>) -> ConnectionInfo {
        explain(&spec(), FailureMode::Closed, text.parse().unwrap(), sender, kernel)
    }

    fn known() -> Sender {
        Sender { user: Some(0), executable: Some("/usr/bin/curl".into()) }
    }

    #[test]
    fn the_last_step_decides_as_the_rules_do() {
        for (text, field, companion) in [
            ("tcp:10.1.1.1:80", "outbound[0]", Some("a")),
            ("tcp:[::ffff:10.1.1.1]:80", "outbound[0]", Some("a")),
            ("tcp:10.1.1.1:8080", "outbound[1]", Some("b")),
            ("tcp:192.0.2.1:443", "outbound[1]", Some("b")),
            ("tcp:192.0.2.1:80", "outbound", None),
            ("tcp:192.0.2.1:22", "exclude.ports", None),
            ("tcp:10.9.1.1:80", "exclude.cidrs", None),
            ("udp:8.8.8.8:53", "dns", Some("dns")),
            ("udp:127.0.0.53:53", "dns", Some("dns")),
            ("udp:127.0.0.1:53", "dns", None),
            ("tcp:127.0.0.1:80", "destination", None),
            ("tcp:224.0.0.1:80", "destination", None),
            ("udp:10.1.1.1:80", "outbound", None),
        ] {
            let info = ask(text, &known(), None);
            let (last, before) = info.steps.split_last().unwrap();
            assert_eq!((&*last.field, last.outcome), (field, StepOutcome::Decides), "{text}: {info:#?}");
            assert!(before.iter().all(|step| step.outcome == StepOutcome::NotMatched), "{text}: {info:#?}");
            assert_eq!(info.companion.as_deref(), companion, "{text}");
            let connection = info.connection;
            let address = connection.to.ip().to_canonical();
            let local = is_local(address) || is_multicast(address);
            let route = spec();
            let route = route.route(connection.protocol, address, connection.to.port());
            assert!(local || matches!(route, Route::Pass(_)) == companion.is_none(), "{text}: {route:?}");
        }
    }

    #[test]
    fn who_sends_matters_where_it_is_told() {
        let excluded = ask("tcp:10.1.1.1:80", &Sender { user: Some(1337), executable: None }, None);
        assert_eq!(excluded.steps.last().unwrap().field, "exclude.users");
        assert_eq!(excluded.effective, Some("10.1.1.1:80".parse().unwrap()));
        let sender = Sender { user: Some(0), executable: Some("/usr/bin/envoy".into()) };
        assert!(!ask("tcp:10.1.1.1:80", &sender, None).redirected);
        let unknown = ask("tcp:10.1.1.1:80", &Sender::default(), None);
        assert!(unknown.redirected);
        let open: Vec<&str> = unknown
            .steps
            .iter()
            .filter(|step| step.outcome == StepOutcome::Unknown)
            .map(|step| &*step.field)
            .collect();
        assert_eq!(open, ["exclude.users", "exclude.executables"]);
    }

    #[test]
    fn the_kernels_tables_are_held_against_the_rules() {
        let answer = |rule, port, listens| TableAnswer {
            table: 4,
            class: Some(2),
            rule,
            companion_port: port,
            listens,
        };
        let right = answer(Rule::Outbound(0), Some(15001), [true, false]);
        let info = ask("tcp:10.1.1.1:80", &known(), Some(right));
        assert!(info.kernel.unwrap().agrees);
        assert_eq!((info.listening, info.effective), (Some(true), Some("127.0.0.1:15001".parse().unwrap())));
        let dead = answer(Rule::Outbound(0), Some(15001), [false, false]);
        let info = ask("tcp:10.1.1.1:80", &known(), Some(dead));
        assert_eq!((info.listening, info.effective), (Some(false), None));
        for wrong in [
            answer(Rule::Outbound(1), Some(15001), [true, true]),
            answer(Rule::Outbound(0), Some(15002), [true, true]),
            answer(Rule::None, None, [false; 2]),
        ] {
            assert!(!ask("tcp:10.1.1.1:80", &known(), Some(wrong)).kernel.unwrap().agrees, "{wrong:?}");
        }
    }

    #[test]
    fn a_connection_needs_protocol_address_and_port() {
        for good in ["tcp:10.1.2.3:443", "udp:[fd00::1]:53"] {
            assert_eq!(good.parse::<Connection>().unwrap().to_string(), good);
        }
        for bad in
            ["10.1.2.3:443", "tcp:example.org:443", "tcp:10.1.2.3", "sctp:10.1.2.3:1", "tcp:10.1.2.3:0", ""]
        {
            assert!(bad.parse::<Connection>().is_err(), "{bad}");
        }
    }
}
