//! What a source knows of its workloads, and which events follow from a new observation.
//!
//! Owns the merging of snapshots, deltas and exits. Pure: never does IO, never looks at a clock.

use std::collections::BTreeMap;

use pillion_workload::{FirstInstruction, ProcessId, Subject, Workload, WorkloadId};

use crate::{RuntimeEvent, SourceName};

/// What was seen when looking at one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Observation {
    /// It is there.
    Present(Box<Workload>, FirstInstruction),
    /// It is there, and redirection cannot reach it: what policies select on, and why not.
    Unreachable(Box<Subject>, String),
    /// It is not there, for certain.
    Absent,
    /// It could not be seen. What was known stays.
    Unclear,
}

/// The workloads of one source.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    known: BTreeMap<WorkloadId, (Workload, FirstInstruction)>,
}

impl Inventory {
    /// Takes in a look at one workload.
    pub(crate) fn observe(&mut self, id: &WorkloadId, seen: Observation) -> Vec<RuntimeEvent> {
        match seen {
            Observation::Present(workload, first) => self.present(*workload, first),
            // It is nothing to attach to; who can tell of it otherwise does.
            Observation::Absent | Observation::Unreachable(..) => self.remove(id).into_iter().collect(),
            Observation::Unclear => Vec::new(),
        }
    }

    /// Takes in a look at everything: what is not mentioned is gone.
    pub(crate) fn reconcile(&mut self, mut seen: BTreeMap<WorkloadId, Observation>) -> Vec<RuntimeEvent> {
        for id in self.known.keys() {
            seen.entry(id.clone()).or_insert(Observation::Absent);
        }
        seen.into_iter().flat_map(|(id, seen)| self.observe(&id, seen)).collect()
    }

    /// The first process of a workload has ended. Harmless when the workload has another one by now.
    pub(crate) fn exited(&mut self, id: &WorkloadId, process: ProcessId) -> Option<RuntimeEvent> {
        (self.known.get(id)?.0.instance.process == process).then(|| self.remove(id)).flatten()
    }

    /// All that is known.
    pub(crate) fn snapshot(&self, source: SourceName) -> RuntimeEvent {
        RuntimeEvent::Snapshot { source, workloads: self.known.values().cloned().collect() }
    }

    /// The ids of all that is known.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &WorkloadId> {
        self.known.keys()
    }

    /// What is known of one.
    pub(crate) fn get(&self, id: &WorkloadId) -> Option<&Workload> {
        self.known.get(id).map(|(workload, _)| workload)
    }

    fn remove(&mut self, id: &WorkloadId) -> Option<RuntimeEvent> {
        self.known.remove(id).map(|_| RuntimeEvent::Stopped { id: id.clone() })
    }

    fn present(&mut self, workload: Workload, first: FirstInstruction) -> Vec<RuntimeEvent> {
        let id = workload.id.clone();
        match self.known.get_mut(&id) {
            Some((known, known_first)) if known.instance == workload.instance => {
                *known_first = later(*known_first, first);
                if known.subject == workload.subject {
                    return Vec::new();
                }
                *known = workload.clone();
                vec![RuntimeEvent::Changed { workload }]
            }
            recreated => {
                let stopped = recreated.is_some().then(|| RuntimeEvent::Stopped { id: id.clone() });
                self.known.insert(id, (workload.clone(), first));
                stopped.into_iter().chain([RuntimeEvent::Started { workload, first }]).collect()
            }
        }
    }
}

/// A workload that has begun cannot un-begin.
fn later(known: FirstInstruction, seen: FirstInstruction) -> FirstInstruction {
    match (known, seen) {
        (FirstInstruction::After, _) | (_, FirstInstruction::After) => FirstInstruction::After,
        (_, FirstInstruction::Before) => FirstInstruction::Before,
        (known, FirstInstruction::Unknown) => known,
    }
}

#[cfg(test)]
mod tests {
    use pillion_workload::{Cgroup, CgroupId, Instance, NetnsId, Pid, RuntimeKind, StartTime, Subject};
    use proptest::prelude::*;

    use super::*;

    type State = BTreeMap<WorkloadId, Workload>;

    fn id(number: u8) -> WorkloadId {
        format!("containerd/default/c{number}").parse().expect("valid")
    }

    fn workload(number: u8, generation: u8, label: u8) -> Workload {
        let process =
            ProcessId { pid: Pid(i32::from(generation) + 1), started: StartTime(u64::from(generation)) };
        let cgroup =
            Cgroup { id: CgroupId(u64::from(number)), path: format!("/sys/fs/cgroup/{number}").into() };
        let mut subject = Subject::new(RuntimeKind::Containerd, number.to_string());
        subject.labels.insert("generation".to_owned(), label.to_string());
        let instance = Instance { cgroup, netns: NetnsId { device: 4, inode: 5 }, process };
        Workload { id: id(number), subject, instance }
    }

    fn present(number: u8, generation: u8, label: u8) -> Observation {
        Observation::Present(Box::new(workload(number, generation, label)), FirstInstruction::After)
    }

    /// What someone who only hears the events believes. Fails when the events contradict themselves.
    fn follow(state: &mut State, events: Vec<RuntimeEvent>) {
        for event in events {
            match event {
                RuntimeEvent::Snapshot { workloads, .. } => {
                    *state = workloads.into_iter().map(|(w, _)| (w.id.clone(), w)).collect();
                }
                RuntimeEvent::Started { workload, .. } => {
                    assert!(state.insert(workload.id.clone(), workload).is_none(), "started twice");
                }
                RuntimeEvent::Changed { workload } => {
                    let old = state.insert(workload.id.clone(), workload.clone()).expect("known before");
                    assert_eq!(old.instance, workload.instance);
                    assert_ne!(old.subject, workload.subject);
                }
                RuntimeEvent::Stopped { id } => assert!(state.remove(&id).is_some(), "stopped twice"),
                RuntimeEvent::Up { .. } | RuntimeEvent::Down { .. } | RuntimeEvent::Unattachable { .. } => {
                    unreachable!("not the inventory's")
                }
            }
        }
    }

