//! Where the demo plays: a web server, two containers and a desk, each in a network namespace of its own.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    Containerd, End, Machine, NetNs, ProcessGuard,
    containerd::{Container, NAMESPACE},
    programs, wait_until,
};

/// The web server's addresses. The containers and the desk reach it by their default route.
pub(super) const SERVER: &str = "10.77.0.1";
pub(super) const SERVER6: &str = "fd77::1";
/// What all servers of the town offer.
pub(super) const PAGE: &str = "cgi-bin/hello";
/// Where the container `web` and the desk serve it.
pub(super) const PORT: u16 = 8080;

const DEADLINE: Duration = Duration::from_secs(30);

/// Greets who asks by the address that it comes from.
fn page(who: &str) -> String {
    format!(
        "#!/bin/sh\n\
         from=${{REMOTE_ADDR#[}}; from=${{from#::ffff:}}; from=${{from%]}}\n\
         printf 'Content-Type: text/plain\\r\\n\\r\\nhello %s, this is {who}\\n' \"$from\"\n"
    )
}

/// The stage. Dropping it takes it down.
pub(super) struct Town {
    /// First, so that its containers end before their namespaces.
    pub(super) containerd: Containerd,
    _httpd: ProcessGuard,
    pub(super) server: NetNs,
    pub(super) web: NetNs,
    pub(super) payments: NetNs,
    pub(super) desk: NetNs,
    pub(super) desk_pages: PathBuf,
}

impl Town {
    pub(super) fn build(machine: &Machine) -> Result<Self> {
        let server = NetNs::new()?;
        server.ip(&format!("address add {SERVER}/32 dev lo"))?;
        server.ip(&format!("address add {SERVER6}/128 dev lo nodad"))?;
        let guest = |number: u8, name: &str| -> Result<NetNs> {
            let netns = NetNs::new()?;
            let (to, from) = (format!("10.77.{number}.1/24"), format!("10.77.{number}.2/24"));
            let (to6, from6) = (format!("fd77:{number}::1/64"), format!("fd77:{number}::2/64"));
            NetNs::join(
                End { netns: &server, device: name, addresses: &[&to, &to6] },
                End { netns: &netns, device: "eth0", addresses: &[&from, &from6] },
            )?;
            netns.ip(&format!("route add default via 10.77.{number}.1"))?;
            netns.ip(&format!("-6 route add default via fd77:{number}::1"))?;
            Ok(netns)
        };
        let (web, payments, desk) = (guest(1, "web")?, guest(2, "payments")?, guest(3, "desk")?);

        let server_pages = pages(machine, "server", "the web server")?;
        let desk_pages = pages(machine, "desk", "the process at the desk")?;
        let mut httpd = hermetic(programs::system("busybox")?);
        httpd.args(["httpd", "-f", "-p", "[::]:80", "-h"]).arg(server_pages);
        let httpd = ProcessGuard::spawn_in(&server, "the web server", &mut httpd)?;
        until_listening(httpd.pid(), 80)?;
        let containerd = Containerd::start(machine)?;
        Ok(Self { containerd, _httpd: httpd, server, web, payments, desk, desk_pages })
    }

    /// Runs the container `name`, which serves its own page.
    pub(super) fn run_container(&self, name: &str) -> Result<()> {
        let netns = if name == "web" { &self.web } else { &self.payments };
        let script = format!(
            "mkdir -p /www/cgi-bin; cat >/www/{PAGE} <<'END'\n{}END\nchmod +x /www/{PAGE}; \
             exec httpd -f -p {PORT} -h /www",
            page(&format!("container {name}"))
        );
        let container = Container {
            id: name,
            labels: &[("app", name)],
            netns: Some(netns),
            command: &["sh", "-c", &script],
        };
        let pid = self.containerd.run(&container)?;
        until_listening(pid, PORT)
    }

    /// A command inside a container.
    pub(super) fn in_container(&self, name: &str, command: &[&str]) -> Result<Command> {
        let mut ctr = self.containerd.ctr_command()?;
        ctr.args(["task", "exec", "--exec-id", "once", name]).args(command);
        Ok(ctr)
    }

    pub(super) fn workload(name: &str) -> String {
        format!("containerd/{NAMESPACE}/{name}")
    }
}

/// A command that inherits nothing of the caller's environment: proxies, for one, would lead it elsewhere.
pub(super) fn hermetic(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("LC_ALL", "C.UTF-8").env("RUST_BACKTRACE", "0");
    command
}

/// Waits until somebody listens on `port` in the network namespace of `pid`.
pub(super) fn until_listening(pid: u32, port: u16) -> Result<()> {
    // net/tcp: local address in the second column, as hexadecimal, and the state in the fourth; 0A is LISTEN.
    let suffix = format!(":{port:04X}");
    wait_until(&format!("a listener on port {port}"), DEADLINE, || {
        ["tcp", "tcp6"].iter().any(|table| {
            let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
                fields.get(1).is_some_and(|local| local.ends_with(&suffix)) && fields.get(3) == Some(&"0A")
            })
        })
    })
}

fn pages(machine: &Machine, directory: &str, who: &str) -> Result<PathBuf> {
    let root = machine.directory().join(directory);
    let script = root.join(PAGE);
    fs::create_dir_all(script.parent().context("the page is in a directory")?)?;
    fs::write(&script, page(who))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(root)
}
