//! What a relay is told when it starts, and the rules that this must keep. Never does IO.

use std::path::PathBuf;

use pillion_workload::{CompanionName, WorkloadId};
use serde::{Deserialize, Serialize};

/// Connections at once when the configuration does not say.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 16_384;
/// Milliseconds that a dial may take when the configuration does not say.
pub const DEFAULT_CONNECT_TIMEOUT_MS: u64 = 10_000;
/// Milliseconds that open connections get at a drain when the configuration does not say.
pub const DEFAULT_DRAIN_GRACE_MS: u64 = 10_000;

/// A day: longer waits are taken for mistakes.
const LONGEST_MS: u64 = 86_400_000;
/// `sun_path` of unix(7), less the terminating zero.
const LONGEST_SOCKET_PATH: usize = 107;

/// Configuration of one relay process; its JSON form is part of what its launcher is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayConfig {
    /// The workload whose connections are relayed; a field of every record.
    pub workload: WorkloadId,
    /// The companion's name in its plan; used in messages on stderr.
    pub name: CompanionName,
    /// Port on loopback for connections that the workload makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound_port: Option<u16>,
    /// Whether UDP is relayed on the outbound port, too.
    #[serde(default, skip_serializing_if = "is_false")]
    pub udp: bool,
    /// Port on loopback for connections that the workload accepts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound_port: Option<u16>,
    /// Connections at once; further ones wait in the kernel's backlog. `RLIMIT_NOFILE` may lower it: a connection
    /// takes two descriptors.
    #[serde(default = "default_max_connections")]
    pub max_connections: u32,
    /// Milliseconds that dialling the original destination may take.
    #[serde(default = "default_connect_timeout_ms")]
    pub connect_timeout_ms: u64,
    /// Milliseconds that open connections get after SIGTERM before they are reset.
    #[serde(default = "default_drain_grace_ms")]
    pub drain_grace_ms: u64,
    /// Where to serve Prometheus metrics (HTTP over a unix socket, mode 0660); nowhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_socket: Option<PathBuf>,
}

/// A rule that a [`RelayConfig`] breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid relay configuration: {field}: {rule}")]
pub struct InvalidRelayConfig {
    /// The field at fault.
    pub field: &'static str,
    /// What it must be.
    pub rule: &'static str,
}

impl RelayConfig {
    /// A relay with the default limits that listens nowhere yet: set at least one port.
    pub fn new(workload: WorkloadId, name: CompanionName) -> Self {
        Self {
            workload,
            name,
            outbound_port: None,
            udp: false,
            inbound_port: None,
            max_connections: DEFAULT_MAX_CONNECTIONS,
            connect_timeout_ms: DEFAULT_CONNECT_TIMEOUT_MS,
            drain_grace_ms: DEFAULT_DRAIN_GRACE_MS,
            metrics_socket: None,
        }
    }

    /// Checks every rule; [`super::main`] does so before anything else.
    ///
    /// # Errors
    /// The first field that breaks its rule.
    pub fn validate(&self) -> Result<(), InvalidRelayConfig> {
        let fault = |field, rule| Err(InvalidRelayConfig { field, rule });
        if self.outbound_port.is_none() && self.inbound_port.is_none() {
            return fault("outbound_port", "one of outbound_port and inbound_port must be given");
        }
        if self.outbound_port == Some(0) {
            return fault("outbound_port", "must be from 1 to 65535");
        }
        if self.udp && self.outbound_port.is_none() {
            return fault("udp", "needs outbound_port");
        }
        if self.inbound_port == Some(0) {
            return fault("inbound_port", "must be from 1 to 65535");
        }
        if self.outbound_port == self.inbound_port {
            return fault("inbound_port", "must differ from outbound_port");
        }
        if !(1..=1_000_000).contains(&self.max_connections) {
            return fault("max_connections", "must be from 1 to 1000000");
        }
        if !(1..=LONGEST_MS).contains(&self.connect_timeout_ms) {
            return fault("connect_timeout_ms", "must be from 1 to 86400000");
        }
        if self.drain_grace_ms > LONGEST_MS {
            return fault("drain_grace_ms", "must be at most 86400000");
        }
        if let Some(path) = &self.metrics_socket {
            if !path.is_absolute() {
                return fault("metrics_socket", "must be an absolute path");
            }
            if path.as_os_str().len() > LONGEST_SOCKET_PATH {
                return fault("metrics_socket", "must be at most 107 bytes long");
            }
        }
        Ok(())
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

fn default_max_connections() -> u32 {
    DEFAULT_MAX_CONNECTIONS
}

fn default_connect_timeout_ms() -> u64 {
    DEFAULT_CONNECT_TIMEOUT_MS
}

fn default_drain_grace_ms() -> u64 {
    DEFAULT_DRAIN_GRACE_MS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> RelayConfig {
        let mut config = RelayConfig::new("process/1-2".parse().unwrap(), "r".parse().unwrap());
        config.outbound_port = Some(15_001);
        config
    }

    #[test]
    fn each_rule_names_its_field() {
        type Change = fn(&mut RelayConfig);
        let cases: [(&str, Change); 11] = [
            ("udp", |c| (c.outbound_port, c.inbound_port, c.udp) = (None, Some(1), true)),
            ("outbound_port", |c| c.outbound_port = None),
            ("outbound_port", |c| c.outbound_port = Some(0)),
            ("inbound_port", |c| c.inbound_port = Some(0)),
            ("inbound_port", |c| c.inbound_port = Some(15_001)),
            ("max_connections", |c| c.max_connections = 0),
            ("max_connections", |c| c.max_connections = 1_000_001),
            ("connect_timeout_ms", |c| c.connect_timeout_ms = 0),
            ("drain_grace_ms", |c| c.drain_grace_ms = u64::MAX),
            ("metrics_socket", |c| c.metrics_socket = Some("relative".into())),
            ("metrics_socket", |c| c.metrics_socket = Some(format!("/{}", "x".repeat(107)).into())),
        ];
        assert_eq!(valid().validate(), Ok(()));
        for (field, change) in cases {
            let mut config = valid();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }

    #[test]
    fn json_is_strict_and_fills_in_defaults() {
        let json = r#"{"workload":"process/1-2","name":"r","outbound_port":15001}"#;
        assert_eq!(serde_json::from_str::<RelayConfig>(json).unwrap(), valid());
        let udp = json.replace('}', ",\"udp\":true}");
        assert_eq!(
            serde_json::to_string(&serde_json::from_str::<RelayConfig>(&udp).unwrap())
                .unwrap()
                .matches("\"udp\":true")
                .count(),
            1
        );
        let back = serde_json::to_string(&valid()).unwrap();
        assert_eq!(serde_json::from_str::<RelayConfig>(&back).unwrap(), valid());
        for bad in [
            r#"{"workload":"process/1-2","name":"r","outbound_prt":15001}"#,
            r#"{"workload":"a b","name":"r","outbound_port":15001}"#,
            r#"{"workload":"process/1-2","name":"r","outbound_port":65536}"#,
        ] {
            assert!(serde_json::from_str::<RelayConfig>(bad).is_err(), "{bad}");
        }
    }
}
