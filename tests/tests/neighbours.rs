//! Living with others: service addresses that iptables, nftables or a socket load balancer translate, and programs of others on
//! the same sockets. What comes first, what is at stake where it is not Pillion, and that nobody's programs are detached.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_redirect::{Neighbour, Order, neighbours_of};
use pillion_tests::{
    EchoServer, End, Foreign, Machine, NetNs, PillionRun, Place, ProcessGuard, Puppet,
    cgroup::cgroup2_mount,
    foreign::{At, By},
    on_machine, programs,
    puppet::Domain,
    run::{Way, dial},
    scene::{self, Scene},
    wait_until,
};
use serde_json::Value;

/// The workload's.
const OWN: [u8; 4] = [10, 77, 0, 1];
const SOON: Duration = Duration::from_secs(20);
/// Addresses of services, which no host has; the second ones are excluded.
const SERVICES: [&str; 2] = ["10.96.0.10:80", "[fd96::10]:80"];
const EXCLUDED: [&str; 2] = ["10.96.0.10:81", "[fd96::10]:81"];

fn policy(machine: &Machine) -> Result<PathBuf> {
    machine.file(
        "relay.yaml",
        "spec:\n  select: { runtimes: [process] }\n  companions: [{ name: r, builtin: relay }]\n  \
         redirect:\n    outbound: [{ to: \"r:15001\", exclude: { ports: [81] } }]\n    \
         inbound: [{ ports: [8080], to: \"r:15006\" }]\n  onFailure: closed\n",
    )
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn finish(run: PillionRun) -> Result<()> {
    let (status, stderr) = run.finish()?;
    ensure!(status.success(), "{stderr}");
    Ok(())
}

/// Redirected and excluded connections to a service arrive; the application sees the service, and the companion dials it.
fn services_are_reached(run: &mut PillionRun, servers: &[&EchoServer]) -> Result<()> {
    for (server, (service, excluded)) in servers.iter().zip(SERVICES.into_iter().zip(EXCLUDED)) {
        let before = run.records()?.len();
        assert_eq!(dial(&mut run.app, server, address(service))?, Ok(Way::Relayed), "{service}");
        assert_eq!(dial(&mut run.app, server, address(excluded))?, Ok(Way::Direct), "{excluded}");
        let records = run.wait_for_records(before + 1)?;
        let record = &records[before];
        assert_eq!((record.destination, &*record.outcome), (Some(address(service)), "ok"), "{record:?}");
    }
    Ok(())
}

fn system(netns: &NetNs, program: &str, arguments: &str) -> Result<()> {
    let mut command = Command::new(programs::system(program)?);
    command.args(arguments.split_whitespace());
    netns.run(|| ProcessGuard::finish(program, &mut command, SOON))?.success()?;
    Ok(())
}

/// The chain of kube-proxy: from a hook to the services, from a service to an endpoint.
fn translate(netns: &NetNs, iptables: &str, hook: &str, ports: [u16; 2], to: &str) -> Result<()> {
    let mask = if iptables.starts_with("ip6") { 128 } else { 32 };
    let service = address(SERVICES[usize::from(mask == 128)]).ip();
    system(netns, iptables, "-w -t nat -N KUBE-SERVICES")?;
    system(netns, iptables, "-w -t nat -N KUBE-SVC")?;
    system(netns, iptables, &format!("-w -t nat -A {hook} -j KUBE-SERVICES"))?;
    for port in ports {
        let service =
            format!("-w -t nat -A KUBE-SERVICES -d {service}/{mask} -p tcp --dport {port} -j KUBE-SVC");
        system(netns, iptables, &service)?;
    }
    system(netns, iptables, &format!("-w -t nat -A KUBE-SVC -p tcp -j DNAT --to-destination {to}"))
}

#[test]
fn kube_proxys_translation_in_the_workloads_namespace() -> Result<()> {
    on_machine(|machine| {
        // The rules of the first kind are x_tables', those of the second nf_tables'.
        for kind in ["legacy", "nft"] {
            let (near, far) = NetNs::pair()?;
            near.ip("route add default via 10.77.0.2")?;
            near.ip("-6 route add default via fd77::2")?;
            let v4 = EchoServer::start(&far, "10.77.0.2:0")?;
            let v6 = EchoServer::start(&far, "[fd77::2]:0")?;
            translate(&near, &format!("iptables-{kind}"), "OUTPUT", [80, 81], &v4.address().to_string())?;
            translate(&near, &format!("ip6tables-{kind}"), "OUTPUT", [80, 81], &v6.address().to_string())?;
            let mut run = PillionRun::start(&near, &policy(machine)?)?;
            services_are_reached(&mut run, &[&v4, &v6]).context(kind)?;
            // The connection's tracker answers SO_ORIGINAL_DST now, with the companion itself: it must not dial itself.
            let direct = run.app.converse(address("127.0.0.1:15001"), "hello")?;
            let ended = matches!(&direct, Ok(nothing) if nothing.is_empty())
                || matches!(direct, Err(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN));
            ensure!(ended, "{direct:?}");
            finish(run)?;
        }
        Ok(())
    })
}

#[test]
fn kube_proxys_translation_on_the_host() -> Result<()> {
    on_machine(|machine| {
        for kind in ["legacy", "nft"] {
            let (near, host) = NetNs::pair()?;
            let far = NetNs::new()?;
            NetNs::join(
                End { netns: &host, device: "pod", addresses: &["10.78.0.1/24", "fd78::1/64"] },
                End { netns: &far, device: "uplink", addresses: &["10.78.0.2/24", "fd78::2/64"] },
            )?;
            for (netns, route) in [
                (&near, "route add default via 10.77.0.2"),
                (&near, "-6 route add default via fd77::2"),
                (&far, "route add default via 10.78.0.1"),
                (&far, "-6 route add default via fd78::1"),
            ] {
                netns.ip(route)?;
            }
            host.run(|| {
                fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
                fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
            })?;
            let v4 = EchoServer::start(&far, "10.78.0.2:0")?;
            let v6 = EchoServer::start(&far, "[fd78::2]:0")?;
            translate(&host, &format!("iptables-{kind}"), "PREROUTING", [80, 81], &v4.address().to_string())?;
            translate(
                &host,
                &format!("ip6tables-{kind}"),
                "PREROUTING",
                [80, 81],
                &v6.address().to_string(),
            )?;
            let mut run = PillionRun::start(&near, &policy(machine)?)?;
            services_are_reached(&mut run, &[&v4, &v6]).context(kind)?;
            finish(run)?;
        }
        Ok(())
    })
}

#[test]
fn a_socket_balancer_on_the_root_comes_after_whoever_was_there_first() -> Result<()> {
    on_machine(|machine| {
        let root = cgroup2_mount()?;
        for balancer_first in [true, false] {
            let (near, far) = NetNs::pair()?;
            let v4 = EchoServer::start(&far, "10.77.0.2:0")?;
            let v6 = EchoServer::start(&far, "[fd77::2]:0")?;
            let mut balancer = Vec::new();
            let mut attach = || -> Result<()> {
                for (server, places) in
                    [&v4, &v6].into_iter().zip([[SERVICES[0], EXCLUDED[0]], [SERVICES[1], EXCLUDED[1]]])
                {
                    for service in places {
                        balancer.extend(Foreign::balancer(&root, address(service), server.address())?);
                    }
                }
                Ok(())
            };
            if balancer_first {
                attach()?;
            }
            let mut run = PillionRun::start(&near, &policy(machine)?)?;
            if !balancer_first {
                attach()?;
            }
            // There is no route to the services: it is the balancer that translates the companion's own dial.
            for (server, service) in [&v4, &v6].into_iter().zip(SERVICES) {
                let before = run.records()?.len();
                assert_eq!(dial(&mut run.app, server, address(service))?, Ok(Way::Relayed), "{service}");
                let records = run.wait_for_records(before + 1)?;
                assert_eq!(records[before].destination, Some(address(service)), "{:?}", records[before]);
            }
            for (index, server) in [&v4, &v6].into_iter().enumerate() {
                // Two services share a backend: whose name the balancer shows is its own affair.
                let socket = run.app.socket(Domain::of(address(EXCLUDED[index])))??;
                run.app.connect(socket, address(EXCLUDED[index]))??;
                run.app.send(socket, "directly")??;
                assert_eq!(run.app.receive(socket)??, "directly");
                let own = run.app.names(socket)??.local;
                assert_eq!(server.peers().last(), Some(&own), "{}", EXCLUDED[index]);
                run.app.close(socket)??;
            }
            let found = around(&run, &near)?;
            ensure!(found.len() == 8, "{found:#?}");
            for neighbour in &found {
                assert_eq!((neighbour.order, &neighbour.at_stake), (Order::After, &None), "{neighbour:?}");
                assert_eq!(neighbour.at, format!("cgroup {}", root.display()));
            }
            finish(run)?;
            for program in &balancer {
                ensure!(program.is_attached()?, "detached: {program:?}");
            }
        }
        Ok(())
    })
}

fn around(run: &PillionRun, netns: &NetNs) -> Result<Vec<Neighbour>> {
    Ok(neighbours_of(&run.cgroup("workload")?, &netns.path(), &[run.cgroup("companion-r")?])?)
}

#[test]
fn a_balancer_below_the_workload_comes_first_and_is_told() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        let mut run = PillionRun::start(&near, &policy(machine)?)?;
        let nested = run.cgroup("workload")?.join("nested");
        fs::create_dir(&nested)?;
        let pids = fs::read_to_string(run.cgroup("workload")?.join("cgroup.procs"))?;
        for pid in pids.lines() {
            fs::write(nested.join("cgroup.procs"), pid)?;
        }
        let balancer = Foreign::translator(&nested, By::Link, address(SERVICES[0]), server.address())?;
        let said = run.app.converse(address(SERVICES[0]), "hello")?;
        assert_eq!(said, Ok("hello".to_owned()));
        // What is at stake has come about: the companion was told of the backend.
        assert_eq!(run.wait_for_records(1)?[0].destination, Some(server.address()));
        let found = around(&run, &near)?;
        ensure!(
            found.len() == 1
                && found[0].order == Order::Before
                && found[0].program == balancer.id()?
                && found[0].at == format!("cgroup {}", nested.display())
                && found[0].at_stake.as_ref().is_some_and(|stake| stake.contains("before Pillion")),
            "{found:#?}"
        );
        ensure!(balancer.is_attached()?, "detached");
        drop(balancer);
        finish(run)
    })
}

