//! Samples become figures: medians and quartiles, and ratios that are taken round by round.

use std::{fmt, fs, path::Path};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{Kind, stage::Mode};

/// All samples of one mode in one row, by rounds.
pub(super) struct Series {
    kind: Kind,
    v6: bool,
    mode: Mode,
    rounds: Vec<Vec<u64>>,
}

impl Series {
    pub(super) fn new(kind: Kind, v6: bool, mode: Mode) -> Self {
        Self { kind, v6, mode, rounds: Vec::new() }
    }

    pub(super) fn is(&self, kind: Kind, v6: bool, mode: Mode) -> bool {
        (self.kind, self.v6, self.mode) == (kind, v6, mode)
    }

    pub(super) fn add(&mut self, samples: Vec<u64>) {
        self.rounds.push(samples);
    }

    fn medians(&self) -> Vec<f64> {
        self.rounds.iter().map(|round| quartiles(round.iter().map(|n| to_float(*n)))[1]).collect()
    }
}

/// One line: a mode in a row. Times in microseconds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    measured: Kind,
    family: &'static str,
    mode: Mode,
    samples: usize,
    quartile1: f64,
    median: f64,
    quartile3: f64,
    /// Median of the rounds' ratios to the base, with its quartiles.
    to_base: [f64; 3],
}

/// All of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    kernel: String,
    processor: String,
    rounds: u32,
    unit: &'static str,
    /// The mode that the others are compared with.
    base: Mode,
    lines: Vec<Line>,
}

impl Report {
    pub(super) fn new(rounds: u32, series: &[Series], base: Mode) -> Self {
        let mut lines = Vec::new();
        for one in series {
            let base = series.iter().find(|s| s.is(one.kind, one.v6, base)).map(Series::medians);
            let ratios =
                one.medians().into_iter().zip(base.unwrap_or_default()).map(|(own, base)| own / base);
            let samples: Vec<f64> = one.rounds.iter().flatten().map(|n| to_float(*n) / 1000.0).collect();
            let count = samples.len();
            let [quartile1, median, quartile3] = quartiles(samples);
            lines.push(Line {
                measured: one.kind,
                family: if one.v6 { "v6" } else { "v4" },
                mode: one.mode,
                samples: count,
                quartile1,
                median,
                quartile3,
                to_base: quartiles(ratios),
            });
        }
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: model.map_or_else(String::new, |(_, name)| name.to_owned()),
            rounds,
            unit: "microseconds; stream: microseconds for 1 MiB",
            base,
            lines,
        }
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "kernel {}, {}, {} rounds, everything on one CPU",
            self.kernel, self.processor, self.rounds
        )?;
        writeln!(
            f,
            "{:12} {:6} {:9} {:>10} {:>10} {:>10}   against {:?}",
            "MEASURED", "FAMILY", "MODE", "Q1 us", "MEDIAN us", "Q3 us", self.base
        )?;
        for line in &self.lines {
            let name = |value: &dyn fmt::Debug| format!("{value:?}").to_lowercase();
            let [low, middle, high] = line.to_base.map(|ratio| (ratio - 1.0) * 100.0);
            writeln!(
                f,
                "{:12} {:6} {:9} {:10.2} {:10.2} {:10.2}   {middle:+6.1} % ({low:+.1} to {high:+.1})",
                name(&line.measured),
                line.family,
                name(&line.mode),
                line.quartile1,
                line.median,
                line.quartile3
            )?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "times of less than a week")]
pub(super) fn to_float(nanoseconds: u64) -> f64 {
    nanoseconds as f64
}

/// First quartile, median and third quartile by the nearest rank; zeroes of nothing.
pub(super) fn quartiles(values: impl IntoIterator<Item = f64>) -> [f64; 3] {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| {
        let rank = (sorted.len() * quarter).div_ceil(4);
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_by_nearest_rank() {
        let shown = |values: &[f64]| format!("{:?}", quartiles(values.iter().copied()));
        assert_eq!(shown(&[]), "[0.0, 0.0, 0.0]");
        assert_eq!(shown(&[5.0]), "[5.0, 5.0, 5.0]");
        assert_eq!(shown(&[4.0, 1.0, 3.0, 2.0]), "[1.0, 2.0, 3.0]");
    }
}
