//! One test's hold on the machine: root, alone, watched, and proven to leave nothing behind.

use std::{
    env,
    fs::{self, File, TryLockError},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process, thread,
    time::{Duration, Instant},
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
    if !nix::unistd::geteuid().is_root() {
        bail!("this test changes the machine and needs root; run it with: cargo xtask test");
    }
    // Held for the test's time, to its very last act; released by the kernel when closed, however the process ends.
    let _lock = lock()?;
    let _watchdog = Watchdog::start();
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

fn lock() -> Result<File> {
    let path = env::temp_dir().join("pillion-tests.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let end = Instant::now() + LOCK_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => bail!("cannot have the machine alone ({}): {error}", path.display()),
        }
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
    _alive: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn start() -> Self {
        let (alive, watched) = std::sync::mpsc::channel::<()>();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            // Nothing is ever sent: the channel closes when the test is over.
            if watched.recv_timeout(TEST_TIMEOUT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // Not through print macros: libtest would capture it.
                let message = format!("\n{test} hangs: ended after {TEST_TIMEOUT:?}\n");
                let _ = std::io::Write::write_all(&mut std::io::stderr(), message.as_bytes());
                process::exit(101);
            }
        });
        Self { _alive: alive }
    }
}
