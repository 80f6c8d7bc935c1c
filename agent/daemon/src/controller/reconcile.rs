//! What to do next for one workload, from what is wanted and what is there.
//!
//! Pure, so that every case is in one table. Asking twice gives the same answer; doing it twice does no harm.

use std::sync::Arc;

use pillion_workload::{Instance, Plan};

/// What is wanted for a workload.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Want<'a> {
    /// No policy selects it, it is held detached, or it has ended.
    Nothing,
    /// This plan, for this instance.
    Plan(&'a Arc<Plan>, &'a Instance),
    /// Not known: no policies were ever loaded. What is in force stays, nothing begins.
    Unknown(&'a Instance),
}

/// What is there.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Have<'a> {
    /// Nothing, and nothing is in the way.
    Nothing,
    /// Nothing, but it is not time yet: the last attempt failed, or what an earlier agent left is being removed.
    Later,
    /// An attachment, for this instance.
    Attachment {
        /// Which instance it was made for.
        instance: &'a Instance,
        /// The plan it was last told; `None` when it was told to end.
        told: Option<&'a Arc<Plan>>,
    },
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Rest,
    /// Begin an attachment.
    Begin,
    /// Tell the attachment the new plan.
    Change,
    /// Tell the attachment to end. When it has, ask again.
    End,
}

pub(super) fn next_step(want: &Want<'_>, have: &Have<'_>) -> Step {
    match (want, have) {
        (Want::Nothing | Want::Unknown(_), Have::Nothing | Have::Later)
        | (Want::Plan(..), Have::Later)
        | (_, Have::Attachment { told: None, .. }) => Step::Rest,
        (Want::Plan(..), Have::Nothing) => Step::Begin,
        (Want::Nothing, Have::Attachment { .. }) => Step::End,
        (Want::Unknown(wanted), Have::Attachment { instance, .. }) => {
            if wanted == instance {
                Step::Rest
            } else {
                Step::End
            }
        }
        (Want::Plan(plan, wanted), Have::Attachment { instance, told: Some(told) }) => {
            if wanted != instance {
                Step::End
            } else if plan == told {
                Step::Rest
            } else {
                Step::Change
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use pillion_workload::{
        Cgroup, CgroupId, ExistingConnections, FailureMode, NetnsId, Pid, ProcessId, RedirectSpec, StartTime,
    };

    use super::*;

    fn instance(inode: u64) -> Instance {
        Instance {
            cgroup: Cgroup { id: CgroupId(inode), path: PathBuf::from("/x") },
            netns: NetnsId { device: 1, inode },
            process: ProcessId { pid: Pid(1), started: StartTime(1) },
        }
    }

    fn plan(policy: &str) -> Arc<Plan> {
        Arc::new(Plan {
            policy: policy.parse().unwrap(),
            companions: Vec::new(),
            redirect: RedirectSpec::default(),
            on_failure: FailureMode::Open,
            existing_connections: ExistingConnections::Keep,
        })
    }

    #[test]
    fn the_table_of_steps() {
        let (one, two) = (instance(1), instance(2));
        let (p, q) = (plan("p"), plan("q"));
        // Equal in content is equal: a reload that changes nothing must not touch an attachment.
        let p_again = plan("p");
        let attached = |instance, told| Have::Attachment { instance, told };
        for (want, have, step) in [
            (Want::Nothing, Have::Nothing, Step::Rest),
            (Want::Nothing, Have::Later, Step::Rest),
            (Want::Nothing, attached(&one, Some(&p)), Step::End),
            (Want::Nothing, attached(&one, None), Step::Rest),
            (Want::Plan(&p, &one), Have::Nothing, Step::Begin),
            (Want::Plan(&p, &one), Have::Later, Step::Rest),
            (Want::Plan(&p, &one), attached(&one, Some(&p_again)), Step::Rest),
            (Want::Plan(&p, &one), attached(&one, Some(&q)), Step::Change),
            (Want::Plan(&p, &one), attached(&two, Some(&p)), Step::End),
            (Want::Plan(&p, &one), attached(&one, None), Step::Rest),
            (Want::Unknown(&one), Have::Nothing, Step::Rest),
            (Want::Unknown(&one), Have::Later, Step::Rest),
            (Want::Unknown(&one), attached(&one, Some(&p)), Step::Rest),
            (Want::Unknown(&one), attached(&two, Some(&p)), Step::End),
            (Want::Unknown(&one), attached(&two, None), Step::Rest),
        ] {
            assert_eq!(next_step(&want, &have), step, "{want:?} with {have:?}");
        }
    }
}
