//! Builds and runs the suites of the crate `tests` as root, one after the other, and proves that they leave nothing.
//!
//! Only the test binaries run as root, never cargo: an ordinary user's target directory stays the user's.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::{
    WORKSPACE,
    cluster::{self, Cluster},
    tally::Tally,
};
use crate::{dist, metadata::TESTS, shell};

/// The suite that installs the Debian package.
const DEB: &str = "deb";

/// The binaries that were built.
struct Built {
    /// By the name of the suite.
    suites: BTreeMap<String, PathBuf>,
    pillion: PathBuf,
    inventory: PathBuf,
}

/// Arguments that select packages.
pub(super) struct Selection {
    suites: &'static [&'static str],
    programs: &'static [&'static str],
}

/// As for the unit tests, so that nothing is compiled a second time with other features.
pub(super) const WHOLE: Selection = Selection { suites: WORKSPACE, programs: WORKSPACE };
/// No more than the suites and the programs that they drive.
pub(super) const ALONE: Selection = Selection {
    suites: &["--package", TESTS],
    programs: &["--package", "pillion", "--package", "pillion-hook", "--package", TESTS],
};

/// Runs the suites that are `wanted`.
pub(super) fn run(
    selection: &Selection,
    wanted: impl Fn(&str) -> bool,
    cluster: Option<&Cluster>,
    tally: &mut Tally,
) -> Result<()> {
    let built = build(selection)?;
    if wanted(cluster::SUITE)
        && let Some(cluster) = cluster
    {
        cluster.prepare(tally);
    }
    let before = built.inventory.with_file_name("inventory-before.json");
    shell::run(inventory(&built, "save", &before)?.current_dir(shell::checkout()))?;

    if built.suites.contains_key(DEB) && wanted(DEB) {
        tally.check("a Debian package", || dist::package("dev"));
    }
    for (name, program) in built.suites.iter().filter(|(name, _)| wanted(name)) {
        tally.step(&format!("suite {name}"), |tally| {
            let backtrace = std::env::var_os("RUST_BACKTRACE").unwrap_or_else(|| "0".into());
            let mut more = Vec::new();
            if name == cluster::SUITE {
                more.extend(cluster.map(Cluster::environment).unwrap_or_default());
                more.push(cluster::image(&built.pillion)?);
            }
            let mut environment = vec![
                ("PILLION_BIN", built.pillion.as_os_str()),
                ("PILLION_TEST", OsStr::new(name)),
                ("RUST_BACKTRACE", &backtrace),
            ];
            environment.extend(more.iter().map(|(name, value)| (*name, value.as_os_str())));
            let mut command = shell::as_root(program, &environment)?;
            command.current_dir(shell::checkout()).arg("--test-threads=1");
            tally.libtest(&mut command)
        });
    }
    tally.check("nothing is left on the machine", || {
        shell::run(inventory(&built, "compare", &before)?.current_dir(shell::checkout()))
    });
    Ok(())
}

fn inventory(built: &Built, what: &str, file: &Path) -> Result<std::process::Command> {
    let mut command = shell::as_root(&built.inventory, &[])?;
    command.arg(what).arg(file);
    Ok(command)
}

/// A line of cargo's JSON messages, as far as it is used here.
#[derive(Deserialize)]
struct Message {
    manifest_path: Option<PathBuf>,
    target: Option<MessageTarget>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct MessageTarget {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

fn build(selection: &Selection) -> Result<Built> {
    let (mut suites, mut programs) = (BTreeMap::new(), BTreeMap::new());
    // Other crates may have integration tests, too.
    let manifest = shell::checkout().join("tests/Cargo.toml");
    let commands = [(["test", "--no-run"], selection.suites), (["build", "--bins"], selection.programs)];
    for (command, packages) in commands {
        let mut cargo = shell::cargo();
        cargo.args(command).args(packages).args(["--locked", "--message-format=json-render-diagnostics"]);
        for line in shell::capture(&mut cargo)?.lines() {
            let message: Message = serde_json::from_str(line).context("cargo prints JSON messages")?;
            let (Some(target), Some(profile), Some(executable)) =
                (message.target, message.profile, message.executable)
            else {
                continue;
            };
            let is = |kind: &str| target.kind.iter().any(|found| found == kind);
            if is("test") && message.manifest_path.as_ref() == Some(&manifest) {
                suites.insert(target.name, executable);
            } else if is("bin") && !profile.test {
                programs.insert(target.name, executable);
            }
        }
    }
    let mut program =
        |name: &str| programs.remove(name).with_context(|| format!("cargo did not build the program {name}"));
    let built = Built { pillion: program("pillion")?, inventory: program("pillion-inventory")?, suites };
    if built.suites.is_empty() {
        bail!("cargo built no suite");
    }
    Ok(built)
}
