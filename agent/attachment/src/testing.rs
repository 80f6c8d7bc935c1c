//! Plans for the unit tests of this crate.

use std::{collections::BTreeSet, time::Duration};

use pillion_workload::{
    CompanionKind, CompanionSpec, ExistingConnections, FailureMode, InboundRule, OutboundRule, Plan,
    Readiness, RedirectSpec, Resources, Target, UserSpec,
};

pub(crate) fn plan(companions: &[&str]) -> Plan {
    Plan {
        policy: "policy".parse().unwrap(),
        companions: companions.iter().map(|name| companion(name)).collect(),
        redirect: RedirectSpec::default(),
        on_failure: FailureMode::Open,
        existing_connections: ExistingConnections::Keep,
    }
}

pub(crate) fn companion(name: &str) -> CompanionSpec {
    CompanionSpec {
        name: name.parse().unwrap(),
        kind: CompanionKind::Relay,
        user: UserSpec { user: "nobody".into(), group: None },
        ready: Readiness { probe: None, timeout: Duration::from_secs(10) },
        resources: Resources::default(),
        stop_grace: Duration::from_secs(5),
    }
}

pub(crate) fn outbound(to: Target) -> OutboundRule {
    OutboundRule::all_tcp(to)
}

pub(crate) fn inbound(ports: &[u16], to: Target) -> InboundRule {
    InboundRule { ports: ports.iter().copied().collect::<BTreeSet<u16>>(), to }
}
