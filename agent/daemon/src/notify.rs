//! Tells systemd how the agent is: `sd_notify(3)`, one datagram a message.
//!
//! Never fails anything: without systemd, or when it does not listen, nothing is sent.

use std::{
    env,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// Where to tell.
#[derive(Debug)]
pub(crate) struct Notifier(Option<(UnixDatagram, SocketAddr)>);

impl Notifier {
    /// From `NOTIFY_SOCKET`: a path, or `@` and an abstract name.
    pub(crate) fn from_environment() -> Self {
        let connect = || {
            let name = env::var_os("NOTIFY_SOCKET")?;
            let address = match name.as_bytes().split_first()? {
                (b'@', rest) => SocketAddr::from_abstract_name(rest),
                (b'/', _) => SocketAddr::from_pathname(&name),
                _ => return None,
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            Some((socket, address.ok()?))
        };
        Self(connect())
    }

    /// Everything is up.
    pub(crate) fn ready(&self) {
        self.send("READY=1");
    }

    /// Policies are being read again; [`Self::ready`] follows.
    pub(crate) fn reloading(&self) {
        // Type=notify-reload asks for the time, CLOCK_MONOTONIC in microseconds.
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let micros = now.map_or(0, |time| time.tv_sec() * 1_000_000 + time.tv_nsec() / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The agent is ending.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The agent is alive.
    pub(crate) fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.0 {
            // systemd that does not listen is not our trouble.
            let _ = socket.send_to_addr(message.as_bytes(), address);
        }
    }
}

/// How often systemd wants to hear [`Notifier::alive`]: half of `WATCHDOG_USEC`, if that is meant for this process.
pub(crate) fn watchdog_interval() -> Option<Duration> {
    if let Ok(pid) = env::var("WATCHDOG_PID")
        && pid != std::process::id().to_string()
    {
        return None;
    }
    let micros: u64 = env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    (micros > 0).then(|| Duration::from_micros(micros) / 2)
}
