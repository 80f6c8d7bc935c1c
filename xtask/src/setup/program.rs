//! Programs compiled from their published source into the directory of tools, each with a stamp that says what was built.

use std::{ffi::OsStr, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::shell;

/// A program to compile.
pub(crate) struct Program<'a> {
    /// Of the crate and of its binary.
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
    /// A reason to build the same version anew when it changes; may be empty.
    pub(crate) variant: &'a str,
    /// Arguments for `cargo install`.
    pub(crate) arguments: &'a [&'a str],
    pub(crate) environment: &'a [(&'a str, &'a OsStr)],
}

impl Program<'_> {
    /// Compiles it, unless it is there. `prepare` runs right before.
    pub(crate) fn install(&self, tools: &Path, prepare: impl FnOnce() -> Result<()>) -> Result<()> {
        let Self { name, version, variant, .. } = *self;
        let binary = tools.join("bin").join(name);
        let stamp = tools.join(format!("{name}.stamp"));
        let wanted = format!("{version} {variant}").trim_end().to_owned();
        let works = || shell::answer(Command::new(&binary).arg("--version")).is_some();
        if fs::read_to_string(&stamp).is_ok_and(|found| found.trim_end() == wanted) && works() {
            println!("      {wanted}");
            return Ok(());
        }
        prepare()?;
        println!("      compiling {name} {wanted} (some minutes)");
        let target = tools.join("target").join(name);
        let mut command = shell::cargo();
        command
            // The caller's flags are not for this program; LTO and debug information only cost time.
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", &target)
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .envs(self.environment.iter().copied())
            .args(["install", name, "--version", version, "--locked", "--force", "--quiet"])
            .args(self.arguments)
            .arg("--root")
            .arg(tools);
        shell::run(&mut command).with_context(|| format!("{name} {wanted} cannot be built"))?;
        shell::capture(Command::new(&binary).arg("--version"))
            .with_context(|| format!("the new {name} does not run"))?;
        fs::write(&stamp, wanted)?;
        fs::remove_dir_all(&target).with_context(|| format!("cannot remove {}", target.display()))
    }
}
