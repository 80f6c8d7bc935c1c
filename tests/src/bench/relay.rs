//! What the embedded relay costs: the same client and server with `pillion run` and its relay between them, and without, taking
//! turns, everything on one CPU.
//!
//! Owns the measurement; the processes that talk are `peers`.

use std::{fs::File, io::Read as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    Kind, Row,
    report::{Report, Series},
    stage::{Mode, Peer, pin},
};
use crate::{CgroupGuard, NetNs, run};

const SOON: Duration = Duration::from_secs(30);
const MODES: [Mode; 2] = [Mode::Direct, Mode::Relay];
const POLICY: &str = "spec:\n  select: { runtimes: [process] }\n  companions: [{ name: r, builtin: relay }]\n  \
                      redirect: { outbound: [{ to: r }] }\n  onFailure: closed\n";

const ROWS: [Row; 5] = [
    Row { kind: Kind::Connection, v6: false, batch: 100 },
    Row { kind: Kind::Message64, v6: false, batch: 400 },
    Row { kind: Kind::Message16K, v6: false, batch: 200 },
    Row { kind: Kind::Stream, v6: false, batch: 6 },
    Row { kind: Kind::Stream, v6: true, batch: 6 },
];

/// Measures, and writes the figures to `output`. An error when anything went by the relay.
pub(super) fn run(output: &Path, rounds: u32) -> Result<()> {
    pin()?;
    let (near, far) = NetNs::pair()?;
    let others = CgroupGuard::new()?;
    let mut server = Peer::start(&far, &others, &["serve", "10.77.0.2:80", "[fd77::2]:80"])?;
    server.line()?;
    let plain = Peer::start(&near, &others, &["measure"])?;

    let directory = tempfile::tempdir()?;
    let policy = directory.path().join("policy.yaml");
    std::fs::write(&policy, POLICY)?;
    let told = directory.path().join("told");
    let mut command = run::command(&policy, &[])?;
    command.arg(std::env::current_exe()?).arg("measure").stderr(File::create(&told)?);
    let relayed = Peer::spawn(&near, &mut command)?;

    let mut clients = [plain, relayed];
    let mut series = Vec::new();
    let mut dialled = 0;
    for round in 0..=rounds {
        for row in &ROWS {
            for turn in 0..MODES.len() {
                let which = (turn + round as usize) % MODES.len();
                let samples = clients[which].sample(row.kind, row.v6, row.batch);
                let samples = samples.with_context(|| said(&told))?;
                if MODES[which] == Mode::Relay {
                    dialled += if row.kind == Kind::Connection { samples.len() } else { 1 };
                }
                let is = |one: &Series| one.is(row.kind, row.v6, MODES[which]);
                match series.iter_mut().find(|one| is(one)) {
                    Some(place) => place.add(samples),
                    // The first round warms caches and lets each path see its first connection.
                    None => series.push(Series::new(row.kind, row.v6, MODES[which])),
                }
            }
        }
    }
    let [_plain, relayed] = clients;
    relayed.finish(SOON)?;
    let records = run::records(&said(&told))?;
    ensure!(records.len() == dialled, "{} of {dialled} connections were relayed", records.len());
    drop(server);
    let report = Report::new(rounds, &series, Mode::Direct);
    super::print(&report);
    report.write(output)
}

/// What `pillion run` and the relay have written to stderr.
fn said(told: &Path) -> String {
    let mut text = String::new();
    let read = File::open(told).and_then(|mut file| file.read_to_string(&mut text));
    read.map_or_else(|error| error.to_string(), |_| text)
}
