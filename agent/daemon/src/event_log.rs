//! What happened, in order: a bounded ring for `pillion events`, and a channel for those who follow.
//!
//! Owned by the controller alone, so that the order of events is the order in which they were handled. Never blocks on
//! a slow follower: who falls behind sees a gap in the sequence.

use std::{collections::VecDeque, sync::Arc};

use pillion_workload::{CompanionName, FirstInstruction, Gate, PolicyName, WorkloadId};
use tokio::sync::broadcast;
use tracing::{info, warn};

use crate::api::{EventKind, EventRecord, Timestamp};

const RING: usize = 1024;
const FOLLOWER_LAG: usize = 256;
/// Policy faults can be long; the ring must not hold megabytes of them.
const MAX_MESSAGE_BYTES: usize = 4096;

/// The ring.
#[derive(Debug)]
pub(crate) struct EventLog {
    ring: VecDeque<Arc<EventRecord>>,
    next: u64,
    followers: broadcast::Sender<Arc<EventRecord>>,
}

/// What is to be logged.
#[derive(Debug)]
pub(crate) struct Entry {
    kind: EventKind,
    message: String,
    workload: Option<WorkloadId>,
    companion: Option<CompanionName>,
    policy: Option<PolicyName>,
    first_instruction: Option<FirstInstruction>,
    attach_millis: Option<u64>,
    gate: Option<Gate>,
    held_micros: Option<u64>,
}

impl Entry {
    pub(crate) fn new(kind: EventKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE_BYTES {
            let boundary = (0..=MAX_MESSAGE_BYTES).rev().find(|at| message.is_char_boundary(*at));
            message.truncate(boundary.unwrap_or(0));
            message.push('…');
        }
        Self {
            kind,
            message,
            workload: None,
            companion: None,
            policy: None,
            first_instruction: None,
            attach_millis: None,
            gate: None,
            held_micros: None,
        }
    }

    pub(crate) fn workload(mut self, workload: &WorkloadId) -> Self {
        self.workload = Some(workload.clone());
        self
    }

    pub(crate) fn companion(mut self, companion: &CompanionName) -> Self {
        self.companion = Some(companion.clone());
        self
    }

    pub(crate) fn policy(mut self, policy: &PolicyName) -> Self {
        self.policy = Some(policy.clone());
        self
    }

    pub(crate) fn attached(mut self, first: Option<FirstInstruction>, millis: Option<u64>) -> Self {
        (self.first_instruction, self.attach_millis) = (first, millis);
        self
    }

    pub(crate) fn at_gate(mut self, gate: Gate, held_micros: u64) -> Self {
        (self.gate, self.held_micros) = (Some(gate), Some(held_micros));
        self
    }
}

/// Whether somebody who only looks at warnings should see it.
fn is_trouble(kind: EventKind) -> bool {
    match kind {
        EventKind::PolicyRefused
        | EventKind::SourceDown
        | EventKind::AttachFailed
        | EventKind::Degraded
        | EventKind::CompanionExited
        | EventKind::ConnectionsKept
        | EventKind::DetachFailed
        | EventKind::AdmittedOpen
        | EventKind::Refused
        | EventKind::CannotAttach
        | EventKind::JournalFault => true,
        EventKind::AgentStarted
        | EventKind::AgentStopping
        | EventKind::PolicyLoaded
        | EventKind::SourceUp
        | EventKind::NotMatched
        | EventKind::Attaching
        | EventKind::Attached
        | EventKind::Adopted
        | EventKind::Recovered
        | EventKind::CompanionReady
        | EventKind::PlanChanged
        | EventKind::ConnectionsReset
        | EventKind::Detaching
        | EventKind::Detached
        | EventKind::Held
        | EventKind::Released
        | EventKind::Admitted
        | EventKind::WorkloadStopped => false,
    }
}

impl EventLog {
    pub(crate) fn new() -> Self {
        let (followers, _) = broadcast::channel(FOLLOWER_LAG);
        Self { ring: VecDeque::with_capacity(64), next: 1, followers }
    }

    pub(crate) fn add(&mut self, entry: Entry) {
        let record = Arc::new(EventRecord {
            sequence: self.next,
            at: Timestamp::now(),
            kind: entry.kind,
            message: entry.message,
            workload: entry.workload,
            companion: entry.companion,
            policy: entry.policy,
            first_instruction: entry.first_instruction,
            attach_millis: entry.attach_millis,
            gate: entry.gate,
            held_micros: entry.held_micros,
        });
        self.next += 1;
        let text = |value: Option<&str>| value.map(str::to_owned);
        let (workload, companion, policy) = (
            text(record.workload.as_ref().map(WorkloadId::as_str)),
            text(record.companion.as_ref().map(CompanionName::as_str)),
            text(record.policy.as_ref().map(PolicyName::as_str)),
        );
        if is_trouble(record.kind) {
            warn!(kind = ?record.kind, workload, companion, policy, "{}", record.message);
        } else {
            info!(kind = ?record.kind, workload, companion, policy, "{}", record.message);
        }
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(record.clone());
        // Nobody follows: fine.
        let _ = self.followers.send(record);
    }

    /// Everything after `since` that is still there, and the channel on which the rest comes: nothing is between them.
    pub(crate) fn read(&self, since: u64) -> (Vec<Arc<EventRecord>>, broadcast::Receiver<Arc<EventRecord>>) {
        let backlog = self.ring.iter().filter(|record| record.sequence > since).cloned().collect();
        (backlog, self.followers.subscribe())
    }

    /// The latest events of a workload, oldest first.
    pub(crate) fn of(&self, workload: &WorkloadId, most: usize) -> Vec<EventRecord> {
        let mut found: Vec<EventRecord> = self
            .ring
            .iter()
            .rev()
            .filter(|record| record.workload.as_ref() == Some(workload))
            .take(most)
            .map(|record| EventRecord::clone(record))
            .collect();
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_the_sequence_is_not() {
        let mut log = EventLog::new();
        for _ in 0..RING + 10 {
            log.add(Entry::new(EventKind::NotMatched, "x"));
        }
        let (all, _) = log.read(0);
        assert_eq!((all.len(), all[0].sequence), (RING, 11));
        let (rest, _) = log.read(RING as u64 + 9);
        assert_eq!(rest.len(), 1);
    }

    #[tokio::test]
    async fn a_follower_misses_nothing_between_backlog_and_channel() {
        let mut log = EventLog::new();
        log.add(Entry::new(EventKind::AgentStarted, "a"));
        let (backlog, mut rest) = log.read(0);
        log.add(Entry::new(EventKind::AgentStopping, "b"));
        assert_eq!((backlog.len(), rest.recv().await.unwrap().sequence), (1, 2));
    }

    #[test]
    fn a_workload_has_its_own_events() {
        let mut log = EventLog::new();
        let (a, b) = ("process/1-1".parse().unwrap(), "process/2-2".parse().unwrap());
        for message in ["1", "2", "3"] {
            log.add(Entry::new(EventKind::Attaching, message).workload(&a));
            log.add(Entry::new(EventKind::Attaching, message).workload(&b));
        }
        let messages: Vec<_> = log.of(&a, 2).into_iter().map(|event| event.message).collect();
        assert_eq!(messages, ["2", "3"]);
    }

    #[test]
    fn long_messages_are_cut() {
        let mut log = EventLog::new();
        log.add(Entry::new(EventKind::PolicyRefused, "ä".repeat(MAX_MESSAGE_BYTES)));
        assert!(log.read(0).0[0].message.len() <= MAX_MESSAGE_BYTES + 3);
    }
}
