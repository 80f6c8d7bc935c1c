//! One of the two sockets of a connection, read and written without ever waiting. Knows nothing of the other one.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::{
    event::epoll::EventFlags,
    io::{Errno, ioctl_fionread},
    net::{RecvFlags, SendFlags, recv, send, sockopt},
};

use super::{buffers::Buffers, connection::SMALL_CHUNK, outq::is_at_mark};

/// One socket of a connection, its readiness, and what it has not yet taken.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is independent of the others; no enum could merge them"
)]
pub(super) struct Peer {
    pub(super) socket: OwnedFd,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// More than data may be waiting (an end, an error, an urgent mark): a short read does not mean "empty".
    pub(super) exhaust: bool,
    /// An urgent byte is on its way or waits to be read.
    urgent: bool,
    /// Its stream has ended, or cannot be read any further.
    pub(super) ended: bool,
    /// Its end has been passed on to it.
    pub(super) shut: bool,
    pub(super) broken: bool,
    /// The end of what it took may wait for more in the kernel.
    pub(super) held: bool,
    /// Read from the other side and not yet taken by this one. Empty, without memory, unless this side is slow.
    pub(super) pending: Vec<u8>,
    pending_from: usize,
    /// What is pending is one urgent byte.
    pending_urgent: bool,
    /// Bytes that this side took.
    pub(super) taken: u64,
}

impl Peer {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            readable: false,
            writable: false,
            exhaust: false,
            urgent: false,
            ended: false,
            shut: false,
            broken: false,
            held: false,
            pending: Vec::new(),
            pending_from: 0,
            pending_urgent: false,
            taken: 0,
        }
    }

    /// Notes what epoll says of the socket.
    pub(super) fn note(&mut self, flags: EventFlags) {
        self.writable |= flags.contains(EventFlags::OUT);
        self.readable |= flags.contains(EventFlags::IN);
        self.urgent |= flags.contains(EventFlags::PRI);
        if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR | EventFlags::PRI) {
            self.readable = true;
            self.exhaust = true;
        }
    }

    /// Whether it has sent something that is not yet read.
    pub(super) fn has_unread(&self) -> bool {
        ioctl_fionread(&self.socket).is_ok_and(|bytes| bytes > 0)
    }

    /// It failed: nothing can be sent to it, but what it had sent may still be read.
    pub(super) fn break_off(&mut self) {
        self.broken = true;
        self.readable = true;
        self.exhaust = true;
        self.pending = Vec::new();
        self.pending_from = 0;
    }

    /// The urgent byte, when all before it has been read. A read never goes across its mark by itself, and leaves it out.
    pub(super) fn urgent_byte(&mut self) -> Option<u8> {
        if !self.urgent || !is_at_mark(self.socket.as_fd()) {
            return None;
        }
        // Announced, perhaps, and not yet there: then there is another event.
        self.urgent = false;
        let mut byte = [0];
        match recv(&self.socket, &mut byte, RecvFlags::OOB) {
            Ok((_, 1)) => Some(byte[0]),
            Ok(_) | Err(_) => None,
        }
    }

    /// Reads once; zero bytes when there is nothing now or no more at all. `Err` is a broken connection.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, ()> {
        let size = into.len();
        match recv(&self.socket, &mut *into, RecvFlags::empty()) {
            Ok((_, 0)) => {
                self.ended = true;
                Ok(0)
            }
            Ok((_, length)) => {
                // A short read has emptied the socket, and what arrives later raises a new event.
                self.readable = length == size || self.exhaust;
                Ok(length)
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                self.exhaust = false;
                Ok(0)
            }
            Err(Errno::INTR) => Ok(0),
            Err(_) => {
                self.ended = true;
                Err(())
            }
        }
    }

    /// Sends the first `length` bytes of `buffer`, and keeps what the socket does not take now: if that is much, `buffer` itself, and
    /// leaves an empty one.
    ///
    /// With `more` the last bytes, when they are less than a segment, wait in the kernel for what follows instead of
    /// becoming a packet of their own; [`Peer::release`] must follow when nothing does.
    pub(super) fn send(&mut self, buffer: &mut Vec<u8>, length: usize, more: bool) -> Result<(), ()> {
        if length == 0 {
            return Ok(());
        }
        let taken = self.send_some(&buffer[..length], more)?;
        if length - taken > SMALL_CHUNK {
            buffer.truncate(length);
            self.pending = std::mem::take(buffer);
            self.pending_from = taken;
        } else {
            self.pending.extend_from_slice(&buffer[taken..length]);
        }
        Ok(())
    }

    /// Sends one urgent byte, or keeps it.
    pub(super) fn send_urgent(&mut self, byte: u8) -> Result<(), ()> {
        self.pending_urgent = true;
        let taken = self.send_some(&[byte], false)?;
        self.pending_urgent = taken == 0;
        self.pending.extend_from_slice(&[byte][taken..]);
        Ok(())
    }

    /// Nothing follows for now what was sent as "more to come".
    pub(super) fn release(&mut self) {
        if std::mem::take(&mut self.held) {
            // Setting the option, even if it is set, sends what is held (tcp(7)). A dead socket tells elsewhere.
            let _ = sockopt::set_tcp_nodelay(&self.socket, true);
        }
    }

    /// Sends what is kept. When all of it is sent, its memory goes back to `buffers`.
    pub(super) fn send_pending(&mut self, buffers: &mut Buffers) -> Result<(), ()> {
        let pending = std::mem::take(&mut self.pending);
        let length = self.send_some(&pending[self.pending_from..], false);
        self.pending_from += length?;
        if self.pending_from < pending.len() {
            self.pending = pending;
        } else {
            self.pending_from = 0;
            self.pending_urgent = false;
            buffers.give(pending);
        }
        Ok(())
    }

    fn send_some(&mut self, bytes: &[u8], more: bool) -> Result<usize, ()> {
        self.held = more;
        let mut flags = SendFlags::NOSIGNAL;
        flags.set(SendFlags::MORE, more);
        flags.set(SendFlags::OOB, self.pending_urgent);
        match send(&self.socket, bytes, flags) {
            Ok(length) => {
                self.writable = length == bytes.len();
                self.taken += length as u64;
                Ok(length)
            }
            Err(Errno::AGAIN) => {
                self.writable = false;
                Ok(0)
            }
            Err(Errno::INTR) => Ok(0),
            Err(_) => Err(()),
        }
    }
}
