//! Compiles the eBPF programs of the crate `ebpf` into `$OUT_DIR/pillion-ebpf` with a toolchain the machine has.
//!
//! `bpfel-unknown-none` has no prebuilt `core`, so the toolchain must carry the source of `core` (`rust-src`).
//! Never installs or downloads a toolchain: `cargo xtask setup` does.
#![expect(
    unsafe_code,
    reason = "aya-build takes the linker and RUSTC_BOOTSTRAP from this process's environment"
)]

use std::{env, path::Path};

use anyhow::{Context as _, Result};
use aya_build::Package;

#[path = "build/toolchain.rs"]
mod toolchain;

use toolchain::{LINKER_VARIABLE, TOOLCHAIN_VARIABLE, Toolchain};

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

    let toolchain = Toolchain::find(&env::var_os("RUSTC").context("cargo sets RUSTC")?)?;
    println!("cargo::rerun-if-changed={}", toolchain.core_source.display());
    let linker = toolchain::linker(&checkout)?;
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
    .with_context(|| {
        let release = toolchain.field("release").unwrap_or("of unknown release");
        format!("the eBPF programs do not build with the toolchain {} (rustc {release})", toolchain.name)
    })
}
