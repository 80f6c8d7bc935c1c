//! Limits: many workloads, many connections, many rules, and what happens when something has run out.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use pillion_redirect::{Counters, LoadOptions, RedirectGuard, Share};
use pillion_tests::{
    CgroupGuard, Place, Puppet,
    crowd::{self, Site, maps_memory, memory},
    duo::{Duo, address, to},
    on_machine,
    puppet::{Domain, Socket},
    wait_until,
};
use pillion_workload::{FailureMode, OutboundRule, Protocol, RedirectSpec};

const DEADLINE: Duration = Duration::from_secs(20);

fn all(which: usize) -> RedirectSpec {
    RedirectSpec { outbound: vec![OutboundRule::all_tcp(to(which))], ..RedirectSpec::default() }
}

/// Of so many things that take `bytes`.
fn each(bytes: u64, count: u32) -> u64 {
    bytes / u64::from(count)
}

/// What a workload has of what all share.
fn taken(guard: &RedirectGuard) -> Result<[u64; 4]> {
    Ok(guard.share().context("a workload that is counted")?.taken)
}

#[test]
fn a_thousand_workloads() -> Result<()> {
    const WORKLOADS: u32 = 1000;
    const SITES: usize = 4;
    on_machine(|machine| {
        let dataplane = crowd::dataplane(machine, |options| options)?;
        let mut sites = (0..SITES).map(|_| Site::new()).collect::<Result<Vec<_>>>()?;
        let own = Path::new("/proc/self/status");
        let (maps, resident) = (maps_memory(None)?, memory(own, "VmRSS")?);
        let cgroups: Vec<_> =
            (0..WORKLOADS).map(|_| Ok((CgroupGuard::new()?, CgroupGuard::new()?))).collect::<Result<_>>()?;
        let slab = memory(Path::new("/proc/meminfo"), "SUnreclaim")?;
        let mut workloads = Vec::new();
        let began = Instant::now();
        for (number, (workload, other)) in cgroups.into_iter().enumerate() {
            let site = &sites[number % SITES];
            // The kernel takes 64 programs of a kind for one cgroup: a companion's process is in its first workload's.
            let companion = if number < SITES { &site.cgroup } else { &other };
            let guard = site.attach(&dataplane, &workload, companion)?;
            workloads.push((guard, workload, other));
        }
        println!("{WORKLOADS} attached in {:?}", began.elapsed());
        println!(
            "for each: {} bytes in maps, {} of the process, about {} of other memory of the kernel",
            each(maps_memory(None)? - maps, WORKLOADS),
            each(memory(own, "VmRSS")?.saturating_sub(resident), WORKLOADS),
            each(memory(Path::new("/proc/meminfo"), "SUnreclaim")?.saturating_sub(slab), WORKLOADS)
        );
        for (number, (guard, workload, _)) in workloads.iter().enumerate() {
            let site = &mut sites[number % SITES];
            workload.add(site.app.pid())?;
            assert_eq!(site.app.hold_open(1)??.sent, 1, "workload {number}");
            assert_eq!(taken(guard)?[Share::CONNECTIONS], 1, "workload {number}");
        }
        for site in &mut sites {
            let expected = WORKLOADS / u32::try_from(SITES)?;
            wait_until("the companion's questions", DEADLINE, || {
                site.companion.held_seen().is_ok_and(|seen| seen.is_ok_and(|seen| seen.right == expected))
            })?;
        }
        let counters = dataplane.counters()?;
        assert_eq!(counters.connections, u64::from(WORKLOADS));
        assert_eq!((counters.slots_busy, counters.by_source), (0, u64::from(WORKLOADS)));
        let began = Instant::now();
        for (guard, _, _) in &mut workloads {
            assert_eq!(guard.drain()?, 0);
        }
        let mut cgroups = Vec::new();
        for (guard, workload, other) in workloads {
            guard.detach()?;
            cgroups.push((workload, other));
        }
        println!("{WORKLOADS} detached in {:?}", began.elapsed());
        let counters = dataplane.counters()?;
        assert_eq!((counters.connections, counters.by_source), (0, 0));
        // What is freed after a grace period is still counted.
        let given_back = || maps_memory(None).is_ok_and(|now| now <= maps);
        wait_until("the maps' memory given back", DEADLINE, given_back)?;
        drop((sites, cgroups));
        crowd::end(dataplane)
    })
}

