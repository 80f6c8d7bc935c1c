//! Workloads that are there and that redirection cannot reach: told with the reason, never left out.
//!
//! They have no attachment, so they are kept apart from the others. Pure bookkeeping and its view.

use std::collections::BTreeMap;

use pillion_policy::PolicySet;
use pillion_runtime::SourceName;
use pillion_workload::{PolicyName, Subject, WorkloadId};

use crate::api::{Timestamp, Verdict, WorkloadSummary};

/// More than a node has; what comes beyond is of the same kind.
const LIMIT: usize = 4096;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Unattachables(BTreeMap<WorkloadId, Unattachable>);

/// One of them.
#[derive(Debug)]
pub(super) struct Unattachable {
    source: SourceName,
    pub(super) subject: Subject,
    pub(super) reason: String,
    since: Timestamp,
}

impl Unattachables {
    /// Takes one in. Whether it is news.
    pub(super) fn add(
        &mut self,
        source: SourceName,
        id: WorkloadId,
        subject: Subject,
        reason: String,
    ) -> bool {
        if self.0.get(&id).is_some_and(|known| known.subject == subject && known.reason == reason)
            || (self.0.len() >= LIMIT && !self.0.contains_key(&id))
        {
            return false;
        }
        self.0.insert(id, Unattachable { source, subject, reason, since: Timestamp::now() });
        true
    }

    pub(super) fn remove(&mut self, id: &WorkloadId) {
        self.0.remove(id);
    }

    /// A snapshot of this source follows, and then all of them again.
    pub(super) fn forget(&mut self, source: SourceName) {
        self.0.retain(|_, known| known.source != source);
    }

    pub(super) fn get(&self, id: &WorkloadId) -> Option<&Unattachable> {
        self.0.get(id)
    }

    /// Each with the policy that would have it.
    pub(super) fn summaries<'a>(
        &'a self,
        policies: Option<&'a PolicySet>,
    ) -> impl Iterator<Item = WorkloadSummary> + 'a {
        self.0.iter().map(move |(id, known)| known.summary(id, policies))
    }
}

impl Unattachable {
    pub(super) fn summary(&self, id: &WorkloadId, policies: Option<&PolicySet>) -> WorkloadSummary {
        let policy: Option<PolicyName> =
            policies.and_then(|policies| policies.plan_for(&self.subject)).map(|plan| plan.policy.clone());
        WorkloadSummary {
            id: id.clone(),
            runtime: self.subject.runtime,
            name: self.subject.name.clone(),
            namespace: self.subject.namespace.clone(),
            pid: 0,
            verdict: if policy.is_some() { Verdict::CannotAttach } else { Verdict::NotMatched },
            since: self.since,
            reason: Some(self.reason.clone()),
            policy,
            companions: Vec::new(),
            first_instruction: None,
            gate: None,
            attach_millis: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::RuntimeKind;

    use super::*;

    #[test]
    fn told_once_and_forgotten_with_their_source() {
        let subject = || Subject::new(RuntimeKind::Containerd, "sandboxed");
        let id: WorkloadId = "containerd/default/sandboxed".parse().unwrap();
        let mut known = Unattachables::default();
        assert!(known.add(SourceName::CONTAINERD, id.clone(), subject(), "gVisor".into()));
        assert!(!known.add(SourceName::CONTAINERD, id.clone(), subject(), "gVisor".into()));
        assert!(known.add(SourceName::CONTAINERD, id.clone(), subject(), "Kata".into()));
        known.forget(SourceName::DOCKER);
        let shown: Vec<WorkloadSummary> = known.summaries(None).collect();
        assert_eq!((shown.len(), shown[0].verdict), (1, Verdict::NotMatched));
        known.forget(SourceName::CONTAINERD);
        assert!(known.get(&id).is_none());
    }
}
