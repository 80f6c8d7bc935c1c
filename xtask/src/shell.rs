//! Runs other programs: with their output shown, captured, or as root. Never retries and never hides a failure.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// The root of the checkout that this xtask was compiled in.
pub(crate) fn checkout() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("xtask is a directory of the checkout").to_owned()
}

/// The cargo that runs this xtask, in the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(checkout());
    // `cargo run` sets these for xtask itself; passed on, they would make build scripts look changed.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs to the end with its output shown; an error names the command and its status.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", show(command)))?;
    ensure!(status.success(), "{} failed ({status})", show(command));
    Ok(())
}

/// Runs to the end and returns what it printed on stdout; stderr is shown.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = output(command.stderr(Stdio::inherit()))?;
    ensure!(output.status.success(), "{} failed ({})", show(command), output.status);
    String::from_utf8(output.stdout).with_context(|| format!("{} printed other than UTF-8", show(command)))
}

/// What it printed on stdout, when it can be run and succeeds; quiet otherwise. For questions, not for deeds.
pub(crate) fn answer(command: &mut Command) -> Option<String> {
    let output = output(command).ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", show(command)))
}

/// The command line, for people.
pub(crate) fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(command.get_args().map(OsStr::to_string_lossy));
    words.join(" ")
}

/// Whether this process is root already.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// `program` as root, with `environment`: directly when root already, else through sudo, which may ask for a password.
pub(crate) fn as_root(program: impl AsRef<OsStr>, environment: &[(&str, &OsStr)]) -> Result<Command> {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(environment.iter().copied());
        return Ok(command);
    }
    if find("sudo").is_none() {
        bail!("{} needs root and there is no sudo: run this command as root", program.as_ref().display());
    }
    let mut command = Command::new("sudo");
    // sudo drops the environment: hand over what is needed by name.
    command.arg("env");
    for (name, value) in environment {
        let mut assignment = std::ffi::OsString::from(name);
        assignment.push("=");
        assignment.push(value);
        command.arg(assignment);
    }
    command.arg(program);
    Ok(command)
}

/// Makes sure that [`as_root`] will work, before hours of work depend on it; asks for the password now.
pub(crate) fn authorize() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    ensure!(find("sudo").is_some(), "the suites need root and there is no sudo: run this command as root");
    run(Command::new("sudo").arg("--validate")).context("the suites need root")
}

/// Where `program` is: in `$PATH`, or in the system directories that ordinary users' `$PATH` leaves out.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}
