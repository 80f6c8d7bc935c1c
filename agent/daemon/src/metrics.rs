//! The agent's metrics, in the text format of `OpenMetrics`.
//!
//! Owns the registry. No workload or container id is a label: a node sees too many of them. What can be asked is asked
//! when scraped (workloads, sources, the data plane's counters); only what happens is counted.

use std::{fmt, sync::Arc, time::Duration};

use pillion_redirect::{Counters, Dataplane};
use pillion_runtime::Admission;
use pillion_workload::Gate;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
        info::Info,
    },
    registry::Registry,
};

use crate::{api::Verdict, controller::Pulse};

/// The label of what no gate has held.
const NO_GATE: &str = "none";

/// What is counted as it happens.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// From the moment a workload was to be attached to redirection in force.
    pub(crate) attach_seconds: Histogram,
    /// Attaches that failed.
    pub(crate) attach_failures: Counter,
    /// Companions that ended.
    pub(crate) companion_exits: Counter,
    /// Companions that did not become ready.
    pub(crate) companion_failures: Counter,
    /// Companions that became ready again after they had ended.
    pub(crate) companion_restarts: Counter,
    /// Policies that were read and accepted.
    pub(crate) policy_reloads: Counter,
    /// Policies that were read and refused.
    pub(crate) policy_reload_failures: Counter,
    gate_seconds: Family<GateLabel, Histogram, fn() -> Histogram>,
    workloads: Family<VerdictLabel, Gauge>,
    source_up: Family<SourceLabel, Gauge>,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
    /// `none` for one that no gate has held.
    gate: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct GateLabel {
    gate: &'static str,
    outcome: &'static str,
}

