//! Which workloads are within others, and whom each one's programs therefore leave alone: inner workloads, whose own
//! policy is to win, and companions that somebody else runs within the workload.
//!
//! Owns the entries of `PL_EXEMPT` and the levels in the configuration. Never attaches anything.
//!
//! A kernel in which both the inner and the outer workload's programs act is right, if not what is wanted: the inner ones
//! run first, and what they have taken the outer ones leave. So an inner workload becomes exempt after its own links are
//! made, and is exempt no longer before they go: its connections are never without a policy. A companion is exempt
//! before anything is sent to it, since its own connections would come back to it.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt as _, path::Path};

use pillion_common::{EXEMPT_LEVELS, ExemptKey, WorkloadConfig};
use pillion_workload::{Cgroup, CgroupId, CompanionName};

use crate::{Dataplane, RedirectError};

/// The root of the cgroup2 hierarchy, which a cgroup namespace does not show.
const ROOT: u64 = 1;

/// All workloads that are attached, by number.
#[derive(Debug, Default)]
pub(crate) struct Nesting {
    known: BTreeMap<u32, Known>,
}

#[derive(Debug)]
struct Known {
    cgroup: Cgroup,
    levels: u32,
    /// Its links are in force: it is exempt from those of the workloads around it.
    active: bool,
    /// What its programs are told, without the levels; `None` while it has no links on its cgroup.
    config: Option<WorkloadConfig>,
    /// Companions within it.
    companions: BTreeMap<CompanionName, Exempt>,
    /// Inner workloads that an earlier agent has exempted and this one has not taken up yet.
    awaited: BTreeMap<CgroupId, u32>,
    /// What is in the map.
    written: BTreeMap<CgroupId, Exempt>,
}

/// A cgroup that is to be left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exempt {
    cgroup: CgroupId,
    /// As in the configuration.
    levels: u32,
    /// The value in the map.
    number: u32,
}

impl Nesting {
    /// Whom the programs of a workload are to leave alone.
    fn wanted(&self, number: u32) -> BTreeMap<CgroupId, Exempt> {
        let Some(outer) = self.known.get(&number) else { return BTreeMap::new() };
        let awaited = outer.awaited.iter().filter(|(_, inner)| !self.known.contains_key(inner));
        let awaited =
            awaited.map(|(cgroup, inner)| Exempt { cgroup: *cgroup, levels: u32::MAX, number: *inner });
        let inner = self.known.iter().filter(|(_, inner)| inner.active && inner.is_within(outer));
        let inner = inner.map(|(number, inner)| Exempt {
            cgroup: inner.cgroup.id,
            levels: inner.levels,
            number: *number,
        });
        let companions = outer.companions.values().copied();
        awaited.chain(companions).chain(inner).map(|exempt| (exempt.cgroup, exempt)).collect()
    }

    /// The workloads around the one with this number.
    fn around(&self, number: u32) -> Vec<u32> {
        let Some(inner) = self.known.get(&number) else { return Vec::new() };
        self.known.iter().filter(|(_, outer)| inner.is_within(outer)).map(|(number, _)| *number).collect()
    }
}

impl Known {
    fn is_within(&self, outer: &Self) -> bool {
        is_below(&self.cgroup.path, &outer.cgroup.path)
    }
}

impl Dataplane {
    /// A workload is about to be attached or taken up. Whom an earlier agent has exempted for it stays so.
    pub(crate) fn enter(&self, number: u32, cgroup: &Cgroup) -> Result<(), RedirectError> {
        let written = self.maps().exempted(number);
        let written: BTreeMap<_, _> = written
            .into_iter()
            .map(|(cgroup, inner)| (cgroup, Exempt { cgroup, levels: u32::MAX, number: inner }))
            .collect();
        let awaited = written.values().filter(|exempt| exempt.number != ExemptKey::COMPANION);
        let awaited = awaited.map(|exempt| (exempt.cgroup, exempt.number)).collect();
        let known = Known {
            cgroup: cgroup.clone(),
            levels: levels(&cgroup.path)?,
            active: false,
            config: None,
            companions: BTreeMap::new(),
            awaited,
            written,
        };
        self.nesting().known.insert(number, known);
        Ok(())
    }

