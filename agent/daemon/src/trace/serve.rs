//! The agent's end of a trace: reads what the kernel side tells and sends it on, until the client goes or time is over.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use pillion_redirect::{Dataplane, RedirectError, TRACE_PERIOD, TraceSession, TraceSettings};
use pillion_workload::CgroupId;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{info, warn};

use super::{DecisionInfo, EndReason, TraceLine};

/// Lines that a client may be behind. What does not fit is counted as left out, and the kernel side is read on.
const BEHIND: usize = 1024;
/// What is left out is told at most so often.
const COUNT_PERIOD: Duration = Duration::from_secs(1);

/// Begins a trace; its lines end when the receiver is dropped, at the latest after `length`.
pub(crate) fn stream(
    dataplane: &Arc<Dataplane>,
    cgroup: CgroupId,
    settings: TraceSettings,
    length: Duration,
) -> Result<mpsc::Receiver<Bytes>, RedirectError> {
    let session = dataplane.trace(cgroup, settings)?;
    let (lines, receiver) = mpsc::channel(BEHIND);
    info!(?session, "a trace has begun");
    tokio::spawn(run(session, lines, Instant::now() + length));
    Ok(receiver)
}

async fn run(mut session: TraceSession, lines: mpsc::Sender<Bytes>, end: Instant) {
    let mut look = interval(TRACE_PERIOD);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut left_out, mut counted) = (0, Instant::now());
    let _ = lines.try_send(bytes(&TraceLine::Started));
    let reason = loop {
        let over = tokio::select! {
            biased;
            () = lines.closed() => return info!(?session, "a trace has ended: its client is gone"),
            () = sleep_until(end) => true,
            _ = look.tick() => false,
        };
        let batch = match session.read() {
            Ok(batch) => batch,
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "a trace cannot be read");
                break EndReason::Failed;
            }
        };
        left_out += batch.left_out;
        for decision in batch.decisions {
            let line = TraceLine::Decision(Box::new(DecisionInfo::from(decision)));
            if lines.try_send(bytes(&line)).is_err() {
                left_out += 1;
            }
        }
        if left_out > 0 && (over || batch.ended || counted.elapsed() >= COUNT_PERIOD) {
            counted = Instant::now();
            if lines.try_send(bytes(&TraceLine::LeftOut { count: left_out })).is_ok() {
                left_out = 0;
            }
        }
        if batch.ended {
            break EndReason::Detached;
        }
        if over {
            break EndReason::Deadline;
        }
    };
    info!(?session, ?reason, "a trace has ended");
    // Off before its client hears so.
    drop(session);
    // A client that does not read hears nothing more; it is not waited for.
    let _ = lines.try_send(bytes(&TraceLine::Ended { reason }));
}

fn bytes(line: &TraceLine) -> Bytes {
    let mut line = serde_json::to_vec(line).unwrap_or_default();
    line.push(b'\n');
    line.into()
}
