//! Puts hooks into a runtime's configuration.
//!
//! Owns the order: first everything is read and worked out, then shown, then checked by the runtime's own program, and only then
//! written: the wrapper, the record, the back-up, the files.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use super::{
    document::Language,
    edit, existing,
    file::{self, Draft},
    record::{Changed, Record},
    runtime::{self, By, Classes, Runtime},
    show, validate,
    wrapper::Wrapper,
};
use crate::{cli::InstallHooksArgs, render::note};

/// Where Podman and CRI-O look for hooks without being told.
pub(super) const HOOKS: &str = "/usr/share/containers/oci/hooks.d";

/// What is to be done.
struct Installation {
    files: Vec<Planned>,
    wrapper: Option<Wrapper>,
}

/// What is to become of one file.
struct Planned {
    now: Option<String>,
    changed: Changed,
}

impl Planned {
    fn is_news(&self) -> bool {
        self.now.as_ref() != Some(&self.changed.after)
    }
}

/// `pillion install-hooks`.
pub(crate) fn main(args: &InstallHooksArgs) -> anyhow::Result<()> {
    if args.by == By::Hook {
        if args.runtime != Runtime::Containerd {
            bail!("--by is for containerd: {} has one way", args.runtime);
        }
        if args.real.is_some() || args.link_dir.is_some() {
            bail!("--real and --link-dir are for the wrapper");
        }
    }
    let hook = hook(args)?;
    let old = Record::read(&args.etc.etc, args.runtime)?;
    let installation = match args.runtime.config() {
        Some((usual, language)) => {
            let path = args.config.clone().unwrap_or_else(|| usual.into());
            settings(args, path, language, &hook, old.as_ref())?
        }
        None => hooks(args, &hook)?,
    };
    for planned in installation.files.iter().filter(|planned| planned.is_news()) {
        show(&planned.changed.path, planned.now.as_deref(), Some(&planned.changed.after))?;
    }
    let news = installation.files.iter().any(Planned::is_news);
    if args.dry_run {
        note(if news { "nothing was written" } else { "the hooks are installed already" });
        return Ok(());
    }
    carry_out(args, installation, &hook, old)?;
    if news {
        note(format_args!("{}: installed; now {}", args.runtime, args.runtime.restart()));
    } else {
        note(format_args!("{}: the hooks are installed already", args.runtime));
    }
    Ok(())
}

/// The program that runtimes will call; it must be there for as long as they may.
fn hook(args: &InstallHooksArgs) -> anyhow::Result<PathBuf> {
    let hook = if let Some(hook) = &args.hook {
        hook.clone()
    } else {
        let own = std::env::current_exe().context("cannot find this program")?;
        own.with_file_name("pillion-hook")
    };
    if !hook.is_absolute() || !hook.is_file() {
        bail!("there is no {}\nname it with its absolute path: --hook PATH", hook.display());
    }
    // As the agent of a DaemonSet has it. A runtime calls the hook until it is restarted, and shims for as long as they run.
    let passing = |path: &&PathBuf| path.starts_with(&args.paths.state_dir);
    if let Some(path) = [Some(&hook), args.link_dir.as_ref()].into_iter().flatten().find(passing) {
        bail!(
            "{} is in the agent's state directory, which `pillion cleanup` removes under the runtime's feet\n\
             copy pillion-hook to a place of its own, such as /usr/local/sbin, and name it: --hook PATH",
            path.display()
        );
    }
    Ok(hook)
}

fn settings(
    args: &InstallHooksArgs,
    path: PathBuf,
    language: Language,
    hook: &Path,
    old: Option<&Record>,
) -> anyhow::Result<Installation> {
    let now = file::read(&path)?;
    let about = || path.display().to_string();
    // As it was before Pillion, with what was edited since.
    let recorded = old.and_then(|old| old.files.iter().find(|file| file.path == path));
    let before = match (&now, recorded) {
        (Some(now), Some(recorded)) if *now == recorded.after => recorded.before.clone(),
        (Some(now), Some(Changed { undo: Some((_, undo)), .. })) => {
            Some(edit::revert(language, now, undo).with_context(about)?.0)
        }
        (now, _) => now.clone(),
    };
    let text = before.as_deref().unwrap_or_default();
    let real = args.real.clone();
    if args.by == By::Hook {
        let base = base(args, text, hook).with_context(about)?;
        let wanted =
            runtime::containerd_by_hook(text, args.default, &base.changed.path).with_context(about)?;
        let (after, undo) = edit::apply(language, text, &wanted).with_context(about)?;
        let changed = Changed { path, before, after, undo: Some((language, undo)) };
        // The specification first: the settings never name what is not there.
        return Ok(Installation { files: vec![base, Planned { now, changed }], wrapper: None });
    }
    let wanted = match args.runtime {
        Runtime::Docker => runtime::docker(text, args.default, real),
        Runtime::Containerd => runtime::containerd(text, args.default, real),
        Runtime::Podman | Runtime::Crio => bail!("{} has no such settings", args.runtime),
    };
    let wanted = wanted.with_context(about)?;
    let directory = args.link_dir.clone().or_else(|| hook.parent().map(Path::to_owned));
    let directory = directory.context("pillion-hook is in no directory")?;
    let wrapper = Wrapper::new(&wanted.real, &directory, &args.etc.etc, &args.paths)?;
    let (after, undo) = edit::apply(language, text, &wanted.settings(&wrapper.link)).with_context(about)?;
    let changed = Changed { path, before, after, undo: Some((language, undo)) };
    Ok(Installation { files: vec![Planned { now, changed }], wrapper: Some(wrapper) })
}

