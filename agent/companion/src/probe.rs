//! Readiness probes: one question to a companion, asked from within the workload's network namespace.
//!
//! Owns how each kind is asked. When, and what follows, is `readiness`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use pillion_workload::Probe;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};

use crate::{
    cgroup::CgroupGuard,
    error::CompanionError,
    exec::Prepared,
    host::{Host, Launch},
    launch,
    netns::NetnsThread,
    process::{Doomed, Ending},
};

/// A courtesy to the companion's log, in time and bytes.
const LONGEST_FAREWELL: Duration = Duration::from_secs(1);
const LONGEST_BODY: u64 = 256 * 1024;
/// A status line and its headers need no more, in bytes.
const LONGEST_ANSWER: usize = 4096;

/// What is needed to ask.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prober<'a> {
    pub(crate) host: &'a Host,
    pub(crate) launch: &'a Launch,
    pub(crate) netns: &'a NetnsThread,
    /// Where a probe's command runs, and as whom; there for every companion whose probe is one.
    pub(crate) place: Option<(&'a Prepared, &'a CgroupGuard)>,
}

impl Prober<'_> {
    /// Asks once. The caller bounds the time; a command is bounded by `deadline`.
    pub(crate) async fn ask(&self, probe: &Probe, deadline: Instant) -> Result<(), String> {
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
        let Some((prepared, cgroup)) = self.place else { return Ok(()) };
        let Some(request) = prepared.probe_request(self.launch, cgroup)? else { return Ok(()) };
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
