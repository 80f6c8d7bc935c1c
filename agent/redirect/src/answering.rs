//! What the programs on a companion's cgroup know. One cgroup may hold the companions of several workloads: a service of
//! the host that somebody else runs serves all of them.
//!
//! Owns the configuration of those cgroups. Never attaches anything.

use std::collections::{BTreeMap, BTreeSet};

use pillion_common::{CompanionConfig, PORTS_PER_COMPANION};
use pillion_workload::{CgroupId, CompanionName};

use crate::{Dataplane, RedirectError};

/// The ports on which connections for each companion's cgroup arrive, by workload and companion.
#[derive(Debug, Default)]
pub(crate) struct Answering {
    ports: BTreeMap<CgroupId, BTreeMap<(u32, CompanionName), BTreeSet<u16>>>,
}

impl Answering {
    fn of(&self, cgroup: CgroupId) -> BTreeSet<u16> {
        self.ports.get(&cgroup).into_iter().flat_map(BTreeMap::values).flatten().copied().collect()
    }

    /// As the kernel side is told. Where a kernel cannot tell the namespace of a question (before Linux 5.15), the first
    /// workload stands for it: those of others that share the companion are then not answered.
    fn config(&self, cgroup: CgroupId) -> CompanionConfig {
        let mut config = CompanionConfig::default();
        for (place, port) in config.ports.iter_mut().zip(self.of(cgroup)) {
            *place = port;
        }
        let first = self.ports.get(&cgroup).and_then(|all| all.keys().next());
        config.workload = first.map_or(0, |(number, _)| *number);
        config
    }

    fn remove(&mut self, cgroup: CgroupId, whose: &(u32, CompanionName)) {
        if let Some(all) = self.ports.get_mut(&cgroup) {
            all.remove(whose);
            if all.is_empty() {
                self.ports.remove(&cgroup);
            }
        }
    }
}

impl Dataplane {
    /// Sockets of this cgroup that listen on `ports` are a companion's from now on.
    pub(crate) fn answer(
        &self,
        number: u32,
        companion: &CompanionName,
        cgroup: CgroupId,
        ports: &BTreeSet<u16>,
    ) -> Result<(), RedirectError> {
        let mut answering = self.answering();
        answering.ports.entry(cgroup).or_default().insert((number, companion.clone()), ports.clone());
        let all = answering.of(cgroup);
        if all.len() > PORTS_PER_COMPANION {
            answering.remove(cgroup, &(number, companion.clone()));
            return Err(RedirectError::TooManyPorts { companion: companion.clone(), count: all.len() });
        }
        self.maps().configure_companion(cgroup, &answering.config(cgroup))
    }

    /// The same, of one that an earlier agent has told the kernel of.
    pub(crate) fn answers(
        &self,
        number: u32,
        companion: &CompanionName,
        cgroup: CgroupId,
        ports: &BTreeSet<u16>,
    ) {
        let whose = (number, companion.clone());
        self.answering().ports.entry(cgroup).or_default().insert(whose, ports.clone());
    }

    /// No connection goes to this companion any more. What else is in its cgroup stays as it is.
    pub(crate) fn answer_no_more(
        &self,
        number: u32,
        companion: &CompanionName,
        cgroup: CgroupId,
    ) -> Result<(), RedirectError> {
        let mut answering = self.answering();
        answering.remove(cgroup, &(number, companion.clone()));
        let rest = answering.of(cgroup);
        // With nobody left the programs are gone, and perhaps the cgroup.
        if rest.is_empty() {
            Ok(())
        } else {
            self.maps().configure_companion(cgroup, &answering.config(cgroup))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_that_share_a_companion_share_its_configuration() {
        let whose = |number| (number, "mesh".parse().expect("a name"));
        let mut answering = Answering::default();
        let (shared, own) = (CgroupId(7), CgroupId(8));
        for (cgroup, number, ports) in
            [(shared, 1, [15001, 15006]), (shared, 2, [15001, 15008]), (own, 3, [1, 2])]
        {
            answering.ports.entry(cgroup).or_default().insert(whose(number), ports.into());
        }
        assert_eq!(answering.of(shared), [15001, 15006, 15008].into());
        let config = answering.config(shared);
        assert_eq!(config.ports, [15001, 15006, 15008, 0, 0, 0, 0, 0]);
        assert_eq!(config.workload, 1);
        answering.remove(shared, &whose(1));
        assert_eq!(answering.of(shared), [15001, 15008].into());
        answering.remove(shared, &whose(2));
        assert_eq!(answering.of(shared), [].into());
        assert!(!answering.ports.contains_key(&shared), "nothing is kept");
    }
}
