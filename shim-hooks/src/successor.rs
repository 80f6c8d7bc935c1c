//! Whether an agent is coming: one that holds its lock and does not listen yet, or not any more.
//!
//! Owns the look at the kernel's list of locks, `/proc/locks`. Never takes the lock itself, not even for a moment: the agent that tries to
//! have it then would give up.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

/// All locks of the machine.
const LOCKS: &str = "/proc/locks";
/// More of them than a machine has: what comes behind is not looked at.
const LIMIT: usize = 100_000;

/// Whether somebody holds this lock. No, when that cannot be told.
pub(crate) fn is_locked(path: &Path) -> bool {
    let (Ok(file), Ok(locks)) = (fs::metadata(path), File::open(LOCKS)) else { return false };
    let lines = BufReader::new(locks).lines().take(LIMIT).map_while(Result::ok);
    lines.into_iter().any(|line| names(&line, file.dev(), file.ino()))
}

/// `1: FLOCK  ADVISORY  WRITE 4711 fe:00:10021514 0 EOF`. One who waits for the lock has `->` in the second place.
fn names(line: &str, device: u64, inode: u64) -> bool {
    let mut fields = line.split_whitespace().skip(1);
    if fields.next() != Some("FLOCK") {
        return false;
    }
    let Some(mut file) = fields.nth(3).map(|file| file.split(':')) else { return false };
    let mut hex = || file.next().and_then(|part| u32::from_str_radix(part, 16).ok());
    let (major, minor) = (hex(), hex());
    major == Some(rustix::fs::major(device))
        && minor == Some(rustix::fs::minor(device))
        && file.next().and_then(|part| part.parse().ok()) == Some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_seen_and_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.lock");
        assert!(!is_locked(&path));
        let file = File::create(&path).unwrap();
        assert!(!is_locked(&path));
        file.lock().unwrap();
        assert!(is_locked(&path));
        assert!(!is_locked(directory.path()), "another file");
        file.unlock().unwrap();
        assert!(!is_locked(&path));
    }

    #[test]
    fn lines() {
        let device = rustix::fs::makedev(0xfe, 0);
        for (line, held) in [
            ("1: FLOCK  ADVISORY  WRITE 21844 fe:00:10021514 0 EOF", true),
            ("7: FLOCK  ADVISORY  READ 21844 fe:00:10021514 0 EOF", true),
            ("1: FLOCK  ADVISORY  WRITE 21844 fe:00:10021515 0 EOF", false),
            ("1: FLOCK  ADVISORY  WRITE 21844 fe:01:10021514 0 EOF", false),
            ("1: POSIX  ADVISORY  WRITE 21844 fe:00:10021514 0 EOF", false),
            ("1: -> FLOCK  ADVISORY  WRITE 21844 fe:00:10021514 0 EOF", false),
            ("1: FLOCK", false),
            ("", false),
        ] {
            assert_eq!(names(line, device, 10_021_514), held, "{line}");
        }
    }
}
