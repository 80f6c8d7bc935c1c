//! Traces: what the programs tell of their decisions about one workload, for as long as somebody listens.
//!
//! Owns the ring buffer, who listens, and the bit that makes the programs tell; turning it on or off is a write to the
//! configuration, never a load or a link. A trace ends with its [`TraceSession`]. The kernel side tells nothing more once
//! the session is not read for a lease of some seconds, so that a killed agent costs nothing, and the next one turns it off at its start.

use std::{
    collections::{BTreeMap, VecDeque},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, MapData, RingBuf};
use nix::time::{ClockId, clock_gettime};
use pillion_common::{
    WorkloadConfig, flags,
    trace::{TraceEvent, TraceState, Traced},
};
use pillion_workload::{CgroupId, RedirectSpec};

use crate::{
    Dataplane, RedirectError,
    dataplane::{Maps, absent_is_fine},
    decision::{Decision, event_of},
};

/// A session that is not read for so long is told nothing more.
const LEASE: Duration = Duration::from_secs(5);
/// How often [`TraceSession::read`] is to be called: in that time no burst fills the ring buffer.
pub const TRACE_PERIOD: Duration = Duration::from_millis(50);
/// The lease is prolonged when so much of it is over.
const PROLONG: Duration = Duration::from_secs(1);
/// How many decisions a session may leave unread.
const QUEUE: usize = 4096;
/// How many may be told in a row, however high the rate.
const LONGEST_BURST: u64 = 1000;

/// How much is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceSettings {
    /// At most so many decisions a second.
    pub rate: NonZeroU32,
    /// Of so many decisions one.
    pub sample: NonZeroU32,
}

/// What is in force for a cgroup, as far as traces need it.
#[derive(Debug)]
struct InForce {
    workload: u32,
    /// What its programs have been told last; `None` while it has no links on its cgroup.
    config: Option<WorkloadConfig>,
    /// By the table's lowest bit: what is told may have been decided before an update.
    specs: [Option<Arc<RedirectSpec>>; 2],
    session: Option<u32>,
}

/// The maps and who listens.
pub(crate) struct Tracing {
    ring: RingBuf<MapData>,
    traced: HashMap<MapData, u32, Traced>,
    state: HashMap<MapData, u32, TraceState>,
    in_force: BTreeMap<CgroupId, InForce>,
    queues: BTreeMap<u32, Queue>,
    next_session: u32,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<TraceEvent>,
    /// How many did not fit.
    lost: u64,
}

/// What [`TraceSession::read`] found.
#[derive(Debug, Default)]
pub struct TraceBatch {
    /// In the order of the ring buffer.
    pub decisions: Vec<Decision>,
    /// How many decisions more there were since the last read: left out by sample, rate or want of room.
    pub left_out: u64,
    /// Redirection of the workload has ended, and so has the trace.
    pub ended: bool,
}

/// A workload that is traced. Dropping it ends that.
pub struct TraceSession {
    dataplane: Arc<Dataplane>,
    cgroup: CgroupId,
    workload: u32,
    session: u32,
    settings: TraceSettings,
    prolonged: Instant,
    /// Left out in all, as of the last read and as told: a decision is counted as seen before it is told.
    left_out: u64,
    reported: u64,
}

impl std::fmt::Debug for TraceSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TraceSession").field("workload", &self.workload).finish_non_exhaustive()
    }
}

impl Dataplane {
    /// Makes the programs tell of their decisions about what is attached to this cgroup.
    ///
    /// # Errors
    /// [`RedirectError::NotInForce`] where nothing is, [`RedirectError::Traced`] where somebody listens already,
    /// [`RedirectError::Untraceable`] on a kernel before Linux 5.12.
    pub fn trace(
        self: &Arc<Self>,
        cgroup: CgroupId,
        settings: TraceSettings,
    ) -> Result<TraceSession, RedirectError> {
        if !self.tells_decisions {
            return Err(RedirectError::Untraceable);
        }
        let mut maps = self.maps();
        let (workload, session) = maps.begin_trace(cgroup, settings)?;
        drop(maps);
        Ok(TraceSession {
            dataplane: Arc::clone(self),
            cgroup,
            workload,
            session,
            settings,
            prolonged: Instant::now(),
            left_out: 0,
            reported: 0,
        })
    }
}

