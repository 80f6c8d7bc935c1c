//! Network namespaces of a test's own. They are gone, with their devices, when the last user is.

use std::{
    fs::File,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
    process::{self, Command},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace with loopback up. No name, no mount: this handle and the processes within keep it.
#[derive(Debug)]
pub struct NetNs {
    file: File,
}

/// One end of a virtual cable: in which namespace, the device's name, and its addresses with prefix length.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// Where the device is.
    pub netns: &'a NetNs,
    /// Name of the device; at most 15 bytes.
    pub device: &'a str,
    /// Such as `10.77.0.1/24` or `fd77::1/64`.
    pub addresses: &'a [&'a str],
}

impl NetNs {
    /// A new namespace.
    pub fn new() -> Result<Self> {
        let file = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            File::open("/proc/thread-self/ns/net").context("cannot open the new network namespace")
        })
        .join()
        .expect("the thread does not panic")?;
        let netns = Self { file };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The namespace of a process.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        Ok(Self { file: File::open(&path).with_context(|| format!("cannot open {path}"))? })
    }

    /// Two namespaces on one cable: `10.77.0.1` and `fd77::1` on device `far`, `10.77.0.2` and `fd77::2` on device `near`.
    pub fn pair() -> Result<(Self, Self)> {
        let (near, far) = (Self::new()?, Self::new()?);
        Self::join(
            End { netns: &near, device: "far", addresses: &["10.77.0.1/24", "fd77::1/64"] },
            End { netns: &far, device: "near", addresses: &["10.77.0.2/24", "fd77::2/64"] },
        )?;
        Ok((near, far))
    }

    /// Runs `work` on a thread inside. Children that it spawns are inside as well.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let worker = move || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace that it holds");
            work()
        };
        thread::scope(|scope| scope.spawn(worker).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// `ip ARGUMENTS` inside; arguments are separated by spaces.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        let output = self
            .run(|| Command::new("ip").args(arguments.split_whitespace()).output())
            .context("cannot run ip: is iproute2 installed?")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip {arguments}: {}", said.trim());
        Ok(())
    }

    /// A path that stands for the namespace as long as this handle lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd()).into()
    }

    /// The number in `net:[…]`.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata().context("cannot stat a network namespace")?.ino())
    }

    /// Joins two namespaces by a pair of virtual devices, with their addresses, up.
    pub fn join(one: End<'_>, other: End<'_>) -> Result<()> {
        let peer = other.netns.path();
        one.netns.ip(&format!(
            "link add {} type veth peer name {} netns {}",
            one.device,
            other.device,
            peer.display()
        ))?;
        for end in [one, other] {
            for address in end.addresses {
                // Duplicate address detection would keep a v6 address unusable for a second.
                let nodad = if address.contains(':') { " nodad" } else { "" };
                end.netns.ip(&format!("address add {address} dev {}{nodad}", end.device))?;
            }
            end.netns.ip(&format!("link set {} up", end.device))?;
        }
        Ok(())
    }
}
