//! systemd in the agent: watching it, and what the policies in force say of its units, for the keeper of drop-ins.
//!
//! Owns the translation. Never decides: the policies do, and the gate asks again when a unit starts.

use std::{path::Path, sync::Arc};

use pillion_policy::PolicySet;
use pillion_runtime::{RuntimeEvent, SystemdConfig, SystemdSource, UnitSelection, Units};
use pillion_workload::Subject;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::config::AgentConfig;

/// Tells the keeper of drop-ins which policies are in force.
pub(crate) type Selections = watch::Sender<Option<Arc<dyn UnitSelection>>>;

/// The policies in force.
#[derive(Debug)]
struct InForce(PolicySet);

impl UnitSelection for InForce {
    fn may_select(&self, unit: &str) -> bool {
        self.0.policies().iter().any(|policy| policy.selector().may_match_unit(unit))
    }

    fn selects(&self, unit: &Subject) -> bool {
        self.0.plan_for(unit).is_some()
    }

    fn patterns(&self) -> Vec<String> {
        let policies = self.0.policies().iter();
        policies.flat_map(|policy| policy.selector().unit_patterns()).map(str::to_owned).collect()
    }
}

/// Begins to watch systemd, if there is one to be watched; `None` otherwise.
pub(crate) fn watch(
    config: &AgentConfig,
    program: &Path,
    events: &mpsc::Sender<RuntimeEvent>,
    selections: &Selections,
    stop: &CancellationToken,
) -> Option<Units> {
    let systemd = SystemdConfig::at(config.systemd.bus()?, config.paths.drop_ins(program));
    let (_task, units) = SystemdSource::spawn(systemd, events.clone(), selections.subscribe(), stop.clone());
    Some(units)
}

/// Says that these policies are in force now.
pub(crate) fn select(selections: &Selections, policies: PolicySet) {
    selections.send_replace(Some(Arc::new(InForce(policies))));
}