    /// Its links are in force: those of the workloads around it leave it alone from now on.
    pub(crate) fn settle_in(&self, number: u32) -> Result<(), RedirectError> {
        self.set_active(number, true)
    }

    /// Its links are about to go: those of the workloads around it act on it again.
    pub(crate) fn move_out(&self, number: u32) -> Result<(), RedirectError> {
        self.set_active(number, false)
    }

    /// Nothing of it is left. Goes on after an error and returns the first.
    pub(crate) fn forget(&self, number: u32) -> Result<(), RedirectError> {
        let mut nesting = self.nesting();
        let (mut outcome, mut stale) = (Ok(()), Vec::new());
        let exempted = self.maps().exempted(number);
        for cgroup in exempted.into_keys() {
            outcome = outcome.and(self.maps().include_cgroup(number, cgroup));
        }
        nesting.known.remove(&number);
        for (outer, known) in &mut nesting.known {
            // One that was not taken up, but ended: nobody waits for it any more.
            let before = known.awaited.len();
            known.awaited.retain(|_, inner| *inner != number);
            if known.awaited.len() < before {
                stale.push(*outer);
            }
        }
        for outer in stale {
            outcome = outcome.and(self.apply(&mut nesting, outer));
        }
        outcome
    }

    /// Writes what the programs of a workload are told; `None` turns them off.
    pub(crate) fn configure(&self, number: u32, config: Option<WorkloadConfig>) -> Result<(), RedirectError> {
        let mut nesting = self.nesting();
        let Some(known) = nesting.known.get_mut(&number) else { return Ok(()) };
        known.config = config;
        match config {
            Some(_) => self.apply(&mut nesting, number),
            None => self.maps().configure_workload(known.cgroup.id, &WorkloadConfig::default()),
        }
    }

    /// A companion is ready in `cgroup`: its own connections are to be left alone where it is within the workload. Tells
    /// whether it is.
    pub(crate) fn exempt(
        &self,
        number: u32,
        companion: &CompanionName,
        cgroup: &Cgroup,
    ) -> Result<bool, RedirectError> {
        let mut nesting = self.nesting();
        let Some(known) = nesting.known.get_mut(&number) else { return Ok(false) };
        let exempt = if is_below(&cgroup.path, &known.cgroup.path) {
            let levels = levels(&cgroup.path)?;
            Some(Exempt { cgroup: cgroup.id, levels, number: ExemptKey::COMPANION })
        } else {
            None
        };
        let before = match exempt {
            Some(exempt) => known.companions.insert(companion.clone(), exempt),
            None => known.companions.remove(companion),
        };
        if before != exempt {
            self.apply(&mut nesting, number)?;
        }
        Ok(exempt.is_some())
    }

    /// A companion has left the plan: if it is within the workload, its connections are the workload's again.
    pub(crate) fn include(&self, number: u32, companion: &CompanionName) -> Result<(), RedirectError> {
        let mut nesting = self.nesting();
        let known = nesting.known.get_mut(&number);
        match known.and_then(|known| known.companions.remove(companion)) {
            Some(_) => self.apply(&mut nesting, number),
            None => Ok(()),
        }
    }

    /// The cgroups below a workload's that its programs leave alone.
    pub fn exempt_within(&self, cgroup: CgroupId) -> Vec<CgroupId> {
        let nesting = self.nesting();
        let known = nesting.known.iter().find(|(_, known)| known.cgroup.id == cgroup);
        known.map(|(number, _)| nesting.wanted(*number).into_keys().collect()).unwrap_or_default()
    }

    fn set_active(&self, number: u32, active: bool) -> Result<(), RedirectError> {
        let mut nesting = self.nesting();
        let Some(known) = nesting.known.get_mut(&number) else { return Ok(()) };
        known.active = active;
        let around = nesting.around(number);
        let mut outcome = Ok(());
        for outer in around {
            outcome = outcome.and(self.apply(&mut nesting, outer));
        }
        outcome
    }

