//! One ioctl that no safe wrapper offers: how much of a socket's output the peer has not acknowledged.
#![expect(unsafe_code, reason = "SIOCOUTQ has no safe wrapper in nix, rustix or socket2")]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc::{TIOCOUTQ, c_int};

mod raw {
    nix::ioctl_read_bad!(outq, super::TIOCOUTQ, super::c_int);
}

/// Bytes of `socket` that were sent or wait to be sent and are not acknowledged (`SIOCOUTQ`, tcp(7)); zero when the
/// socket is dead.
pub(super) fn unacknowledged(socket: BorrowedFd<'_>) -> usize {
    let mut bytes: c_int = 0;
    // SAFETY: the descriptor is borrowed, hence open, and SIOCOUTQ (the same number as TIOCOUTQ) writes one int to the
    // pointer, which points to a live int of ours.
    let result = unsafe { raw::outq(socket.as_raw_fd(), &raw mut bytes) };
    match result {
        Ok(_) => usize::try_from(bytes).unwrap_or(0),
        Err(_) => 0,
    }
}
