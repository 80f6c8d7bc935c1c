//! Policies compared with each other: names that repeat, and claims that no priority decides.
//!
//! Owns the faults that need more than one document. Never changes a policy.

use std::collections::HashMap;

use pillion_workload::PolicyName;

use crate::{
    document::Draft,
    fault::{Faults, quoted},
    reader::At,
    source::{Source, fault_at, note_at},
};

/// Steps that comparing may take, about a second. Policies with different priorities are not compared at all.
const MAX_STEPS: u64 = 200_000_000;

/// Something of one of the files.
pub(crate) struct InFile<T> {
    /// Index of the file.
    pub(crate) file: usize,
    pub(crate) value: T,
}

/// Reports names that are given to more than one policy.
pub(crate) fn names(names: &[InFile<At<PolicyName>>], sources: &[Source<'_>], faults: &mut Faults) {
    let mut seen: HashMap<&PolicyName, &InFile<At<PolicyName>>> = HashMap::new();
    for name in names {
        let Some(first) = seen.get(&name.value.value) else {
            seen.insert(&name.value.value, name);
            continue;
        };
        let message = format!("two policies are named {}", quoted(name.value.value.as_str()));
        let cure = "give each a metadata.name of its own".to_owned();
        let mut fault = fault_at(&sources[name.file], &name.value.at, message, cure);
        fault.note = Some(note_at(&sources[first.file], &first.value.at, "first named here"));
        faults.push(fault);
    }
}

/// Reports policies that can claim the same workload with the same priority, each with the first one that it
/// conflicts with. Two policies pass only when no workload at all can match both.
pub(crate) fn claims(drafts: &[InFile<Draft>], sources: &[Source<'_>], faults: &mut Faults) {
    let mut by_priority: HashMap<i32, Vec<&InFile<Draft>>> = HashMap::new();
    let mut steps = 0;
    for draft in drafts {
        let equals = by_priority.entry(draft.value.priority.value).or_default();
        let conflict =
            equals.iter().find(|other| draft.value.selector.meets(&other.value.selector, &mut steps));
        let (name, priority) = (quoted(draft.value.name.value.as_str()), draft.value.priority.value);
        let source = &sources[draft.file];
        let at = &draft.value.priority.at;
        if let Some(other) = conflict {
            let theirs = quoted(other.value.name.value.as_str());
            let message = format!(
                "{name} and {theirs} can select the same workload, and both have priority {priority}"
            );
            let cure = "give the one that shall win a higher spec.priority, or narrow spec.select until no \
                        workload fits both"
                .to_owned();
            let mut fault = fault_at(source, at, message, cure);
            let note = format!("{theirs} is here");
            fault.note = Some(note_at(&sources[other.file], &other.value.priority.at, &note));
            faults.push(fault);
        }
        if steps > MAX_STEPS {
            let message =
                format!("too many policies with priority {priority} to tell whether they exclude each other");
            let cure = "give them different priorities, or fewer and shorter patterns".to_owned();
            faults.push(fault_at(source, at, message, cure));
            return;
        }
        equals.push(draft);
    }
}
