//! Real systems in namespaces of their own, brought up by the scripts in `tests/lab`: other versions of container
//! runtimes, an init system, a virtual machine.
//!
//! Owns bringing up and taking down. What the scripts download they keep in a cache, see [`prepare`].

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{Agent, Machine, ProcessGuard, process::Finished, programs};

/// The scripts' cache and state; theirs to fill. Short, because the paths of sockets are.
pub const DIRECTORY: &str = "/var/tmp/pillion-lab";
/// A system of which the packages are there is up within seconds; a missing package takes its time.
const UP_LIMIT: Duration = Duration::from_secs(300);
const DOWN_LIMIT: Duration = Duration::from_secs(60);
/// What one command within a system may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// A system that is up. Taken down when dropped.
#[derive(Debug)]
pub struct Lab {
    script: &'static str,
    version: Option<&'static str>,
    values: BTreeMap<String, String>,
}

/// Makes the scripts' directory, so that it is no leftover of the first test that uses them.
pub fn prepare() -> Result<()> {
    fs::create_dir_all(DIRECTORY).with_context(|| format!("cannot make {DIRECTORY}"))
}

/// Makes the image `localhost/NAME` of a static program, with busybox beside it, by `tests/lab/image.sh`; returns the archive.
pub fn image(name: &str, program: &Path) -> Result<PathBuf> {
    let mut command = Command::new(programs::checkout().join("tests/lab/image.sh"));
    command.arg(name).arg(program).env("LAB", DIRECTORY);
    let done = ProcessGuard::finish("image.sh", &mut command, COMMAND_LIMIT)?.success()?;
    Ok(PathBuf::from(done.stdout.trim()))
}

impl Lab {
    /// Runs `tests/lab/SCRIPT.sh up`, with `--version VERSION` where the script has versions (names of Debian's suites:
    /// `bookworm`, `trixie`, `sid`), and `environment` for the script.
    pub fn up(
        script: &'static str,
        version: Option<&'static str>,
        environment: &[(&str, &OsStr)],
    ) -> Result<Self> {
        let mut lab = Self { script, version, values: BTreeMap::new() };
        let mut command = lab.script(&["up"], true)?;
        command.envs(environment.iter().copied());
        // From here on, dropping it takes down what a failed `up` has left.
        let done = ProcessGuard::finish(script, &mut command, UP_LIMIT)?.success()?;
        for line in done.stdout.lines() {
            if let Some((key, value)) = line.split_once('=') {
                lab.values.insert(key.to_owned(), value.to_owned());
            }
        }
        Ok(lab)
    }

    /// containerd of this Debian suite whose runtime class [`WRAPPED`] is `pillion-hook` in front of runc, for this agent.
    ///
    /// [`WRAPPED`]: crate::pods::WRAPPED
    pub fn wrapped_containerd(machine: &Machine, version: &'static str, agent: &Agent) -> Result<Self> {
        let wrapper = machine.directory().join("pillion-runc");
        symlink(programs::hook()?, &wrapper).context("a link to pillion-hook")?;
        // containerd hands its environment down to shims, and these to their runtime.
        let places = agent.environment();
        let mut environment: Vec<(&str, &OsStr)> =
            places.iter().map(|(name, path)| (*name, path.as_os_str())).collect();
        environment.push(("RUNTIME_WRAPPER", wrapper.as_os_str()));
        Self::up("containerd", Some(version), &environment)
    }

    /// What `up` printed as `KEY=VALUE`.
    pub fn value(&self, key: &str) -> Result<&str> {
        let value = self.values.get(key).with_context(|| format!("{} up printed no {key}", self.script))?;
        Ok(value)
    }

    /// A command of the script, such as `exec`, `ctr` or `docker`, with its arguments, to be started by the caller.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        self.script(arguments, false)
    }

    /// Runs such a command to its end, whatever its exit code.
    pub fn run(&self, arguments: &[&str]) -> Result<Finished> {
        ProcessGuard::finish(&arguments.join(" "), &mut self.command(arguments)?, COMMAND_LIMIT)
    }

    /// Takes it down; an error when something of it stays.
    pub fn down(self) -> Result<()> {
        let result = self.take_down();
        std::mem::forget(self);
        result
    }

    fn take_down(&self) -> Result<()> {
        let mut command = self.script(&["down"], true)?;
        ProcessGuard::finish("down", &mut command, DOWN_LIMIT)?.success().map(drop)
    }

    fn script(&self, arguments: &[&str], version_last: bool) -> Result<Command> {
        let path = programs::checkout().join("tests/lab").join(format!("{}.sh", self.script));
        ensure!(path.is_file(), "no {}", path.display());
        let version: Vec<&str> = self.version.iter().flat_map(|version| ["--version", version]).collect();
        let mut command = Command::new(path);
        if version_last {
            command.args(arguments).args(version);
        } else {
            command.args(version).args(arguments);
        }
        command.current_dir(programs::checkout()).env("LAB", DIRECTORY).env("LAB_BIND", binaries()?);
        Ok(command)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The inventory tells what stays.
        let _ = self.take_down();
    }
}

/// The directory of the built programs, which may be outside of the checkout.
fn binaries() -> Result<PathBuf> {
    let program = programs::pillion()?;
    Ok(program.parent().unwrap_or(Path::new("/")).to_owned())
}
