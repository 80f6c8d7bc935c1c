//! The state of one attachment, and which transitions there are.
//!
//! Pure: owns no companion and no link, so that the table of transitions can be tested without a kernel. The driver
//! holds the resources and moves this along; a transition that is not in the table is a bug that shows at once.

use std::{collections::BTreeSet, fmt};

use pillion_workload::CompanionName;

/// Where an attachment is on its way.
///
/// ```text
/// Planned ─▶ Starting ─▶ Redirecting ─▶ Attached ─▶ Detaching ─▶ Detached
///               │             │                        ▲  │
///               │             └──────────▶ Failed      │  └────▶ Failed (something is left)
///               └──────────────────────────────────────┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing has been done.
    Planned,
    /// Companions are being started, in the order of the plan; or those of an earlier agent are being looked at.
    Starting,
    /// Every companion has had its first attempt; sockets are about to be redirected.
    Redirecting {
        /// Companions that are not ready.
        missing: BTreeSet<CompanionName>,
    },
    /// Redirection is in force. For a missing companion the failure mode acts in the kernel.
    Attached {
        /// Companions that are not ready. They are tried again in the background.
        missing: BTreeSet<CompanionName>,
    },
    /// Redirection is taken back, then companions are stopped.
    Detaching,
    /// Nothing is left.
    Detached,
    /// Given up. Everything was rolled back, except what the reason names.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What moves a [`State`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transition {
    /// Begin.
    Start,
    /// Every companion has had its first attempt.
    CompanionsTried {
        /// Those that are not ready.
        missing: BTreeSet<CompanionName>,
    },
    /// Redirection is in force.
    Redirected,
    /// Another set of companions is ready than before.
    CompanionsChanged {
        /// Those that are not ready now.
        missing: BTreeSet<CompanionName>,
    },
    /// Take everything back.
    Detach,
    /// Nothing is left.
    Detached,
    /// It cannot be done; what was done has been rolled back.
    Fail {
        /// Why.
        reason: String,
    },
}

/// A transition that a state does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an attachment that is {from} cannot take the transition {transition:?}")]
pub struct InvalidTransition {
    /// The state, which is lost: the attachment must be given up.
    pub from: State,
    /// The transition.
    pub transition: Transition,
}

impl State {
    /// Consumes the state and gives the next one.
    pub fn apply(self, transition: Transition) -> Result<Self, InvalidTransition> {
        match (self, transition) {
            (Self::Planned, Transition::Start) => Ok(Self::Starting),
            (Self::Starting, Transition::CompanionsTried { missing }) => Ok(Self::Redirecting { missing }),
            (Self::Redirecting { missing }, Transition::Redirected)
            | (Self::Attached { .. }, Transition::CompanionsChanged { missing }) => {
                Ok(Self::Attached { missing })
            }
            (
                Self::Planned | Self::Starting | Self::Redirecting { .. } | Self::Attached { .. },
                Transition::Detach,
            ) => Ok(Self::Detaching),
            (Self::Detaching, Transition::Detached) => Ok(Self::Detached),
            (
                Self::Planned | Self::Starting | Self::Redirecting { .. } | Self::Detaching,
                Transition::Fail { reason },
            ) => Ok(Self::Failed { reason }),
            (from, transition) => Err(InvalidTransition { from, transition }),
        }
    }

    /// Whether nothing happens any more.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Detached | Self::Failed { .. } => true,
            Self::Planned
            | Self::Starting
            | Self::Redirecting { .. }
            | Self::Attached { .. }
            | Self::Detaching => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Planned => "planned",
            Self::Starting => "starting",
            Self::Redirecting { .. } => "redirecting",
            Self::Attached { .. } => "attached",
            Self::Detaching => "detaching",
            Self::Detached => "detached",
            Self::Failed { .. } => "failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(names: &[&str]) -> BTreeSet<CompanionName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn failed() -> State {
        State::Failed { reason: "r".into() }
    }

    /// Every state against every transition: what is not named here must be refused.
    #[test]
    fn the_table_of_transitions() {
        let a = || missing(&["a"]);
        let none = || missing(&[]);
        let states = [
            State::Planned,
            State::Starting,
            State::Redirecting { missing: a() },
            State::Attached { missing: a() },
            State::Detaching,
            State::Detached,
            failed(),
        ];
        let fail = || Transition::Fail { reason: "r".into() };
        let transitions = [
            Transition::Start,
            Transition::CompanionsTried { missing: a() },
            Transition::Redirected,
            Transition::CompanionsChanged { missing: none() },
            Transition::Detach,
            Transition::Detached,
            fail(),
        ];
        let allowed = [
            ("planned", Transition::Start, State::Starting),
            ("planned", Transition::Detach, State::Detaching),
            ("planned", fail(), failed()),
            ("starting", Transition::CompanionsTried { missing: a() }, State::Redirecting { missing: a() }),
            ("starting", Transition::Detach, State::Detaching),
            ("starting", fail(), failed()),
            ("redirecting", Transition::Redirected, State::Attached { missing: a() }),
            ("redirecting", Transition::Detach, State::Detaching),
            ("redirecting", fail(), failed()),
            (
                "attached",
                Transition::CompanionsChanged { missing: none() },
                State::Attached { missing: none() },
            ),
            ("attached", Transition::Detach, State::Detaching),
            ("detaching", Transition::Detached, State::Detached),
            ("detaching", fail(), failed()),
        ];
        let mut accepted = 0;
        for state in &states {
            for transition in &transitions {
                let wanted = allowed
                    .iter()
                    .find(|(from, by, _)| *from == state.to_string() && by == transition)
                    .map(|(_, _, to)| to.clone());
                let got = state.clone().apply(transition.clone());
                accepted += usize::from(got.is_ok());
                assert_eq!(got.ok(), wanted, "{state} by {transition:?}");
            }
        }
        assert_eq!(accepted, allowed.len());
    }

    #[test]
    fn only_the_ends_are_final() {
        assert!(State::Detached.is_final() && failed().is_final());
        assert!(!State::Attached { missing: missing(&[]) }.is_final() && !State::Detaching.is_final());
    }

    #[test]
    fn a_refused_transition_names_both_sides() {
        let error = State::Detached.apply(Transition::Redirected).unwrap_err();
        assert_eq!(error.to_string(), "an attachment that is detached cannot take the transition Redirected");
    }
}