#[test]
fn a_hundred_thousand_connections() -> Result<()> {
    // An ordinary process has no more than 20,000 descriptors here.
    const SITES: u32 = 6;
    const EACH: u32 = 16_700;
    on_machine(|machine| {
        let dataplane = crowd::dataplane(machine, |options| options)?;
        let mut workloads = Vec::new();
        for _ in 0..SITES {
            let (site, workload) = (Site::new()?, CgroupGuard::new()?);
            let guard = site.attach(&dataplane, &workload, &site.cgroup)?;
            workload.add(site.app.pid())?;
            workloads.push((site, guard, workload));
        }
        let before = [maps_memory(Some("PL_REDIRECTED"))?, maps_memory(Some("PL_BY_SOURCE"))?];
        let began = Instant::now();
        for (site, guard, _) in &mut workloads {
            let held = site.app.hold_open(EACH)??;
            assert_eq!((held.sent, &held.failed), (EACH, &[].into()));
            wait_until("the companion's questions", DEADLINE, || {
                site.companion.held_seen().is_ok_and(|seen| seen.is_ok_and(|seen| seen.accepted == EACH))
            })?;
            let seen = site.companion.held_seen()??;
            assert_eq!((seen.right, seen.wrong, seen.unanswered), (EACH, 0, 0));
            let each = u64::from(EACH);
            assert_eq!(taken(guard)?, [0, each, each, 0]);
        }
        let total = SITES * EACH;
        println!("{total} connections, open at once, in {:?}", began.elapsed());
        let counters = dataplane.counters()?;
        assert_eq!((counters.connections, counters.by_source), (u64::from(total), u64::from(total)));
        assert_eq!((counters.slots_exhausted, counters.share_exhausted), (0, 0));
        println!(
            "for each: {} bytes of sockets, {} by source",
            each(maps_memory(Some("PL_REDIRECTED"))? - before[0], total),
            each(maps_memory(Some("PL_BY_SOURCE"))? - before[1], total)
        );
        let began = Instant::now();
        for (site, _, _) in &mut workloads {
            site.app.let_go()??;
            site.companion.let_go()??;
        }
        let mut left = dataplane.counters()?;
        wait_until("no connection left", DEADLINE, || {
            left = dataplane.counters().unwrap_or(left);
            (left.connections, left.by_source, left.slots_busy) == (0, 0, 0)
        })
        .with_context(|| format!("{left:?}"))?;
        println!("closed in {:?}", began.elapsed());
        let mut rest = Vec::new();
        for (site, mut guard, workload) in workloads {
            assert_eq!(taken(&guard)?, [0; 4]);
            assert_eq!(guard.drain()?, 0);
            guard.detach()?;
            rest.push((site, workload));
        }
        drop(rest);
        crowd::end(dataplane)
    })
}

/// Connects, and returns the open socket, or the error.
fn connect(app: &mut Puppet, destination: &str) -> Result<std::result::Result<Socket, Errno>> {
    let socket = app.socket(Domain::of(address(destination)))??;
    Ok(match app.connect(socket, address(destination))? {
        Ok(()) => Ok(socket),
        Err(errno) => {
            app.close(socket)??;
            Err(errno)
        }
    })
}

/// Has a companion accept the next connection, which wants to go to `destination`, and keep it.
fn asked(duo: &mut Duo, which: usize, destination: &str) -> Result<Socket> {
    let companion = &mut duo.companions[which];
    let accepted = companion.puppet.accept(companion.listeners[0])??;
    let told = companion.puppet.original_destination(accepted, Domain::V4)?;
    assert_eq!(told, Ok(address(destination)));
    Ok(accepted)
}

/// What a connection to the far host's echo does while a bound is reached.
fn fails_by_policy(duo: &mut Duo, mode: FailureMode, server: &str) -> Result<()> {
    let expected = match mode {
        FailureMode::Open => Ok("hello".to_owned()),
        FailureMode::Closed => Err(Errno::EADDRNOTAVAIL),
    };
    let before = duo.dataplane.counters()?;
    assert_eq!(duo.app.converse(address(server), "hello")?, expected);
    let after = duo.dataplane.counters()?;
    let failed = match mode {
        FailureMode::Open => after.outbound_failed_open - before.outbound_failed_open,
        FailureMode::Closed => after.outbound_failed_closed - before.outbound_failed_closed,
    };
    let noticed =
        after.slots_exhausted + after.share_exhausted - before.slots_exhausted - before.share_exhausted;
    assert_eq!((failed, noticed), (1, 1), "{after:?}");
    Ok(())
}

