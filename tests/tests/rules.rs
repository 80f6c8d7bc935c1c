//! Ordered rules and exclusions in the kernel: which companion a connection goes to, changed while connections are open.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use pillion_tests::{
    Puppet,
    duo::{Duo, address, to},
    on_machine, programs,
    puppet::Domain,
};
use pillion_workload::{Exclusions, Exemptions, FailureMode, OutboundRule, PortSet, RedirectSpec};

/// Which companion, or the error of `connect`; `None`: it went out directly, where nobody listens.
type Expected = Option<usize>;

fn rules() -> RedirectSpec {
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a network")).collect();
    let mut first = OutboundRule::all_tcp(to(0));
    first.cidrs = networks(&["192.0.2.0/24", "2001:db8::/32"]);
    first.ports = PortSet::from_ranges([80..=80, 8000..=8999]);
    first.exclude = Exclusions { ports: [8080].into(), cidrs: networks(&["192.0.2.128/25"]) };
    let mut second = OutboundRule::all_tcp(to(1));
    second.cidrs = networks(&["192.0.2.0/23", "2001:db8::/31"]);
    RedirectSpec {
        outbound: vec![first, second],
        exclude: Exemptions {
            destinations: Exclusions { ports: [22].into(), cidrs: networks(&["192.0.2.66/32"]) },
            ..Exemptions::default()
        },
        ..RedirectSpec::default()
    }
}

fn check(duo: &mut Duo, table: &[(&str, Expected)]) -> Result<()> {
    for (text, expected) in table {
        let destination = address(text);
        let shown = match destination {
            SocketAddr::V6(six) => {
                six.ip().to_ipv4_mapped().map_or(destination, |ip| (ip, six.port()).into())
            }
            SocketAddr::V4(_) => destination,
        };
        // The far host has no such address: what passes is refused by its kernel or finds no route.
        let got = match duo.goes_to(destination)? {
            Ok((which, told)) => {
                assert_eq!(told, shown, "the original destination");
                Some(which)
            }
            Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::ECONNREFUSED | Errno::EINPROGRESS) => None,
            Err(other) => return Err(other).with_context(|| format!("connect to {text}")),
        };
        assert_eq!(got, *expected, "{text}");
    }
    Ok(())
}

#[test]
fn the_first_rule_that_matches_decides() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        // What passes ends at once instead of in a time limit.
        duo.near.ip("route add unreachable 192.0.0.0/8")?;
        duo.near.ip("-6 route add unreachable 2001::/16")?;
        duo.attach(&rules(), FailureMode::Closed)?;
        check(
            &mut duo,
            &[
                ("192.0.2.1:80", Some(0)),
                ("192.0.2.1:8000", Some(0)),
                ("192.0.2.1:8999", Some(0)),
                ("192.0.2.1:9000", Some(1)),
                ("192.0.2.1:8080", Some(1)),
                ("192.0.2.200:80", Some(1)),
                ("192.0.3.1:80", Some(1)),
                ("192.0.4.1:80", None),
                ("192.0.2.1:22", None),
                ("192.0.2.66:80", None),
                ("[::ffff:192.0.2.1]:80", Some(0)),
                ("[::ffff:192.0.2.1]:81", Some(1)),
                ("[2001:db8::1]:80", Some(0)),
                ("[2001:db8::1]:81", Some(1)),
                ("[2001:db9::1]:80", Some(1)),
                ("[2001:dba::1]:80", None),
            ],
        )?;
        let counters = duo.dataplane.counters()?;
        assert_eq!((counters.outbound_redirected, counters.outbound_excluded), (12, 4));
        duo.end()
    })
}