/// The specification that containers are to begin with: the one of before with hooks.
fn base(args: &InstallHooksArgs, settings: &str, hook: &Path) -> anyhow::Result<Planned> {
    let spec = match Classes::parse(settings)?.base() {
        Some(own) => file::read(&own)?.with_context(|| format!("there is no {}", own.display()))?,
        None => default_spec()?,
    };
    let after = runtime::with_hooks(&spec, hook, &places(args))
        .context("the specification that containers begin with cannot have hooks")?;
    let path = args.etc.etc.join(runtime::BASE);
    let now = file::read(&path)?;
    Ok(Planned { now, changed: Changed { path, before: None, after, undo: None } })
}

/// What containerd of this version takes where nothing is configured, by its own program.
fn default_spec() -> anyhow::Result<String> {
    let ctr = runtime::in_path("ctr").context("containerd's ctr tells which specification it takes")?;
    let output = Command::new(&ctr).args(["oci", "spec"]).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {}", ctr.display()))?;
    if !output.status.success() {
        bail!("{} oci spec: {}", ctr.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} oci spec", ctr.display()))
}

/// Where the agent is, when not where hooks look by themselves.
fn places(args: &InstallHooksArgs) -> Vec<String> {
    if args.paths.are_usual() {
        return Vec::new();
    }
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    let (run, state) = (shown(&args.paths.run_dir), shown(&args.paths.state_dir));
    vec!["--run-dir".to_owned(), run, "--state-dir".to_owned(), state]
}

fn hooks(args: &InstallHooksArgs, hook: &Path) -> anyhow::Result<Installation> {
    if args.default || args.real.is_some() || args.link_dir.is_some() {
        bail!("{} has hooks and no wrapper: --default, --real and --link-dir are for others", args.runtime);
    }
    let directory = args.config.clone().unwrap_or_else(|| HOOKS.into());
    let files = runtime::hooks(hook, &places(args)).into_iter().map(|(name, after)| {
        let path = directory.join(name);
        let now = file::read(&path)?;
        if now.as_ref().is_some_and(|now| !existing::is_our_hook(now)) {
            bail!("{} is there and not of Pillion", path.display());
        }
        Ok(Planned { now, changed: Changed { path, before: None, after, undo: None } })
    });
    Ok(Installation { files: files.collect::<anyhow::Result<_>>()?, wrapper: None })
}

fn carry_out(
    args: &InstallHooksArgs,
    installation: Installation,
    hook: &Path,
    old: Option<Record>,
) -> anyhow::Result<()> {
    let Installation { files, wrapper } = installation;
    let mut directories = old.as_ref().map(|old| old.directories.clone()).unwrap_or_default();
    let mut drafts = Vec::new();
    for planned in files.iter().filter(|planned| planned.is_news()) {
        let path = &planned.changed.path;
        let made = file::make_directory(path.parent().unwrap_or(Path::new("/")))?;
        let draft = Draft::write(path, &planned.changed.after)?;
        // What is Pillion's as a whole is no file of settings.
        let valid = planned.changed.undo.as_ref().map_or(Ok(()), |_| validate(args.runtime, draft.place()));
        if let Err(error) = valid {
            drop(draft);
            made.iter().rev().for_each(|directory| file::remove_empty(directory));
            return Err(error.context("the runtime does not take this; nothing was changed"));
        }
        directories.extend(made);
        drafts.push((planned, draft));
    }
    if let Some(wrapper) = &wrapper {
        wrapper.make(hook)?;
    }
    if drafts.is_empty() {
        return Ok(());
    }
    let record = Record {
        state_dir: args.paths.state_dir.clone(),
        files: files.iter().map(|planned| planned.changed.clone()).collect(),
        directories,
        wrapper: wrapper.map(|wrapper| wrapper.link),
    };
    record.write(&args.etc.etc, args.runtime)?;
    for (planned, draft) in drafts {
        if let (Some(now), Some(_)) = (&planned.now, &planned.changed.undo) {
            let backup = file::back_up(&planned.changed.path, now)?;
            note(format_args!("what was there before is in {}", backup.display()));
        }
        draft.replace()?;
    }
    // Of an earlier installation in another way.
    for file in old.iter().flat_map(|old| &old.files).filter(|file| file.undo.is_none()) {
        if !record.files.iter().any(|new| new.path == file.path)
            && file::read(&file.path)?.as_ref() == Some(&file.after)
        {
            file::remove(&file.path)?;
        }
    }
    // And for another runtime program.
    if let Some(old) = old.and_then(|old| old.wrapper).filter(|link| Some(link) != record.wrapper.as_ref())
        && !super::is_named(&old, &args.etc.etc)
    {
        Wrapper::at(&old, &args.etc.etc).unmake()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn what_cleanup_removes_is_no_place_for_a_hook() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path).display().to_string();
        for place in ["state/bin", "sbin"] {
            fs::create_dir_all(at(place)).unwrap();
            fs::write(at(&format!("{place}/pillion-hook")), "").unwrap();
        }
        for (place, link, good) in
            [("sbin", "sbin", true), ("state/bin", "sbin", false), ("sbin", "state/bin", false)]
        {
            let program = at(&format!("{place}/pillion-hook"));
            let (link, state) = (at(link), at("state"));
            let words = [
                "pillion",
                "install-hooks",
                "--runtime",
                "containerd",
                "--hook",
                &program,
                "--link-dir",
                &link,
            ];
            let cli = Cli::try_parse_from(words.into_iter().chain(["--state-dir", &state])).unwrap();
            let Command::InstallHooks(args) = cli.command else { panic!("another command") };
            assert_eq!(hook(&args).is_ok(), good, "{program} {link}");
        }
    }
}
