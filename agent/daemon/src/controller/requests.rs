//! What the admin API asks and orders.

use pillion_workload::WorkloadId;
use tokio::{sync::oneshot, time::Instant};

use super::{Controller, Override, OverrideRefused, OverrideReply, Request};
use crate::api::EventKind;

impl Controller {
    pub(super) fn request(&mut self, request: Request) {
        // An asker that has gone needs no answer.
        match request {
            Request::Ping(reply) => drop(reply.send(self.pulse())),
            Request::Status(reply) => drop(reply.send(self.status())),
            Request::Workloads(reply) => {
                drop(reply.send(self.summaries()));
            }
            Request::Workload(id, reply) => drop(reply.send(self.detail(&id))),
            Request::InForce(id, reply) => drop(reply.send(self.in_force(&id))),
            Request::Events(since, reply) => drop(reply.send(self.events.read(since))),
            Request::Override(id, what, reply) => self.override_by_hand(id, what, reply),
            Request::Explain(request, reply) => drop(reply.send(self.explain(request))),
        }
    }

    fn override_by_hand(&mut self, id: WorkloadId, what: Override, reply: oneshot::Sender<OverrideReply>) {
        let Some(entry) = self.workloads.get(&id).filter(|entry| entry.present) else {
            return drop(reply.send(Err(OverrideRefused::Unknown(id))));
        };
        if what == Override::Attach && entry.plan.is_none() && self.policies.is_some() {
            return drop(reply.send(Err(OverrideRefused::NotMatched(id))));
        }
        let mut held = self.held.clone();
        let changed = match what {
            Override::Attach => held.remove(&id),
            Override::Detach => held.insert(id.clone()),
        };
        // Some KiB, by hand, seldom: worth no task of its own.
        if changed && let Err(error) = self.journal.write_held(&held) {
            return drop(reply.send(Err(OverrideRefused::Journal(error.to_string()))));
        }
        self.held = held;
        if changed {
            let (kind, text) = match what {
                Override::Attach => (EventKind::Released, "no longer held detached"),
                Override::Detach => (EventKind::Held, "held detached until `pillion attach`"),
            };
            self.log(&id, kind, text);
        }
        let entry = self.workloads.get_mut(&id).expect("looked up above");
        entry.held = what == Override::Detach;
        entry.failure = None;
        entry.wanted_at = Instant::now();
        entry.waiters.retain(|waiter| !waiter.is_closed());
        entry.waiters.push(reply);
        self.reconcile(&id);
    }
}
