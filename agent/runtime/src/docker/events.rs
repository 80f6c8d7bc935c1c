//! An engine's stream of events, read without pause, cut into lines and decoded.
//!
//! Owns the subscription, its bounded queue and its buffer. Never trusts an event for more than which container it is about.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::{
    ContainerId, api,
    client::{Client, ClientError, Stream},
};

/// Events that wait while we are busy. More than that are dropped, and a new snapshot makes up for them.
const QUEUE: usize = 1024;
/// An event bears its container's labels. A longer line is skipped, and a new snapshot makes up for it.
const LINE_LIMIT: usize = 1 << 20;

/// What an event means here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Signal {
    /// Look at this container again.
    Look(ContainerId),
    /// Some events were lost or not understood: look at everything again.
    Resync,
}

/// A subscription. Ends when dropped.
pub(super) struct Events {
    queue: mpsc::Receiver<Result<Signal, ClientError>>,
    lost: Arc<AtomicBool>,
    _reader: AbortOnDropHandle<()>,
}

impl Events {
    pub(super) async fn subscribe(client: &Client) -> Result<Self, ClientError> {
        let stream = client.events().await?;
        let (sender, queue) = mpsc::channel(QUEUE);
        let lost = Arc::new(AtomicBool::new(false));
        let reader = AbortOnDropHandle::new(tokio::spawn(read(stream, sender, Arc::clone(&lost))));
        Ok(Self { queue, lost, _reader: reader })
    }

    /// The next signal. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Signal, ClientError> {
        if self.lost.swap(false, Ordering::AcqRel) {
            return Ok(Signal::Resync);
        }
        self.queue.recv().await.unwrap_or(Err(ClientError::EventsEnded))
    }
}

/// Reads as fast as the engine sends, because Docker drops what a slow reader has not taken, without a word.
async fn read(mut stream: Stream, queue: mpsc::Sender<Result<Signal, ClientError>>, lost: Arc<AtomicBool>) {
    let mut lines = Lines::default();
    let error = loop {
        match stream.next().await {
            Ok(piece) => lines.push(&piece, |signal| {
                if queue.try_send(Ok(signal)).is_err() {
                    lost.store(true, Ordering::Release);
                }
            }),
            Err(error) => break error,
        }
    };
    // Nobody listens any more, or it is the last thing to be heard.
    let _ = queue.send(Err(error)).await;
}

/// Lines out of pieces.
#[derive(Debug, Default)]
struct Lines {
    begun: Vec<u8>,
    /// The rest of the line that has begun is not wanted.
    skipping: bool,
}

impl Lines {
    fn push(&mut self, piece: &[u8], mut found: impl FnMut(Signal)) {
        let mut parts = piece.split(|byte| *byte == b'\n').peekable();
        while let Some(part) = parts.next() {
            if !self.skipping && self.begun.len() + part.len() > LINE_LIMIT {
                self.skipping = true;
                self.begun = Vec::new();
            }
            if !self.skipping {
                self.begun.extend_from_slice(part);
            }
            if parts.peek().is_some() {
                self.end_of_line().into_iter().for_each(&mut found);
            }
        }
    }

    fn end_of_line(&mut self) -> Option<Signal> {
        let line = std::mem::take(&mut self.begun);
        if std::mem::take(&mut self.skipping) {
            return Some(Signal::Resync);
        }
        if line.trim_ascii().is_empty() {
            return None;
        }
        api::event(&line).map_or(Some(Signal::Resync), |id| id.map(Signal::Look))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "7865c3c3aa2d2a95e6ea66ab4a652df0aaf970ef3ee16bc5c3203be970dc762e";

    fn line(action: &str) -> String {
        format!("{{\"Action\":\"{action}\",\"Actor\":{{\"ID\":\"{ID}\"}}}}\n")
    }

    #[test]
    fn what_is_not_understood_or_too_long_asks_for_a_look_at_everything() {
        let look = || Signal::Look(ID.parse().expect("valid"));
        let long = format!("{}\n", "x".repeat(LINE_LIMIT + 1));
        for (text, signals) in [
            (line("start"), vec![look()]),
            (format!("\r\n{}{}", line("create"), line("die")), vec![look()]),
            ("nonsense\n".to_owned(), vec![Signal::Resync]),
            (format!("{long}{}", line("start")), vec![Signal::Resync, look()]),
            (line("start").trim_end().to_owned(), vec![]),
        ] {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            lines.push(text.as_bytes(), |signal| found.push(signal));
            assert_eq!(found, signals, "{}", &text[..text.len().min(80)]);
            assert!(lines.begun.len() <= LINE_LIMIT);
        }
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_are_one_stream(cuts in proptest::collection::vec(1_usize..40, 1..20)) {
            let text = format!("{}{}{}", line("start"), line("create"), line("die")).into_bytes();
            let (mut lines, mut rest, mut found) = (Lines::default(), &text[..], 0);
            for cut in cuts.into_iter().cycle() {
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                lines.push(piece, |_| found += 1);
                rest = more;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found, 2);
        }

        #[test]
        fn arbitrary_bytes_never_panic(pieces: Vec<Vec<u8>>) {
            let mut lines = Lines::default();
            for piece in &pieces {
                lines.push(piece, drop);
            }
        }
    }
}
