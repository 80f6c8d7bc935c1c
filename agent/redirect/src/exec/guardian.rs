//! The guardian: a process of its own that lets go what an agent has stopped, when that agent is gone, or hangs.
//!
//! It knows the agent by a pipe whose other end the agent holds: the kernel closes that however the agent ends. It shares the
//! list of what is stopped with the program in the kernel, so it needs no message, and nothing is stopped that it does not see.

use std::{
    fs, io,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    PATIENCE, monotonic_ns,
    process::{let_go_all, let_go_those, open},
};

/// Between two looks at what is overdue.
const LOOK: u16 = 1000;
const PAUSE: Duration = Duration::from_millis(50);

/// Serves until the agent's end of `pipe` is closed. `limit` is how long anything may be stopped: longer than the agent's own
/// deadline, which it is for when the agent hangs.
///
/// # Errors
/// When the list cannot be opened. An error while letting go is tried again.
pub fn guard(pin: &Path, pipe: impl AsFd, limit: Duration) -> io::Result<()> {
    let mut held = open(pin)?;
    let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
    loop {
        let mut waited = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited, PollTimeout::from(LOOK)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            // Nothing is ever sent: it is the end of the stream.
            Ok(_) => break,
            Err(errno) => return Err(errno.into()),
        }
        let now = monotonic_ns();
        let _ = let_go_those(&mut held, |process| now.saturating_sub(process.held_ns) > limit);
    }
    // A program that was at it when the agent ended may still add to the list, until the heart is too old.
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let _ = let_go_those(&mut held, |_| true);
        std::thread::sleep(PAUSE);
    }
    let_go_all(held)?;
    // An agent that ended in order has removed it.
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
