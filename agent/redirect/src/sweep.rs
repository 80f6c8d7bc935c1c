//! Ends redirection that nobody remembers: its record was lost, or was not written before a kill.
//!
//! Left in force it would run beside the one that is made anew, and its companion would never be asked for again.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Dataplane, RedirectError,
    links::{Link, remove_if_there},
};

/// Links of a companion are in a directory of their own in that of the workload.
const DEPTH: usize = 1;

impl Dataplane {
    /// Ends every attachment whose number is not in `known`, and forgets what maps hold for such numbers, which are given
    /// out again. Returns how many attachments there were. To be called before anything is attached or adopted.
    /// Goes on after an error, because each one left in force does harm of its own, and returns the first.
    pub fn sweep(&self, known: &BTreeSet<u32>) -> Result<usize, RedirectError> {
        let (mut ended, mut outcome) = (0, Ok(()));
        for path in entries(&self.all_links())? {
            let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            if number.is_some_and(|number: u32| known.contains(&number)) {
                continue;
            }
            outcome = outcome.and(end(&path, DEPTH));
            ended += 1;
        }
        outcome.and(self.maps().keep_only(known)).map(|()| ended)
    }
}

fn end(directory: &Path, depth: usize) -> Result<(), RedirectError> {
    let mut outcome = Ok(());
    for path in entries(directory)? {
        outcome = outcome.and(if path.is_dir() && depth > 0 {
            end(&path, depth - 1)
        } else {
            Link::adopt(&path).and_then(Link::detach)
        });
    }
    let removed = remove_if_there(fs::remove_dir(directory));
    outcome.and(removed.map_err(RedirectError::sys("cannot remove", directory)))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, RedirectError> {
    let entries = fs::read_dir(directory).map_err(RedirectError::sys("cannot list", directory))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}
