//! All policies of a node, and which of them a workload gets.
//!
//! Owns the order of policies and the decision. Never starts anything: the plan is for others to carry out.

use std::{fmt, sync::Arc};

use pillion_workload::{FailureMode, Plan, PolicyName, Sighting, Subject};
use serde::Serialize;

use crate::{FieldReason, Place, Selector};

/// A validated policy.
#[derive(Debug, Clone, Serialize)]
pub struct Policy {
    pub(crate) name: PolicyName,
    pub(crate) priority: i32,
    pub(crate) selector: Selector,
    pub(crate) plan: Arc<Plan>,
    pub(crate) place: Place,
}

/// Equal when they say the same, wherever that is written: a reload that only moved lines changes nothing.
impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
            && self.priority == other.priority
            && self.selector == other.selector
            && self.plan == other.plan
    }
}

impl Eq for Policy {}

impl Policy {
    /// `metadata.name`, or the file's stem.
    pub fn name(&self) -> &PolicyName {
        &self.name
    }

    /// The highest one that matches wins.
    pub fn priority(&self) -> i32 {
        self.priority
    }

    /// Which workloads it is for.
    pub fn selector(&self) -> &Selector {
        &self.selector
    }

    /// What it wants for them.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Where it is written.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

/// Policies of which no two can claim the same workload with the same priority.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct PolicySet {
    /// Highest priority first, then by name.
    policies: Vec<Policy>,
}

/// What a workload gets, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The plan of the policy that won; absent when none matched.
    pub plan: Option<Arc<Plan>>,
    /// One for every policy, highest priority first.
    pub reasons: Vec<Reason>,
}

/// What became of one policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// Its name.
    pub policy: PolicyName,
    /// Its priority.
    pub priority: i32,
    /// The outcome.
    pub verdict: Verdict,
    /// Every field of its selector.
    pub fields: Vec<FieldReason>,
}

/// What became of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Verdict {
    /// It matched, and none with a higher priority did.
    Chosen,
    /// It matched, and so did one with a higher priority.
    Shadowed {
        /// The one that was chosen.
        by: PolicyName,
    },
    /// A field of its selector failed.
    NotMatched,
}

impl PolicySet {
    /// No policies: no workload gets anything.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The caller has made sure that priorities decide.
    pub(crate) fn new(mut policies: Vec<Policy>) -> Self {
        policies.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
        Self { policies }
    }

    /// All policies, highest priority first, then by name.
    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// The policy that a workload gets. Allocates nothing.
    pub fn policy_for(&self, subject: &Subject) -> Option<&Policy> {
        self.policies.iter().find(|policy| policy.selector.matches(subject))
    }

    /// The plan that a workload gets. Allocates nothing.
    pub fn plan_for(&self, subject: &Subject) -> Option<&Arc<Plan>> {
        self.policy_for(subject).map(Policy::plan)
    }

    /// The strictest policy that may be the one of a workload which could not be identified, being one of these: one that says
    /// `onFailure: closed`, if there is such a one.
    pub fn strictest_for(&self, sightings: &[Sighting]) -> Option<&Policy> {
        let mut open = None;
        for sighting in sightings {
            for policy in &self.policies {
                let (may, certain) = policy.selector.may_match(sighting);
                if may && policy.plan.on_failure == FailureMode::Closed {
                    return Some(policy);
                }
                if may {
                    open = open.or(Some(policy));
                }
                if certain {
                    // Those with a lower priority are not asked.
                    break;
                }
            }
        }
        open
    }

    /// The plan that a workload gets, and for every policy why it was or was not the one.
    pub fn decide(&self, subject: &Subject) -> Decision {
        let mut chosen: Option<&Policy> = None;
        let mut reasons = Vec::with_capacity(self.policies.len());
        for policy in &self.policies {
            let fields = policy.selector.explain(subject);
            let verdict = match chosen {
                _ if !fields.iter().all(|field| field.matched) => Verdict::NotMatched,
                Some(winner) => Verdict::Shadowed { by: winner.name.clone() },
                None => {
                    chosen = Some(policy);
                    Verdict::Chosen
                }
            };
            reasons.push(Reason { policy: policy.name.clone(), priority: policy.priority, verdict, fields });
        }
        Decision { plan: chosen.map(|policy| Arc::clone(&policy.plan)), reasons }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.plan {
            Some(plan) => writeln!(f, "policy {} applies", plan.policy)?,
            None if self.reasons.is_empty() => writeln!(f, "no policy applies: there are none")?,
            None => writeln!(f, "no policy applies")?,
        }
        for reason in &self.reasons {
            write!(f, "\n{reason}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (priority {}): ", self.policy, self.priority)?;
        match &self.verdict {
            Verdict::Chosen => writeln!(f, "chosen")?,
            Verdict::Shadowed { by } => writeln!(f, "matched, but {by} has a higher priority")?,
            Verdict::NotMatched => writeln!(f, "not matched")?,
        }
        for field in &self.fields {
            let outcome = if field.matched { "matched" } else { "failed" };
            // What a workload calls itself is not trusted: escaped, it cannot forge a line.
            let actual = match &field.actual {
                Some(actual) => format!("is {}", actual.escape_debug()),
                None => "is not set".to_owned(),
            };
            writeln!(
                f,
                "  {:<11} {outcome:<7} wanted {}; {actual}",
                field.field,
                field.wanted.escape_debug()
            )?;
        }
        Ok(())
    }
}