#[test]
fn the_table_of_connections_runs_out_by_policy() -> Result<()> {
    const CONNECTIONS: u32 = 64;
    const FAR: &str = "10.77.0.2:80";
    on_machine(|machine| {
        for mode in [FailureMode::Closed, FailureMode::Open] {
            let limits = |options| LoadOptions { connections: CONNECTIONS, ..options }.for_one_workload();
            let mut duo = Duo::with(machine, limits)?;
            duo.attach(&all(0), mode)?;
            duo.remote.echo(address(FAR))??;
            let destination = |number: u32| format!("192.0.2.{number}:80");
            let mut open = Vec::new();
            let mut kept = Vec::new();
            for number in 1..=CONNECTIONS {
                open.push(connect(&mut duo.app, &destination(number))??);
                kept.push(asked(&mut duo, 0, &destination(number))?);
            }
            fails_by_policy(&mut duo, mode, FAR)?;
            // One that is closed makes room for one.
            duo.app.close(open.pop().context("open")?)??;
            open.push(connect(&mut duo.app, "192.0.2.100:80")??);
            fails_by_policy(&mut duo, mode, FAR)?;
            // What companions keep open fills the other table; without room there the question is answered all the same.
            let late = asked(&mut duo, 0, "192.0.2.100:80")?;
            assert_eq!(duo.dataplane.counters()?.slots_busy, 1, "the slot waits for a second question");
            for socket in open.drain(..) {
                duo.app.close(socket)??;
            }
            // A bound socket needs a place in it at once.
            let bound = duo.app.socket(Domain::V4)??;
            duo.app.bind(bound, address("10.77.0.1:40001"))??;
            let refused = duo.app.connect(bound, address(FAR))?;
            assert_eq!(refused, if mode == FailureMode::Closed { Err(Errno::EADDRNOTAVAIL) } else { Ok(()) });
            duo.app.close(bound)??;
            for socket in kept.drain(..).chain([late]) {
                duo.companions[0].puppet.close(socket)??;
            }
            let counters = duo.dataplane.counters()?;
            assert_eq!((counters.connections, counters.by_source, counters.slots_busy), (0, 0, 0));
            assert_eq!(share(&duo)?, [0; 4]);
            let again = duo.app.socket(Domain::V4)??;
            duo.app.bind(again, address("10.77.0.1:40002"))??;
            duo.app.connect(again, address("192.0.2.101:80"))??;
            let last = asked(&mut duo, 0, "192.0.2.101:80")?;
            duo.app.close(again)??;
            duo.companions[0].puppet.close(last)??;
            duo.end()?;
        }
        Ok(())
    })
}

fn share(duo: &Duo) -> Result<[u64; 4]> {
    taken(duo.guard.as_ref().context("attached")?)
}

