//! bpf-linker, linked to the system's shared LLVM.
//!
//! It must bring an LLVM that is not older than that of the rustc whose bitcode it links, so it is built for exactly the
//! major version that the chosen toolchain reports. The `-dev` package of LLVM (400 MB) is not needed: a directory with
//! the shared library under the name that the linker looks for is enough.

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::{Context as _, Result};

use super::{apt, program::Program};
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
    let prefix = tools.join("llvm");
    let program = Program {
        name: "bpf-linker",
        version: VERSION,
        variant: &format!("llvm {major}"),
        arguments: &["--no-default-features", "--features", &format!("llvm-{major}")],
        environment: &[("LLVM_PREFIX", prefix.as_os_str())],
    };
    program.install(tools, || offer(&llvm(major)?, &prefix))
}

/// Makes `prefix` look like an installation of LLVM, as far as a linker looks.
fn offer(library: &str, prefix: &Path) -> Result<()> {
    let directory = prefix.join("lib");
    fs::create_dir_all(&directory)?;
    let link = directory.join("libLLVM.so");
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link)?;
    }
    symlink(library, &link).with_context(|| format!("cannot link to {library}"))
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
