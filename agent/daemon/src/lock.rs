//! One agent on a machine: flock(2) on a file in the run directory, and on the state directory and the pin root themselves.
//!
//! The kernel gives a lock up when its holder ends, however it ends.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// See [`take_soon`].
const PATIENCE: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Held as long as the agent runs.
#[derive(Debug)]
pub(crate) struct AgentLock {
    _run: Flock<File>,
    _state: Flock<File>,
    _pins: Flock<File>,
}

/// Why the lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Somebody else has it.
    #[error("another agent runs{}: it holds {}", by(.holder.as_deref()), path.display())]
    Held {
        /// The lock.
        path: PathBuf,
        /// The pid that is written in it.
        holder: Option<String>,
    },
    /// The file cannot be used.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The lock.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn by(holder: Option<&str>) -> String {
    holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

impl AgentLock {
    /// Takes all locks: two agents must share neither the socket nor the journal nor what is in force in the kernel.
    pub(crate) fn take(lock_file: &Path, state_dir: &Path, pin_root: &Path) -> Result<Self, LockError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            |source| LockError::Io { path, source }
        };
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(flags)
            .open(lock_file)
            .map_err(at(lock_file))?;
        let mut run = lock(file, lock_file)?;
        let state = lock(File::open(state_dir).map_err(at(state_dir))?, state_dir)?;
        let pins = lock(File::open(pin_root).map_err(at(pin_root))?, pin_root)?;
        // For the message of the one who comes second, nothing else.
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut run).map_err(at(lock_file))?;
        Ok(Self { _run: run, _state: state, _pins: pins })
    }
}

/// Takes a lock, or gives the file back. A child that an agent was about to start when it was killed shares its locks until
/// it runs its own program, which takes milliseconds: so a lock that is taken is tried for a little longer.
pub(crate) fn take_soon(mut file: File) -> Result<Flock<File>, (File, Errno)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((again, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = again,
            outcome => return outcome,
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn lock(file: File, path: &Path) -> Result<Flock<File>, LockError> {
    match take_soon(file) {
        Ok(lock) => Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => {
            Err(LockError::Held { path: path.to_owned(), holder: holder(file) })
        }
        Err((_, errno)) => Err(LockError::Io { path: path.to_owned(), source: errno.into() }),
    }
}

fn holder(file: File) -> Option<String> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    let pid = text.trim();
    (!pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit())).then(|| pid.to_owned())
}

/// Makes a directory of the agent, owned by it, with this mode.
pub(crate) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
    // Against the umask, and for one that was there before.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_who_is_first() {
        let directory = tempfile::tempdir().unwrap();
        let [file, state, pins] = ["agent.lock", "state", "pins"].map(|name| directory.path().join(name));
        let [other_state, other_pins] = ["state.2", "pins.2"].map(|name| directory.path().join(name));
        for path in [&state, &pins, &other_state, &other_pins] {
            make_directory(path, 0o711).unwrap();
        }
        let first = AgentLock::take(&file, &state, &pins).unwrap();
        let error = AgentLock::take(&file, &state, &pins).unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        // Another run directory does not help: the journal is locked, too, and so is what is pinned.
        let other = directory.path().join("other.lock");
        for (state, pins, held) in [(&state, &other_pins, &state), (&other_state, &pins, &pins)] {
            let error = AgentLock::take(&other, state, pins).unwrap_err();
            assert!(matches!(&error, LockError::Held { path, .. } if path == held), "{error}");
        }
        // One that is given up in a moment is waited for.
        let held = lock(File::open(&other_pins).unwrap(), &other_pins).unwrap();
        let giver = thread::spawn(move || {
            thread::sleep(PATIENCE / 10);
            drop(held);
        });
        let _second = AgentLock::take(&other, &other_state, &other_pins).unwrap();
        giver.join().unwrap();
        drop(first);
        AgentLock::take(&file, &state, &pins).unwrap();
    }
}
