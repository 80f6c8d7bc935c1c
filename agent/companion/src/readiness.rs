//! Whether a companion is ready: its probe passes and it listens on every port that redirection sends to it.
//!
//! Asked from within the workload's network namespace. Without a probe in the plan, listening is all that is asked:
//! the kernel completes handshakes for a listening socket, and no strange connection appears in the companion's log.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use pillion_workload::{Probe, ReadyCompanion};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    cgroup::CgroupGuard,
    error::CompanionError,
    exec::Prepared,
    host::{Host, Launch},
    launch,
    listeners::{Look, look},
    netns::NetnsThread,
    process::{Doomed, Ending, Process},
};

const FIRST_DELAY: Duration = Duration::from_millis(1);
const LONGEST_DELAY: Duration = Duration::from_millis(100);
/// An attempt that hangs is given up after this time and made again.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(2);
/// Looks in a row that must find somebody else on a port, so that a socket on its way between two processes of the
/// companion is not taken for a stranger's.
const FOREIGN_LOOKS: u32 = 3;
/// A courtesy to the companion's log, in time and bytes.
const LONGEST_FAREWELL: Duration = Duration::from_secs(1);
const LONGEST_BODY: u64 = 256 * 1024;
/// A status line and its headers need no more, in bytes.
const LONGEST_ANSWER: usize = 4096;

/// A companion whose program runs, and all that is needed to ask whether it is ready.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) host: &'a Host,
    pub(crate) launch: &'a Launch,
    pub(crate) prepared: &'a Prepared,
    pub(crate) cgroup: &'a CgroupGuard,
    pub(crate) process: &'a Process,
    pub(crate) netns: &'a NetnsThread,
}

impl Candidate<'_> {
    /// Asks until it is ready, its process ends or `deadline` is reached.
    pub(crate) async fn ready(&self, deadline: Instant) -> Result<ReadyCompanion, CompanionError> {
        let oom_kills = self.cgroup.oom_kills();
        tokio::select! {
            ending = self.process.ended() => Err(self.ended_early(ending?, oom_kills).await),
            outcome = self.ask_until(deadline) => outcome,
        }
    }

    /// A port that somebody else has is the likely cause, and a better thing to say than an exit code.
    async fn ended_early(&self, status: Ending, oom_kills: Option<u64>) -> CompanionError {
        match self.look(Instant::now() + LONGEST_DELAY).await {
            Ok(Look { foreign, .. }) if !foreign.is_empty() => {
                CompanionError::PortTaken { port: foreign.first().map_or(0, |(port, _)| *port) }
            }
            Ok(_) | Err(_) => CompanionError::EndedEarly { status, oom: self.cgroup.oom_kills() > oom_kills },
        }
    }

    async fn ask_until(&self, deadline: Instant) -> Result<ReadyCompanion, CompanionError> {
        let mut delay = FIRST_DELAY;
        let mut probe_passed = self.launch.spec.ready.probe.is_none();
        let mut foreign_looks = 0;
        loop {
            let last = if let Some(probe) = self.launch.spec.ready.probe.as_ref().filter(|_| !probe_passed) {
                let limit = deadline.min(Instant::now() + LONGEST_ATTEMPT);
                match timeout_at(limit, self.probe(probe, limit)).await {
                    Ok(Ok(())) => {
                        probe_passed = true;
                        // Straight on to the listeners.
                        continue;
                    }
                    Ok(Err(reason)) => reason,
                    Err(_) => "the probe got no answer in time".to_owned(),
                }
            } else {
                let look = self.look(deadline).await?;
                foreign_looks = if look.foreign.is_empty() { 0 } else { foreign_looks + 1 };
                match (look.missing.first(), look.foreign.first()) {
                    // A look is not one moment: sockets of a port that were made during it may be missed. A second one
                    // sees them, as the relay's for IPv6, which it makes right after that for IPv4.
                    (None, _) => {
                        let again = self.look(deadline).await?;
                        return Ok(self.token(if again.missing.is_empty() { again } else { look }));
                    }
                    (_, Some((port, _))) if foreign_looks >= FOREIGN_LOOKS => {
                        return Err(CompanionError::PortTaken { port: *port });
                    }
                    (Some(_), _) => {
                        let missing = look.missing.iter();
                        let ports: Vec<_> = missing
                            .map(|(port, protocol)| format!("{port} ({})", protocol.as_str()))
                            .collect();
                        format!(
                            "it does not listen for IPv4 on port {} of loopback or of all addresses",
                            ports.join(", ")
                        )
                    }
                }
            };
            if Instant::now() + delay >= deadline {
                return Err(CompanionError::NotReady { timeout: self.launch.spec.ready.timeout, last });
            }
            sleep(delay).await;
            delay = (delay * 3 / 2).min(LONGEST_DELAY);
        }
    }

    async fn look(&self, deadline: Instant) -> Result<Look, CompanionError> {
        if self.launch.ports.listening.is_empty() {
            return Ok(Look::default());
        }
        let ports = self.launch.ports.listening.clone();
        let cgroup = self.cgroup.cgroup().path.clone();
        let deadline = deadline.into_std();
        let job = move || look(&ports, &cgroup, deadline);
        Ok(self.netns.run("look for the companion's listening sockets", job).await?)
    }

    fn token(&self, look: Look) -> ReadyCompanion {
        ReadyCompanion::probe_passed(
            self.launch.spec.name.clone(),
            self.process.id(),
            self.cgroup.cgroup().clone(),
            look.listeners,
        )
    }

    async fn probe(&self, probe: &Probe, deadline: Instant) -> Result<(), String> {
        match probe {
            Probe::Tcp { port } => self.connect(*port).await.map(drop).map_err(|error| error.to_string()),
            Probe::Http { port, path } => {
                let mut stream = self.connect(*port).await.map_err(|error| error.to_string())?;
                let status = http_status(&mut stream, path).await?;
                tokio::spawn(timeout(LONGEST_FAREWELL, take_leave(stream)));
                if (200..400).contains(&status) {
                    Ok(())
                } else {
                    Err(format!("HTTP status {status} from {path}"))
                }
            }
            Probe::Exec { .. } => self.execute(deadline).await.map_err(|error| error.to_string()),
        }
    }

    /// Connects to loopback, IPv4 first.
    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let mut outcome = Err(io::ErrorKind::ConnectionRefused.into());
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            let address = SocketAddr::new(address, port);
            let make = move || {
                if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
            };
            // A socket stays in the namespace in which it was made.
            let socket = self.netns.run("make a socket", make).await.map_err(io::Error::other)?;
            outcome = socket
                .connect(address)
                .await
                .map_err(|error| io::Error::new(error.kind(), format!("port {port} of loopback: {error}")));
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    async fn execute(&self, deadline: Instant) -> Result<(), CompanionError> {
        let Some(request) = self.prepared.probe_request(self.launch, self.cgroup)? else { return Ok(()) };
        let limit = deadline.saturating_duration_since(Instant::now());
        let launching = launch::spawn(&self.host.config().launcher, request).await?;
        // A command that is given up does not run on.
        let process = Doomed::new(launching.executed(limit).await?);
        match process.get().ended().await? {
            Ending::Code(0) => Ok(()),
            status => Err(CompanionError::ProbeCommand { status }),
        }
    }
}

