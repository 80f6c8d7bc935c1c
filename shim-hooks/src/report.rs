//! What this program says: on stderr, and as a runtime in the runtime's own log.
//!
//! Owns the form of both. containerd and Docker show why a runtime failed from the log that they name with `--log`: the last JSON line whose level is
//! `error` (`getLastRuntimeError` in containerd's `pkg/process/utils.go`), which must have a time.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

/// Says it to whoever reads stderr.
pub(crate) fn say(message: &str) {
    // There is nowhere to say that this failed.
    let _ = writeln!(io::stderr(), "{message}");
}

/// Data on stdout.
pub(crate) fn print(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// How bad it is, by logrus' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Error,
    Warning,
}

/// A runtime's log: `--log` and `--log-format`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) path: Option<PathBuf>,
    pub(crate) json: bool,
}

impl Log {
    /// Says it on stderr and in the log.
    pub(crate) fn say(&self, level: Level, message: &str) {
        say(message);
        let Some(path) = &self.path else { return };
        let line = self.line(level, message, SystemTime::now());
        let file = fs::OpenOptions::new().create(true).append(true).mode(0o644).open(path);
        // stderr has it already.
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }

    fn line(&self, level: Level, message: &str, now: SystemTime) -> String {
        let level = match level {
            Level::Error => "error",
            Level::Warning => "warning",
        };
        let time = rfc3339(now);
        if self.json {
            let line = serde_json::json!({ "level": level, "msg": message, "time": time });
            format!("{line}\n")
        } else {
            format!("time={time:?} level={level} msg={message:?}\n")
        }
    }
}

/// In UTC, to the second.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days from 0000-03-01, in eras of 400 years, so that a leap day is the last day of its year (Howard Hinnant's
    // `civil_from_days`).
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + next_year;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_795_644_954, "2026-11-25T22:15:54Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn lines_as_runtimes_write_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        fs::write(&path, "{\"level\":\"info\",\"msg\":\"earlier\"}\n").unwrap();
        let log = Log { path: Some(path.clone()), json: true };
        log.say(Level::Error, "pillion: \"no\"\nat all");
        let text = fs::read_to_string(&path).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!((&last["level"], &last["msg"]), (&"error".into(), &"pillion: \"no\"\nat all".into()));
        assert_eq!(text.lines().count(), 2);

        let text = Log::default().line(Level::Warning, "a \"b\"\nc", UNIX_EPOCH);
        assert_eq!(text, "time=\"1970-01-01T00:00:00Z\" level=warning msg=\"a \\\"b\\\"\\nc\"\n");
        // A log that cannot be written harms nothing.
        Log { path: Some("/nowhere/log".into()), json: false }.say(Level::Error, "said");
    }
}
