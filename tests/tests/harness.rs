//! The harness itself: its guards do what they say, and the inventory sees what is left behind.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{errno::Errno, sys::signal::Signal};
use pillion_tests::{
    CgroupGuard, Containerd, EchoServer, Inventory, NetNs, Place, ProcessGuard, Puppet,
    containerd::Container,
    image, on_machine, programs,
    puppet::{Domain, Names},
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn namespaces_are_apart_and_joined() -> Result<()> {
    on_machine(|_| {
        let (near, far) = NetNs::pair()?;
        ensure!(near.inode()? != far.inode()?);
        for address in ["10.77.0.2:0", "[fd77::2]:0"] {
            let server = EchoServer::start(&far, address)?;
            let mut puppet = Puppet::start(Place { netns: Some(&near), cgroup: None })?;
            assert_eq!(puppet.converse(server.address(), "over the cable")?, Ok("over the cable".to_owned()));
            assert_eq!(server.peers().len(), 1);
            let done = puppet.exchange(server.address(), 20, 100_000)?.context("exchange")?;
            assert_eq!((done.exact, done.faults), (20, vec![]));
            ensure!(puppet.dismiss(SOON)?.success());
        }
        let mut outside = Puppet::start(Place::default())?;
        let server = EchoServer::start(&far, "127.0.0.1:0")?;
        assert_eq!(outside.converse(server.address(), "nobody here")?, Err(Errno::ECONNREFUSED));
        Ok(())
    })
}

#[test]
fn a_puppet_does_what_it_is_told() -> Result<()> {
    on_machine(|_| {
        let (near, far) = NetNs::pair()?;
        let mut client = Puppet::start(Place { netns: Some(&near), cgroup: None })?;
        let mut server = Puppet::start(Place { netns: Some(&far), cgroup: None })?;
        let address = "10.77.0.2:8080".parse()?;
        let listener = server.listen(address)??;

        let socket = client.socket(Domain::V4)??;
        client.bind_device(socket, "far")??;
        client.bind(socket, "10.77.0.1:40000".parse()?)??;
        client.nonblocking(socket, true)??;
        assert_eq!(client.connect(socket, address)?, Err(Errno::EINPROGRESS));
        client.finish_connect(socket)??;
        client.nonblocking(socket, false)??;
        let accepted = server.accept(listener)??;
        assert_eq!(
            server.names(accepted)??,
            Names { local: address, peer: Some("10.77.0.1:40000".parse()?) }
        );
        client.send(socket, "ping")??;
        assert_eq!(server.receive(accepted)??, "ping");
        server.send(accepted, "pong")??;
        assert_eq!(client.receive(socket)??, "pong");
        server.reset(accepted)??;
        assert_eq!(client.receive(socket)?, Err(Errno::ECONNRESET));

        let mapped = client.socket(Domain::V6)??;
        client.connect(mapped, "[::ffff:10.77.0.2]:8080".parse()?)??;
        server.accept(listener)??;
        let only = client.socket(Domain::V6)??;
        client.v6_only(only, true)??;
        assert_eq!(client.connect(only, "[::ffff:10.77.0.2]:8080".parse()?)?, Err(Errno::ENETUNREACH));

        let fast = client.socket(Domain::V4)??;
        client.fast_open(fast, address, "early")??;
        let accepted = server.accept(listener)??;
        assert_eq!(server.receive(accepted)??, "early");
        // Nothing was redirected: ENOPROTOOPT, or ENOENT where connection tracking is loaded.
        ensure!(server.original_destination(accepted, Domain::V4)?.is_err());
        assert_eq!(client.close(pillion_tests::puppet::Socket(99))?, Err(Errno::EBADF));
        Ok(())
    })
}

#[test]
fn a_cgroup_holds_its_processes_from_birth() -> Result<()> {
    on_machine(|_| {
        let cgroup = CgroupGuard::new()?;
        let nested = cgroup.child("nested")?;
        let puppet = Puppet::start(Place { netns: None, cgroup: Some(&nested) })?;
        let procs = fs::read_to_string(nested.path().join("cgroup.procs"))?;
        assert_eq!(procs.trim(), puppet.pid().to_string());
        ensure!(nested.id()? != cgroup.id()?);
        // Dropped with a process inside: the guard ends it.
        drop(nested);
        drop(cgroup);
        Ok(())
    })
}

#[test]
fn processes_end_with_their_guards() -> Result<()> {
    on_machine(|_| {
        let mut sleeper = ProcessGuard::spawn(
            "a sleeper",
            Command::new("sh")
                .args(["-c", "echo begun; trap 'echo asked >&2; exit 3' TERM; while :; do sleep 0.05; done"]),
        )?;
        sleeper.stdout_line(SOON, |line| line == "begun")?;
        let done = sleeper.stop(SOON)?.code(3)?;
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("begun\n", "asked\n"));

        // One process, not a shell with a child that would outlive it.
        let deaf = "trap '' TERM; echo deaf; exec sleep 99";
        let mut stubborn = ProcessGuard::spawn("a stubborn one", Command::new("sh").args(["-c", deaf]))?;
        stubborn.stdout_line(SOON, |line| line == "deaf")?;
        let pid = stubborn.pid();
        drop(stubborn);
        ensure!(!fs::exists(format!("/proc/{pid}"))?, "{pid} is still there");
        let early =
            ProcessGuard::spawn("one that ends", &mut Command::new("true"))?.stdout_line(SOON, |_| true);
        ensure!(early.is_err_and(|error| error.to_string().contains("ended without")));
        Ok(())
    })
}

