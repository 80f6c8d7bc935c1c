//! bpf-linker, compiled and linked to the system's shared LLVM.
//!
//! It must bring an LLVM that is not older than that of the rustc whose bitcode it links, so it is built for exactly the
//! major version that the chosen toolchain reports. The `-dev` package of LLVM (400 MB) is not needed: a directory with
//! the shared library under the name that the linker looks for is enough.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::apt;
use crate::{
    shell,
    toolchain::{self, Toolchain},
};

const VERSION: &str = "0.13.0";

/// Builds it, unless there is one already.
pub(crate) fn install(tools: &Path, toolchain: &Toolchain) -> Result<()> {
    let major = toolchain
        .field("LLVM version")
        .and_then(|version| version.split('.').next())
        .with_context(|| format!("{} does not say which LLVM it has", toolchain.name))?;
    if std::env::var_os(toolchain::LINKER_VARIABLE).is_some() {
        let chosen = toolchain::linker(&shell::checkout())?;
        println!("      {} (from {})", chosen.display(), toolchain::LINKER_VARIABLE);
        return Ok(());
    }
    let linker = tools.join("bin/bpf-linker");
    let stamp = tools.join("bpf-linker.stamp");
    let wanted = format!("{VERSION} llvm {major}\n");
    let works = shell::answer(Command::new(&linker).arg("--version")).is_some();
    if works && fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        println!("      {VERSION} with LLVM {major}");
        return Ok(());
    }

    let library = llvm(major)?;
    println!("      compiling {VERSION} for LLVM {major} (some minutes)");
    let prefix = tools.join("llvm");
    fs::create_dir_all(prefix.join("lib"))?;
    let link = prefix.join("lib/libLLVM.so");
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link)?;
    }
    symlink(&library, &link).with_context(|| format!("cannot link to {library}"))?;

    let target = tools.join("target");
    let mut command = shell::cargo();
    command
        // A target or wrapper of the caller is not for this program; LTO and debug information only cost time.
        .env_remove("RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &target)
        .env("LLVM_PREFIX", &prefix)
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--force", "--quiet"])
        .args(["--no-default-features", "--features", &format!("llvm-{major}"), "--root"])
        .arg(tools);
    shell::run(&mut command).with_context(|| {
        format!("bpf-linker {VERSION} cannot be built for LLVM {major}, the LLVM of {}", toolchain.name)
    })?;
    shell::capture(Command::new(&linker).arg("--version")).context("the new bpf-linker does not run")?;
    fs::write(&stamp, wanted)?;
    fs::remove_dir_all(&target).with_context(|| format!("cannot remove {}", target.display()))
}

/// Path of the system's shared LLVM of that major version; installed when absent.
fn llvm(major: &str) -> Result<String> {
    let names =
        [format!("libLLVM.so.{major}.1"), format!("libLLVM-{major}.so.1"), format!("libLLVM-{major}.so")];
    let find = || names.iter().find_map(|name| apt::shared_library(name));
    if let Some(found) = find() {
        return Ok(found);
    }
    apt::install_llvm(major)?;
    find().with_context(|| format!("no shared LLVM {major} (looked for {})", names.join(", ")))
}