#[test]
fn destinations_of_datagrams_run_out_by_policy() -> Result<()> {
    const DESTINATIONS: u32 = 64;
    on_machine(|machine| {
        for mode in [FailureMode::Closed, FailureMode::Open] {
            let limits = |options| LoadOptions { slots: DESTINATIONS, ..options }.for_one_workload();
            let mut duo = Duo::with(machine, limits)?;
            let mut spec = all(0);
            spec.outbound[0].protocols = [Protocol::Tcp, Protocol::Udp].into();
            duo.attach(&spec, mode)?;
            duo.remote.answer(address("10.77.0.2:53"), "far ")??;
            let socket = duo.app.datagrams(Domain::V4)??;
            for number in 1..=DESTINATIONS {
                duo.app.send_to(socket, address(&format!("192.0.2.{number}:53")), "to")??;
            }
            assert_eq!(share(&duo)?[Share::PEERS], u64::from(DESTINATIONS));
            // Those that are known still are.
            duo.app.send_to(socket, address("192.0.2.1:53"), "to")??;
            let before = duo.dataplane.counters()?;
            let asked = duo.app.ask_datagram(address("10.77.0.2:53"), "hello")?;
            match mode {
                FailureMode::Closed => assert_eq!(asked, Err(Errno::EADDRNOTAVAIL)),
                FailureMode::Open => {
                    assert_eq!(asked, Ok(("far hello".to_owned(), address("10.77.0.2:53"))));
                }
            }
            let after = duo.dataplane.counters()?;
            let noticed = |counters: &Counters| counters.slots_exhausted + counters.share_exhausted;
            assert_eq!(noticed(&after), noticed(&before) + 1);
            duo.app.close(socket)??;
            // A workload's destinations end with it, not ten minutes later. (Free ones are found by chance: half of them
            // are enough for that.)
            let mut guard = duo.guard.take().context("attached")?;
            guard.drain()?;
            guard.detach()?;
            duo.attach(&spec, mode)?;
            let socket = duo.app.datagrams(Domain::V4)??;
            for number in 1..=DESTINATIONS / 2 {
                duo.app.send_to(socket, address(&format!("198.51.100.{number}:53")), "to")??;
            }
            assert_eq!(share(&duo)?[Share::PEERS], u64::from(DESTINATIONS / 2));
            duo.app.close(socket)??;
            duo.end()?;
        }
        Ok(())
    })
}

#[test]
fn rules_without_room_leave_those_before() -> Result<()> {
    const ENTRIES: u32 = 256;
    on_machine(|machine| {
        let mut duo = Duo::with(machine, |options| LoadOptions { table_entries: ENTRIES, ..options })?;
        duo.near.ip("route add unreachable 192.0.0.0/8")?;
        let networks = |count: u32, to_which| -> Result<RedirectSpec> {
            let mut spec = all(to_which);
            spec.outbound[0].cidrs = (0..count)
                .map(|number| format!("192.0.{number}.0/24").parse())
                .collect::<std::result::Result<_, _>>()?;
            Ok(spec)
        };
        duo.attach(&networks(100, 0)?, FailureMode::Closed)?;
        assert_eq!(duo.goes_to(address("192.0.99.1:80"))?, Ok((0, address("192.0.99.1:80"))));
        // Both tables are there while one takes the other's place.
        let refused = duo.update(&networks(200, 1)?, FailureMode::Closed);
        let refused = format!("{:#}", refused.expect_err("no room"));
        assert!(refused.contains("PL_NETS4"), "{refused}");
        assert_eq!(duo.goes_to(address("192.0.99.1:80"))?, Ok((0, address("192.0.99.1:80"))));
        assert!(duo.goes_to(address("192.0.150.1:80"))?.is_err());
        // A second workload, which then makes room.
        let first = duo.guard.take();
        let other = CgroupGuard::new()?;
        let workload = std::mem::replace(&mut duo.workload, other);
        assert!(duo.attach(&networks(200, 1)?, FailureMode::Closed).is_err());
        duo.attach(&networks(100, 1)?, FailureMode::Closed)?;
        duo.guard.take().context("attached")?.detach()?;
        duo.workload = workload;
        duo.guard = first;
        duo.update(&networks(150, 1)?, FailureMode::Closed)?;
        assert_eq!(duo.goes_to(address("192.0.149.1:80"))?, Ok((1, address("192.0.149.1:80"))));
        duo.end()
    })
}

