//! A program that does with sockets what programs do and prints what it observes, and the stage it is run on: bare, and under
//! `pillion run` with a relay. See `tests/differ/main.c`. Comparing is here; what may differ is the suite's to say.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{End, Finished, NetNs, ProcessGuard, programs, run};

/// Some pages of C.
const COMPILE_LIMIT: Duration = Duration::from_secs(120);
/// All cases.
const RUN_LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);

/// What each case has said, in order.
pub type Observations = BTreeMap<String, Vec<String>>;

/// Builds the program into `directory`.
pub fn build(directory: &Path) -> Result<PathBuf> {
    let program = directory.join("differ");
    let sources =
        ["main", "common", "peer", "client", "connect", "data", "ends", "options", "ready", "share"];
    let sources = sources.into_iter().chain(["udp", "inbound"]);
    let mut compiler = Command::new("cc");
    compiler
        .args(["-O2", "-pthread", "-o"])
        .arg(&program)
        .args(sources.map(|name| source(&format!("{name}.c"))));
    ProcessGuard::finish("cc", &mut compiler, COMPILE_LIMIT)?.success().context("differ cannot be built")?;
    Ok(program)
}

/// A file of the program, or of the clients in other languages.
pub fn source(name: &str) -> PathBuf {
    programs::checkout().join("tests/differ").join(name)
}

/// The application's host and the far end's, whose program runs.
#[derive(Debug)]
pub struct Stage {
    near: NetNs,
    // Ends before its namespace does.
    _peer: ProcessGuard,
    _far: NetNs,
}

impl Stage {
    /// Two hosts on a cable. The application's has two addresses in one network and one in another that is not the default
    /// route's, networks that are unreachable and prohibited, a neighbour that never answers, and a rule against the mark 7.
    pub fn new(program: &Path) -> Result<Self> {
        let (near, far) = (NetNs::new()?, NetNs::new()?);
        NetNs::join(
            End {
                netns: &near,
                device: "far",
                // Of several the kernel prefers the last one in IPv6, the first one in IPv4.
                addresses: &[
                    "10.77.0.1/24",
                    "10.77.0.5/24",
                    "10.78.0.1/24",
                    "fd78::1/64",
                    "fd77::1/64",
                    "fe80::77:1/64",
                ],
            },
            End {
                netns: &far,
                device: "near",
                addresses: &[
                    "10.77.0.2/24",
                    "10.77.0.4/24",
                    "10.78.0.2/24",
                    "fd77::2/64",
                    "fd78::2/64",
                    "fe80::77:2/64",
                ],
            },
        )?;
        // Never chosen by the kernel itself, unlike the first ones.
        near.ip("-6 address add fd77::5/64 dev far nodad preferred_lft 0")?;
        far.ip("-6 address add fd77::4/64 dev near nodad preferred_lft 0")?;
        for (family, far, silent, unreachable, prohibited) in [
            ("-4", "10.77.0.2", "10.77.0.66", "10.98.0.0/16", "10.99.0.0/16"),
            ("-6", "fd77::2", "fd77::66", "fd98::/16", "fd99::/16"),
        ] {
            near.ip(&format!("{family} route add default via {far}"))?;
            near.ip(&format!("{family} route add unreachable {unreachable}"))?;
            near.ip(&format!("{family} route add prohibit {prohibited}"))?;
            near.ip(&format!("{family} neigh add {silent} lladdr 02:00:00:00:00:66 dev far nud permanent"))?;
            near.ip(&format!("{family} rule add fwmark 7 prohibit pref 100"))?;
        }
        far.run(|| {
            std::fs::write("/proc/sys/net/ipv4/tcp_reflect_tos", "1")?;
            std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "3")
        })
        .context("the far end's settings")?;
        let mut peer = ProcessGuard::spawn_in(&far, "the far end", Command::new(program).arg("peer"))?;
        peer.stdout_line(SOON, |line| line == "ready")?;
        Ok(Self { near, _peer: peer, _far: far })
    }

    /// Runs a command as it is.
    pub fn bare(&self, command: &mut Command) -> Result<Finished> {
        self.near.run(|| ProcessGuard::finish("the application, bare", command, RUN_LIMIT))?.success()
    }

    /// Runs `arguments` by `pillion run` with `policy`.
    pub fn under(&self, policy: &Path, command: &Command) -> Result<Finished> {
        let mut run = run::command(policy, &[])?;
        run.arg(command.get_program()).args(command.get_args());
        self.near
            .run(|| ProcessGuard::finish("the application, under Pillion", &mut run, RUN_LIMIT))?
            .success()
    }
}

/// What was printed, by case.
pub fn observations(printed: &str) -> Result<Observations> {
    let mut found = Observations::new();
    for line in printed.lines() {
        let (case, observation) = line.split_once(": ").with_context(|| format!("no observation: {line}"))?;
        found.entry(case.to_owned()).or_default().push(observation.to_owned());
    }
    ensure!(!found.is_empty(), "no observation at all");
    Ok(found)
}

/// One difference: in which case, at which observation (its first words), bare and under Pillion.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "said above")]
pub struct Found {
    pub case: String,
    pub observation: String,
    pub bare: String,
    pub under: String,
}

/// All differences.
pub fn differences(bare: &Observations, under: &Observations) -> Vec<Found> {
    let mut found = Vec::new();
    for case in bare.keys().chain(under.keys().filter(|case| !bare.contains_key(*case))) {
        let empty = Vec::new();
        let (one, other) = (bare.get(case).unwrap_or(&empty), under.get(case).unwrap_or(&empty));
        for number in 0..one.len().max(other.len()) {
            let at =
                |lines: &Vec<String>| lines.get(number).cloned().unwrap_or_else(|| "nothing said".to_owned());
            let (bare, under) = (at(one), at(other));
            if bare != under {
                let split = |text: &str| match text.split_once(": ") {
                    Some((name, value)) => (name.to_owned(), value.to_owned()),
                    None => (String::new(), text.to_owned()),
                };
                let ((observation, bare), (_, under)) = (split(&bare), split(&under));
                found.push(Found { case: case.clone(), observation, bare, under });
            }
        }
    }
    found
}

/// Whether `text` is `pattern`, in which `*` stands for anything.
pub fn fits(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    text.strip_prefix(start).is_some_and(|text| {
        (0..=text.len()).filter(|at| text.is_char_boundary(*at)).any(|at| fits(rest, &text[at..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, text, wanted) in [
            ("", "", true),
            ("*", "", true),
            ("*", "anything", true),
            ("EINVAL", "EINVAL", true),
            ("from *:*, 5", "from [fd77::1]:*, 5", true),
            ("from *:21*, 5", "from 10.77.0.1:*, 5", false),
            ("a*", "b", false),
        ] {
            assert_eq!(fits(pattern, text), wanted, "{pattern} {text}");
        }
    }

    #[test]
    fn what_one_side_alone_says_differs() {
        let of = |printed| observations(printed).unwrap();
        let same = of("a: x: 1\nb: y: 2\n");
        assert_eq!(differences(&same, &same), vec![]);
        let found = differences(&of("a: x: 1\na: y: 2\n"), &of("a: x: 0\nc: z: 3\n"));
        let told: Vec<_> =
            found.iter().map(|it| (it.case.as_str(), it.observation.as_str(), it.under.as_str())).collect();
        assert_eq!(told, [("a", "x", "0"), ("a", "y", "nothing said"), ("c", "", "3")]);
    }
}
