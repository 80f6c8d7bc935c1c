//! The command line of runc, crun and youki, as far as a wrapper must understand it.
//!
//! Owns the recognition of `start`. Never changes an argument: all of them go to the real runtime as they came.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::PathBuf,
};

use crate::report::Log;

/// Flags before the command that take a value, also as the next argument. runc: `--root --log --log-format --criu --rootless`; crun
/// has `--cgroup-manager` besides; youki abbreviates `-r` and `-l`.
const WITH_VALUE: [&[u8]; 8] =
    [b"root", b"log", b"log-format", b"criu", b"rootless", b"cgroup-manager", b"r", b"l"];
/// Flags before the command that take none.
const WITHOUT_VALUE: [&[u8]; 8] =
    [b"debug", b"systemd-cgroup", b"help", b"version", b"h", b"v", b"s", b"no-pivot"];
/// Commands of the three and of others like them.
const COMMANDS: [&[u8]; 22] = [
    b"checkpoint",
    b"create",
    b"delete",
    b"events",
    b"exec",
    b"features",
    b"help",
    b"info",
    b"init",
    b"kill",
    b"list",
    b"pause",
    b"ps",
    b"restore",
    b"resume",
    b"run",
    b"spec",
    b"start",
    b"state",
    b"update",
    b"version",
    b"wait",
];

/// What was understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CommandLine<'a> {
    /// `--root`.
    pub(crate) root: Option<PathBuf>,
    /// `--log` and `--log-format`.
    pub(crate) log: Log,
    /// The arguments before the command.
    pub(crate) globals: &'a [OsString],
    /// The container's id, when the command is `start`.
    pub(crate) start: Option<&'a OsStr>,
}

impl<'a> CommandLine<'a> {
    /// Reads the arguments after the program's name.
    pub(crate) fn parse(arguments: &'a [OsString]) -> Self {
        let mut line = Self::default();
        let mut rest = arguments;
        while let [argument, after @ ..] = rest {
            let Some(flag) = flag(argument) else { break };
            let (name, value) = match flag.iter().position(|&byte| byte == b'=') {
                Some(at) => (flag.get(..at).unwrap_or_default(), flag.get(at + 1..)),
                None => (flag, None),
            };
            rest = after;
            let value = match (value, after) {
                (Some(value), _) => Some(value),
                (None, [next, beyond @ ..]) if takes_next(name, next, beyond) => {
                    rest = beyond;
                    Some(next.as_bytes())
                }
                (None, _) => None,
            };
            line.set(name, value.unwrap_or_default());
            if argument.as_bytes() == b"--" {
                break;
            }
        }
        line.globals = arguments.get(..arguments.len() - rest.len()).unwrap_or_default();
        if let [command, after @ ..] = rest
            && command.as_bytes() == b"start"
        {
            line.start = after.iter().find(|argument| flag(argument).is_none()).map(OsString::as_os_str);
        }
        line
    }

    fn set(&mut self, name: &[u8], value: &[u8]) {
        let path = || PathBuf::from(OsString::from_vec(value.to_owned()));
        match name {
            b"root" | b"r" => self.root = Some(path()).filter(|path| !path.as_os_str().is_empty()),
            b"log" | b"l" => self.log.path = Some(path()).filter(|path| !path.as_os_str().is_empty()),
            b"log-format" => self.log.json = value == b"json",
            _ => {}
        }
    }
}

/// The name of a flag with its value, without the dashes; `None` for another argument.
fn flag(argument: &OsStr) -> Option<&[u8]> {
    let bytes = argument.as_bytes();
    let flag = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-"))?;
    // A dash alone is no flag.
    (bytes.len() > 1).then_some(flag)
}

