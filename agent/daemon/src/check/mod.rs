//! `pillion check`: whether this machine can run Pillion, each shortcoming with cause and cure.
//!
//! Owns the list of checks and what each means for Pillion. Tries things out instead of comparing version numbers.
//! Changes nothing and leaves nothing behind.

mod hooks;
mod kernel;
mod machine;
mod neighbours;
mod privileges;

use std::{fmt::Write as _, process::ExitCode};

use serde::Serialize;

use crate::{
    cli::CheckArgs,
    inspect::DEGRADED,
    render::{self, Cell, Paint, Table, Tone, View, count, indent, plain_lines},
};

/// A cure.
const RUN_AS_ROOT: &str = "run it as root: sudo pillion check";

/// What a finding means for Pillion, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Pillion works, but not all of it, or not as well.
    Warn,
    /// Pillion does not work.
    Fail,
}

/// The outcome of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Finding {
    /// Short name, stable.
    check: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// Why it is not ok.
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    cure: Option<String>,
}

impl Finding {
    fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Ok, found: found.into(), cause: None, cure: None }
    }

    fn warn(
        check: impl Into<String>,
        found: impl Into<String>,
        cause: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self {
            check: check.into(),
            verdict: Verdict::Warn,
            found: found.into(),
            cause: Some(cause.into()),
            cure: Some(cure.into()),
        }
    }

    fn fail(
        check: impl Into<String>,
        found: impl Into<String>,
        cause: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(check, found, cause, cure) }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    verdict: Verdict,
    checks: Vec<Finding>,
}

impl View for Report {
    fn text(&self, wide: bool, paint: Paint) -> String {
        let mut table = Table::new(&["VERDICT", "CHECK", "FOUND"]);
        for finding in &self.checks {
            let (word, tone) = look(finding.verdict);
            table.row(vec![Cell::toned(word, tone), (&finding.check).into(), (&finding.found).into()]);
        }
        let mut out = table.render(paint);
        for finding in self.checks.iter().filter(|finding| wide || finding.verdict != Verdict::Ok) {
            let (Some(cause), Some(cure)) = (&finding.cause, &finding.cure) else { continue };
            let (word, tone) = look(finding.verdict);
            let title = paint.tone(tone, &format!("{word}: {}", finding.check));
            let text = format!("cause: {}\ncure: {}", plain_lines(cause), plain_lines(cure));
            let _ = write!(out, "\n{title}\n{}", indent(&text, 2));
        }
        let number = |verdict| self.checks.iter().filter(|finding| finding.verdict == verdict).count();
        let summary = match self.verdict {
            Verdict::Ok => "all is well".to_owned(),
            Verdict::Warn => {
                format!("Pillion works here, with {}", count(number(Verdict::Warn), "shortcoming"))
            }
            Verdict::Fail => {
                format!("Pillion does not work here: {}", count(number(Verdict::Fail), "failed check"))
            }
        };
        let _ = write!(out, "\n{summary}\n");
        out
    }

    fn names(&self) -> Vec<String> {
        self.checks.iter().filter(|f| f.verdict != Verdict::Ok).map(|finding| finding.check.clone()).collect()
    }
}

fn look(verdict: Verdict) -> (&'static str, Tone) {
    match verdict {
        Verdict::Ok => ("ok", Tone::Good),
        Verdict::Warn => ("warn", Tone::Warn),
        Verdict::Fail => ("fail", Tone::Bad),
    }
}

/// `pillion check`.
pub(crate) async fn main(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    // Before anything is tried out: the kernel frees what was a little later.
    let leftovers = machine::leftovers(&args.paths);
    let mut checks = Vec::new();
    checks.extend(kernel::checks(&args.paths));
    checks.extend(privileges::checks());
    checks.push(machine::policies(&args.policy_dir));
    if let Some(socket) = args.containerd_socket.get() {
        checks.push(machine::containerd(socket).await);
    }
    checks.extend(hooks::checks(args));
    checks.push(machine::ports());
    checks.extend(neighbours::checks());
    checks.extend(leftovers);
    let verdict = checks.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    render::print(&Report { verdict, checks }, args.output.format)?;
    Ok(match verdict {
        Verdict::Ok => ExitCode::SUCCESS,
        Verdict::Warn => ExitCode::from(DEGRADED),
        Verdict::Fail => ExitCode::FAILURE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_cause_and_cure() {
        let checks = vec![
            Finding::ok("btf", "the kernel describes its types"),
            Finding::warn("ports", "1024-65535", "they overlap", "sysctl this\nor that"),
        ];
        let report = Report { verdict: Verdict::Warn, checks };
        assert_eq!(
            report.text(false, Paint::OFF),
            "VERDICT  CHECK  FOUND\n\
             ok       btf    the kernel describes its types\n\
             warn     ports  1024-65535\n\
             \n\
             warn: ports\n\
             \x20 cause: they overlap\n\
             \x20 cure: sysctl this\n\
             \x20 or that\n\
             \n\
             Pillion works here, with 1 shortcoming\n"
        );
        assert_eq!(report.names(), ["ports"]);
    }
}
