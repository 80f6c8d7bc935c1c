//! ARCHITECTURE.md is the map: each crate has a section with its path in the heading, which names each top-level module.

use std::{
    collections::BTreeSet,
    path::{Component, Path},
};

use super::SourceFile;
use crate::{metadata::Metadata, shell};

const MAP: &str = "ARCHITECTURE.md";

pub(super) fn faults(metadata: &Metadata, files: &[SourceFile]) -> Vec<String> {
    let Some(map) = files.iter().find(|file| file.is(MAP)) else {
        return vec![format!("there is no {MAP}")];
    };
    let mut faults = Vec::new();
    for package in &metadata.packages {
        let directory = package.manifest_path.parent().unwrap_or(&package.manifest_path);
        let directory = directory.strip_prefix(shell::checkout()).unwrap_or(directory);
        let Some(section) = section(&map.text, &directory.display().to_string()) else {
            faults.push(format!("{MAP}: no heading with `{}`", directory.display()));
            continue;
        };
        for module in modules(directory, files) {
            if !names(&section, &module) {
                faults.push(format!(
                    "{MAP}: the section of `{}` does not name `{module}`",
                    directory.display()
                ));
            }
        }
    }
    faults
}

/// The lines from the heading that has `name` in backticks up to the next heading.
fn section(text: &str, name: &str) -> Option<String> {
    let quoted = format!("`{name}`");
    let mut lines = text.lines().skip_while(|line| !(line.starts_with('#') && line.contains(&quoted)));
    let heading = lines.next()?;
    let body = lines.take_while(|line| !line.starts_with('#'));
    Some([heading].into_iter().chain(body).collect::<Vec<_>>().join("\n"))
}

/// A module is named in backticks, as `name` or as `name.rs`.
fn names(section: &str, module: &str) -> bool {
    section.contains(&format!("`{module}`")) || section.contains(&format!("`{module}.rs`"))
}

/// Files and directories right below `src`, but for the crate's root.
fn modules(directory: &Path, files: &[SourceFile]) -> BTreeSet<String> {
    let source = directory.join("src");
    files
        .iter()
        .filter(|file| file.is_rust())
        .filter_map(|file| match file.path.strip_prefix(&source).ok()?.components().next()? {
            Component::Normal(name) => Path::new(name).file_stem()?.to_str().map(str::to_owned),
            _ => None,
        })
        .filter(|module| !["lib", "main", "bin", "tests"].contains(&module.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_ends_at_the_next_heading() {
        let text = "# Map\n## `agent/one`: one\n`a.rs` and `b`\n## `agent/two`\n`c`\n";
        let one = section(text, "agent/one").expect("it is there");
        assert!(names(&one, "a") && names(&one, "b") && !names(&one, "c"));
        assert!(section(text, "agent/three").is_none());
    }

    #[test]
    fn modules_are_files_and_directories_below_src() {
        let file = |path: &str| SourceFile { path: path.into(), text: String::new() };
        let files = ["a/src/lib.rs", "a/src/one.rs", "a/src/two/deep.rs", "a/src/note.md", "b/src/three.rs"]
            .map(file);
        assert_eq!(modules(Path::new("a"), &files).into_iter().collect::<Vec<_>>(), ["one", "two"]);
    }
}
