//! The walk of one attachment: ports, companions in order, redirection; kept in force; taken back in reverse.
//!
//! Owns the companions and the redirection of one workload, in one task. Everything slow is a task of its own or has a
//! deadline, so that a wish is heard at any time. Never decides whether to attach: the owner wishes.

use std::{collections::BTreeSet, mem, os::fd::OwnedFd, sync::Arc, time::Duration};

use pillion_redirect::Sources;
use pillion_workload::{CompanionName, FailureMode, FirstInstruction, Plan, Workload};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    claims::Claims,
    companions::{Started, next_news, slots_of},
    machinery::{Fault, Machinery, Rules},
    namespace::Settled,
    ports::Resolved,
    record::{Ledger, Record, Witness},
    report::{Happening, Report, Wish},
    slot::{Slot, Stage},
    state::{State, Transition},
};

/// What asking whether the workload has begun may take: before redirection it delays the workload's protection.
const LOOK_LIMIT: Duration = Duration::from_millis(500);
/// A plan that could not be put in force is tried again after this.
const REPLAN_PAUSE: Duration = Duration::from_secs(30);

pub(crate) struct Driver<M: Machinery> {
    pub(crate) machinery: Arc<M>,
    pub(crate) ledger: Arc<dyn Ledger>,
    pub(crate) workload: Arc<Workload>,
    pub(crate) netns: Arc<OwnedFd>,
    pub(crate) witness: Arc<dyn Witness>,
    /// What was true when the workload was told of.
    pub(crate) told_first: FirstInstruction,
    pub(crate) serial: u64,
    pub(crate) reports: mpsc::Sender<Report>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) wish: watch::Receiver<Wish>,
    pub(crate) kept: Kept<M>,
}

/// What has been made so far.
pub(crate) struct Kept<M: Machinery> {
    pub(crate) state: State,
    pub(crate) resolved: Option<Resolved>,
    pub(crate) claims: Claims,
    pub(crate) sources: Sources,
    pub(crate) slots: Vec<Slot<M>>,
    pub(crate) starts: JoinSet<Started<M>>,
    pub(crate) guard: Option<M::Guard>,
    pub(crate) first_instruction: Option<FirstInstruction>,
    pub(crate) refused: Option<Refused>,
    /// Open connections are to be reset as soon as the rules act.
    pub(crate) reset_due: bool,
    /// Why they could not be.
    pub(crate) unreset: Option<String>,
    adopted: bool,
}

/// A plan that could not be put in force.
pub(crate) struct Refused {
    plan: Arc<Plan>,
    pub(crate) reason: String,
    retry_at: Instant,
}

impl Refused {
    /// Whether this plan need not be tried again yet.
    fn stands(&self, plan: &Plan) -> bool {
        *self.plan == *plan && Instant::now() < self.retry_at
    }
}

enum End {
    TakeBack,
    Leave,
}

impl<M: Machinery> Default for Kept<M> {
    fn default() -> Self {
        Self {
            state: State::Planned,
            resolved: None,
            claims: Claims::default(),
            sources: Sources::default(),
            slots: Vec::new(),
            starts: JoinSet::new(),
            guard: None,
            first_instruction: None,
            refused: None,
            reset_due: false,
            unreset: None,
            adopted: false,
        }
    }
}

impl<M: Machinery> Driver<M> {
    /// Runs until the attachment is taken back, given up or left.
    pub(crate) async fn run(mut self, earlier: Option<Record>) {
        let end = match self.begin(earlier).await {
            Ok(()) => self.serve().await,
            Err(fault) => Err(fault),
        };
        match end {
            Ok(End::Leave) => self.leave(),
            Ok(End::TakeBack) => self.take_back().await,
            Err(fault) => self.give_up(fault).await,
        }
    }

    async fn begin(&mut self, earlier: Option<Record>) -> Result<(), Fault> {
        self.step(Transition::Start)?;
        if let Some(record) = earlier
            && let Some(resolved) = record.resolved()
        {
            self.take_up(record, resolved).await;
        } else {
            let settled =
                self.machinery.settle(&self.workload, self.netns.clone(), self.plan.clone(), None).await?;
            self.kept.slots = slots_of(&self.plan, &settled.resolved);
            (self.kept.claims, self.kept.sources) = (settled.claims, settled.sources);
            self.kept.resolved = Some(settled.resolved);
            // Before anything that would outlive us: what cannot be recorded could never be taken back.
            let saved = self.ledger.save(self.record()).await;
            saved.map_err(|error| Fault(format!("cannot write the journal: {error}")))?;
            if !self.kept.slots.is_empty() {
                // The first companion starts while redirection comes into force.
                self.advance().await?;
            }
        }
        self.close_first().await?;
        self.report(Happening::Started).await;
        Ok(())
    }