#[test]
fn another_sk_lookup_program_takes_nothing_that_comes_after_it() -> Result<()> {
    on_machine(|machine| {
        // Attached before ours, with and without replacing; and after ours, with and without.
        for (first, replaces, ours_wins) in
            [(true, false, true), (true, true, true), (false, false, true), (false, true, false)]
        {
            let (near, far) = NetNs::pair()?;
            let stranger = near.run(|| TcpListener::bind("10.77.0.1:7000"))?;
            let steering = || Foreign::steering(&near.path(), OWN, 8080, &stranger, replaces);
            let mut other = if first { Some(steering()?) } else { None };
            let mut run = PillionRun::start(&near, &policy(machine)?)?;
            if !first {
                other = Some(steering()?);
            }
            let server = run.app.echo(address("[::]:8080"))??;
            let mut remote = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
            let to = SocketAddr::new("10.77.0.1".parse()?, server.port());
            if ours_wins {
                let said = remote.converse(to, "hello")?;
                assert_eq!(
                    said,
                    Ok("hello".to_owned()),
                    "{first} {replaces} {:?} {}",
                    run.counters()?,
                    run.stderr()?
                );
                assert_eq!(run.wait_for_records(1)?[0].direction, "inbound");
                // Without its companion ours selects nothing, and the kernel takes what another selects.
                run.signal(Signal::SIGSTOP)?;
                kill(Pid::from_raw(run.companion("r")?.try_into()?), Signal::SIGKILL)?;
                stranger.set_nonblocking(true)?;
                wait_until("the stranger's turn", SOON, || {
                    remote.socket(Domain::V4).is_ok_and(|socket| {
                        socket.is_ok_and(|socket| remote.connect(socket, to).is_ok_and(|done| done.is_ok()))
                    }) && stranger.accept().is_ok()
                })?;
                run.signal(Signal::SIGCONT)?;
            } else {
                let socket = remote.socket(Domain::V4)??;
                remote.connect(socket, to)??;
                stranger.accept().context("the stranger has it")?;
            }
            let found = around(&run, &near)?;
            let order = if first { Order::Before } else { Order::After };
            ensure!(found.len() == 1 && found[0].order == order, "{found:#?}");
            ensure!(found[0].at_stake.is_some(), "{found:#?}");
            ensure!(other.as_ref().is_some_and(|other| other.is_attached().unwrap_or(false)), "detached");
            drop(other);
            run.signal(Signal::SIGCONT)?;
            finish(run)?;
        }
        Ok(())
    })
}

