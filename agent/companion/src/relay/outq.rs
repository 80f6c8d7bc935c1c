//! Two ioctls that no safe wrapper offers: how much of a socket's output the peer has not acknowledged, and whether the next
//! byte to be read is the urgent one.
#![expect(unsafe_code, reason = "SIOCOUTQ and SIOCATMARK have no safe wrapper in nix, rustix or socket2")]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc::{Ioctl, TIOCOUTQ, c_int};

/// Of linux/sockios.h, the same on every architecture but some of no interest here.
const SIOCATMARK: Ioctl = 0x8905;

mod raw {
    nix::ioctl_read_bad!(outq, super::TIOCOUTQ, super::c_int);
    nix::ioctl_read_bad!(at_mark, super::SIOCATMARK, super::c_int);
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

/// Whether everything before the urgent mark of `socket` has been read, and the byte there has not (`SIOCATMARK`, tcp(7)).
pub(super) fn is_at_mark(socket: BorrowedFd<'_>) -> bool {
    let mut at: c_int = 0;
    // SAFETY: the descriptor is borrowed, hence open, and SIOCATMARK writes one int to the pointer, which points to a live int
    // of ours.
    let result = unsafe { raw::at_mark(socket.as_raw_fd(), &raw mut at) };
    result.is_ok() && at != 0
}