impl TraceSession {
    /// What has been told since the last read.
    pub fn read(&mut self) -> Result<TraceBatch, RedirectError> {
        let dataplane = Arc::clone(&self.dataplane);
        let mut maps = dataplane.maps();
        let tracing = &mut maps.tracing;
        let Some(queue) = tracing.queues.get(&self.session) else {
            return Ok(TraceBatch { ended: true, ..TraceBatch::default() });
        };
        let lost = queue.lost;
        if self.prolonged.elapsed() > PROLONG {
            tracing.grant(self.workload, self.session, self.settings)?;
            self.prolonged = Instant::now();
        }
        let state = tracing.state.get(&self.workload, 0).map_err(RedirectError::map("PL_TRACE_STATE"))?;
        let total = state.seen.saturating_sub(state.told) + lost;
        // What is being told this instant looks left out: only what still does the next time was.
        let settled = total.min(self.left_out).max(self.reported);
        self.left_out = total;
        tracing.drain();
        let left_out = settled - self.reported;
        self.reported = settled;
        let events = tracing.queues.get_mut(&self.session).map(|queue| std::mem::take(&mut queue.events));
        let specs = tracing.in_force.get(&self.cgroup).map(|it| &it.specs);
        let spec = |event: &TraceEvent| {
            let table = usize::try_from(event.table & 1).unwrap_or(0);
            specs.and_then(|specs| specs[table].clone().or_else(|| specs[table ^ 1].clone()))
        };
        let decisions =
            events.into_iter().flatten().filter_map(|event| Decision::new(&event, spec(&event))).collect();
        Ok(TraceBatch { decisions, left_out, ended: false })
    }
}

impl Drop for TraceSession {
    fn drop(&mut self) {
        self.dataplane.maps().end_trace(self.cgroup, self.session);
    }
}

impl Tracing {
    /// Forgets what an earlier agent has left on.
    pub(crate) fn new(
        ring: RingBuf<MapData>,
        traced: HashMap<MapData, u32, Traced>,
        state: HashMap<MapData, u32, TraceState>,
    ) -> Result<Self, RedirectError> {
        // Sessions of earlier agents, whose events may still be in the ring buffer, have had lower numbers since boot.
        let next_session = u32::try_from(now_ns() >> 20 & u64::from(u32::MAX)).unwrap_or(0);
        let mut tracing =
            Self { ring, traced, state, in_force: BTreeMap::new(), queues: BTreeMap::new(), next_session };
        let left: Vec<u32> = tracing.traced.keys().chain(tracing.state.keys()).flatten().collect();
        for workload in left {
            tracing.revoke(workload)?;
        }
        Ok(tracing)
    }

    fn grant(&mut self, workload: u32, session: u32, settings: TraceSettings) -> Result<(), RedirectError> {
        let rate = u64::from(settings.rate.get());
        let interval_ns = 1_000_000_000 / rate;
        let lease = u64::try_from(LEASE.as_nanos()).unwrap_or(u64::MAX);
        let traced = Traced {
            until_ns: now_ns().saturating_add(lease),
            interval_ns,
            burst_ns: interval_ns * rate.clamp(1, LONGEST_BURST),
            session,
            sample: settings.sample.get(),
        };
        self.traced.insert(workload, traced, 0).map_err(RedirectError::map("PL_TRACED"))
    }

    fn revoke(&mut self, workload: u32) -> Result<(), RedirectError> {
        absent_is_fine(self.traced.remove(&workload), "PL_TRACED")?;
        absent_is_fine(self.state.remove(&workload), "PL_TRACE_STATE")
    }

    /// Gives what is in the ring buffer to those who have asked.
    fn drain(&mut self) {
        while let Some(item) = self.ring.next() {
            let Some(event) = event_of(&item) else { continue };
            let Some(queue) = self.queues.get_mut(&event.session) else { continue };
            if queue.events.len() < QUEUE {
                queue.events.push_back(event);
            } else {
                queue.lost += 1;
            }
        }
    }

