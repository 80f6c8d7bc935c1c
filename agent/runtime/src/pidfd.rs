//! Waits for the end of one process through its pidfd (`pidfd_open(2)`, Linux 5.3).
//!
//! Owns the descriptor. Never signals the process, never reaps it.
#![expect(unsafe_code, reason = "tokio registers a foreign descriptor only through an unsafe function")]

use std::{io, os::fd::OwnedFd};

use pillion_workload::ProcessId;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::{Interest, unix::AsyncFd};

use crate::instance::is_alive;

/// A process that was alive when this was opened.
#[derive(Debug)]
pub(crate) struct Pidfd(AsyncFd<OwnedFd>);

impl Pidfd {
    /// `None` when the process has ended already. To be called within a tokio runtime.
    pub(crate) fn open(process: ProcessId) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(process.pid.0) else { return Ok(None) };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // In this order: the pidfd holds whoever has the pid now, and that is the process when its start time is right.
        if !is_alive(process) {
            return Ok(None);
        }
        // SAFETY: an `OwnedFd` always answers the same descriptor and keeps it open until it is dropped, and the `AsyncFd`
        // owns it until then.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Some(Self(registered?)))
    }

    /// Returns when the process has ended: a pidfd is readable from then on.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }
}
