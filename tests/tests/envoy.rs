//! An unmodified Envoy as the companion of a `pillion run`, configured by the example in `packaging/companions/envoy`.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    EchoServer, Machine, NetNs, PillionRun, Place, Puppet, on_machine, programs, run, wait_until,
};

const SOON: Duration = Duration::from_secs(20);
/// What the policy selects.
const LABEL: [&str; 2] = ["--label", "app=api"];
const ADMIN: &str = "127.0.0.1:9901";

fn policy(machine: &Machine) -> Result<PathBuf> {
    let envoy = programs::for_everybody(&programs::envoy()?, machine.directory())?;
    run::example(machine, "envoy", "envoy.yaml", ("/usr/bin/envoy", &envoy))
}

/// A counter of Envoy's, as its admin interface tells it from within the workload's namespace.
fn stat(netns: &NetNs, name: &str) -> Result<u64> {
    let answer = netns.run(|| -> Result<String> {
        let mut stream = TcpStream::connect(ADMIN).context("Envoy's admin port")?;
        stream.set_read_timeout(Some(SOON))?;
        write!(stream, "GET /stats?filter=^{name}$ HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let value = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    value.and_then(|value| value.trim().parse().ok()).with_context(|| format!("no {name} in {answer}"))
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        std::net::IpAddr::V4(ip) => (ip.to_ipv6_mapped(), address.port()).into(),
        std::net::IpAddr::V6(_) => address,
    }
}

#[test]
fn what_the_workload_dials_goes_through_envoy() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let v4 = EchoServer::start(&far, "10.77.0.2:0")?;
        let v6 = EchoServer::start(&far, "[fd77::2]:0")?;
        let mut run = PillionRun::start_with(&near, &policy(machine)?, &LABEL, &[])?;
        let (mut connections, mut bytes) = (0, 0);
        for (address, count) in [(v4.address(), 300), (v6.address(), 300), (mapped(v4.address()), 100)] {
            let done = run.app.exchange(address, count, 100_000)??;
            assert_eq!((done.exact, done.faults), (count, vec![]), "{address}");
            (connections, bytes) = (connections + u64::from(count), bytes + done.bytes);
            // Envoy counts what it read when it is done with a connection.
            wait_until("Envoy's counters", SOON, || {
                let seen = stat(&near, "tcp.outbound.downstream_cx_total").ok();
                let read = stat(&near, "tcp.outbound.downstream_cx_rx_bytes_total").ok();
                (seen, read) == (Some(connections), Some(bytes))
            })
            .with_context(|| format!("{connections} connections to {address}, {bytes} bytes"))?;
        }
        assert_eq!((v4.peers().len(), v6.peers().len()), (400, 300));
        assert_eq!(stat(&near, "tcp.outbound.downstream_cx_no_route")?, 0);

        // Nobody dials for it once it is gone; another one does.
        let envoy = run.companion("envoy")?;
        kill(Pid::from_raw(envoy.try_into()?), Signal::SIGKILL)?;
        wait_until("a refusal", SOON, || {
            run.app.converse(v4.address(), "refused").is_ok_and(|said| said == Err(Errno::ECONNREFUSED))
        })?;
        let before = v4.peers().len();
        wait_until("another Envoy", SOON, || {
            run.app.converse(v4.address(), "again").is_ok_and(|said| said == Ok("again".to_owned()))
        })?;
        assert_eq!(v4.peers().len(), before + 1);
        assert_eq!(stat(&near, "tcp.outbound.downstream_cx_total")?, 1);
        let (status, stderr) = run.finish()?;
        ensure!(status.success(), "{stderr}");
        Ok(())
    })
}

#[test]
fn what_dials_the_workload_goes_through_envoy() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let mut run = PillionRun::start_with(&near, &policy(machine)?, &LABEL, &[])?;
        let mut client = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
        run.app.echo("[::]:8080".parse()?)??;
        let (mut connections, mut bytes) = (0, 0);
        for address in ["10.77.0.1:8080", "[fd77::1]:8080", "[::ffff:10.77.0.1]:8080"] {
            let done = client.exchange(address.parse()?, 150, 100_000)??;
            assert_eq!((done.exact, done.faults), (150, vec![]), "{address}");
            (connections, bytes) = (connections + 150, bytes + done.bytes);
            wait_until("Envoy's counters", SOON, || {
                let seen = stat(&near, "tcp.inbound.downstream_cx_total").ok();
                let read = stat(&near, "tcp.inbound.downstream_cx_rx_bytes_total").ok();
                (seen, read) == (Some(connections), Some(bytes))
            })
            .with_context(|| format!("{connections} connections to {address}, {bytes} bytes"))?;
        }
        // Within the namespace, and on other ports, nothing is taken.
        let other = run.app.echo("[::]:8081".parse()?)??;
        let mut neighbour = Puppet::start(Place { netns: Some(&near), cgroup: None })?;
        for (puppet, address) in
            [(&mut neighbour, "127.0.0.1:8080"), (&mut client, &*format!("10.77.0.1:{}", other.port()))]
        {
            assert_eq!(puppet.converse(address.parse()?, "past")?, Ok("past".to_owned()), "{address}");
        }
        assert_eq!(stat(&near, "tcp.inbound.downstream_cx_total")?, connections);
        assert_eq!(stat(&near, "tcp.outbound.downstream_cx_total")?, 0);
        let (status, stderr) = run.finish()?;
        ensure!(status.success(), "{stderr}");
        Ok(())
    })
}
