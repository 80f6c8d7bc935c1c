//! `cargo xtask tidy`: what the compiler does not enforce: the map of the crates, the form of the files, the documents.
//!
//! Only looks, and reports all faults at once.

mod arrows;
mod map;
mod sources;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{metadata::Metadata, shell};

/// A file of the repository: tracked, or new and not ignored.
pub(crate) struct SourceFile {
    /// Relative to the checkout.
    path: PathBuf,
    text: String,
}

impl SourceFile {
    fn is_rust(&self) -> bool {
        self.path.extension().is_some_and(|extension| extension == "rs")
    }

    fn is(&self, path: &str) -> bool {
        self.path == Path::new(path)
    }
}

/// An error when there is any fault.
pub(crate) fn run() -> Result<()> {
    let metadata = Metadata::read()?;
    let files = files()?;
    let mut faults = arrows::faults(&metadata);
    faults.extend(sources::faults(&files));
    faults.extend(map::faults(&metadata, &files));
    for line in sources::long_files(&files) {
        println!("note: {line}");
    }
    for fault in &faults {
        println!("tidy: {fault}");
    }
    if !faults.is_empty() {
        bail!("tidy found {} faults", faults.len());
    }
    println!("tidy: {} files are in order", files.len());
    Ok(())
}

fn files() -> Result<Vec<SourceFile>> {
    let mut list = Command::new("git");
    list.current_dir(shell::checkout()).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let mut files = Vec::new();
    for path in shell::capture(&mut list)?.split_terminator('\0').map(PathBuf::from) {
        let absolute = shell::checkout().join(&path);
        // Deleted but still in the index, or a link, or a fuzzer's corpus.
        if !absolute.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        let bytes = fs::read(&absolute).with_context(|| format!("cannot read {}", absolute.display()))?;
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(SourceFile { path, text });
        }
    }
    Ok(files)
}
