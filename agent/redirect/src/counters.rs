//! What the kernel side has counted, for all workloads of a data plane together.

use pillion_common::Counter;
use serde::{Deserialize, Serialize};

/// Totals since the maps were made. See [`pillion_common::Counter`] for what each one counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the names are those of `Counter`, which documents them")]
pub struct Counters {
    pub outbound_redirected: u64,
    pub outbound_excluded: u64,
    pub outbound_failed_open: u64,
    pub outbound_failed_closed: u64,
    pub slots_exhausted: u64,
    pub slots_expired: u64,
    pub destinations_answered: u64,
    pub destinations_stale: u64,
    pub inbound_redirected: u64,
    pub inbound_failed_open: u64,
    pub inbound_failed_closed: u64,
    pub datagrams_redirected: u64,
    pub share_exhausted: u64,
    /// Slots that wait for their companion's question right now.
    pub slots_busy: u64,
    /// Destinations kept by source right now: connections that companions have asked for and not closed yet, and those
    /// of bound sockets.
    pub by_source: u64,
    /// Redirected sockets of workloads that are open right now.
    pub connections: u64,
}

impl Counters {
    pub(crate) fn set(&mut self, counter: Counter, value: u64) {
        *match counter {
            Counter::OutboundRedirected => &mut self.outbound_redirected,
            Counter::OutboundExcluded => &mut self.outbound_excluded,
            Counter::OutboundFailedOpen => &mut self.outbound_failed_open,
            Counter::OutboundFailedClosed => &mut self.outbound_failed_closed,
            Counter::SlotsExhausted => &mut self.slots_exhausted,
            Counter::SlotsExpired => &mut self.slots_expired,
            Counter::DestinationsAnswered => &mut self.destinations_answered,
            Counter::DestinationsStale => &mut self.destinations_stale,
            Counter::InboundRedirected => &mut self.inbound_redirected,
            Counter::InboundFailedOpen => &mut self.inbound_failed_open,
            Counter::InboundFailedClosed => &mut self.inbound_failed_closed,
            Counter::DatagramsRedirected => &mut self.datagrams_redirected,
            Counter::ShareExhausted => &mut self.share_exhausted,
        } = value;
    }
}
