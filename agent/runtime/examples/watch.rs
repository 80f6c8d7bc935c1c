//! Prints what the containerd source tells, as one JSON object a line: `watch [SOCKET]`. Ends at SIGINT.
//!
//! A debugging tool. For each workload that starts it also says whether its first instruction is still to come when
//! asked for after the event (`probe`).

use std::time::Instant;

use pillion_runtime::{ContainerdConfig, ContainerdSource, RuntimeEvent};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), serde_json::Error> {
    let config = std::env::args().nth(1).map_or_else(ContainerdConfig::default, ContainerdConfig::at);
    let (events, mut received) = mpsc::channel(64);
    let stop = CancellationToken::new();
    let (source, probe) = ContainerdSource::spawn(config, events, stop.clone());
    let begun = Instant::now();
    loop {
        let event = tokio::select! {
            event = received.recv() => event,
            _ = tokio::signal::ctrl_c() => break,
        };
        let Some(event) = event else { break };
        println!("{:9.3} {}", begun.elapsed().as_secs_f64(), serde_json::to_string(&event)?);
        if let RuntimeEvent::Started { workload, .. } = event {
            let answer = serde_json::json!({ "probe": probe.check(&workload).await, "id": workload.id });
            println!("{:9.3} {answer}", begun.elapsed().as_secs_f64());
        }
    }
    stop.cancel();
    // A task that is cancelled ends at once; one that panicked has said so.
    let _ = source.await;
    Ok(())
}
