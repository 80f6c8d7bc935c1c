//! Finds a toolchain and a linker that can compile for eBPF; shared by this crate's build.rs and `cargo xtask setup`.
//!
//! Only looks: never installs or downloads anything.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Chooses the toolchain; a name that rustup knows or the path of a sysroot.
pub(crate) const TOOLCHAIN_VARIABLE: &str = "PILLION_EBPF_TOOLCHAIN";
/// Chooses the linker; a path.
pub(crate) const LINKER_VARIABLE: &str = "PILLION_BPF_LINKER";
/// Within a sysroot; there only when the source of `core` is.
const CORE_SOURCE: &str = "lib/rustlib/src/rust/library/Cargo.lock";
/// The oldest release that compiles this workspace.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");

/// A toolchain that can compile for eBPF.
pub(crate) struct Toolchain {
    /// What `rustup run` takes.
    pub(crate) name: String,
    /// A file of the source of `core`.
    pub(crate) core_source: PathBuf,
    /// Accepts unstable flags as it is.
    pub(crate) nightly: bool,
    /// What `rustc -vV` prints.
    pub(crate) version: String,
}

impl Toolchain {
    /// The first that has the source of `core` of: `$PILLION_EBPF_TOOLCHAIN` (and then no other), nightly, the
    /// toolchain of `rustc`, `/usr` (Debian's rustc-web or rustc). Without rustup only the current one can be meant.
    pub(crate) fn find(rustc: &OsStr) -> Result<Self> {
        let rustup = in_path("rustup");
        let current = sysroot(Command::new(rustc));
        let chosen = env::var(TOOLCHAIN_VARIABLE).ok().filter(|name| !name.is_empty());
        let candidates: Vec<String> = match (chosen, &rustup) {
            (Some(name), _) => vec![name],
            (None, Some(_)) => {
                ["nightly".to_owned()].into_iter().chain(current).chain(["/usr".to_owned()]).collect()
            }
            (None, None) => current.into_iter().collect(),
        };
        if let Some(found) = candidates.iter().find_map(|name| Self::probe(name, rustup.as_deref())) {
            return Ok(found);
        }
        bail!(
            "no Rust toolchain of version {OLDEST} or later has the source of `core`, which eBPF programs need \
             (tried: {})\n\
             install what is missing with: cargo xtask setup\n\
             or by hand: `rustup toolchain install nightly --component rust-src`,\n\
             or on Debian: `apt-get install rustc-web rust-web-src cargo-web`",
            candidates.join(", ")
        )
    }

    fn probe(name: &str, rustup: Option<&Path>) -> Option<Self> {
        let rustc = || match rustup {
            Some(rustup) => {
                let mut command = Command::new(rustup);
                // Without this, rustup may begin to download a toolchain that is merely named.
                command.env("RUSTUP_AUTO_INSTALL", "0").args(["run", name, "rustc"]);
                command
            }
            None => Command::new("rustc"),
        };
        let core_source = Path::new(&sysroot(rustc())?).join(CORE_SOURCE);
        let version = output(rustc().arg("-vV")).filter(|_| core_source.is_file())?;
        let release = field(&version, "release")?;
        if numbers(release) < numbers(OLDEST) {
            return None;
        }
        let nightly = release.ends_with("-nightly") || release.ends_with("-dev");
        Some(Self { name: name.to_owned(), core_source, nightly, version })
    }

    /// The value of a line of `rustc -vV`, such as `LLVM version`.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        field(&self.version, name)
    }
}

/// The first bpf-linker of: `$PILLION_BPF_LINKER` (and then no other), `.tools/bin` of the checkout, `$PATH`.
pub(crate) fn linker(checkout: &Path) -> Result<PathBuf> {
    if let Some(chosen) = env::var_os(LINKER_VARIABLE).filter(|path| !path.is_empty()) {
        let chosen = PathBuf::from(chosen);
        if !chosen.is_file() {
            bail!("{LINKER_VARIABLE} names {}, which is not a file", chosen.display());
        }
        return Ok(chosen);
    }
    let local = checkout.join(".tools/bin/bpf-linker");
    Some(local)
        .filter(|path| path.is_file())
        .or_else(|| in_path("bpf-linker"))
        .context("no bpf-linker in .tools/bin nor in PATH; install it with: cargo xtask setup")
}

/// The first file named `program` in the directories of `$PATH`.
pub(crate) fn in_path(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let program = program.as_ref();
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn sysroot(mut rustc: Command) -> Option<String> {
    output(rustc.args(["--print", "sysroot"]))
}

/// What `command` printed, when it succeeded.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

fn field<'a>(version: &'a str, name: &str) -> Option<&'a str> {
    version.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// Major and minor number of a release such as `1.97.0-nightly`.
fn numbers(release: &str) -> (u32, u32) {
    let mut parts = release.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