    /// Brings map and configuration of one workload to what is wanted: new entries before the configuration that looks
    /// for them, old ones after it.
    fn apply(&self, nesting: &mut Nesting, number: u32) -> Result<(), RedirectError> {
        let wanted = nesting.wanted(number);
        let Some(known) = nesting.known.get_mut(&number) else { return Ok(()) };
        let maps = &mut *self.maps();
        for (cgroup, exempt) in &wanted {
            if known.written.get(cgroup).is_none_or(|written| written.number != exempt.number) {
                maps.exempt_cgroup(number, *cgroup, exempt.number)?;
            }
        }
        if let Some(config) = known.config {
            let exempt_levels = wanted.values().fold(0, |levels, exempt| levels | exempt.levels);
            maps.configure_workload(known.cgroup.id, &WorkloadConfig { exempt_levels, ..config })?;
        }
        for cgroup in known.written.keys().filter(|cgroup| !wanted.contains_key(cgroup)) {
            maps.include_cgroup(number, *cgroup)?;
        }
        known.written = wanted;
        Ok(())
    }
}

fn is_below(inner: &Path, outer: &Path) -> bool {
    inner != outer && inner.starts_with(outer)
}

/// The level of a cgroup as a bit: how many directories there are between it and the root of the hierarchy. All of them where
/// a cgroup namespace hides the root.
fn levels(cgroup: &Path) -> Result<u32, RedirectError> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
    let Ok((own, _)) = device(cgroup) else { return Ok(u32::MAX) };
    let above = cgroup.ancestors().skip(1).map_while(|path| device(path).ok().filter(|(dev, _)| *dev == own));
    let (mut level, mut top) = (0_u32, None);
    for (_, inode) in above {
        (level, top) = (level + 1, Some(inode));
    }
    if top != Some(ROOT) {
        return Ok(u32::MAX);
    }
    if level >= EXEMPT_LEVELS {
        return Err(RedirectError::TooDeep { cgroup: cgroup.to_owned() });
    }
    Ok(1 << level)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(path: &str, id: u64, active: bool) -> Known {
        Known {
            cgroup: Cgroup { id: CgroupId(id), path: path.into() },
            levels: 1 << path.matches('/').count(),
            active,
            config: None,
            companions: BTreeMap::new(),
            awaited: BTreeMap::new(),
            written: BTreeMap::new(),
        }
    }

    #[test]
    fn whom_each_workload_leaves_alone() {
        let mut nesting = Nesting::default();
        for (number, path, active) in [
            (1, "/pod", true),
            (2, "/pod/container", true),
            (3, "/pod/container/inner", true),
            (4, "/pod/starting", false),
            (5, "/podium", true),
        ] {
            nesting.known.insert(number, known(path, u64::from(number) * 10, active));
        }
        for (number, wanted) in [(1, &[20, 30][..]), (2, &[30]), (3, &[]), (4, &[]), (5, &[]), (6, &[])] {
            let ids: Vec<u64> = nesting.wanted(number).keys().map(|id| id.0).collect();
            assert_eq!(ids, wanted, "{number}");
        }
        assert_eq!(nesting.around(3), [1, 2]);
        assert_eq!(nesting.around(1), [0; 0]);
        assert_eq!(nesting.wanted(1).values().fold(0, |all, exempt| all | exempt.levels), 0b1100);
    }

    #[test]
    fn what_an_earlier_agent_has_exempted_stays_until_it_is_taken_up_or_ends() {
        let mut nesting = Nesting::default();
        let mut outer = known("/pod", 10, true);
        outer.awaited.insert(CgroupId(20), 2);
        nesting.known.insert(1, outer);
        let wanted = |nesting: &Nesting| nesting.wanted(1).into_values().collect::<Vec<_>>();
        let awaited = Exempt { cgroup: CgroupId(20), levels: u32::MAX, number: 2 };
        assert_eq!(wanted(&nesting), [awaited]);
        // Taken up, and then in force.
        nesting.known.insert(2, known("/pod/container", 20, true));
        assert_eq!(wanted(&nesting), [Exempt { levels: 0b100, ..awaited }]);
    }

    #[test]
    fn a_level_is_counted_from_the_root_or_unknown() {
        assert_eq!(levels(Path::new("/no/such/cgroup")).expect("unknown"), u32::MAX);
        // Not the root of a cgroup hierarchy.
        assert_eq!(
            levels(Path::new("/proc/self")).expect("unknown"),
            if fs::metadata("/proc").expect("proc").ino() == ROOT { 0b10 } else { u32::MAX }
        );
    }
}
