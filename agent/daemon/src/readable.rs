//! Registration of descriptors with the runtime, in the one place that knows about tokio's open question.

use std::{io, os::fd::AsRawFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Watches an owned descriptor for readability. Must be called within a tokio runtime.
#[expect(
    deprecated,
    reason = "its successor is unsafe, for types whose AsRawFd changes its answer; Inotify and SignalFd never do"
)]
pub(crate) fn readable<T: AsRawFd>(descriptor: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(descriptor, Interest::READABLE)
}
