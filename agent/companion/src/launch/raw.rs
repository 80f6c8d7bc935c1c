//! The system calls of the launcher that need `unsafe`. Owns nothing, decides nothing.

#![expect(
    unsafe_code,
    reason = "close_range(2) and signal(2) have no safe wrapper in the crates that we use"
)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::errno::Errno;

/// Marks every descriptor above 2 close-on-exec (`CLOSE_RANGE_CLOEXEC`, Linux 5.11).
pub(super) fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: the call takes plain integers and changes flags only; no descriptor is closed here, so that no owned
    // descriptor of this process becomes dangling. close_range has no wrapper in every supported C library.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor above 2 but this one (Linux 5.9). To be called when this process owns no other.
pub(super) fn close_all_but(kept: BorrowedFd<'_>) -> io::Result<()> {
    let kept = u32::try_from(kept.as_raw_fd()).map_err(io::Error::other)?;
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.max(2) + 1, u32::MAX)] {
        if first > last {
            continue;
        }
        // SAFETY: the call takes plain integers. The caller owns no other descriptor above 2, so that what is closed has
        // been inherited from the launcher's parent and belongs to no value of this process.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Ignores SIGPIPE, as Rust's runtime does for a program that it has started.
pub(super) fn ignore_broken_pipes() -> io::Result<()> {
    // SAFETY: SIG_IGN installs no handler, so that no code of ours can run in signal context.
    let previous = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if previous == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets SIGPIPE, which Rust's runtime ignores, or every signal back to its default.
pub(super) fn reset_signals(all: bool) -> io::Result<()> {
    let signals = if all { 1..=libc::SIGRTMAX() } else { libc::SIGPIPE..=libc::SIGPIPE };
    for signal in signals {
        // SAFETY: SIG_DFL installs no handler, so that no code of ours can run in signal context.
        let previous = unsafe { libc::signal(signal, libc::SIG_DFL) };
        // SIGKILL, SIGSTOP and the two signals that the C library keeps for itself cannot be set.
        if previous == libc::SIG_ERR && Errno::last() != Errno::EINVAL {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