/// Sends one request and reads the status line; bounded in length by [`LONGEST_ANSWER`] and in time by the caller.
async fn http_status(stream: &mut TcpStream, path: &str) -> Result<u16, String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: pillion\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    while !answer.contains(&b'\n') && answer.len() < LONGEST_ANSWER {
        let received = stream.read_buf(&mut answer).await.map_err(|error| error.to_string())?;
        if received == 0 {
            break;
        }
    }
    parse_status(&answer).ok_or_else(|| "the answer is not HTTP".to_owned())
}

/// Reads the rest of the answer: closing a socket with unread data resets the connection, which servers log.
async fn take_leave(stream: TcpStream) {
    let _ = tokio::io::copy(&mut stream.take(LONGEST_BODY), &mut tokio::io::sink()).await;
}

/// `HTTP/1.x SP 3DIGIT` (RFC 9112, 4).
fn parse_status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.strip_prefix("HTTP/1.")?;
    let (minor, rest) = line.split_at_checked(1)?;
    let status = rest.strip_prefix(' ')?.get(..3)?;
    let end = rest.as_bytes().get(4);
    let delimited = matches!(end, None | Some(b' ' | b'\r'));
    (minor.bytes().all(|b| b.is_ascii_digit()) && delimited && status.bytes().all(|b| b.is_ascii_digit()))
        .then(|| status.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines() {
        for (answer, want) in [
            ("HTTP/1.1 200 OK\r\n\r\n", Some(200)),
            ("HTTP/1.0 404 Not Found\r\n", Some(404)),
            ("HTTP/1.1 204\r\n", Some(204)),
            ("HTTP/1.1 204", Some(204)),
            ("HTTP/2 200\r\n", None),
            ("HTTP/1.1 2000\r\n", None),
            ("HTTP/1.1 -20\r\n", None),
            ("HTTP/1.1  200\r\n", None),
            ("HTTP/1.1 20", None),
            ("HTTP/1.é 200", None),
            ("SSH-2.0-OpenSSH\r\n", None),
            ("", None),
        ] {
            assert_eq!(parse_status(answer.as_bytes()), want, "{answer:?}");
        }
        assert_eq!(parse_status(b"\xff\xfe\n"), None);
    }
}