#[test]
fn another_getsockopt_program_that_changes_answers_is_told() -> Result<()> {
    on_machine(|machine| {
        let root = cgroup2_mount()?;
        // On the companion's own cgroup, where it was attached later, and on one above, where it was there before.
        for above in [false, true] {
            let (near, far) = NetNs::pair()?;
            let server = EchoServer::start(&far, "10.77.0.2:0")?;
            let early =
                if above { Some(Foreign::idle("harmless", At::Getsockopt, &root, By::Link)?) } else { None };
            let mut run = PillionRun::start(&near, &policy(machine)?)?;
            assert_eq!(dial(&mut run.app, &server, server.address())?, Ok(Way::Relayed));
            assert_eq!(run.wait_for_records(1)?[0].destination, Some(server.address()));
            let place = if above { root.join("pillion.slice") } else { run.cgroup("companion-r")? };
            let other = Foreign::answering(&place, [10, 77, 0, 3])?;
            let _ = run.app.converse(server.address(), "hello")?;
            // What is at stake has come about: the kernel runs it after ours.
            let told = run.wait_for_records(2)?[1].destination;
            assert_eq!(told, Some(SocketAddr::new("10.77.0.3".parse()?, server.address().port())));
            let found = around(&run, &near)?;
            ensure!(found.len() == 1 + usize::from(above), "{found:#?}");
            for neighbour in &found {
                assert_eq!(
                    (neighbour.order, neighbour.at_stake.is_some()),
                    (Order::After, true),
                    "{neighbour:?}"
                );
            }
            ensure!(
                found.iter().any(|neighbour| other.id().is_ok_and(|id| id == neighbour.program)),
                "{found:#?}"
            );
            ensure!(other.is_attached()?, "detached");
            drop((other, early));
            finish(run)?;
        }
        Ok(())
    })
}

