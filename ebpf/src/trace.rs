//! Telling the agent of decisions about a workload that is traced. Nobody else pays more than the test of a bit.
//!
//! Bounded in the kernel: so many events a second, one of so many decisions, until a time that a living agent moves on,
//! and no more than the ring buffer holds. What is left out is counted: every decision is seen, some are told.

use core::ptr::NonNull;

use aya_ebpf::{
    helpers::generated::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_ns,
    },
    maps::ring_buf::RingBufEntry,
};
use pillion_common::{
    AF_INET, AF_INET6, Destination, Redirected, Route, TCP, UDP, WorkloadConfig, flags,
    trace::{COMMAND_BYTES, TraceEvent, verdict, why},
};

use crate::{
    atomic,
    maps::{PL_TRACE, PL_TRACE_STATE, PL_TRACED},
    socket::{LOOPBACK4, ONE},
};

/// Whether anything is ever told: see `older/trace.rs`.
pub const TELLS: bool = true;

/// `BPF_RB_NO_WAKEUP`: the agent looks by itself, some times a second.
const NO_WAKEUP: u64 = 1;

/// What became of something, and what the program returns.
#[derive(Clone, Copy)]
pub struct Outcome {
    pub route: Route,
    pub verdict: u8,
    pub why: u8,
    pub errno: i32,
    pub result: i32,
}

impl Outcome {
    /// `result` lets it pass.
    #[inline(always)]
    pub fn redirected(route: Route, result: i32) -> Self {
        Self { route, verdict: verdict::REDIRECTED, why: why::NOTHING, errno: 0, result }
    }

    #[inline(always)]
    pub fn passed(why: u8, result: i32) -> Self {
        let route = Route { companion_port: 0, flags: 0, rule: TraceEvent::NO_RULE };
        Self { route, verdict: verdict::PASSED, why, errno: 0, result }
    }

    #[inline(always)]
    pub fn failed_open(route: Route, why: u8, result: i32) -> Self {
        Self { route, verdict: verdict::FAILED_OPEN, why, errno: 0, result }
    }

    #[inline(always)]
    pub fn refused(route: Route, why: u8, errno: i32, result: i32) -> Self {
        Self { route, verdict: verdict::REFUSED, why, errno, result }
    }

    #[inline(always)]
    fn packed(&self, program: u8) -> u64 {
        u64::from(program)
            | u64::from(self.verdict) << 8
            | u64::from(self.why) << 16
            | u64::from(self.errno as u16) << 32
    }
}

/// Tells of something that the workload sends, if it is traced.
#[inline(always)]
pub fn sent(program: u8, config: &WorkloadConfig, socket: &Redirected, outcome: &Outcome) {
    if config.flags & flags::TRACED != 0 {
        let Route { companion_port, rule, .. } = outcome.route;
        trace_sent(
            config,
            socket,
            u64::from(rule) << 32 | u64::from(companion_port),
            outcome.packed(program),
        );
    }
}

/// Tells of an arriving connection. The caller has looked whether it is to.
#[inline(always)]
pub fn arrived(program: u8, workload: u32, source: &Destination, original: &Destination, outcome: &Outcome) {
    let word = u64::from(workload) << 32 | u64::from(outcome.route.companion_port);
    trace_arrived(source, original, word, outcome.packed(program));
}

apart! {
    /// See [`sent`].
    fn trace_sent(config: *const WorkloadConfig, socket: *const Redirected, route: u64, outcome: u64) -> u32 {
        // SAFETY: the verifier sees to it that they are null or what they are said to be.
        let (Some(config), Some(socket)) = (unsafe { (config.as_ref(), socket.as_ref()) }) else { return 0 };
        let Some(entry) = begin(config.workload, config.table, (route >> 32) as u32, outcome) else { return 0 };
        let mut entry = entry;
        let event = entry.as_mut_ptr();
        // SAFETY: reserved memory of that type, written field by field; the helpers take nothing, or it and its length.
        unsafe {
            (*event).pid = (bpf_get_current_pid_tgid() >> 32) as u32;
            (*event).user = bpf_get_current_uid_gid() as u32;
            bpf_get_current_comm((&raw mut (*event).command).cast(), COMMAND_BYTES as u32);
            let v6 = socket.bound[1] | socket.bound[2] | socket.bound[3] != 0;
            copy(&raw mut (*event).source, &socket.bound, (socket.source_port as u16).to_be(), family(v6));
            let to = &socket.destination;
            copy(&raw mut (*event).original, &to.address, to.port_be, to.family);
            (*event).protocol = if socket.flags & Redirected::DATAGRAMS == 0 { TCP } else { UDP };
            if outcome >> 8 & 0xff != u64::from(verdict::REDIRECTED) {
                copy(&raw mut (*event).effective, &to.address, to.port_be, to.family);
            } else if socket.flags & Redirected::DIALLED6 == 0 {
                copy(&raw mut (*event).effective, &[LOOPBACK4, 0, 0, 0], (route as u16).to_be(), AF_INET);
            } else {
                copy(&raw mut (*event).effective, &[0, 0, 0, ONE], (route as u16).to_be(), AF_INET6);
            }
        }
        entry.submit(NO_WAKEUP);
        1
    }
}

