//! Counts what passed and failed, from the closing lines that test runners print.

use std::{
    io::{BufRead as _, BufReader, Read},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::shell;

/// The sum so far.
#[derive(Default)]
pub(super) struct Tally {
    passed: u32,
    failed: u32,
    faults: Vec<String>,
}

impl Tally {
    /// A single thing that passes or fails.
    pub(super) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        self.step(name, |tally| {
            check()?;
            tally.passed += 1;
            Ok(())
        });
    }

    /// Something that counts for itself; its own error is one failure more.
    pub(super) fn step(&mut self, name: &str, step: impl FnOnce(&mut Self) -> Result<()>) {
        println!("== {name}");
        if let Err(error) = step(self) {
            println!("== {name}: {error:#}");
            self.failed += 1;
            self.faults.push(format!("{name}: {error:#}"));
        }
    }

    /// Runs a program that prints as libtest does, which may be several test binaries.
    pub(super) fn libtest(&mut self, command: &mut Command) -> Result<()> {
        self.runner(
            command.stdout(Stdio::piped()),
            |child| Some(Box::new(child.stdout.take()?)),
            libtest_line,
        )
    }

    /// Runs cargo-nextest, which prints to stderr.
    pub(super) fn nextest(&mut self, command: &mut Command) -> Result<()> {
        command.env("NEXTEST_STATUS_LEVEL", "fail").env("NEXTEST_FINAL_STATUS_LEVEL", "fail");
        self.runner(
            command.stderr(Stdio::piped()),
            |child| Some(Box::new(child.stderr.take()?)),
            nextest_line,
        )
    }

    fn runner(
        &mut self,
        command: &mut Command,
        stream: impl FnOnce(&mut std::process::Child) -> Option<Reader>,
        parse: Parse,
    ) -> Result<()> {
        let what = shell::show(command);
        let mut child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot run {what}"))?;
        let output = stream(&mut child).context("the output is a pipe")?;
        let (mut counted, mut failed) = (false, 0);
        for line in BufReader::new(output).lines() {
            let line = line.with_context(|| format!("cannot read what {what} prints"))?;
            println!("{line}");
            if let Some(counts) = parse(&line) {
                counted = true;
                self.passed += counts.0;
                failed += counts.1;
            }
        }
        let status = child.wait().with_context(|| format!("cannot wait for {what}"))?;
        self.failed += failed;
        ensure!(counted, "{what} printed no result ({status})");
        if failed > 0 {
            self.faults.push(format!("{failed} tests of: {what}"));
        } else if !status.success() {
            bail!("{what} ended with {status}");
        }
        Ok(())
    }

    /// Lists the failures; returns how many passed and failed.
    pub(super) fn close(self) -> (u32, u32) {
        for fault in &self.faults {
            println!("FAILED: {fault}");
        }
        (self.passed, self.failed)
    }
}

type Reader = Box<dyn Read>;
/// How many a line says that passed and failed; nothing when it is no closing line.
type Parse = fn(&str) -> Option<(u32, u32)>;

/// `test result: ok. 3 passed; 1 failed; 0 ignored; …`: an ignored test is one that did not run, so it failed.
fn libtest_line(line: &str) -> Option<(u32, u32)> {
    let counts = line.strip_prefix("test result: ")?;
    let count = |what: &str| number_before(counts, what).unwrap_or(0);
    Some((count("passed"), count("failed") + count("ignored")))
}

/// `Summary [ 0.5s] 12 tests run: 10 passed, 2 failed, 0 skipped`; tests left out by a filter count as skipped.
fn nextest_line(line: &str) -> Option<(u32, u32)> {
    let counts = line.trim_start().strip_prefix("Summary [")?.split_once("run:")?.1;
    let count = |what: &str| number_before(counts, what).unwrap_or(0);
    Some((count("passed"), count("failed") + count("timed out") + count("exec failed")))
}

/// The number right before the words `what`.
fn number_before(text: &str, what: &str) -> Option<u32> {
    text.split([',', ';', '.', '(', ')']).find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of which runner, the line, and what it counts.
    type Case = (Parse, &'static str, Option<(u32, u32)>);

    #[test]
    fn closing_lines_are_counted() {
        let cases: [Case; 7] = [
            (
                libtest_line,
                "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.00s",
                Some((3, 0)),
            ),
            (libtest_line, "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured", Some((3, 3))),
            (libtest_line, "test some::name ... ok", None),
            (nextest_line, "     Summary [   0.004s] 3 tests run: 3 passed, 6 skipped", Some((3, 0))),
            (
                nextest_line,
                "     Summary [   1.0s] 5 tests run: 2 passed (1 slow), 3 failed, 0 skipped",
                Some((2, 3)),
            ),
            (
                nextest_line,
                "     Summary [   1.0s] 3/5 tests run: 2 passed, 1 timed out, 0 skipped",
                Some((2, 1)),
            ),
            (nextest_line, "        PASS [   0.003s] crate a_test", None),
        ];
        for (parse, line, expected) in cases {
            assert_eq!(parse(line), expected, "{line}");
        }
    }
}