#[test]
fn programs_that_allow_no_others_are_told() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        let slice = cgroup2_mount()?.join("pillion.slice");
        // Pillion removes its slice when it is empty.
        let kept = slice.join("kept");
        fs::create_dir_all(&kept)?;
        let policy = policy(machine)?;

        let replaced = Foreign::translator(&slice, By::Override, address(EXCLUDED[0]), server.address())?;
        let run = PillionRun::start(&near, &policy)?;
        let found = around(&run, &near)?;
        ensure!(
            found.len() == 1 && found[0].order == Order::Replaced && found[0].at_stake.is_some(),
            "{found:#?}"
        );
        finish(run)?;
        ensure!(replaced.is_attached()?, "detached");
        drop(replaced);

        let alone = Foreign::translator(&slice, By::Alone, address(EXCLUDED[0]), server.address())?;
        let refused = PillionRun::start(&near, &policy).err().context("nothing can be attached below")?;
        let refused = format!("{refused:#}");
        ensure!(refused.contains("lb_connect") && refused.contains(&alone.id()?.to_string()), "{refused}");
        ensure!(alone.is_attached()?, "detached");
        drop(alone);
        fs::remove_dir(&kept)?;
        fs::remove_dir(&slice)?;
        Ok(())
    })
}

/// Everything that is found around a workload or on the machine, by program.
fn told<'a>(list: &'a Value, name: &str) -> Result<&'a Value> {
    let found = list.as_array().into_iter().flatten().find(|entry| entry["name"] == name);
    found.with_context(|| format!("no {name} in {list:#}"))
}