/// A workload that nothing is wanted for passes in some ten microseconds; a runtime gives up after some seconds.
fn gate_histogram() -> Histogram {
    Histogram::new([
        0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
    ])
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SourceLabel {
    source: String,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Arc<Self> {
        // A relay is ready within some ten milliseconds, an Envoy within seconds.
        let buckets = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
        let metrics = Self {
            attach_seconds: Histogram::new(buckets),
            attach_failures: Counter::default(),
            companion_exits: Counter::default(),
            companion_failures: Counter::default(),
            companion_restarts: Counter::default(),
            policy_reloads: Counter::default(),
            policy_reload_failures: Counter::default(),
            gate_seconds: Family::new_with_constructor(gate_histogram),
            workloads: Family::default(),
            source_up: Family::default(),
        };
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("pillion_build", "Which agent this is", version);
        registry.register(
            "pillion_workloads",
            "Known workloads by verdict and by the gate that has held them",
            metrics.workloads.clone(),
        );
        registry.register(
            "pillion_gate_seconds",
            "Time from a gate's question to the agent's answer",
            metrics.gate_seconds.clone(),
        );
        registry.register(
            "pillion_source_up",
            "Whether a runtime source is connected",
            metrics.source_up.clone(),
        );
        registry.register(
            "pillion_attach_seconds",
            "Time from when a workload was to be attached to redirection in force",
            metrics.attach_seconds.clone(),
        );
        for (name, help, counter) in [
            ("pillion_attach_failures", "Attaches that failed", &metrics.attach_failures),
            ("pillion_companion_exits", "Companions that ended", &metrics.companion_exits),
            (
                "pillion_companion_failures",
                "Companions that did not become ready",
                &metrics.companion_failures,
            ),
            (
                "pillion_companion_restarts",
                "Companions that became ready again after they had ended",
                &metrics.companion_restarts,
            ),
            ("pillion_policy_reloads", "Policies that were read and accepted", &metrics.policy_reloads),
            (
                "pillion_policy_reload_failures",
                "Policies that were read and refused",
                &metrics.policy_reload_failures,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        Arc::new(metrics)
    }

    /// A gate has been answered.
    pub(crate) fn gate(&self, gate: Gate, admission: &Admission, took: Duration) {
        let outcome = match admission {
            Admission::Unmatched => "unmatched",
            Admission::Covered => "covered",
            Admission::Attached => "attached",
            Admission::Open { .. } => "open",
            Admission::Refused { .. } => "refused",
        };
        let label = GateLabel { gate: gate.as_str(), outcome };
        self.gate_seconds.get_or_create(&label).observe(took.as_secs_f64());
    }

    /// Takes over what the controller has told.
    pub(crate) fn set(&self, pulse: &Pulse) {
        // A pair that nobody has any more must not keep its last number.
        self.workloads.clear();
        for verdict in Verdict::ALL {
            let label = VerdictLabel { verdict: verdict.as_str(), gate: NO_GATE };
            self.workloads.get_or_create(&label).set(0);
        }
        for ((verdict, gate), count) in &pulse.workloads {
            let label = VerdictLabel { verdict: verdict.as_str(), gate: gate.map_or(NO_GATE, Gate::as_str) };
            self.workloads.get_or_create(&label).set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
        for (source, up) in &pulse.sources {
            let label = SourceLabel { source: (*source).to_owned() };
            self.source_up.get_or_create(&label).set(i64::from(*up));
        }
    }
}

/// Asks the data plane when scraped.
#[derive(Debug)]
pub(crate) struct DataplaneCollector(pub(crate) Arc<Dataplane>);

impl Collector for DataplaneCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // A map that cannot be read leaves these metrics out, which an alert on absence shows.
        let Ok(counters) = self.0.counters() else { return Ok(()) };
        for Shown { name, help, value, now } in shown(&counters) {
            if now {
                let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
                gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
            } else {
                let counter = ConstCounter::new(value);
                counter.encode(encoder.encode_descriptor(&name, help, None, counter.metric_type())?)?;
            }
        }
        Ok(())
    }
}

/// A counter of the data plane.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) name: String,
    pub(crate) help: &'static str,
    pub(crate) value: u64,
    /// A state of this moment rather than a total.
    pub(crate) now: bool,
}

/// Names and values of the data plane's counters. All fields are named, so that a new one cannot be forgotten.
pub(crate) fn shown(counters: &Counters) -> Vec<Shown> {
    let Counters {
        outbound_redirected,
        outbound_excluded,
        outbound_failed_open,
        outbound_failed_closed,
        slots_exhausted,
        slots_expired,
        destinations_answered,
        destinations_stale,
        inbound_redirected,
        inbound_failed_open,
        inbound_failed_closed,
        datagrams_redirected,
        share_exhausted,
        slots_busy,
        by_source,
        connections,
    } = *counters;
    let total =
        |name: &str, help, value| Shown { name: format!("pillion_redirect_{name}"), help, value, now: false };
    let now =
        |name: &str, help, value| Shown { name: format!("pillion_redirect_{name}"), help, value, now: true };
    vec![
        total("outbound_redirected", "Outbound connections sent to a companion", outbound_redirected),
        total("outbound_excluded", "Outbound connections left alone as the policy says", outbound_excluded),
        total(
            "outbound_failed_open",
            "Outbound connections passed without a companion",
            outbound_failed_open,
        ),
        total(
            "outbound_failed_closed",
            "Outbound connections refused without a companion",
            outbound_failed_closed,
        ),
        total("slots_exhausted", "Outbound connections that found no free slot", slots_exhausted),
        total("slots_expired", "Slots whose companion never asked for the destination", slots_expired),
        total("destinations_answered", "Original destinations told to a companion", destinations_answered),
        total(
            "destinations_stale",
            "Questions for an original destination that was no longer known",
            destinations_stale,
        ),
        total("inbound_redirected", "Inbound connections sent to a companion", inbound_redirected),
        total("inbound_failed_open", "Inbound connections passed without a companion", inbound_failed_open),
        total(
            "inbound_failed_closed",
            "Inbound connections refused without a companion",
            inbound_failed_closed,
        ),
        total(
            "datagrams_redirected",
            "Datagrams of sockets without a peer sent to a companion",
            datagrams_redirected,
        ),
        total(
            "share_exhausted",
            "Outbound connections and destinations of workloads that had used up their share",
            share_exhausted,
        ),
        now("slots_busy", "Slots that wait for their companion's question", slots_busy),
        now("destinations_by_source", "Destinations kept by source address", by_source),
        now("connections", "Redirected sockets of workloads that are open", connections),
    ]
}

/// The whole registry as text.
pub(crate) fn text(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    encode(&mut text, registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every registered metric must have a value once everything that can happen has happened. That each of these is
    /// called is the compiler's care: an unused one is an error.
    #[test]
    fn every_metric_is_moved_by_something() {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        metrics.attach_seconds.observe(0.1);
        metrics.attach_failures.inc();
        metrics.companion_exits.inc();
        metrics.companion_failures.inc();
        metrics.companion_restarts.inc();
        metrics.policy_reloads.inc();
        metrics.policy_reload_failures.inc();
        metrics.gate(Gate::Nri, &Admission::Attached, Duration::from_millis(3));
        metrics.set(&Pulse {
            policies_loaded: true,
            workloads: Verdict::ALL.into_iter().map(|verdict| ((verdict, None), 3)).collect(),
            sources: vec![("containerd", true)],
        });
        let text = text(&registry).unwrap();
        let names: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()).collect();
        assert_eq!(names.len(), 11, "{text}");
        for name in names {
            let moved = text.lines().any(|line| {
                line.starts_with(name)
                    && line.rsplit(' ').next().is_some_and(|value| value != "0" && value != "0.0")
            });
            assert!(moved, "{name} has no value in\n{text}");
        }
        assert!(text.contains("pillion_workloads{verdict=\"notMatched\",gate=\"none\"} 3"), "{text}");
    }

    #[test]
    fn data_plane_counters_have_distinct_names() {
        let shown = shown(&Counters { slots_busy: 7, ..Counters::default() });
        let names: std::collections::BTreeSet<&str> = shown.iter().map(|shown| shown.name.as_str()).collect();
        assert_eq!(names.len(), shown.len());
        assert!(shown.iter().any(|shown| shown.name == "pillion_redirect_slots_busy" && shown.value == 7));
    }
}
