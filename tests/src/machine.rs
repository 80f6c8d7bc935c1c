//! One test's hold on the machine: root, alone, watched, and proven to leave nothing behind.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tempfile::TempDir;

use crate::{Inventory, lab};

/// Other suites may be running; longer than any of them takes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// No test is meant to take as long.
const TEST_TIMEOUT: Duration = Duration::from_secs(8 * 60);
/// The kernel frees programs, cgroups and namespaces some time after their last user is gone.
const SETTLE: Duration = Duration::from_secs(10);

/// What a test has while it runs.
#[derive(Debug)]
pub struct Machine {
    directory: TempDir,
}

impl Machine {
    /// An empty directory of this test's own, which everybody may enter. Removed at the end.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a file into [`Machine::directory`] and returns its path. Everybody may read it.
    pub fn file(&self, name: &str, text: &str) -> Result<std::path::PathBuf> {
        let path = self.directory().join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        Ok(path)
    }
}

/// Runs a test on the machine itself. Fails without root, when `test` fails, and when anything is left afterwards that was
/// not there before; see [`Inventory`].
pub fn on_machine(test: impl FnOnce(&Machine) -> Result<()>) -> Result<()> {
    on_machine_within(TEST_TIMEOUT, test)
}

/// The same for what is known to take longer than a test, such as a measurement: the process is ended after `limit`.
pub fn on_machine_within(limit: Duration, test: impl FnOnce(&Machine) -> Result<()>) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this test changes the machine and needs root; run it with: cargo xtask test");
    }
    // Held for the test's time, to its very last act; released by the kernel when closed, however the process ends.
    let _lock = lock()?;
    let _watchdog = Watchdog::start(limit);
    let _bpffs = Bpffs::as_after_boot()?;
    lab::prepare()?;
    let before = Inventory::take().context("inventory before the test")?;
    let directory = tempfile::Builder::new()
        .prefix("pillion-test-")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir()
        .context("the test's own directory")?;
    let machine = Machine { directory };
    let outcome = test(&machine);
    machine.directory.close().context("cannot remove the test's own directory")?;
    // What a failed test left behind is only noise beside its error.
    outcome?;
    before.expect_nothing_added(SETTLE)
}

/// Waits in the kernel's queue: who only looks now and then never has the lock while others wait there.
fn lock() -> Result<File> {
    let path = env::temp_dir().join("pillion-tests.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let (sender, locked) = mpsc::sync_channel(1);
    // Past the deadline this thread still waits; what it then gets is let go with it, or by the process's end.
    thread::spawn(move || {
        let outcome = file.lock().map(|()| file);
        let _ = sender.send(outcome);
    });
    match locked.recv_timeout(LOCK_TIMEOUT) {
        Ok(outcome) => outcome.with_context(|| format!("cannot lock {}", path.display())),
        Err(_) => bail!("cannot have the machine alone: {} is locked for {LOCK_TIMEOUT:?}", path.display()),
    }
}

/// The BPF file system, which systemd mounts at boot and a machine without systemd lacks. Taken back afterwards.
struct Bpffs {
    mounted: bool,
}

impl Bpffs {
    const POINT: &str = "/sys/fs/bpf";

    fn as_after_boot() -> Result<Self> {
        let is = statfs(Self::POINT).context("this kernel has no /sys/fs/bpf")?;
        let mounted = is.filesystem_type() != BPF_FS_MAGIC;
        if mounted {
            mount(Some("bpf"), Self::POINT, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .context("cannot mount the BPF file system")?;
        }
        Ok(Self { mounted })
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if self.mounted {
            // Busy when a failed test has left something pinned, which its error or the inventory has told of.
            let _ = umount2(Self::POINT, MntFlags::MNT_DETACH);
        }
    }
}

/// Ends the whole process when a test hangs in spite of its own deadlines.
struct Watchdog {
    /// Open while the test runs.
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    fn start(limit: Duration) -> Self {
        let (alive, watched) = mpsc::channel::<()>();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            // Nothing is ever sent: the channel closes when the test is over.
            if watched.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                // Not through print macros: libtest would capture it.
                let message = format!("\n{test} hangs: ended after {limit:?}\n");
                let _ = std::io::Write::write_all(&mut std::io::stderr(), message.as_bytes());
                process::exit(101);
            }
        });
        Self { _alive: alive }
    }
}
