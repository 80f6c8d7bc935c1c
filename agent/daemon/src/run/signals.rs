//! Signals of `pillion run`: received, and passed on to the command.
//!
//! Received through signalfd(2), because it tells who sent them: what the terminal sends (Ctrl-C, Ctrl-Z) has already
//! reached the command, which is in the same process group, and must not reach it twice.

use std::io;

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal, raise},
        signalfd::{SfdFlags, SignalFd},
    },
};
use pillion_companion::Process;
use tokio::io::unix::AsyncFd;

use crate::readable::readable;

/// What is passed on.
const PASSED_ON: [Signal; 9] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// The kernel sent it: on behalf of the terminal, to the whole foreground process group (`SI_KERNEL`, sigaction(2)).
const FROM_KERNEL: i32 = 0x80;

/// Receives the signals that are passed on.
#[derive(Debug)]
pub(super) struct Signals(AsyncFd<SignalFd>);

/// A signal, and whether the command has had it already.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    pub(super) signal: Signal,
    from_terminal: bool,
}

/// Keeps the signals from having their default effect. Before any thread is started: the mask is inherited by threads,
/// and the launcher clears it for the command.
pub(super) fn block() -> io::Result<()> {
    Ok(set().thread_block()?)
}

fn set() -> SigSet {
    PASSED_ON.into_iter().collect()
}

impl Signals {
    /// To be called in the runtime, after [`block`].
    pub(super) fn receive() -> io::Result<Self> {
        let fd = SignalFd::with_flags(&set(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self(readable(fd)?))
    }

    /// The next one. Cancel-safe.
    pub(super) async fn next(&mut self) -> io::Result<Received> {
        loop {
            let mut ready = self.0.readable_mut().await?;
            match ready.get_inner_mut().read_signal() {
                Ok(Some(info)) => {
                    let number = i32::try_from(info.ssi_signo).unwrap_or(0);
                    let signal = Signal::try_from(number).map_err(io::Error::from)?;
                    return Ok(Received { signal, from_terminal: info.ssi_code == FROM_KERNEL });
                }
                Ok(None) | Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Received {
    /// Whether it asks for the end.
    pub(super) fn ends(self) -> bool {
        matches!(self.signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT)
    }

    /// Gives it to the command. On SIGTSTP this process stops as well, so that the shell sees a stopped job; companions
    /// are processes of their own and go on.
    pub(super) fn pass_on(self, command: &Process) -> io::Result<()> {
        if !self.from_terminal {
            let number = rustix::process::Signal::from_named_raw(self.signal as i32);
            let number = number.ok_or(io::ErrorKind::InvalidInput)?;
            command.signal(number).map_err(io::Error::other)?;
        }
        if self.signal == Signal::SIGTSTP {
            raise(Signal::SIGSTOP)?;
        }
        Ok(())
    }
}
