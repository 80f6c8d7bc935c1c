//! `cargo xtask dist`: what is given to users, made in `target/dist`. Needs no root and no container engine.

mod image;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{metadata::Metadata, setup, shell};

/// What to make.
#[derive(clap::Subcommand)]
pub(crate) enum What {
    /// A container image as an OCI archive, for `ctr images import`, `docker load`, `podman load` and `skopeo copy`.
    Image(ImageOptions),
    /// A Debian package, `target/debian/pillion.deb`. What is in it is told in `agent/daemon/Cargo.toml`.
    Deb {
        /// Cargo's profile: 'dev' builds faster, for trying the package itself.
        #[arg(long, default_value = "release")]
        profile: String,
    },
}

#[derive(clap::Args)]
pub(crate) struct ImageOptions {
    /// Take this `pillion`, with the `pillion-hook` beside it, instead of building. One that is linked dynamically
    /// brings its libraries along.
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
    /// Where to write the archive; without it, target/dist/pillion-VERSION.oci.tar.
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// What the image is called.
    #[arg(long, value_name = "NAME:TAG")]
    name: Option<String>,
}

/// The programs of the image.
const PROGRAMS: [&str; 2] = ["pillion", HOOK];
const HOOK: &str = "pillion-hook";
/// Needs no library of the node, which may have others. With glibc, because rustc's musl target is not everywhere.
const STATIC: &str = "-C target-feature=+crt-static";

/// Makes it.
pub(crate) fn run(what: &What) -> Result<()> {
    match what {
        What::Image(options) => image(options),
        What::Deb { profile } => {
            setup::run()?;
            deb(profile)
        }
    }
}

/// The image of these programs, under the name that packaging/kubernetes has.
pub(crate) fn image_of(program: &Path, output: &Path) -> Result<()> {
    image(&ImageOptions { program: Some(program.to_owned()), output: Some(output.to_owned()), name: None })
}

fn image(options: &ImageOptions) -> Result<()> {
    let metadata = Metadata::read()?;
    let version = metadata.version()?;
    let programs = match &options.program {
        Some(program) => beside(program)?,
        None => build(&metadata.target_directory, &PROGRAMS)?,
    };
    let output = options
        .output
        .clone()
        .unwrap_or_else(|| metadata.target_directory.join(format!("dist/pillion-{version}.oci.tar")));
    let name = options.name.clone().unwrap_or_else(|| format!("localhost/pillion:{version}"));
    let made = image::write(&programs, version, &name, &output)?;
    println!("{} ({} KiB): {name}, {made}", output.display(), fs::metadata(&output)?.len() / 1024);
    Ok(())
}

fn beside(program: &Path) -> Result<Vec<PathBuf>> {
    let programs = PROGRAMS.map(|name| program.with_file_name(name));
    for path in &programs {
        ensure!(path.is_file(), "no {}", path.display());
    }
    Ok(programs.into())
}

/// Builds programs that are optimised and need no library, in a directory of their own: other flags than those of all other builds.
fn build(target: &Path, programs: &[&str]) -> Result<Vec<PathBuf>> {
    setup::run()?;
    let triple = host_triple()?;
    let directory = target.join("dist/build");
    println!("building; the first time takes some minutes");
    let mut cargo = shell::cargo();
    cargo.env("RUSTFLAGS", flags()).env("CARGO_TARGET_DIR", &directory);
    cargo.args(["build", "--release", "--locked", "--quiet", "--target", &triple]);
    for package in programs {
        cargo.args(["--package", package]);
    }
    shell::run(&mut cargo)?;
    Ok(programs.iter().map(|name| directory.join(&triple).join("release").join(name)).collect())
}

/// The caller's flags stay: with the path of a linker, say.
fn flags() -> OsString {
    let mut flags = std::env::var_os("RUSTFLAGS").unwrap_or_default();
    flags.push(" ");
    flags.push(STATIC);
    flags
}

fn host_triple() -> Result<String> {
    let printed = shell::capture(Command::new("rustc").arg("-vV"))?;
    let host = printed.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names its host")
}

fn deb(profile: &str) -> Result<()> {
    let mut cargo = shell::cargo();
    shell::run(cargo.args([
        "build",
        "--package",
        "pillion",
        "--package",
        "pillion-hook",
        "--profile",
        profile,
    ]))?;
    if profile == "release" {
        // Runtimes call it where they are, and it is to start at once: no library is looked for.
        let target = Metadata::read()?.target_directory;
        let packaged = target.join("release").join(HOOK);
        for made in build(&target, &[HOOK])? {
            // Not into the file that is there, which cargo keeps under another name as well.
            fs::remove_file(&packaged).with_context(|| format!("cannot replace {}", packaged.display()))?;
            fs::copy(&made, &packaged).with_context(|| format!("cannot copy {}", made.display()))?;
        }
    }
    package(profile)
}

/// The Debian package of programs that have been built.
pub(crate) fn package(profile: &str) -> Result<()> {
    let output = Metadata::read()?.target_directory.join("debian");
    let mut command = Command::new(setup::cargo_deb()?);
    command.current_dir(shell::checkout());
    command.args(["--package", "pillion", "--no-build", "--no-strip", "--profile", profile, "--output"]);
    shell::run(command.arg(output.join("pillion.deb")))
}
