//! An unmodified HAProxy as the companion of a `pillion run`, configured by the example in `packaging/companions/haproxy`.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_tests::{
    EchoServer, NetNs, PillionRun, Place, Puppet, on_machine, programs,
    run::{self, Way, dial},
    wait_until,
};

const SOON: Duration = Duration::from_secs(20);
const PROGRAM: &str = "/usr/sbin/haproxy";

#[test]
fn what_the_workload_dials_by_ipv4_goes_through_haproxy() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let v4 = EchoServer::start(&far, "10.77.0.2:0")?;
        let v6 = EchoServer::start(&far, "[fd77::2]:0")?;
        let program = programs::system("haproxy")?;
        let policy = run::example(machine, "haproxy", "haproxy.cfg", (PROGRAM, &program))?;
        let mut run = PillionRun::start_with(&near, &policy, &["--label", "app=api"], &[])?;
        let mapped: SocketAddr = format!("[::ffff:10.77.0.2]:{}", v4.address().port()).parse()?;
        for address in [v4.address(), mapped] {
            let done = run.app.exchange(address, 300, 100_000)??;
            assert_eq!((done.exact, done.faults), (300, vec![]), "{address}");
            assert_eq!(dial(&mut run.app, &v4, address)?, Ok(Way::Relayed), "{address}");
        }
        assert_eq!(v4.peers().len(), 602, "one connection each");
        // Excluded by the example, for HAProxy cannot learn such destinations.
        let done = run.app.exchange(v6.address(), 50, 10_000)??;
        assert_eq!((done.exact, done.faults), (50, vec![]));
        assert_eq!(dial(&mut run.app, &v6, v6.address())?, Ok(Way::Direct));

        // Whoever dials the listener itself is turned away, not sent in a circle.
        let mut neighbour = Puppet::start(Place { netns: Some(&near), cgroup: None })?;
        let circle = neighbour.converse("127.0.0.1:15001".parse()?, "round and round")?;
        ensure!(circle.as_ref().map_or(true, String::is_empty), "{circle:?}");

        kill(Pid::from_raw(run.companion("haproxy")?.try_into()?), Signal::SIGKILL)?;
        wait_until("a refusal", SOON, || {
            run.app.converse(v4.address(), "refused").is_ok_and(|said| said == Err(Errno::ECONNREFUSED))
        })?;
        wait_until("another HAProxy", SOON, || {
            run.app.converse(v4.address(), "again").is_ok_and(|said| said == Ok("again".to_owned()))
        })?;
        assert_eq!(dial(&mut run.app, &v4, v4.address())?, Ok(Way::Relayed));
        let (status, stderr) = run.finish()?;
        ensure!(status.success(), "{stderr}");
        Ok(())
    })
}