#[test]
fn changed_rules_leave_open_connections_alone() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        duo.near.ip("route add unreachable 192.0.0.0/8")?;
        let all = |which| RedirectSpec {
            outbound: vec![OutboundRule::all_tcp(to(which))],
            ..RedirectSpec::default()
        };
        duo.attach(&all(0), FailureMode::Closed)?;
        let server = address("192.0.2.1:80");
        let open = duo.app.socket(Domain::V4)??;
        duo.app.connect(open, server)??;
        let companion = &mut duo.companions[0];
        let accepted = companion.puppet.accept(companion.listeners[0])??;
        let mut spec = rules();
        for round in 0..6 {
            let (spec, expected) = if round % 2 == 0 { (&spec, 1) } else { (&all(0), 0) };
            duo.update(spec, FailureMode::Closed)?;
            check(&mut duo, &[("192.0.3.1:80", Some(expected))])?;
            let text = format!("round {round}");
            duo.app.send(open, &text)??;
            assert_eq!(duo.companions[0].puppet.receive(accepted)??, text);
            assert_eq!(duo.app.names(open)??.peer, Some(server));
        }
        // A rule that cannot be put in force leaves the ones before.
        spec.outbound[0].ports = (0..2000).map(|port| port * 2 + 1).collect();
        for third in 0..200_u8 {
            let rule = OutboundRule {
                cidrs: vec![format!("192.1.{third}.0/24").parse()?],
                ports: spec.outbound[0].ports.clone(),
                ..OutboundRule::all_tcp(to(0))
            };
            spec.outbound.push(rule);
        }
        let refused = duo.update(&spec, FailureMode::Closed);
        assert!(format!("{:#}", refused.expect_err("too much")).contains("131072 entries"));
        check(&mut duo, &[("192.0.3.1:80", Some(0))])?;
        // Left and taken up by the next agent, which then changes them.
        let record = duo.guard.as_mut().context("attached")?.record();
        duo.guard.take().context("attached")?.leave();
        let netns = fs::File::open(duo.near.path())?;
        duo.guard = Some(duo.dataplane.adopt(&record, std::os::fd::AsFd::as_fd(&netns))?);
        check(&mut duo, &[("192.0.3.1:80", Some(0))])?;
        duo.update(&rules(), FailureMode::Closed)?;
        check(&mut duo, &[("192.0.3.1:80", Some(1)), ("192.0.4.1:80", None)])?;
        duo.companions[0].puppet.close(accepted)??;
        duo.app.close(open)??;
        duo.end()
    })
}

#[test]
fn users_and_programs_are_left_alone() -> Result<()> {
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        duo.near.ip("route add unreachable 192.0.0.0/8")?;
        let directory = tempfile::tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let inner = directory.path().join("bin");
        fs::create_dir(&inner)?;
        let copy = |name: &str| -> Result<std::path::PathBuf> {
            let path = inner.join(name);
            fs::copy(programs::puppet()?, &path)?;
            Ok(path)
        };
        let (excluded, other) = (copy("excluded")?, copy("other")?);
        let mut spec =
            RedirectSpec { outbound: vec![OutboundRule::all_tcp(to(0))], ..RedirectSpec::default() };
        spec.exclude.users = [1337].into();
        spec.exclude.executables = [excluded.clone(), "/usr/bin/excluded".into()].into();
        duo.attach(&spec, FailureMode::Closed)?;
        let destination = address("192.0.2.1:80");
        let puppet = |program: &std::path::Path, user: Option<u32>| -> Result<Puppet> {
            let mut command = duo.nested.command(program);
            let mut puppet = duo.near.run(|| Puppet::under(&mut command))?;
            if let Some(user) = user {
                puppet.become_user(user)??;
            }
            Ok(puppet)
        };
        for (program, user, passes) in [
            (&other, None, false),
            (&excluded, None, true),
            (&other, Some(1337), true),
            (&other, Some(1338), false),
            (&excluded, Some(1338), true),
        ] {
            let mut puppet = puppet(program, user)?;
            let socket = puppet.socket(Domain::V4)??;
            let connected = puppet.connect(socket, destination)?;
            let expected = if passes { Err(Errno::EHOSTUNREACH) } else { Ok(()) };
            assert_eq!(connected, expected, "{} as {user:?}", program.display());
        }
        // Another file of the same name elsewhere, the same file under another name, and one seen through a mount.
        let elsewhere = directory.path().join("excluded");
        fs::hard_link(&excluded, &elsewhere)?;
        let mut linked = puppet(&elsewhere, None)?;
        let socket = linked.socket(Domain::V4)??;
        assert_eq!(linked.connect(socket, destination)?, Ok(()), "another path");
        drop(linked);
        // Within a root of its own the path is the one that the workload sees.
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("usr/bin"))?;
        for name in ["usr", "lib", "lib64", "proc", "dev"] {
            fs::create_dir_all(root.join(name))?;
        }
        let script = format!(
            "mount --bind /lib {r}/lib && mount --bind /lib64 {r}/lib64 && mount --bind {} {r}/usr/bin && exec chroot {r} /usr/bin/excluded",
            inner.display(),
            r = root.display(),
        );
        let mut command = duo.nested.command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
        let mut inside = duo.near.run(|| Puppet::under(&mut command))?;
        let socket = inside.socket(Domain::V4)??;
        assert_eq!(
            inside.connect(socket, destination)?,
            Err(Errno::EHOSTUNREACH),
            "seen as /usr/bin/excluded"
        );
        drop(inside);
        let counters = duo.dataplane.counters()?;
        assert_eq!((counters.outbound_redirected, counters.outbound_excluded), (3, 4));
        duo.end()
    })
}
