//! The Debian package, installed by dpkg on a real systemd: what it brings, what it does at boot and without the agent, and that its
//! removal leaves nothing. `cargo xtask test` makes the package first; by hand: `cargo xtask dist deb --profile dev`.

use std::{fs::File, time::Duration};

use anyhow::{Context as _, Result, ensure};
use pillion_tests::{
    on_machine, programs,
    systemd::{Booted, policy},
    wait_until,
};

const SOON: Duration = Duration::from_secs(30);

#[test]
fn the_package_is_installed_works_and_leaves_nothing() -> Result<()> {
    on_machine(|_| {
        let booted = Booted::new()?;
        let far = booted.echo.address();
        let before = footprint(&booted)?;
        // The machine may lack the privilege for a lower score.
        booted.file("/run/systemd/system/pillion.service.d/test.conf", "[Service]\nOOMScoreAdjust=0\n")?;
        install(&booted)?;
        booted.systemctl(&["is-enabled", "pillion.service"])?;
        booted.systemctl(&["start", "pillion.service"])?;
        booted.until_up()?;
        ensure!(booted.sh("pillion version")?.stdout.contains("pillion"));
        ensure!(booted.sh("pillion-hook --version")?.stdout.contains("pillion-hook"));

        // The unit's own ExecStart, paths and directories.
        let connect = format!("/usr/bin/busybox nc {} {}", far.ip(), far.port());
        booted.unit("guarded.service", &format!("Type=oneshot\nExecStart={connect}"))?;
        booted.policy("p.yaml", &policy("p", "units: [guarded.service]", "builtin: relay", "closed"))?;
        booted.until_drop_ins(&["guarded.service"])?;
        booted.systemctl(&["start", "guarded.service"])?;
        booted.until_records("guarded.service", far, 1)?;
        booted.systemctl(&["reload", "pillion.service"])?;

        // As after a boot: /run is empty, and the agent is not up yet. The generator puts the drop-in back.
        booted.systemctl(&["stop", "pillion.service"])?;
        booted.sh("rm -r /run/systemd/system/guarded.service.d")?;
        booted.systemctl(&["daemon-reload"])?;
        let paths = booted.systemctl(&["show", "--property", "DropInPaths", "guarded.service"])?.stdout;
        ensure!(paths.contains("/run/systemd/generator/guarded.service.d/50-pillion.conf"), "{paths}");
        ensure!(!booted.try_systemctl(&["start", "guarded.service"])?.status.success());
        ensure!(booted.log("guarded.service")?.contains("policy p"));

        // An installation over itself, as an upgrade is, changes nothing of that.
        install(&booted)?;
        booted.systemctl(&["start", "pillion.service"])?;
        booted.until_up()?;
        booted.until_drop_ins(&["guarded.service"])?;
        booted.systemctl(&["start", "guarded.service"])?;
        booted.until_records("guarded.service", far, 2)?;

        booted.sh("dpkg -r pillion")?;
        ensure!(booted.drop_ins()?.is_empty(), "removal left drop-ins");
        let connections = booted.echo.peers().len();
        booted.systemctl(&["start", "guarded.service"])?;
        wait_until("a connection without Pillion", SOON, || booted.echo.peers().len() > connections)?;
        booted.sh("rm /etc/pillion/policy.d/p.yaml && dpkg -P pillion")?;
        booted.sh("rm -r /run/systemd/system/pillion.service.d /etc/systemd/system/guarded.service")?;
        booted.systemctl(&["daemon-reload"])?;
        let after = footprint(&booted)?;
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
        booted.lab.down()
    })
}

/// Every path of the system that has Pillion's name, but for what dpkg keeps of any package and the logs.
fn footprint(booted: &Booted) -> Result<String> {
    let found = booted.sh(
        "find / -xdev -name '*pillion*' -not -path '/proc/*' -not -path '/var/lib/dpkg/*' -not -path '/var/log/*'; \
         find /run /sys/fs/bpf /sys/fs/cgroup -name '*pillion*' -not -path '/run/log/*' -not -path '/run/systemd/units/*'",
    )?;
    Ok(found.stdout)
}

fn install(booted: &Booted) -> Result<()> {
    let package =
        programs::pillion()?.ancestors().nth(2).context("a target directory")?.join("debian/pillion.deb");
    let file = File::open(&package).with_context(|| {
        format!("no {}; make it with: cargo xtask dist deb --profile dev", package.display())
    })?;
    let mut command = booted.lab.command(&[
        "exec",
        "sh",
        "-c",
        "cat >/tmp/new.deb && dpkg -i /tmp/new.deb && rm /tmp/new.deb",
    ])?;
    let done = command.stdin(file).output()?;
    ensure!(done.status.success(), "dpkg -i: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