    #[test]
    fn tells_each_change_once() {
        let mut inventory = Inventory::default();
        let started =
            |g, l| RuntimeEvent::Started { workload: workload(1, g, l), first: FirstInstruction::After };
        let changed = |g, l| RuntimeEvent::Changed { workload: workload(1, g, l) };
        let stopped = || RuntimeEvent::Stopped { id: id(1) };
        for (seen, events) in [
            (Observation::Absent, vec![]),
            (Observation::Unclear, vec![]),
            (present(1, 0, 0), vec![started(0, 0)]),
            (present(1, 0, 0), vec![]),
            (Observation::Unclear, vec![]),
            (present(1, 0, 1), vec![changed(0, 1)]),
            (present(1, 1, 1), vec![stopped(), started(1, 1)]),
            (Observation::Absent, vec![stopped()]),
            (Observation::Absent, vec![]),
        ] {
            assert_eq!(inventory.observe(&id(1), seen), events);
        }
    }

    #[test]
    fn an_exit_counts_only_for_its_own_process() {
        let mut inventory = Inventory::default();
        inventory.observe(&id(1), present(1, 7, 0));
        let old = workload(1, 6, 0).instance.process;
        let current = workload(1, 7, 0).instance.process;
        assert_eq!(inventory.exited(&id(1), old), None);
        assert_eq!(inventory.exited(&id(2), current), None);
        assert_eq!(inventory.exited(&id(1), current), Some(RuntimeEvent::Stopped { id: id(1) }));
        assert_eq!(inventory.exited(&id(1), current), None);
    }

    #[test]
    fn what_has_begun_stays_so() {
        use FirstInstruction::{After, Before, Unknown};
        for (seen, told) in [
            (vec![Before], Before),
            (vec![Before, After], After),
            (vec![After, Before], After),
            (vec![After, Unknown], After),
            (vec![Unknown, Before], Before),
            (vec![Before, Unknown], Before),
        ] {
            let mut inventory = Inventory::default();
            for first in &seen {
                inventory.observe(&id(1), Observation::Present(Box::new(workload(1, 0, 0)), *first));
            }
            let workloads = vec![(workload(1, 0, 0), told)];
            let source = SourceName::CONTAINERD;
            assert_eq!(inventory.snapshot(source), RuntimeEvent::Snapshot { source, workloads }, "{seen:?}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Look(u8, Observation),
        All(BTreeMap<u8, Observation>),
        Exit(u8, u8),
        TellAll,
    }

    fn observation() -> impl Strategy<Value = (u8, Observation)> {
        (0..4_u8, 0..3_u8, 0..3_u8, 0..5_u8).prop_map(|(number, generation, label, kind)| {
            let seen = match kind {
                0 => Observation::Absent,
                1 => Observation::Unclear,
                _ => present(number, generation, label),
            };
            (number, seen)
        })
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let all = proptest::collection::vec(observation(), 0..5);
        let step = prop_oneof![
            6 => observation().prop_map(|(number, seen)| Step::Look(number, seen)),
            2 => all.prop_map(|seen| Step::All(seen.into_iter().collect())),
            2 => (0..4_u8, 0..3_u8).prop_map(|(number, generation)| Step::Exit(number, generation)),
            1 => Just(Step::TellAll),
        ];
        proptest::collection::vec(step, 0..40)
    }

    fn take(truth: &mut State, number: u8, seen: &Observation) {
        match seen {
            Observation::Present(workload, _) => {
                truth.insert(id(number), (**workload).clone());
            }
            Observation::Absent | Observation::Unreachable(..) => {
                truth.remove(&id(number));
            }
            Observation::Unclear => {}
        }
    }

    proptest! {
            /// For any interleaving: who follows the events knows the last snapshot plus all that was seen since.
            #[test]
            fn events_tell_the_whole_truth(steps in steps()) {
                let (mut inventory, mut truth, mut told) = (Inventory::default(), State::new(), State::new());
                for step in steps {
                    match step {
                        Step::Look(number, seen) => {
                            take(&mut truth, number, &seen);
                            follow(&mut told, inventory.observe(&id(number), seen));
                        }
                        Step::All(all) => {
                            truth.retain(|known, _| all.keys().any(|number| id(*number) == *known));
                            for (number, seen) in &all {
     take(&mut truth, *number, seen);
    }
                            let all = all.into_iter().map(|(number, seen)| (id(number), seen)).collect();
                            follow(&mut told, inventory.reconcile(all));
                        }
                        Step::Exit(number, generation) => {
                            let process = workload(number, generation, 0).instance.process;
                            if truth.get(&id(number)).is_some_and(|w| w.instance.process == process) {
                                truth.remove(&id(number));
                            }
                            follow(&mut told, inventory.exited(&id(number), process).into_iter().collect());
                        }
                        Step::TellAll => {
                            let before = told.clone();
                            follow(&mut told, vec![inventory.snapshot(SourceName::CONTAINERD)]);
                            prop_assert_eq!(&before, &told);
                        }
                    }
                    prop_assert_eq!(&truth, &told);
                    prop_assert!(inventory.ids().eq(truth.keys()));
                }
            }
        }
}