    /// The configuration as it is to be written for this cgroup.
    pub(crate) fn mark(&mut self, cgroup: CgroupId, config: &WorkloadConfig) -> WorkloadConfig {
        let mut marked = *config;
        if let Some(in_force) = self.in_force.get_mut(&cgroup) {
            in_force.config = (config.flags != 0).then_some(*config);
            if config.flags != 0 && in_force.session.is_some() {
                marked.flags |= flags::TRACED;
            }
        }
        marked
    }

    /// The flag for the ports of this workload.
    pub(crate) fn flag_of(&self, workload: u32) -> u32 {
        let mut of_it = self.in_force.values().filter(|it| it.workload == workload);
        if of_it.any(|it| it.session.is_some()) { flags::TRACED } else { 0 }
    }
}

impl Maps {
    /// Notes what is in force: rules of the table with this number.
    pub(crate) fn note_in_force(&mut self, cgroup: CgroupId, table: u32, spec: &RedirectSpec) {
        let workload = table / 2;
        let entry = self.tracing.in_force.entry(cgroup).or_insert_with(|| InForce {
            workload,
            config: None,
            specs: [None, None],
            session: None,
        });
        entry.specs[usize::try_from(table & 1).unwrap_or(0)] = Some(Arc::new(spec.clone()));
    }

    /// Nothing of this workload is in force any more.
    pub(crate) fn note_out_of_force(&mut self, cgroup: CgroupId, workload: u32) {
        let tracing = &mut self.tracing;
        if tracing.in_force.get(&cgroup).is_none_or(|it| it.workload != workload) {
            return;
        }
        if let Some(session) = tracing.in_force.remove(&cgroup).and_then(|it| it.session) {
            tracing.queues.remove(&session);
            if let Err(error) = tracing.revoke(workload) {
                tracing::warn!(error = &error as &dyn std::error::Error, "a trace's entry is left");
            }
        }
    }

    fn begin_trace(
        &mut self,
        cgroup: CgroupId,
        settings: TraceSettings,
    ) -> Result<(u32, u32), RedirectError> {
        let tracing = &mut self.tracing;
        let in_force = tracing.in_force.get_mut(&cgroup).ok_or(RedirectError::NotInForce)?;
        if in_force.session.is_some() {
            return Err(RedirectError::Traced);
        }
        let workload = in_force.workload;
        let session = tracing.next_session;
        tracing.next_session = session.wrapping_add(1);
        in_force.session = Some(session);
        tracing.drain();
        tracing.queues.insert(session, Queue::default());
        let state = tracing.state.insert(workload, TraceState::default(), 0);
        let on = state
            .map_err(RedirectError::map("PL_TRACE_STATE"))
            .and_then(|()| tracing.grant(workload, session, settings))
            .and_then(|()| self.write_flag(cgroup));
        if let Err(error) = on {
            self.end_trace(cgroup, session);
            return Err(error);
        }
        Ok((workload, session))
    }

    fn end_trace(&mut self, cgroup: CgroupId, session: u32) {
        self.tracing.queues.remove(&session);
        let Some(in_force) = self.tracing.in_force.get_mut(&cgroup) else { return };
        if in_force.session != Some(session) {
            return;
        }
        in_force.session = None;
        let workload = in_force.workload;
        // Without the entry nothing is told, whatever becomes of the flag.
        if let Err(error) = self.tracing.revoke(workload).and(self.write_flag(cgroup)) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a trace's bit is left in the configuration"
            );
        }
    }

    /// Writes configuration and ports of what is in force again, with the flag or without.
    fn write_flag(&mut self, cgroup: CgroupId) -> Result<(), RedirectError> {
        let Some(in_force) = self.tracing.in_force.get(&cgroup) else { return Ok(()) };
        let (workload, config) = (in_force.workload, in_force.config);
        if let Some(config) = config {
            self.configure_workload(cgroup, &config)?;
        }
        let ports: Vec<_> =
            self.inbound.iter().flatten().filter(|(key, _)| key.workload == workload).collect();
        for (key, mut rule) in ports {
            rule.flags &= !flags::TRACED;
            self.steer_port(key, rule)?;
        }
        Ok(())
    }
}

/// `CLOCK_MONOTONIC`, which programs read.
pub(crate) fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX))
}
