//! Where the programs under test and the companions are.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Names the built `pillion`; set by `cargo xtask test`.
pub const PILLION_VARIABLE: &str = "PILLION_BIN";

/// The `pillion` binary: `$PILLION_BIN`, else the one in the target directory of this test.
pub fn pillion() -> Result<PathBuf> {
    if let Some(path) = env::var_os(PILLION_VARIABLE) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{PILLION_VARIABLE} names {}, which is not there", path.display());
        return Ok(path);
    }
    beside("pillion").context("build it with: cargo build -p pillion")
}

/// The hook and runtime wrapper, built beside `pillion`.
pub fn hook() -> Result<PathBuf> {
    let path = pillion()?.with_file_name("pillion-hook");
    ensure!(path.is_file(), "no {}; build it with: cargo build -p pillion-hook", path.display());
    Ok(path)
}

/// This crate's helper program, see [`crate::puppet`].
pub fn puppet() -> Result<PathBuf> {
    beside("pillion-puppet").context("build it with: cargo build -p pillion-tests")
}

/// Envoy, as `cargo xtask setup` installs it.
pub fn envoy() -> Result<PathBuf> {
    let versions = checkout().join(".tools/envoy");
    let mut found: Vec<PathBuf> = fs::read_dir(&versions)
        .with_context(|| format!("no Envoy in {}; run: cargo xtask setup", versions.display()))?
        .flatten()
        .map(|version| version.path().join("envoy"))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop().context("no Envoy; run: cargo xtask setup")
}

/// A program of the system, also from the directories that an ordinary `$PATH` leaves out.
pub fn system(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed; run: cargo xtask setup"))
}

/// `program`, or a copy of it in `directory` (see [`crate::Machine::directory`]) when other users cannot reach it where it
/// is: caches and checkouts are often in a home directory that only its owner may enter.
pub fn for_everybody(program: &Path, directory: &Path) -> Result<PathBuf> {
    let program = program.canonicalize().with_context(|| format!("no {}", program.display()))?;
    let reachable = program
        .ancestors()
        .all(|path| fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0));
    if reachable {
        return Ok(program);
    }
    let Some(name) = program.file_name() else { bail!("{} is no program", program.display()) };
    let copy = directory.join(name);
    fs::copy(&program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy)
}

/// The root of the checkout.
pub fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a directory of the checkout").to_owned()
}

/// A program built into the same target directory as this test, which is in `deps` there.
fn beside(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("where this test is")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} beside {}", own.display()))
}
