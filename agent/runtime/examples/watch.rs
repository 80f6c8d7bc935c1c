//! Prints what the containerd source tells, as one JSON object a line: `watch [SOCKET]`. Ends at SIGINT.
//!
//! A debugging tool. Each line begins with the time, as `ctr events` has it. For each workload that starts it also says whether its first instruction is still to come when
//! asked for after the event (`probe`).
#![expect(clippy::print_stdout, reason = "printing is its purpose")]

use std::time::{SystemTime, UNIX_EPOCH};

use pillion_runtime::{ContainerdConfig, ContainerdSource, RuntimeEvent};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), serde_json::Error> {
    let config = std::env::args().nth(1).map_or_else(ContainerdConfig::default, ContainerdConfig::at);
    let (events, mut received) = mpsc::channel(64);
    let stop = CancellationToken::new();
    let (source, probe, _resolver) = ContainerdSource::spawn(config, events, stop.clone());
    loop {
        let event = tokio::select! {
            event = received.recv() => event,
            _ = tokio::signal::ctrl_c() => break,
        };
        let Some(event) = event else { break };
        println!("{} {}", time(), serde_json::to_string(&event)?);
        if let RuntimeEvent::Started { workload, .. } = event {
            let answer = serde_json::json!({ "probe": probe.check(&workload).await, "id": workload.id });
            println!("{} {answer}", time());
        }
    }
    stop.cancel();
    // A task that is cancelled ends at once; one that panicked has said so.
    let _ = source.await;
    Ok(())
}

/// Time of day in UTC, to the microsecond.
fn time() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let of_day = now.as_secs() % 86_400;
    let (hours, minutes, seconds) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}.{:06}", now.subsec_micros())
}
