//! Which policy decides about what cannot be identified: the gates' rule, without the controller.
//!
//! Owns a second handle on the policies in force, which gates read when there is no time left to ask. Until the first ones are loaded these
//! are an earlier agent's. Never blocks for long.

use std::{
    path::PathBuf,
    sync::{PoisonError, RwLock},
};

use pillion_policy::PolicySet;
use pillion_runtime::Rule;
use pillion_workload::{FailureMode, PolicyName, Sighting, WorkloadId};

use crate::{journal, last_good};

/// The policies in force.
#[derive(Debug)]
pub(crate) struct Standing {
    state_dir: PathBuf,
    policies: RwLock<PolicySet>,
}

impl Standing {
    /// Those that the agent before this one had last. Reads files.
    pub(crate) fn recall(state_dir: PathBuf) -> Self {
        // Whether they can be used is told when this agent needs them for itself.
        let policies = last_good::copied(&state_dir).unwrap_or_default();
        Self { state_dir, policies: RwLock::new(policies) }
    }

    /// Others are in force.
    pub(crate) fn replace(&self, policies: PolicySet) {
        *self.policies.write().unwrap_or_else(PoisonError::into_inner) = policies;
    }
}

impl Rule for Standing {
    fn strictest(
        &self,
        id: Option<&WorkloadId>,
        sightings: &[Sighting],
    ) -> Option<(PolicyName, FailureMode)> {
        // What its user has detached is not to be attached, whatever it is.
        if id.is_some_and(|id| journal::held_detached(&self.state_dir).is_ok_and(|held| held.contains(id))) {
            return None;
        }
        let policies = self.policies.read().unwrap_or_else(PoisonError::into_inner);
        let policy = policies.strictest_for(sightings)?;
        Some((policy.name().clone(), policy.plan().on_failure))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pillion_policy::SourceFile;
    use pillion_workload::{Facet, RuntimeKind, Subject};

    use super::*;

    #[test]
    fn an_earlier_agents_policies_stand_until_others_are_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let text = "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: { name: shop }\n\
            spec: { select: { labels: { app: web } }, companions: [{ name: r, builtin: relay }], \
            redirect: { outbound: [{ to: r }] }, onFailure: closed }\n";
        let sighting =
            Sighting { subject: Subject::new(RuntimeKind::Containerd, "c1"), unknown: vec![Facet::Labels] };
        let strictest = |standing: &Standing| {
            let found = standing.strictest(None, std::slice::from_ref(&sighting));
            found.map(|(policy, mode)| (policy.to_string(), mode))
        };
        let shop = Some(("shop".to_owned(), FailureMode::Closed));
        let standing = Standing::recall(directory.path().to_owned());
        assert_eq!(strictest(&standing), None);
        let copy = serde_json::json!({ "version": 1, "files": [{ "path": "p.yaml", "text": text }] });
        fs::write(directory.path().join("policies.json"), copy.to_string()).unwrap();
        let standing = Standing::recall(directory.path().to_owned());
        assert_eq!(strictest(&standing), shop);
        standing.replace(PolicySet::empty());
        assert_eq!(strictest(&standing), None);
        let files = [SourceFile { path: "p.yaml".into(), text: text.to_owned() }];
        standing.replace(pillion_policy::parse(&files).unwrap());
        assert_eq!(strictest(&standing), shop);
    }
}
