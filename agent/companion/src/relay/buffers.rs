//! Where bytes stay between the two calls that copy them. A buffer that a slow side keeps is replaced, and comes back. Never
//! shrinks what it lends, never holds more than a few that nobody uses.

use super::connection::CHUNK;

/// Buffers that wait for their next use, at most: as many slow sides can keep theirs by turns without new ones being made.
const SPARE: usize = 4;

/// The buffers of a relay.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    spare: Vec<Vec<u8>>,
}

impl Buffers {
    /// One of [`CHUNK`] bytes, whatever they are; to be given back, or kept.
    pub(super) fn take(&mut self) -> Vec<u8> {
        // A new one takes no memory before it is written to.
        let Some(mut buffer) = self.spare.pop() else { return vec![0; CHUNK] };
        buffer.resize(CHUNK, 0);
        buffer
    }

    /// Takes it back if it is worth it.
    pub(super) fn give(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() >= CHUNK && self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_buffers_wait_and_all_are_whole() {
        let mut buffers = Buffers::default();
        let mut lent: Vec<_> = (0..SPARE + 3).map(|_| buffers.take()).collect();
        assert!(lent.iter().all(|buffer| buffer.len() == CHUNK));
        lent[0].truncate(9);
        buffers.give(vec![0; 9]);
        assert!(buffers.spare.is_empty(), "not worth it");
        for buffer in lent {
            buffers.give(buffer);
        }
        assert_eq!(buffers.spare.len(), SPARE);
        assert!((0..=SPARE).all(|_| buffers.take().len() == CHUNK));
    }
}
