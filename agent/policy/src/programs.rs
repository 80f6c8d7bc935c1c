//! What the file names of selected programs have in common with the patterns for their paths: a quick first test.
//!
//! Pure. The whole path is compared later, by the policy itself.

use std::collections::BTreeSet;

use pillion_workload::Subject;

use crate::PolicySet;

/// What the last part of a program's path must be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProgramName {
    /// Just this.
    Whole(String),
    /// Anything that begins with this.
    Beginning(String),
}

impl ProgramName {
    /// A `*` in the last part of a pattern is taken not to reach beyond a `/`.
    pub(crate) fn of(pattern: &str) -> Self {
        let last = match pattern.rfind('/') {
            Some(at) => &pattern[at + 1..],
            // The `*` that it must have may stand for any path.
            None => return Self::Beginning(String::new()),
        };
        match last.find(['*', '?']) {
            Some(at) => Self::Beginning(last[..at].to_owned()),
            None => Self::Whole(last.to_owned()),
        }
    }
}

impl PolicySet {
    /// Names of all programs that policies select as processes of the host. Empty: nothing needs to be held at its exec.
    pub fn program_names(&self) -> BTreeSet<ProgramName> {
        self.policies().iter().flat_map(|policy| policy.selector().program_names()).collect()
    }

    /// Whether a process of the host gets a policy that selects it by its program.
    pub fn wants_program(&self, subject: &Subject) -> bool {
        self.policy_for(subject).is_some_and(|policy| policy.selector().selects_programs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{one, policy};

    #[test]
    fn patterns_become_names() {
        let (whole, beginning) =
            (|name: &str| ProgramName::Whole(name.into()), |name: &str| ProgramName::Beginning(name.into()));
        for (pattern, name) in [
            ("/usr/bin/curl", whole("curl")),
            ("/usr/bin/pay*", beginning("pay")),
            ("/usr/*/curl", whole("curl")),
            ("*/curl", whole("curl")),
            ("*curl", beginning("")),
            ("/opt/p?y-*", beginning("p")),
            ("/opt/*", beginning("")),
        ] {
            assert_eq!(ProgramName::of(pattern), name, "{pattern}");
        }
    }

    #[test]
    fn only_policies_for_processes_by_program_count() {
        for (select, names) in [
            ("{ runtimes: [process], executables: [\"/usr/bin/curl\"] }", 1),
            ("{ executables: [\"/usr/bin/curl\", \"/opt/pay*\"] }", 2),
            ("{ runtimes: [process] }", 0),
            ("{ runtimes: [containerd], executables: [\"/usr/bin/curl\"] }", 0),
            ("{ names: [\"*\"] }", 0),
        ] {
            let set = one(&policy("p", &format!("select: {select}"))).expect("valid");
            assert_eq!(set.program_names().len(), names, "{select}");
        }
    }
}
