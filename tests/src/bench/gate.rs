//! What gates catch and what they cost: of so many starts whose first instruction connects, how many connections went
//! through the relay; how long the agent let a gate wait; and the time from the start's command to the server's accept,
//! with Pillion and without, taking turns.
//!
//! Owns the measurement. How a workload is started at each gate is `stations`.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::stations::{Place, STATIONS, Told, Way};
use crate::{NetNs, on_machine_within, process};

/// Starts before those that count.
const WARM_UP: u32 = 3;
/// A connection reaches the server within this, or has been missed.
const ARRIVAL: Duration = Duration::from_secs(60);
/// All of one gate's starts, on a slow machine.
const LIMIT: Duration = Duration::from_secs(2 * 60 * 60);
/// Between two looks at whether to stop.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// The server that every workload dials first. Answers each byte with a byte, and knows when it accepted what.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    accepted: Arc<Mutex<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(netns: &NetNs, address: &str) -> Result<Self> {
        let listener = netns.run(|| TcpListener::bind(address));
        let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (accepted, stop) = (Arc::<Mutex<Vec<Instant>>>::default(), Arc::<AtomicBool>::default());
        let acceptor = thread::spawn({
            let (accepted, stop) = (accepted.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&TICK));
                    while let Ok((stream, _)) = listener.accept() {
                        accepted.lock().expect("nobody panics with it").push(Instant::now());
                        thread::spawn(move || answer(stream));
                    }
                }
            }
        });
        Ok(Self { address, accepted, stop, acceptor: Some(acceptor) })
    }

    fn accepted(&self) -> usize {
        self.accepted.lock().expect("nobody panics with it").len()
    }

    /// When connection number `index` came.
    fn arrival(&self, index: usize) -> Result<Instant> {
        let look = || self.accepted.lock().expect("nobody panics with it").get(index).copied();
        crate::wait_for("the workload's connection", ARRIVAL, look)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn answer(stream: TcpStream) {
    crate::echo::serve(stream);
}

/// What was measured at one gate.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    gate: &'static str,
    starts: u32,
    captured: usize,
    /// What the agent let the gate wait, in milliseconds; absent where no agent is asked.
    held_p50: Option<f64>,
    held_p99: Option<f64>,
    /// From the command to the server's accept, p50 and p99 in milliseconds; absent where that means nothing.
    start_with: Option<[f64; 2]>,
    start_without: Option<[f64; 2]>,
}

/// What is written.
#[derive(Debug, Serialize)]
struct Figures {
    kernel: String,
    cpus: usize,
    gates: Vec<Line>,
}

impl Figures {
    fn new() -> Result<Self> {
        let kernel = nix::sys::utsname::uname().context("uname")?.release().to_string_lossy().into_owned();
        let cpus = thread::available_parallelism().context("the number of processors")?.get();
        Ok(Self { kernel, cpus, gates: Vec::new() })
    }

    fn write(&self, output: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(output, text).with_context(|| format!("cannot write {}", output.display()))
    }
}

/// Measures at every gate, or at those named, and writes the figures to `output`. An error when one start was missed, after
/// all of them.
pub(super) fn run(output: &Path, share: f64, only: &[&str]) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| STATIONS.iter().all(|station| station.name != **name)) {
        let names: Vec<&str> = STATIONS.iter().map(|station| station.name).collect();
        bail!("no gate {unknown}; there are:\n  {}", names.join("\n  "));
    }
    process::keep_quiet();
    let mut figures = Figures::new()?;
    head(&figures);
    let mut failed = Vec::new();
    for station in STATIONS.iter().filter(|station| only.is_empty() || only.contains(&station.name)) {
        let mut lines = Vec::new();
        let outcome = on_machine_within(LIMIT, |machine| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousands")]
            let starts = (f64::from(station.starts) * share).ceil() as u32;
            match station.way {
                Way::Here(prepare) => {
                    let place = prepare(machine)?;
                    lines.push(measure(station.name, &*place, starts)?);
                    place.end()?;
                }
                Way::Elsewhere(measure) => {
                    lines.extend(measure(machine, starts)?.iter().map(Line::elsewhere));
                }
            }
            Ok(())
        });
        let missed = lines.iter().filter(|line| line.captured != line.starts as usize);
        failed.extend(missed.map(|line| format!("{}: first connections were missed", line.gate)));
        failed.extend(outcome.err().map(|error| format!("{}: {error:#}", station.name)));
        lines.iter().for_each(show);
        figures.gates.append(&mut lines);
        // Some gates take an hour: what has been measured is kept, whatever becomes of the others.
        figures.write(output)?;
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

fn measure(gate: &'static str, place: &dyn Place, starts: u32) -> Result<Line> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let server = place.server();
    let mut captured = 0;
    for number in 0..starts + WARM_UP {
        for matched in [true, false] {
            place.before()?;
            let before = server.accepted();
            let began = Instant::now();
            place.start(&format!("w{number}{}", if matched { "" } else { "-bare" }), matched)?;
            let took = server.arrival(before)?.duration_since(began);
            ensure!(server.accepted() == before + 1, "one start, one connection");
            if number >= WARM_UP {
                if matched { &mut with } else { &mut without }.push(took.as_secs_f64() * 1000.0);
            }
        }
        if number + 1 == WARM_UP {
            captured = place.captured(WARM_UP as usize)?;
        }
    }
    let captured = place.captured((starts + WARM_UP) as usize)? - captured;
    let both = |took: &[f64]| Some([percentile(took, 50), percentile(took, 99)]);
    Ok(Line {
        start_with: both(&with),
        start_without: both(&without),
        ..Line::elsewhere(&Told { gate, starts, captured, held: place.held()? })
    })
}

impl Line {
    /// Of a gate where starts are not timed.
    fn elsewhere(told: &Told) -> Self {
        let held = |percent| (!told.held.is_empty()).then(|| percentile(&told.held, percent));
        Self {
            gate: told.gate,
            starts: told.starts,
            captured: told.captured,
            held_p50: held(50),
            held_p99: held(99),
            start_with: None,
            start_without: None,
        }
    }
}

/// By the nearest rank.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[expect(clippy::print_stdout, reason = "a command line program")]
fn head(figures: &Figures) {
    println!("kernel {}, {} CPUs; times in milliseconds", figures.kernel, figures.cpus);
    println!(
        "{:36} {:>7} {:>9} {:>10} {:>10} {:>12} {:>12} {:>12} {:>12}",
        "GATE",
        "STARTS",
        "CAPTURED",
        "HELD p50",
        "HELD p99",
        "START p50",
        "START p99",
        "BARE p50",
        "BARE p99"
    );
}

#[expect(clippy::print_stdout, reason = "a command line program")]
fn show(line: &Line) {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    let of = |both: Option<[f64; 2]>, which: usize| number(both.map(|both| both[which]));
    println!(
        "{:36} {:>7} {:>9} {:>10} {:>10} {:>12} {:>12} {:>12} {:>12}",
        line.gate,
        line.starts,
        line.captured,
        number(line.held_p50),
        number(line.held_p99),
        of(line.start_with, 0),
        of(line.start_with, 1),
        of(line.start_without, 0),
        of(line.start_without, 1)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        for (percent, wanted) in [(50, 50.0), (99, 99.0)] {
            assert!((percentile(&values, percent) - wanted).abs() < 1e-9);
        }
        assert!((percentile(&[7.0], 99) - 7.0).abs() < 1e-9);
        assert!((percentile(&[], 50) - 0.0).abs() < 1e-9);
    }
}