    /// A companion may take seconds: until it is ready, nothing may pass where the plan is closed. Does nothing where
    /// redirection is in force already.
    async fn close_first(&mut self) -> Result<(), Fault> {
        if self.plan.on_failure == FailureMode::Closed && self.kept.guard.is_none() {
            self.put_in_force(Vec::new()).await?;
            self.save().await;
        }
        Ok(())
    }

    /// Takes over what an earlier agent made. Whatever of it is gone is made again.
    async fn take_up(&mut self, record: Record, resolved: Resolved) {
        self.kept.claims = self.machinery.claim_again(&self.workload, self.netns.clone(), &resolved).await;
        self.kept.slots = slots_of(&self.plan, &resolved);
        self.kept.resolved = Some(resolved);
        for earlier in record.companions {
            if let Some(index) = self.kept.slots.iter().position(|slot| slot.spec.name == earlier.name) {
                self.spawn_start(index, Some(earlier));
            }
        }
        let Some(guard) = record.guard else { return };
        self.kept.sources = guard.sources;
        match self.machinery.adopt_redirect(&guard, &self.netns) {
            Ok(guard) => {
                self.kept.guard = Some(guard);
                self.kept.first_instruction = record.first_instruction;
                self.kept.adopted = true;
                self.kept.reset_due = record.reset_due;
            }
            Err(fault) => {
                warn!(workload = %self.workload.id, error = %fault, "redirection could not be adopted, attaching anew");
            }
        }
    }

    async fn serve(&mut self) -> Result<End, Fault> {
        loop {
            self.advance().await?;
            self.reset_what_is_due().await;
            // Marked as seen: a wish that comes while this one is served wakes the loop again.
            let wish = self.wish.borrow_and_update().clone();
            match wish {
                Wish::Attached(plan) if plan == self.plan => self.kept.refused = None,
                Wish::Attached(plan) if self.kept.refused.as_ref().is_some_and(|it| it.stands(&plan)) => {}
                Wish::Attached(plan) => {
                    self.replan(plan).await?;
                    continue;
                }
                Wish::Detached => return Ok(End::TakeBack),
                Wish::Left => return Ok(End::Leave),
            }
            let retries = self.kept.slots.iter().filter_map(Slot::retry_at);
            let retry = retries.chain(self.kept.refused.as_ref().map(|refused| refused.retry_at)).min();
            let machinery = self.machinery.clone();
            let Kept { slots, starts, .. } = &mut self.kept;
            tokio::select! {
                biased;
                changed = self.wish.changed() => {
                    // The owner is gone without a word: what is in force stays, as after a kill.
                    if changed.is_err() { return Ok(End::Leave); }
                }
                Some(done) = starts.join_next_with_id() => self.started(done).await?,
                (index, news) = next_news(&*machinery, slots) => self.heard(index, news).await?,
                () = sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => self.retry(),
            }
        }
    }

    /// Takes the next step that is possible without waiting for anything.
    async fn advance(&mut self) -> Result<(), Fault> {
        match self.kept.state {
            State::Starting => {
                let busy = self.kept.slots.iter().any(|slot| matches!(slot.stage, Stage::Starting(_)));
                match self.kept.slots.iter().position(|slot| !slot.tried) {
                    Some(index) if !busy && matches!(self.kept.slots[index].stage, Stage::Idle) => {
                        self.spawn_start(index, None);
                        Ok(())
                    }
                    Some(_) => Ok(()),
                    None => self.redirect().await,
                }
            }
            State::Attached { .. } => {
                for index in 0..self.kept.slots.len() {
                    if matches!(self.kept.slots[index].stage, Stage::Idle) {
                        self.spawn_start(index, None);
                    }
                }
                Ok(())
            }
            State::Planned
            | State::Redirecting { .. }
            | State::Detaching
            | State::Detached
            | State::Failed { .. } => Ok(()),
        }
    }

    /// Every companion has had its attempt: redirect to those that are ready. For the others the failure mode acts.
    async fn redirect(&mut self) -> Result<(), Fault> {
        let missing = self.missing();
        self.step(Transition::CompanionsTried { missing })?;
        let happening = if self.kept.adopted && self.kept.guard.is_some() {
            Happening::Adopted
        } else {
            let proofs: Vec<M::Ready> =
                self.kept.slots.iter_mut().filter_map(|slot| slot.proof.take()).collect();
            match &mut self.kept.guard {
                Some(guard) => {
                    for proof in proofs {
                        self.machinery.companion_ready(guard, proof)?;
                    }
                }
                None => self.put_in_force(proofs).await?,
            }
            Happening::Attached
        };
        self.step(Transition::Redirected)?;
        self.save().await;
        self.report(happening).await;
        Ok(())
    }

