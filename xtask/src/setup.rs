//! `cargo xtask setup`: from a machine with a stable Rust to everything that building, demo and tests need.
//!
//! Idempotent; looks first, so that it takes no noticeable time when all is there. What is built or downloaded goes to a
//! cache of the user (`.tools` of the checkout links to it); only Debian packages need root. On a system without apt it
//! installs no packages but says which programs are missing.

mod apt;
mod bpf_linker;
mod cargo_deb;
mod deny;
mod envoy;
mod program;

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{shell, toolchain::Toolchain};

/// Another setup on this machine may be building bpf-linker; longer than that takes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// Makes the machine ready; returns at once when it is.
pub(crate) fn run() -> Result<()> {
    let started = Instant::now();
    let tools = tools_directory()?;
    let lock = lock(&tools)?;

    let step = |number: u8, title: &str| println!("[{number}/5] {title}");
    step(1, "system packages");
    apt::install_missing()?;

    step(2, "Rust toolchain for eBPF");
    let toolchain = match Toolchain::find("rustc".as_ref()) {
        Ok(found) => found,
        Err(absent) => {
            apt::install_ebpf_toolchain().map_err(|error| absent.context(format!("{error:#}")))?;
            Toolchain::find("rustc".as_ref())?
        }
    };
    let release = toolchain.field("release").unwrap_or("?");
    println!("      {} (rustc {release})", toolchain.name);

    step(3, "bpf-linker");
    bpf_linker::install(&tools, &toolchain)?;

    step(4, "Envoy");
    envoy::install(&tools)?;

    step(5, ".tools of this checkout");
    link(&tools, &shell::checkout().join(".tools"))?;

    drop(lock);
    println!("ready after {:.1} s", started.elapsed().as_secs_f32());
    Ok(())
}

/// cargo-deny, which only the tests need; call [`run`] before.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let tools = tools_directory()?;
    let _lock = lock(&tools)?;
    deny::install(&tools)
}

/// The trees, images and disks that the systems in `tests/lab` are made of: those of the suites, which have no time for it.
/// Needs root. Returns at once when all is there; call [`run`] before.
pub(crate) fn lab() -> Result<()> {
    let script = shell::checkout().join("tests/lab/prepare.sh");
    shell::run(shell::as_root(script, &[])?.arg("run")).context("the suites' systems cannot be prepared")
}

/// cargo-deb, which only packaging needs; call [`run`] before.
pub(crate) fn cargo_deb() -> Result<PathBuf> {
    let tools = tools_directory()?;
    let _lock = lock(&tools)?;
    cargo_deb::install(&tools)
}

/// Where tools are kept, over all checkouts of this user.
fn tools_directory() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: there is nowhere to keep tools")?;
    let tools = cache.join("pillion/tools");
    fs::create_dir_all(tools.join("bin")).with_context(|| format!("cannot make {}", tools.display()))?;
    Ok(tools)
}

/// Keeps two setups from building into the same directory. Released when the file is closed.
fn lock(tools: &Path) -> Result<File> {
    let path = tools.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    let mut said = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                if !said {
                    println!("another setup is running; waiting for it");
                    said = true;
                }
                thread::sleep(Duration::from_millis(200));
            }
            Err(error) => bail!("cannot lock {}: {error}", path.display()),
        }
    }
}

/// Points `link` to `tools`, unless it is there: a directory of that name is somebody's own choice of tools.
fn link(tools: &Path, link: &Path) -> Result<()> {
    match fs::symlink_metadata(link) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) if fs::read_link(link).is_ok_and(|target| target == tools) => return Ok(()),
        Ok(_) => fs::remove_file(link).with_context(|| format!("cannot replace {}", link.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", link.display())),
    }
    symlink(tools, link).with_context(|| format!("cannot link {} to {}", link.display(), tools.display()))
}
