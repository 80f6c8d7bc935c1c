//! `pillion install-hooks` and `uninstall-hooks`: the settings by which container runtimes call `pillion-hook`.
//!
//! Owns what may be changed in a runtime's configuration, and that it can be taken back. Never restarts a runtime: it says what is to be
//! done.

mod document;
mod edit;
mod existing;
mod file;
mod install;
mod record;
mod runtime;
mod uninstall;
mod wrapper;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, bail};
use similar::TextDiff;

use crate::{
    cli::{InstallHooksArgs, UninstallHooksArgs},
    config::Paths,
    render::{self, note},
};

pub(crate) use existing::{Hooked, hooked};
use record::Record;
pub(crate) use runtime::{By, Runtime};

/// Where records and wrappers' files are, unless the environment says otherwise.
pub(crate) const ETC: &str = "/etc/pillion";
/// The variable that says otherwise.
pub(crate) const ETC_VARIABLE: &str = "PILLION_ETC_DIR";

/// `pillion install-hooks`.
pub(crate) fn install(args: &InstallHooksArgs) -> anyhow::Result<ExitCode> {
    must_be_root("install-hooks")?;
    install::main(args)?;
    Ok(ExitCode::SUCCESS)
}

/// `pillion uninstall-hooks`.
pub(crate) fn uninstall(args: &UninstallHooksArgs) -> anyhow::Result<ExitCode> {
    must_be_root("uninstall-hooks")?;
    let all = Runtime::ALL.into_iter().filter(|runtime| args.runtime.is_none_or(|wanted| wanted == *runtime));
    let mut any = false;
    for runtime in all {
        any |= uninstall::uninstall(&args.etc.etc, runtime, args.dry_run)?;
    }
    if !any {
        note("no hooks are installed");
    } else if args.dry_run {
        note("nothing was written");
    }
    Ok(ExitCode::SUCCESS)
}

/// The records of hooks that ask the agent with this state directory.
pub(crate) fn recorded(paths: &Paths) -> Vec<(Runtime, PathBuf)> {
    let etc = etc();
    let ours = |runtime: &Runtime| {
        // A broken record is told when it is used.
        let record = Record::read(&etc, *runtime).ok().flatten();
        record.is_some_and(|record| record.state_dir == paths.state_dir)
    };
    Runtime::ALL.into_iter().filter(ours).map(|runtime| (runtime, record::path(&etc, runtime))).collect()
}

/// Takes out the hooks that ask the agent with this state directory.
pub(crate) fn clean_up(paths: &Paths) -> anyhow::Result<()> {
    for (runtime, _) in recorded(paths) {
        uninstall::uninstall(&etc(), runtime, false)
            .with_context(|| format!("cannot uninstall the hooks of {runtime}"))?;
    }
    Ok(())
}

/// The directory of records.
pub(crate) fn etc() -> PathBuf {
    std::env::var_os(ETC_VARIABLE).map_or_else(|| ETC.into(), PathBuf::from)
}

fn must_be_root(command: &str) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the settings of runtimes are root's\nrun it as root: sudo pillion {command}");
    }
    Ok(())
}

/// Whether the settings of a runtime name this wrapper.
fn is_named(link: &Path, etc: &Path) -> bool {
    Runtime::ALL.into_iter().any(|runtime| {
        // What cannot be read may name it.
        Record::read(etc, runtime)
            .map_or(true, |record| record.is_some_and(|record| record.wrapper.as_deref() == Some(link)))
    })
}

/// Prints what changes, as `diff -u` does.
fn show(path: &Path, before: Option<&str>, after: Option<&str>) -> anyhow::Result<()> {
    let name = |text: Option<&str>| text.map_or("/dev/null".to_owned(), |_| path.display().to_string());
    let (old, new) = (before.unwrap_or_default(), after.unwrap_or_default());
    let diff = TextDiff::from_lines(old, new);
    let diff = diff.unified_diff().context_radius(3).header(&name(before), &name(after)).to_string();
    render::stdout(&(render::plain_lines(&diff) + "\n"))?;
    Ok(())
}

/// Lets the runtime's own program read the new file, where it can do that and is there.
fn validate(runtime: Runtime, file: &Path) -> anyhow::Result<()> {
    let (program, arguments): (_, &[&str]) = match runtime {
        Runtime::Docker => ("dockerd", &["--validate", "--config-file"]),
        Runtime::Containerd => ("containerd", &["--config"]),
        Runtime::Podman | Runtime::Crio => return Ok(()),
    };
    let Ok(program) = runtime::in_path(program) else { return Ok(()) };
    let mut command = Command::new(&program);
    command.args(arguments).arg(file).stdin(Stdio::null()).stdout(Stdio::null());
    if runtime == Runtime::Containerd {
        command.args(["config", "dump"]);
    }
    let output = command.output().with_context(|| format!("cannot run {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // Docker before 23 cannot say.
    if output.status.success() || said.contains("unknown flag: --validate") {
        return Ok(());
    }
    bail!("{}: {}", program.display(), said.trim())
}
