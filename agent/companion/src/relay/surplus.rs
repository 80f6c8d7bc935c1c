//! How much is copied at a time, so that memory for slow sides is bounded for the whole relay too. Never touches a socket.
//!
//! Large chunks are what makes copying fast, and what a side does not take of one waits in memory. So they are copied only
//! while slow sides hold little, all together: then one that is slow for a moment costs nothing, and thousands of them cost what
//! small chunks cost.

use super::connection::{CHUNK, Connection, SMALL_CHUNK};

/// Memory that slow sides may hold beyond a small chunk each, all together, before chunks become small.
pub(super) const SURPLUS: usize = 8 << 20;

/// What all connections hold beyond small chunks.
#[derive(Debug)]
pub(super) struct Surplus {
    held: usize,
    limit: usize,
}

impl Surplus {
    pub(super) fn up_to(limit: usize) -> Self {
        Self { held: 0, limit }
    }

    /// Bytes to copy at a time now.
    pub(super) fn chunk(&self) -> usize {
        if self.held < self.limit { CHUNK } else { SMALL_CHUNK }
    }

    /// To be told after each turn of a connection.
    pub(super) fn settle(&mut self, connection: &mut Connection) {
        let (before, after) = connection.surplus();
        self.held = self.held - before + after;
    }

    /// The connection has ended.
    pub(super) fn release(&mut self, connection: &mut Connection) {
        self.held -= connection.surplus().0;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::{
        super::connection::testing::{advance, connection},
        *,
    };

    #[test]
    fn slow_sides_hold_a_bounded_surplus_and_give_it_back() {
        const LIMIT: usize = 1 << 20;
        let mut surplus = Surplus::up_to(LIMIT);
        let mut connections: Vec<_> = (0..40).map(|_| connection()).collect();
        let block = vec![7; 4 << 20];
        for (connection, ours, _theirs) in &mut connections {
            ours.set_nonblocking(true).unwrap();
            let mut stalled = 0;
            while stalled < 3 {
                stalled = if ours.write(&block).is_ok() { 0 } else { stalled + 1 };
                advance(connection, surplus.chunk());
                surplus.settle(connection);
            }
        }
        assert!(surplus.held >= LIMIT, "{}: not enough of them for this test", surplus.held);
        assert!(surplus.held < LIMIT + CHUNK, "{}", surplus.held);
        assert_eq!(surplus.chunk(), SMALL_CHUNK);
        for (connection, ..) in &mut connections {
            surplus.release(connection);
        }
        assert_eq!((surplus.held, surplus.chunk()), (0, CHUNK));
    }
}