    /// Redirects to those that are ready, and judges whether that was before the workload's first instruction.
    async fn put_in_force(&mut self, ready: Vec<M::Ready>) -> Result<(), Fault> {
        let before = match self.told_first {
            FirstInstruction::After => FirstInstruction::After,
            FirstInstruction::Before | FirstInstruction::Unknown => self.look().await,
        };
        let spec = self.kept.resolved.as_ref().map(|resolved| &resolved.redirect);
        let spec = spec.ok_or_else(|| Fault("its ports were never settled".to_owned()))?;
        let rules = Rules { spec, mode: self.plan.on_failure, sources: self.kept.sources };
        let guard = self.machinery.redirect(&self.workload, &self.netns, rules, ready)?;
        self.kept.guard = Some(guard);
        let after = match before {
            FirstInstruction::After => FirstInstruction::After,
            FirstInstruction::Before | FirstInstruction::Unknown => self.look().await,
        };
        let first = self.witness.judge(before, after);
        self.kept.first_instruction = Some(first);
        self.owe_reset_at_attach(first);
        Ok(())
    }

    async fn look(&self) -> FirstInstruction {
        timeout(LOOK_LIMIT, self.witness.look()).await.unwrap_or(FirstInstruction::Unknown)
    }

    /// Puts another plan in force. First the rules, so that nothing is sent to a companion that is leaving; then the
    /// companions that are gone or changed are stopped; new ones are started by [`Self::advance`].
    async fn replan(&mut self, plan: Arc<Plan>) -> Result<(), Fault> {
        let previous = self.kept.resolved.clone();
        let settled = self.machinery.settle(&self.workload, self.netns.clone(), plan.clone(), previous).await;
        let updated = settled.and_then(|settled| {
            self.update(&settled.resolved, settled.sources, plan.on_failure)?;
            Ok(settled)
        });
        let Settled { resolved, claims, sources } = match updated {
            Ok(settled) => settled,
            Err(Fault(reason)) => {
                self.keep_plan(plan, reason).await;
                return Ok(());
            }
        };
        self.kept.refused = None;
        let before = mem::replace(&mut self.plan, plan);
        self.kept.sources = sources;
        self.kept.resolved = Some(resolved.clone());
        self.owe_reset_at_replan(&before);
        self.close_first().await?;
        let mut old = mem::take(&mut self.kept.slots);
        let mut slots = slots_of(&self.plan, &resolved);
        for slot in &mut slots {
            let same = |other: &Slot<M>| other.spec == slot.spec && other.ports == slot.ports;
            if let Some(index) = old.iter().position(same) {
                *slot = old.remove(index);
            }
        }
        for slot in old.into_iter().rev() {
            self.disconnect(&slot.spec.name);
            self.stop(slot).await;
        }
        self.kept.slots = slots;
        self.kept.claims.join(claims);
        self.kept.claims.keep_only(&resolved);
        self.save().await;
        info!(workload = %self.workload.id, policy = %self.plan.policy, before = %before.policy, "plan changed");
        // A refused transition is impossible here: missing companions are recomputed in the same state.
        if self.refresh().is_ok() {
            self.report(Happening::Replanned).await;
        }
        Ok(())
    }

    fn update(&mut self, resolved: &Resolved, sources: Sources, mode: FailureMode) -> Result<(), Fault> {
        let Some(guard) = &mut self.kept.guard else { return Ok(()) };
        self.machinery.update(guard, &self.netns, Rules { spec: &resolved.redirect, mode, sources })
    }

    /// The plan could not be put in force: the one of before stays, and it is tried again after a while.
    async fn keep_plan(&mut self, plan: Arc<Plan>, reason: String) {
        warn!(workload = %self.workload.id, error = %reason, "the changed plan is not in force");
        if let Some(resolved) = self.kept.resolved.clone()
            && let Err(error) = self.update(&resolved, self.kept.sources, self.plan.on_failure)
        {
            warn!(workload = %self.workload.id, %error, "the rules of before could not be restored");
        }
        self.kept.refused =
            Some(Refused { plan, reason: reason.clone(), retry_at: Instant::now() + REPLAN_PAUSE });
        self.report(Happening::ReplanFailed { reason }).await;
    }

    fn missing(&self) -> BTreeSet<CompanionName> {
        self.kept.slots.iter().filter(|slot| !slot.is_ready).map(|slot| slot.spec.name.clone()).collect()
    }

    pub(crate) fn refresh(&mut self) -> Result<(), Fault> {
        if matches!(self.kept.state, State::Attached { .. }) {
            let missing = self.missing();
            self.step(Transition::CompanionsChanged { missing })?;
        }
        Ok(())
    }

    pub(crate) fn step(&mut self, transition: Transition) -> Result<(), Fault> {
        let before = mem::replace(&mut self.kept.state, State::Planned);
        let name = before.to_string();
        self.kept.state = before.apply(transition).map_err(|error| Fault::of(&error))?;
        let now = &self.kept.state;
        if now.to_string() != name {
            debug!(workload = %self.workload.id, policy = %self.plan.policy, state = %now, "attachment");
        }
        Ok(())
    }
}
