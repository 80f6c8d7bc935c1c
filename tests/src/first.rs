//! A program whose first instruction connects: what a gate must not miss. See `tests/first/first.c`.

use std::{
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{ProcessGuard, programs};

/// A page of C.
const COMPILE_LIMIT: Duration = Duration::from_secs(30);

/// Its exit codes.
pub mod exit {
    /// It was answered.
    pub const ANSWERED: i32 = 0;
    /// The connection was refused, or failed.
    pub const REFUSED: i32 = 2;
}

/// Builds the program `directory/name`: static, without a libc. It connects to `server`, which must send a byte back.
pub fn build(directory: &Path, name: &str, server: SocketAddrV4) -> Result<PathBuf> {
    let program = directory.join(name);
    let source = programs::checkout().join("tests/first/first.c");
    let mut compiler = Command::new("cc");
    compiler
        .args(["-Os", "-static", "-nostdlib", "-nostartfiles", "-fno-stack-protector", "-fno-pie", "-no-pie"])
        .arg(format!("-DADDRESS={}u", u32::from_ne_bytes(server.ip().octets())))
        .arg(format!("-DPORT={}", server.port().to_be()))
        .arg("-o")
        .arg(&program)
        .arg(source);
    ProcessGuard::finish("cc", &mut compiler, COMPILE_LIMIT)?.success().context("first.c cannot be built")?;
    Ok(program)
}