apart! {
    /// See [`arrived`].
    fn trace_arrived(source: *const Destination, original: *const Destination, word: u64, outcome: u64) -> u32 {
        // SAFETY: the verifier sees to it that they are null or what they are said to be.
        let (Some(source), Some(to)) = (unsafe { (source.as_ref(), original.as_ref()) }) else { return 0 };
        let Some(entry) = begin((word >> 32) as u32, 0, TraceEvent::NO_RULE, outcome) else { return 0 };
        let mut entry = entry;
        let event = entry.as_mut_ptr();
        let redirected = outcome >> 8 & 0xff == u64::from(verdict::REDIRECTED);
        let port_be = if redirected { (word as u16).to_be() } else { to.port_be };
        // SAFETY: reserved memory of that type, written field by field.
        unsafe {
            (*event).pid = 0;
            (*event).user = 0;
            (*event).command = [0; COMMAND_BYTES];
            copy(&raw mut (*event).source, &source.address, source.port_be, source.family);
            copy(&raw mut (*event).original, &to.address, to.port_be, to.family);
            copy(&raw mut (*event).effective, &to.address, port_be, to.family);
            (*event).protocol = TCP;
        }
        entry.submit(NO_WAKEUP);
        1
    }
}

/// Room for an event, if one may be told, with the fields that all have.
#[inline(always)]
fn begin(workload: u32, table: u32, rule: u32, outcome: u64) -> Option<RingBufEntry<TraceEvent>> {
    // SAFETY: takes nothing, returns a number.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: copied at once, before any other operation on the map.
    let traced = unsafe { PL_TRACED.get(workload) }.copied()?;
    if now >= traced.until_ns {
        return None;
    }
    let state = PL_TRACE_STATE.get_ptr_mut(workload)?;
    // SAFETY: a map value that a lookup has returned, hence not null; all three are changed by atomic instructions only.
    let (used, seen, told) = unsafe {
        (
            NonNull::new_unchecked(&raw mut (*state).used_ns),
            NonNull::new_unchecked(&raw mut (*state).seen),
            NonNull::new_unchecked(&raw mut (*state).told),
        )
    };
    let before = atomic::fetch_add(seen, 1);
    if traced.sample > 1 && before % u64::from(traced.sample) != 0 {
        return None;
    }
    let used_up = atomic::load(used);
    let from = if used_up > now { used_up } else { now };
    let next = from + traced.interval_ns;
    // Who loses against another CPU is left out: no more than the rate is told, whatever happens.
    if next > now + traced.burst_ns || !atomic::compare_exchange(used, workload, used_up, next) {
        return None;
    }
    let mut entry = PL_TRACE.reserve(0)?;
    atomic::fetch_add(told, 1);
    let event = entry.as_mut_ptr();
    // SAFETY: reserved memory of that type, written field by field.
    unsafe {
        (*event).time_ns = now;
        (*event).session = traced.session;
        (*event).workload = workload;
        (*event).table = table;
        (*event).rule = rule;
        (*event).errno = (outcome >> 32) as u16;
        (*event).program = outcome as u8;
        (*event).verdict = (outcome >> 8) as u8;
        (*event).why = (outcome >> 16) as u8;
        (*event).pad = 0;
        (*event).pad2 = 0;
    }
    Some(entry)
}

#[inline(always)]
fn family(v6: bool) -> u16 {
    if v6 { AF_INET6 } else { AF_INET }
}

/// # Safety
/// `to` is memory of that type.
#[inline(always)]
unsafe fn copy(to: *mut Destination, address: &[u32; 4], port_be: u16, family: u16) {
    // SAFETY: as the caller says.
    unsafe {
        (*to).address[0] = address[0];
        (*to).address[1] = address[1];
        (*to).address[2] = address[2];
        (*to).address[3] = address[3];
        (*to).port_be = port_be;
        (*to).family = family;
    }
}
