//! What attachments report: into the state, the log and the metrics.

use pillion_attachment::{Happening, Report, State, View};
use pillion_workload::{PolicyName, WorkloadId};

use super::{
    Controller,
    entry::{Failure, is_awaited},
};
use crate::{api::EventKind, event_log};

impl Controller {
    pub(super) fn attachment(&mut self, report: Report) {
        let Report { workload: id, serial, happening, view } = report;
        let Some(entry) = self.workloads.get_mut(&id) else { return };
        let Some(attachment) = entry.attachment.as_mut().filter(|attachment| attachment.serial == serial)
        else {
            return;
        };
        let state = view.state.clone();
        let policy = view.plan.policy.clone();
        let was_degraded = attachment.view.as_ref().is_some_and(is_degraded);
        let now_degraded = is_degraded(&view);
        let ending = attachment.told.is_none();
        attachment.view = Some(view);
        if state.is_final() {
            entry.attachment = None;
        }
        if happening == Happening::Attached {
            let took = entry.wanted_at.elapsed();
            entry.attach_millis = Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
            entry.failure = None;
            self.metrics.attach_seconds.observe(took.as_secs_f64());
            // In place of the one that was taken.
            self.prepare();
        }
        self.tell(&id, &happening, &state, &policy, ending);
        if now_degraded && !was_degraded {
            let reason = self.workloads.get(&id).and_then(|entry| entry.verdict().1).unwrap_or_default();
            self.log(&id, EventKind::Degraded, reason);
        } else if was_degraded && matches!(state, State::Attached { .. }) && !now_degraded {
            self.log(&id, EventKind::Recovered, "all companions are ready");
        }
        self.reconcile(&id);
    }

    /// Puts what happened into the log and the metrics.
    fn tell(
        &mut self,
        id: &WorkloadId,
        happening: &Happening,
        state: &State,
        policy: &PolicyName,
        ending: bool,
    ) {
        let entry = |kind, message: String| event_log::Entry::new(kind, message).workload(id).policy(policy);
        let entry = match happening {
            Happening::Started => entry(EventKind::Attaching, format!("attaching as policy {policy} says")),
            Happening::CompanionReady { companion, restarted } => {
                self.metrics.companion_restarts.inc_by(u64::from(*restarted));
                let again = if *restarted { " again" } else { "" };
                entry(EventKind::CompanionReady, format!("the companion is ready{again}"))
                    .companion(companion)
            }
            Happening::CompanionExited { companion, how } => {
                self.metrics.companion_exits.inc();
                entry(EventKind::CompanionExited, format!("the companion has ended: {how}"))
                    .companion(companion)
            }
            Happening::CompanionFailed { companion, reason } => {
                self.metrics.companion_failures.inc();
                entry(EventKind::CompanionExited, format!("the companion is not ready: {reason}"))
                    .companion(companion)
            }
            Happening::Attached | Happening::Adopted => {
                let known = self.workloads.get(id);
                let first = known.and_then(|entry| entry.view()).and_then(|view| view.first_instruction);
                let (kind, text, millis) = if *happening == Happening::Attached {
                    (
                        EventKind::Attached,
                        "redirection is in force",
                        known.and_then(|entry| entry.attach_millis),
                    )
                } else {
                    (EventKind::Adopted, "taken over from an earlier agent", None)
                };
                entry(kind, text.into()).attached(first, millis)
            }
            Happening::Replanned => entry(EventKind::PlanChanged, format!("policy {policy} is now in force")),
            Happening::ReplanFailed { reason } => entry(
                EventKind::PlanChanged,
                format!("the changed policy could not be put in force: {reason}"),
            ),
            Happening::ConnectionsReset { count } => {
                let noun = if *count == 1 { "connection" } else { "connections" };
                entry(EventKind::ConnectionsReset, format!("{count} open {noun} reset, to be made anew"))
            }
            Happening::ConnectionsKept { reason } => entry(
                EventKind::ConnectionsKept,
                format!("open connections could not be reset, and go on as they are: {reason}"),
            ),
            Happening::Detaching => entry(EventKind::Detaching, "detaching".into()),
            Happening::Detached => entry(EventKind::Detached, "nothing of Pillion is left at it".into()),
            Happening::Failed => {
                let State::Failed { reason } = state else { return };
                if !ending {
                    return self.failed(id, reason.clone());
                }
                self.problem("workload", format!("{id} {reason}"));
                entry(EventKind::DetachFailed, reason.clone())
            }
            Happening::Unrecorded { reason } => {
                self.problem("journal", format!("the attachment of {id} could not be recorded: {reason}"));
                entry(EventKind::JournalFault, format!("could not be recorded: {reason}"))
            }
        };
        self.events.add(entry);
    }

    pub(super) fn discarded(&mut self, id: &WorkloadId, left: &[String]) {
        self.discarding.remove(id);
        if left.is_empty() {
            self.log(id, EventKind::Detached, "the workload had ended; nothing of Pillion is left at it");
        } else {
            let left = left.join("; ");
            self.problem("workload", format!("{id} has ended, but this is left of it: {left}"));
            self.log(id, EventKind::DetachFailed, format!("could not be taken back completely: {left}"));
        }
        self.reconcile(id);
    }

    pub(super) fn failed(&mut self, id: &WorkloadId, reason: String) {
        self.metrics.attach_failures.inc();
        self.log(id, EventKind::AttachFailed, format!("attach failed: {reason}"));
        if let Some(entry) = self.workloads.get_mut(id) {
            entry.failure = Some(Failure::after(entry.failure.as_ref(), reason));
        }
    }
}

fn is_degraded(view: &View) -> bool {
    matches!(&view.state, State::Attached { missing } if !missing.is_empty()) && !is_awaited(view)
}