#[test]
fn check_and_describe_name_programs_and_owners() -> Result<()> {
    on_machine(|machine| {
        let scene = Scene::with_agent(machine)?;
        let root = cgroup2_mount()?;
        let mut app = scene.web("web")?;
        scene.says_through_relay(&mut app)?;

        let mut pinned = Foreign::translator(&root, By::Link, address(SERVICES[0]), scene.echo.address())?;
        let pin = Path::new("/sys/fs/bpf/other-balancer");
        pinned.pin(pin)?;
        let answering = Foreign::answering(&root, [10, 77, 0, 3])?;
        let stranger = scene.near.run(|| TcpListener::bind("10.77.0.1:7000"))?;
        let steering = Foreign::steering(&scene.near.path(), OWN, 8080, &stranger, true)?;

        let described = scene.agent.json(&["describe", &scene::id("web")])?;
        let neighbours = &described["neighbours"];
        let me = format!("process {} ", std::process::id());
        let owners = |of: &Value| {
            of["owners"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        for (name, attach_type, program) in [
            ("lb_connect", "connect4", &pinned),
            ("other_answer", "getsockopt", &answering),
            ("other_steer", "sk_lookup", &steering),
        ] {
            let neighbour = told(neighbours, name)?;
            assert_eq!(
                (&neighbour["attachType"], &neighbour["program"]),
                (&attach_type.into(), &program.id()?.into())
            );
            ensure!(owners(neighbour).iter().any(|owner| owner.starts_with(&me)), "{neighbour:#}");
        }
        ensure!(owners(told(neighbours, "lb_connect")?).contains(&format!("pinned at {}", pin.display())));
        ensure!(told(neighbours, "other_answer")?["atStake"].is_string(), "{neighbours:#}");
        let text = scene.agent.cli(&["describe", &scene::id("web")])?.success()?.stdout;
        for part in ["Programs of others", "lb_connect", "other_answer", "other_steer", "SO_ORIGINAL_DST"] {
            ensure!(text.contains(part), "no {part} in {text}");
        }

        let check = scene.agent.cli(&["check", "-o", "json"])?;
        let report: Value = serde_json::from_str(&check.stdout)?;
        let checks = report["checks"].as_array().context("checks")?;
        let about = |name: &str| {
            checks.iter().find(|check| check["found"].as_str().is_some_and(|found| found.contains(name)))
        };
        let balancer = about("lb_connect").context("the balancer")?;
        assert_eq!(balancer["verdict"], "ok", "{balancer:#}");
        ensure!(
            balancer["found"].as_str().is_some_and(|found| found.contains("other-balancer")),
            "{balancer:#}"
        );
        let answers = about("other_answer").context("the answering one")?;
        ensure!(answers["verdict"] == "warn" && answers["cause"].is_string(), "{answers:#}");
        about("other_steer").context("the steering one")?;

        drop(app);
        scene.agent.until_forgotten(&scene::id("web"))?;
        scene.end()?;
        // Everything of Pillion is gone, and what is not Pillion's is there.
        for program in [&pinned, &answering, &steering] {
            ensure!(program.is_attached()?, "detached: {program:?}");
        }
        ensure!(pin.exists(), "the pin is gone");
        Ok(())
    })
}
