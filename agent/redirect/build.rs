//! Compiles the eBPF programs of the crate `ebpf` into `$OUT_DIR/pillion-ebpf` with a toolchain the machine has.
//!
//! `bpfel-unknown-none` has no prebuilt `core`, so the toolchain must carry the source of `core` (`rust-src`).
//! The search is described at [`Toolchain::find`]. Never installs or downloads a toolchain: `cargo xtask setup` does.
#![expect(
    unsafe_code,
    reason = "aya-build takes the linker and RUSTC_BOOTSTRAP from this process's environment"
)]

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use aya_build::Package;

/// Chooses the toolchain; a name that rustup knows or the path of a sysroot.
const TOOLCHAIN_VARIABLE: &str = "PILLION_EBPF_TOOLCHAIN";
/// Chooses the linker; a path.
const LINKER_VARIABLE: &str = "PILLION_BPF_LINKER";
/// Within a sysroot; there only when the source of `core` is.
const CORE_SOURCE: &str = "lib/rustlib/src/rust/library/Cargo.lock";

fn main() -> Result<()> {
    let manifest = env::var("CARGO_MANIFEST_DIR").context("cargo sets CARGO_MANIFEST_DIR")?;
    let checkout = Path::new(&manifest).join("../..").canonicalize().context("the checkout")?;
    for variable in [TOOLCHAIN_VARIABLE, LINKER_VARIABLE, "RUSTUP_TOOLCHAIN", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // aya-build names `ebpf` itself; these are what else the object is made from.
    for source in ["common/src", "common/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", checkout.join(source).display());
    }

    let toolchain = Toolchain::find()?;
    println!("cargo::rerun-if-changed={}", toolchain.core_source.display());
    let linker = linker(&checkout)?;
    println!("cargo::rerun-if-changed={}", linker.display());

    let mut nested = vec![
        ("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker.into_os_string()),
        // aya-build shows every line of the nested cargo as a warning: leave only real ones.
        ("CARGO_TERM_QUIET", "true".into()),
    ];
    if !toolchain.nightly {
        // build-std is refused on a stable compiler. Only the nested cargo sees this, not the build for the host.
        nested.push(("RUSTC_BOOTSTRAP", "1".into()));
    }
    for (name, value) in nested {
        // SAFETY: this process has one thread until `build_ebpf`, which is called below.
        unsafe { env::set_var(name, value) };
    }
    let ebpf = checkout.join("ebpf");
    aya_build::build_ebpf(
        [Package {
            name: "pillion-ebpf",
            root_dir: ebpf.to_str().context("the path of the checkout must be UTF-8")?,
            ..Package::default()
        }],
        aya_build::Toolchain::Custom(&toolchain.name),
    )
    .with_context(|| format!("the eBPF programs do not build with the toolchain {}", toolchain.name))
}

/// A toolchain that can compile for eBPF.
struct Toolchain {
    /// What `rustup run` takes.
    name: String,
    core_source: PathBuf,
    /// Accepts unstable flags as it is.
    nightly: bool,
}

impl Toolchain {
    /// The first that has the source of `core` of: `$PILLION_EBPF_TOOLCHAIN` (and then no other), nightly, the
    /// toolchain that compiles the host's crates, `/usr` (Debian's rustc-web or rustc). Without rustup only the current one
    /// can be meant.
    fn find() -> Result<Self> {
        let rustup = in_path("rustup");
        let current = sysroot(Command::new(env::var_os("RUSTC").context("cargo sets RUSTC")?));
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
            "no Rust toolchain has the source of `core`, which eBPF programs need (tried: {})\n\
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
        if !core_source.is_file() {
            return None;
        }
        let version = output(rustc().arg("--version"))?;
        let nightly = version.contains("-nightly") || version.contains("-dev");
        Some(Self { name: name.to_owned(), core_source, nightly })
    }
}

fn sysroot(mut rustc: Command) -> Option<String> {
    output(rustc.args(["--print", "sysroot"]))
}

/// What `command` printed, when it succeeded.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// The first bpf-linker of: `$PILLION_BPF_LINKER` (and then no other), `.tools/bin` of the checkout, `$PATH`.
fn linker(checkout: &Path) -> Result<PathBuf> {
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

fn in_path(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let program = program.as_ref();
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}