/// Whether the flag's value is the argument after it. Of a flag that is not known it is, when that is no command and a command comes later: so
/// a runtime's new flag does not hide its `start`.
fn takes_next(name: &[u8], next: &OsStr, beyond: &[OsString]) -> bool {
    if WITH_VALUE.contains(&name) {
        return true;
    }
    if name.is_empty() || WITHOUT_VALUE.contains(&name) {
        return false;
    }
    let is_command = |argument: &OsStr| COMMANDS.contains(&argument.as_bytes());
    flag(next).is_none() && !is_command(next) && beyond.iter().any(|argument| is_command(argument))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arguments(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn start_is_seen_in_every_form() {
        let cases = [
            // containerd, Docker.
            (
                "--root /run/containerd/runc/default --log /b/log.json --log-format json start web",
                Some("web"),
                Some("/run/containerd/runc/default"),
                Some("/b/log.json"),
                true,
            ),
            (
                "--root /r --log /b/log.json --log-format json --systemd-cgroup start web",
                Some("web"),
                Some("/r"),
                Some("/b/log.json"),
                true,
            ),
            // podman start, conmon.
            ("start 0123abc", Some("0123abc"), None, None, false),
            (
                "--systemd-cgroup --log-format=json --log=/l create --bundle start x",
                None,
                None,
                Some("/l"),
                true,
            ),
            ("--cgroup-manager=systemd --root=/r start x", Some("x"), Some("/r"), None, false),
            // The Go style has one dash as well.
            ("-root /r -debug start x", Some("x"), Some("/r"), None, false),
            ("-r /r -l /l start x", Some("x"), Some("/r"), Some("/l"), false),
            ("--log-format text --log /l start -x y", Some("y"), None, Some("/l"), false),
            // The last one counts.
            ("--root /a --root /b start x", Some("x"), Some("/b"), None, false),
            // Names that look like the command.
            ("--root start state x", None, Some("start"), None, false),
            ("create start", None, None, None, false),
            ("state start", None, None, None, false),
            ("exec x start", None, None, None, false),
            ("start start", Some("start"), None, None, false),
            ("start --help", None, None, None, false),
            ("-- start x", Some("x"), None, None, false),
            // Flags that are not known, with and without a value.
            ("--platform kvm start x", Some("x"), None, None, false),
            ("--overlay start x", Some("x"), None, None, false),
            ("--network host --strace start x", Some("x"), None, None, false),
            ("--help", None, None, None, false),
            ("", None, None, None, false),
            ("start", None, None, None, false),
            ("--root", None, None, None, false),
        ];
        for (text, start, root, log, json) in cases {
            let arguments = arguments(text);
            let line = CommandLine::parse(&arguments);
            assert_eq!(line.start, start.map(OsStr::new), "{text}");
            assert_eq!(line.root, root.map(PathBuf::from), "{text}");
            assert_eq!(line.log, Log { path: log.map(PathBuf::from), json }, "{text}");
        }
    }

    #[test]
    fn what_is_before_the_command() {
        let arguments = arguments("--root /r --systemd-cgroup --log=/l start x");
        assert_eq!(CommandLine::parse(&arguments).globals, &arguments[..4]);
    }

    proptest! {
        #[test]
        fn arbitrary_arguments_never_panic(arguments: Vec<Vec<u8>>) {
            let arguments: Vec<OsString> = arguments.into_iter().map(OsString::from_vec).collect();
            let line = CommandLine::parse(&arguments);
            prop_assert!(line.globals.len() <= arguments.len());
        }

        #[test]
        fn known_flags_in_any_order_never_hide_start(
            flags in proptest::collection::vec(
                prop_oneof![
                    Just("--root /r"), Just("--root=/r"), Just("--log /l"), Just("--log-format json"), Just("--debug"),
                    Just("--systemd-cgroup"), Just("--rootless auto"), Just("--cgroup-manager cgroupfs"),
                ],
                0..6,
            ),
        ) {
            let arguments = arguments(&format!("{} start web", flags.join(" ")));
            prop_assert_eq!(CommandLine::parse(&arguments).start, Some(OsStr::new("web")));
        }
    }
}