#[test]
fn the_inventory_sees_what_is_left() -> Result<()> {
    on_machine(|machine| {
        let before = Inventory::take()?;
        let cgroup = CgroupGuard::new()?;
        let process = ProcessGuard::spawn("a leftover", Command::new("sleep").arg("99"))?;
        let pin = tempfile::Builder::new().prefix("pillion-left-").tempdir_in("/sys/fs/bpf")?;
        let file = tempfile::Builder::new().prefix("pillion-left-").tempfile_in("/tmp")?;
        let socket = machine.directory().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket)?;
        let map = pin.path().join("map");
        let create = [
            "map", "create", "PIN", "type", "array", "key", "4", "value", "4", "entries", "1", "name", "left",
        ];
        let create = create.map(|word| if word == "PIN" { map.as_os_str() } else { word.as_ref() });
        ProcessGuard::finish("bpftool", Command::new(programs::system("bpftool")?).args(create), SOON)?
            .success()?;

        let added = Inventory::take()?.added_since(&before);
        for expected in [
            format!("cgroup2: {}", cgroup.path().display()),
            format!("process: {} sleep 99", process.pid()),
            format!("pin: {}", pin.path().display()),
            format!("file: {}", file.path().display()),
            format!("socket: {}", socket.display()),
        ] {
            ensure!(added.contains(&expected), "{expected} is not in {added:#?}");
        }
        ensure!(added.iter().any(|line| line.starts_with("map: ")), "no map in {added:#?}");
        ensure!(before.expect_nothing_added(Duration::ZERO).is_err());
        fs::remove_file(&map)?;
        fs::remove_file(&socket)?;
        drop((cgroup, process, pin, file, listener));
        before.expect_nothing_added(SOON)
    })
}

#[test]
fn containerd_runs_containers() -> Result<()> {
    on_machine(|machine| {
        let (near, far) = NetNs::pair()?;
        let server = EchoServer::start(&far, "10.77.0.2:0")?;
        let mut containerd = Containerd::start(machine)?;

        let command = ["sh", "-c", "echo in the container; exec sleep 1000"];
        let container =
            Container { id: "sleeper", labels: &[("app", "test")], netns: Some(&near), command: &command };
        let pid = containerd.run(&container)?;
        wait_until("output of the container", SOON, || {
            containerd.output("sleeper").is_ok_and(|text| text == "in the container\n")
        })?;
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        ensure!(cgroups.contains("0::/pillion-test/sleeper"), "no cgroup2 of its own: {cgroups}");
        ensure!(
            containerd
                .ctr(&["containers", "info", "sleeper"])?
                .success()?
                .stdout
                .contains("\"app\": \"test\"")
        );
        let exec = containerd.exec("sleeper", &["ip", "-o", "address"])?.success()?;
        ensure!(exec.stdout.contains("10.77.0.1/24"), "another namespace: {}", exec.stdout);

        containerd.stop_daemon(Signal::SIGKILL)?;
        ensure!(fs::exists(format!("/proc/{pid}"))?, "the container ended with its daemon");
        containerd.start_daemon()?;
        assert_eq!(containerd.pid("sleeper")?, pid);

        let container =
            Container { id: "puppet", netns: Some(&near), command: &[image::PUPPET], ..Container::default() };
        let mut puppet = Puppet::under(&mut containerd.run_attached(&container)?)?;
        assert_eq!(puppet.converse(server.address(), "from a container")?, Ok("from a container".to_owned()));
        ensure!(puppet.dismiss(SOON)?.success());
        containerd.remove("sleeper")?;
        // One that is still there ends with the guard.
        containerd.run(&Container { id: "left", command: &["sleep", "1000"], ..Container::default() })?;
        Ok(())
    })
}
