//! `cargo xtask demo`: builds what the demo needs and runs it as root. The story itself is in `tests/src/demo.rs`.
//!
//! The profile is that of the tests, so that who runs both commands of the README compiles everything once.

use std::{ffi::OsStr, process::Command, time::Instant};

use anyhow::{Context as _, Result, ensure};

use crate::{
    metadata::{Metadata, TESTS},
    setup, shell,
};

/// An error when the demo met a surprise.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    shell::authorize()?;
    let started = Instant::now();
    println!("building; the first time takes some minutes");
    shell::run(shell::cargo().args([
        "build",
        "--locked",
        "--quiet",
        "--bins",
        "--package",
        "pillion",
        "--package",
        TESTS,
    ]))?;
    println!("built after {:.1} s", started.elapsed().as_secs_f32());

    let programs = Metadata::read()?.target_directory.join("debug");
    let pillion = programs.join("pillion");
    let no_color = std::env::var_os("NO_COLOR").unwrap_or_default();
    let environment: [(&str, &OsStr); 2] = [("PILLION_BIN", pillion.as_os_str()), ("NO_COLOR", &no_color)];
    let mut demo: Command = shell::as_root(programs.join("pillion-demo"), &environment)?;
    let status = demo.current_dir(shell::checkout()).status().context("the demo cannot be started")?;
    // It has said what went wrong.
    ensure!(status.success(), "the demo did not come to its end ({status})");
    Ok(())
}
