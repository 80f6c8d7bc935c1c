//! `cargo xtask test`: everything that must hold before a change lands: form, lints, unit tests, and the suites as root.
//!
//! Runs all of it even after a failure, and closes with one line: how many passed and failed. Nothing is skipped: what
//! cannot be run has failed. One suite needs a Kubernetes cluster: it is run where one is named, and where none is, a line
//! says that it was left out.

mod cluster;
mod suites;
mod tally;

use std::{path::PathBuf, process::Command};

use anyhow::{Result, bail, ensure};
use cluster::Cluster;
use tally::Tally;

use crate::{
    metadata::{EBPF, Metadata, TESTS},
    setup, shell, tidy,
};

/// What to test.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run only this suite; may be given several times. Without it: all suites, unit tests and checks.
    #[arg(long, value_name = "NAME")]
    suite: Vec<String>,
    /// Bring up the cluster for the suite `kubernetes` with this script (it knows build, up, down and kubectl). Without it the
    /// suite uses the cluster that KUBECONFIG names; without either it is left out, unless it is asked for by name.
    #[arg(long, value_name = "SCRIPT")]
    cluster: Option<PathBuf>,
    /// List the suites and do nothing.
    #[arg(long)]
    list: bool,
}

/// An error when anything failed.
pub(crate) fn run(options: &Options) -> Result<()> {
    let metadata = Metadata::read()?;
    let all = metadata.suites();
    if options.list {
        for suite in all {
            println!("{suite}");
        }
        return Ok(());
    }
    for name in &options.suite {
        ensure!(all.contains(&name.as_str()), "there is no suite {name}; there are: {}", all.join(", "));
    }
    setup::run()?;
    shell::authorize()?;
    setup::lab()?;

    let mut tally = Tally::default();
    if options.suite.is_empty() {
        checks(&mut tally);
        unit_tests(&mut tally);
    }
    let cluster = Cluster::named(options.cluster.as_deref())?;
    let left_out = |suite: &str| suite == cluster::SUITE && cluster.is_none() && options.suite.is_empty();
    let wanted = |suite: &str| {
        (options.suite.is_empty() || options.suite.iter().any(|name| name == suite)) && !left_out(suite)
    };
    let selection = if options.suite.is_empty() { &suites::WHOLE } else { &suites::ALONE };
    tally.step("the suites", |tally| suites::run(selection, wanted, cluster.as_ref(), tally));

    let (passed, failed) = tally.close();
    for suite in all.into_iter().filter(|suite| left_out(suite)) {
        println!(
            "left out: suite {suite}, as no cluster is named (set KUBECONFIG, or pass --cluster SCRIPT)"
        );
    }
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        bail!("{failed} failed");
    }
    Ok(())
}

/// All crates but the one for the kernel.
const WORKSPACE: &[&str] = &["--workspace", "--exclude", EBPF];

fn checks(tally: &mut Tally) {
    tally.check("cargo fmt", || shell::run(shell::cargo().args(["fmt", "--all", "--check"])));
    tally.check("tidy", tidy::run);
    tally.check("clippy", || {
        let mut clippy = shell::cargo();
        clippy.arg("clippy").args(WORKSPACE).args(["--locked", "--all-targets", "--", "-D", "warnings"]);
        shell::run(&mut clippy)
    });
    tally.check("cargo deny", || {
        let mut deny = Command::new(setup::cargo_deny()?);
        // Advisories would be fetched from a place that is not always within reach.
        deny.current_dir(shell::checkout()).args([
            "--log-level",
            "error",
            "check",
            "bans",
            "licenses",
            "sources",
        ]);
        shell::run(&mut deny)
    });
}

fn unit_tests(tally: &mut Tally) {
    // The suites need root and the machine for themselves: they come later, one by one.
    if shell::find("cargo-nextest").is_some() {
        let filter = format!("not (package({TESTS}) & kind(test))");
        let mut nextest = shell::cargo();
        nextest.args(["nextest", "run"]).args(WORKSPACE).args(["--locked", "--no-fail-fast", "-E", &filter]);
        tally.step("unit tests", |tally| tally.nextest(&mut nextest));
    } else {
        let mut test = shell::cargo();
        test.arg("test").args(WORKSPACE).args(["--locked", "--no-fail-fast", "--lib", "--bins"]);
        tally.step("unit tests", |tally| tally.libtest(&mut test));
        let mut test = shell::cargo();
        test.arg("test").args(WORKSPACE).args([
            "--exclude",
            TESTS,
            "--locked",
            "--no-fail-fast",
            "--test",
            "*",
        ]);
        tally.step("integration tests", |tally| tally.libtest(&mut test));
    }
    let mut doc = shell::cargo();
    doc.arg("test").args(WORKSPACE).args(["--locked", "--no-fail-fast", "--doc"]);
    tally.step("tests in documentation", |tally| tally.libtest(&mut doc));
}