#[test]
fn one_workload_does_not_use_up_what_is_for_all() -> Result<()> {
    const SLOTS: u32 = 32;
    on_machine(|machine| {
        let limits = |options| LoadOptions {
            slots: 2 * SLOTS,
            slots_per_workload: SLOTS,
            connections_per_workload: SLOTS + 8,
            ..options
        };
        let mut duo = Duo::with(machine, limits)?;
        duo.remote.echo(address("10.77.0.2:80"))??;
        // The neighbour, with the second companion.
        let hostile = std::mem::replace(&mut duo.workload, CgroupGuard::new()?);
        let mut neighbour = Puppet::start(Place { netns: Some(&duo.near), cgroup: Some(&duo.workload) })?;
        duo.attach(&all(1), FailureMode::Closed)?;
        let beside: RedirectGuard = duo.guard.take().context("attached")?;
        let workload = std::mem::replace(&mut duo.workload, hostile);
        duo.attach(&all(0), FailureMode::Closed)?;

        let mut open = Vec::new();
        for _ in 0..SLOTS {
            open.push(connect(&mut duo.app, "192.0.2.1:80")??);
        }
        assert_eq!(share(&duo)?, [u64::from(SLOTS), u64::from(SLOTS), 0, 0]);
        fails_by_policy(&mut duo, FailureMode::Closed, "10.77.0.2:80")?;
        let counters = duo.dataplane.counters()?;
        assert_eq!((counters.share_exhausted, counters.slots_exhausted), (1, 0));
        for _ in 0..2 * SLOTS {
            let socket = connect(&mut neighbour, "192.0.2.2:80")??;
            let accepted = asked(&mut duo, 1, "192.0.2.2:80")?;
            neighbour.close(socket)??;
            duo.companions[1].puppet.close(accepted)??;
        }
        assert_eq!(taken(&beside)?, [0; 4]);
        // With its questions answered it has slots again, but no more sockets than its share.
        let mut kept = Vec::new();
        for _ in 0..SLOTS {
            kept.push(asked(&mut duo, 0, "192.0.2.1:80")?);
        }
        for _ in 0..8 {
            open.push(connect(&mut duo.app, "192.0.2.3:80")??);
            kept.push(asked(&mut duo, 0, "192.0.2.3:80")?);
        }
        assert_eq!(share(&duo)?, [0, u64::from(SLOTS) + 8, u64::from(SLOTS) + 8, 0]);
        fails_by_policy(&mut duo, FailureMode::Closed, "10.77.0.2:80")?;
        assert_eq!(share(&duo)?[Share::SLOTS], 0, "the slot of what was refused is given back");
        let socket = connect(&mut neighbour, "192.0.2.2:80")??;
        let accepted = asked(&mut duo, 1, "192.0.2.2:80")?;
        neighbour.close(socket)??;
        duo.companions[1].puppet.close(accepted)??;
        for socket in open {
            duo.app.close(socket)??;
        }
        for socket in kept {
            duo.companions[0].puppet.close(socket)??;
        }
        assert_eq!(share(&duo)?, [0; 4]);
        beside.detach()?;
        drop((neighbour, workload));
        duo.end()
    })
}

#[test]
fn ten_thousand_rules_on_a_live_workload() -> Result<()> {
    const RULES: u32 = 10_000;
    on_machine(|machine| {
        let mut duo = Duo::new(machine)?;
        let rules = |which: usize| -> Result<RedirectSpec> {
            let rule = |number: u32| -> Result<OutboundRule> {
                let mut rule = OutboundRule::all_tcp(to(which));
                rule.cidrs = vec![format!("10.{}.{}.0/24", 100 + number / 256, number % 256).parse()?];
                rule.ports = [u16::try_from(1000 + number)?].into();
                Ok(rule)
            };
            let outbound = (0..RULES).map(rule).collect::<Result<_>>()?;
            Ok(RedirectSpec { outbound, ..RedirectSpec::default() })
        };
        let last =
            address(&format!("10.{}.{}.9:{}", 100 + (RULES - 1) / 256, (RULES - 1) % 256, 999 + RULES));
        let before = maps_memory(None)?;
        let began = Instant::now();
        duo.attach(&rules(0)?, FailureMode::Closed)?;
        println!("{RULES} rules attached in {:?}", began.elapsed());
        println!("for each: {} bytes in maps", each(maps_memory(None)? - before, RULES));
        assert_eq!(duo.goes_to(last)?, Ok((0, last)));
        let open = connect(&mut duo.app, &last.to_string())??;
        let accepted = asked(&mut duo, 0, &last.to_string())?;
        for which in [1, 0, 1] {
            let began = Instant::now();
            duo.update(&rules(which)?, FailureMode::Closed)?;
            println!("{RULES} rules changed in {:?}", began.elapsed());
            assert_eq!(duo.goes_to(last)?, Ok((which, last)));
            duo.app.send(open, "still there")??;
            assert_eq!(duo.companions[0].puppet.receive(accepted)??, "still there");
        }
        duo.app.close(open)??;
        duo.companions[0].puppet.close(accepted)??;
        duo.end()
    })
}
