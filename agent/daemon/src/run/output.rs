//! Companions' output of a `pillion run`: one JSON object a line, on stderr, where it does not mix with the command's data.
//!
//! What the relay writes is JSON already; lines of other companions are wrapped with their names.

use std::{collections::BTreeSet, io::Write, time::Duration};

use pillion_companion::{LogLine, Stream};
use pillion_workload::{CompanionKind, CompanionName, Plan};
use serde::Serialize;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

/// Writes until the companions are gone.
#[derive(Debug)]
pub(super) struct Output {
    task: JoinHandle<()>,
}

#[derive(Debug, Serialize)]
struct Wrapped<'a> {
    workload: &'a str,
    companion: &'a str,
    stream: &'a str,
    line: &'a str,
}

impl Output {
    pub(super) fn follow(mut lines: mpsc::Receiver<LogLine>, plan: &Plan) -> Self {
        let relays: BTreeSet<CompanionName> = plan
            .companions
            .iter()
            .filter(|companion| matches!(companion.kind, CompanionKind::Relay))
            .map(|companion| companion.name.clone())
            .collect();
        let task = tokio::spawn(async move {
            while let Some(line) = lines.recv().await {
                let text = render(&line, relays.contains(&line.companion));
                // Nobody reads stderr: the companions go on all the same.
                let _ = std::io::stderr().lock().write_all(text.as_bytes());
            }
        });
        Self { task }
    }

    /// Waits for the last lines.
    pub(super) async fn finish(self, limit: Duration) {
        let _ = timeout(limit, self.task).await;
    }
}

fn render(line: &LogLine, is_relay: bool) -> String {
    if is_relay && line.stream == Stream::Output && line.line.starts_with('{') {
        return format!("{}\n", line.line);
    }
    let wrapped = Wrapped {
        workload: line.workload.as_str(),
        companion: line.companion.as_str(),
        stream: line.stream.as_str(),
        line: &line.line,
    };
    let mut text = serde_json::to_string(&wrapped).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_one_json_object() {
        let line = |stream, text: &str| LogLine {
            workload: "process/1-2".parse().unwrap(),
            companion: "r".parse().unwrap(),
            stream,
            line: text.to_owned(),
        };
        assert_eq!(render(&line(Stream::Output, "{\"a\":1}"), true), "{\"a\":1}\n");
        for (stream, text, relay) in [
            (Stream::Errors, "{\"a\":1}", true),
            (Stream::Output, "\"\u{1b}[0m", true),
            (Stream::Output, "{}", false),
        ] {
            let rendered = render(&line(stream, text), relay);
            let value: serde_json::Value = serde_json::from_str(&rendered).unwrap();
            assert_eq!((value["line"].as_str(), value["companion"].as_str()), (Some(text), Some("r")));
            assert_eq!(rendered.matches('\n').count(), 1);
        }
    }
}
