//! What redirection costs, against dialling the companion oneself, not having one, and iptables REDIRECT; what the embedded
//! relay costs (`relay`); whether that grows with rules and workloads (`rules`); and what gates catch and cost (`gate`).
//!
//! Owns the measurement of redirection: `stage` sets namespaces, cgroups, data plane and rules up, `peers` are the processes that
//! talk, `report` turns samples into figures. Everything runs on one CPU; the modes take turns within every round, so
//! that what disturbs the machine disturbs all of them.

#![expect(clippy::print_stdout, reason = "a command line program")]

mod gate;
mod peers;
mod relay;
mod report;
mod rules;
mod stage;
mod stations;

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use report::{Report, Series};
use stage::{MODES, Mode, Stage};

/// One thing that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// connect, one byte there and back, close: nanoseconds.
    Connection,
    /// connect and close, without the byte there and back between them: nanoseconds.
    Connect,
    /// 64 bytes there and back on an open connection: nanoseconds.
    Message64,
    /// 16 KiB there and back on an open connection: nanoseconds.
    Message16K,
    /// A stream, counted by the receiver: nanoseconds for 1 MiB.
    Stream,
}

/// A row of the table.
struct Row {
    kind: Kind,
    v6: bool,
    /// Samples that one turn takes.
    batch: u32,
}

const ROWS: [Row; 5] = [
    Row { kind: Kind::Connection, v6: false, batch: 250 },
    Row { kind: Kind::Connection, v6: true, batch: 250 },
    Row { kind: Kind::Message64, v6: false, batch: 400 },
    Row { kind: Kind::Message16K, v6: false, batch: 200 },
    Row { kind: Kind::Stream, v6: false, batch: 6 },
];

/// The program: measures, or is one of the peers.
pub fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["redirect", output, rounds] => redirect(Path::new(output), rounds.parse().context("rounds")?),
        ["relay", output, rounds] => relay::run(Path::new(output), rounds.parse().context("rounds")?),
        ["rules", output, rounds] => rules::run(Path::new(output), rounds.parse().context("rounds")?),
        ["gate", output, share, ref only @ ..] => {
            gate::run(Path::new(output), share.parse().context("share")?, only)
        }
        ["serve", ref addresses @ ..] => peers::serve(addresses),
        ["measure"] => peers::measure(),
        _ => bail!(
            "usage: pillion-bench redirect|relay|rules OUTPUT.json ROUNDS | gate OUTPUT.json SHARE [GATE…]"
        ),
    }
}

fn redirect(output: &Path, rounds: u32) -> Result<()> {
    let mut stage = Stage::new()?;
    let mut series: Vec<Series> = Vec::new();
    for row in &ROWS {
        for mode in MODES {
            // Warm caches and let each path see its first connection.
            stage.sample(mode, row.kind, row.v6, row.batch)?;
            series.push(Series::new(row.kind, row.v6, mode));
        }
    }
    for round in 0..rounds {
        for row in &ROWS {
            for turn in 0..MODES.len() {
                let mode = MODES[(turn + round as usize) % MODES.len()];
                let samples = stage.sample(mode, row.kind, row.v6, row.batch)?;
                let place = series.iter_mut().find(|s| s.is(row.kind, row.v6, mode)).context("a series")?;
                place.add(samples);
            }
        }
    }
    stage.check()?;
    stage.end()?;
    let report = Report::new(rounds, &series, Mode::Dial);
    print(&report);
    report.write(output)
}

fn print(report: &Report) {
    print!("{report}");
}
