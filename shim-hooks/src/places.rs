//! Where the agent is: its run directory, for the socket, and its state directory, for the file that stands in for it.
//!
//! Owns the order of precedence: a flag, the configuration of a wrapper, the environment as the agent itself reads it, the default.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use pillion_common::hook::{GATE_FILE, LOCK, RUN_DIRECTORY, SOCKET, STATE_DIRECTORY};

/// The agent's directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) run: PathBuf,
    pub(crate) state: PathBuf,
}

impl Places {
    /// As the configuration of a wrapper or else the environment says.
    pub(crate) fn new(run: Option<PathBuf>, state: Option<PathBuf>) -> Self {
        let place = |given: Option<PathBuf>, variable, default| {
            given
                .or_else(|| env::var_os(variable).map(PathBuf::from))
                .unwrap_or_else(|| PathBuf::from(default))
        };
        Self {
            run: place(run, "PILLION_RUN_DIR", RUN_DIRECTORY),
            state: place(state, "PILLION_STATE_DIR", STATE_DIRECTORY),
        }
    }

    /// Takes the flags off the front of the arguments.
    pub(crate) fn from_arguments(arguments: &[OsString]) -> Result<(Self, &[OsString]), String> {
        let (mut run, mut state) = (None, None);
        let mut rest = arguments;
        while let [flag, after @ ..] = rest {
            let place = match flag.as_os_str() {
                flag if flag == OsStr::new("--run-dir") => &mut run,
                flag if flag == OsStr::new("--state-dir") => &mut state,
                _ => break,
            };
            let [value, after @ ..] = after else {
                return Err(format!("{} needs a directory", crate::shown(flag)));
            };
            *place = Some(PathBuf::from(value));
            rest = after;
        }
        Ok((Self::new(run, state), rest))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join(SOCKET)
    }

    /// Held by an agent from before it listens until it has ended.
    pub(crate) fn lock(&self) -> PathBuf {
        self.run.join(LOCK)
    }

    pub(crate) fn gate_file(&self) -> PathBuf {
        self.state.join(GATE_FILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_come_first() {
        let arguments = |list: &[&str]| list.iter().map(OsString::from).collect::<Vec<_>>();
        let given = arguments(&["--run-dir", "/r", "--state-dir", "/s", "poststop", "--run-dir"]);
        let (places, rest) = Places::from_arguments(&given).unwrap();
        assert_eq!(places, Places { run: "/r".into(), state: "/s".into() });
        assert_eq!(rest, arguments(&["poststop", "--run-dir"]));
        assert_eq!(places.socket(), PathBuf::from("/r/gate.sock"));
        assert_eq!(places.gate_file(), PathBuf::from("/s/gate.json"));
        assert!(Places::from_arguments(&arguments(&["--run-dir"])).is_err());
        let (places, rest) = Places::from_arguments(&[]).unwrap();
        assert!(places.run.is_absolute() && rest.is_empty());
    }
}
