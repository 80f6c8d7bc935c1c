//! Processes that are listed as stopped: whether they are the same still, and letting them go.

use std::{fs, io, path::Path};

use aya::maps::{HashMap, Map, MapData};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pillion_common::HeldProcess;

use super::{TICK_NS, directory};
use crate::RedirectError;

/// The inode of the first PID namespace: `PROC_PID_INIT_INO` of `linux/proc_ns.h`.
const MACHINES: &str = "pid:[4026531836]";

pub(super) fn in_machines_pid_namespace() -> Result<(), RedirectError> {
    let path = Path::new("/proc/self/ns/pid");
    let is = fs::read_link(path).map_err(RedirectError::sys("cannot read", path))?;
    if is.as_os_str() == MACHINES { Ok(()) } else { Err(RedirectError::PidNamespace) }
}

/// Lets go what earlier agents have left stopped, and removes their lists. Tells how many there were.
///
/// # Errors
/// When a list cannot be read or removed; the others are done.
pub fn let_go_left(pin_root: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(directory(pin_root)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let (mut count, mut failure) = (0, None);
    for entry in entries {
        let done = entry.and_then(|entry| {
            count += let_go_all(open(&entry.path())?)?;
            fs::remove_file(entry.path())
        });
        failure = failure.or(done.err());
    }
    // Not empty when one could not be removed.
    let _ = fs::remove_dir(directory(pin_root));
    failure.map_or(Ok(count), Err)
}

pub(super) fn open(pin: &Path) -> io::Result<HashMap<MapData, u32, HeldProcess>> {
    let map = MapData::from_pin(pin).map_err(io::Error::other)?;
    HashMap::try_from(Map::HashMap(map)).map_err(io::Error::other)
}

pub(super) fn let_go_all(mut held: HashMap<MapData, u32, HeldProcess>) -> io::Result<usize> {
    let_go_those(&mut held, |_| true)
}

/// Lets go those that `overdue` names.
pub(super) fn let_go_those(
    held: &mut HashMap<MapData, u32, HeldProcess>,
    overdue: impl Fn(&HeldProcess) -> bool,
) -> io::Result<usize> {
    let listed: Vec<(u32, HeldProcess)> = held.iter().flatten().collect();
    let mut count = 0;
    for (pid, process) in listed.into_iter().filter(|(_, process)| overdue(process)) {
        count += usize::from(let_go(pid, process.started_ns)?);
        // Removed by the agent meanwhile.
        let _ = held.remove(&pid);
    }
    Ok(count)
}

/// Continues the process if it is this very one. A process that runs is not disturbed by SIGCONT unless it asked for it.
fn let_go(pid: u32, started_ns: u64) -> io::Result<bool> {
    let Ok(number) = i32::try_from(pid) else { return Ok(false) };
    if started(number) != Some(started_ns / TICK_NS) {
        return Ok(false);
    }
    match kill(Pid::from_raw(number), Signal::SIGCONT) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Field 22 of `/proc/PID/stat`, in clock ticks; `None` when there is no such process.
fn started(pid: i32) -> Option<u64> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let after = text.iter().rposition(|byte| *byte == b')')?;
    let text = std::str::from_utf8(text.get(after + 1..)?).ok()?;
    text.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_when_it_started() {
        let own = i32::try_from(std::process::id()).expect("a pid fits an i32");
        assert!(started(own).is_some_and(|ticks| ticks > 0));
        assert_eq!(started(0), None);
        // Another start time is another process.
        assert!(!let_go(std::process::id(), 0).expect("nothing is signalled"));
    }
}
