//! Takes hooks out of a runtime's configuration.
//!
//! Owns the order: the settings first, the wrapper last. A file that nobody has edited since is again what it was, to the byte; out of
//! one that was edited only Pillion's settings go.

use std::path::Path;

use anyhow::Context as _;

use super::{
    edit, existing,
    file::{self, Draft},
    is_named,
    record::{Changed, Record},
    runtime::{Runtime, is_base},
    show, validate,
    wrapper::{Gone, Wrapper},
};
use crate::render::note;

/// Takes the hooks out of one runtime. Says what it does; whether there was anything to take out.
pub(crate) fn uninstall(etc: &Path, runtime: Runtime, dry_run: bool) -> anyhow::Result<bool> {
    let recorded = match Record::read(etc, runtime) {
        Ok(recorded) => recorded,
        Err(error) => {
            note(format_args!("{error:#}"));
            None
        }
    };
    let record = match recorded {
        Some(record) => Some(record),
        None => existing::record(etc, runtime)?,
    };
    let Some(record) = record else { return Ok(false) };
    // The settings before what they name.
    for changed in record.files.iter().rev() {
        restore(runtime, changed, dry_run)?;
    }
    if dry_run {
        return Ok(true);
    }
    Record::remove(etc, runtime)?;
    record.directories.iter().rev().for_each(|directory| file::remove_empty(directory));
    if let Some(link) = &record.wrapper
        && !is_named(link, etc)
        && Wrapper::at(link, etc).unmake()? == Gone::InUse
    {
        note(format_args!(
            "{} stays, and leads to the real runtime: containers that run were started through it; remove it when they have ended",
            link.display()
        ));
    }
    note(format_args!("{runtime}: uninstalled; now {}", runtime.restart()));
    if runtime == Runtime::Docker {
        note(
            "containers that were made with Docker's runtime `pillion` cannot be started again: make them anew",
        );
    }
    Ok(true)
}

fn restore(runtime: Runtime, changed: &Changed, dry_run: bool) -> anyhow::Result<()> {
    let path = &changed.path;
    let Some(now) = file::read(path)? else { return Ok(()) };
    let then = match &changed.undo {
        _ if now == changed.after => changed.before.clone(),
        Some((language, undo)) => {
            let (text, others) =
                edit::revert(*language, &now, undo).with_context(|| path.display().to_string())?;
            for other in others {
                note(format_args!(
                    "{}: somebody has set {} since; it stays",
                    path.display(),
                    other.join(".")
                ));
            }
            Some(text)
        }
        None if existing::is_our_hook(&now) || is_base(path) => None,
        None => {
            note(format_args!("{} is not of Pillion any more; it stays", path.display()));
            return Ok(());
        }
    };
    show(path, Some(&now), then.as_deref())?;
    if dry_run {
        return Ok(());
    }
    match &then {
        Some(then) => {
            let draft = Draft::write(path, then)?;
            validate(runtime, draft.place())
                .context("the runtime does not take this; nothing was changed")?;
            draft.replace()?;
        }
        None => file::remove(path)?,
    }
    if let Some(backup) = file::drop_backup(path, then.as_deref())? {
        note(format_args!("{} stays: what it has is not what is there now", backup.display()));
    }
    Ok(())
}
