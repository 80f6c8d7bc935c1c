//! Policies: from files to validated policies, and from a workload to the plan that it gets, with reasons.
//!
//! Owns the `pillion.dev/v1alpha1` format. Pure: no IO, no clock; reading and watching files is the daemon's business.
//!
//! The way of a file: `source` finds its lines, `tree` cuts it into documents and parses each to a tree with places,
//! `reader` turns nodes into values, `document` with `select`, `companion` and `redirect` makes a policy of them, and
//! `conflict` compares the policies. Each of them reports what is wrong and goes on, so that [`parse`] tells all
//! faults of all files at once. Every size is bounded: files are hostile until proven otherwise.

mod companion;
mod conflict;
mod document;
mod external;
mod fault;
mod programs;
mod quantity;
mod reader;
mod redirect;
mod select;
mod set;
mod source;
mod syntax;
mod template;
mod tree;

use std::{collections::HashMap, path::Path};

use crate::{
    conflict::InFile,
    source::{Report, Source},
};

pub use pillion_workload::{Glob, InvalidGlob};

pub use crate::{
    document::{API_VERSION, KIND},
    fault::{Fault, Faults, Note},
    programs::ProgramName,
    select::{FieldReason, Selector},
    set::{Decision, Policy, PolicySet, Reason, Verdict},
    source::{Place, SourceFile},
    template::VARIABLES,
};

/// Bytes of one file.
pub const MAX_FILE_BYTES: usize = 4 << 20;
/// Policies in one file.
pub const MAX_POLICIES_PER_FILE: usize = 1_000;
/// Policies in all files.
pub const MAX_POLICIES: usize = 5_000;

/// Parses and validates all files together.
///
/// # Errors
/// All faults of all files: of a document that is no YAML the first one, else every one.
pub fn parse(files: &[SourceFile]) -> Result<PolicySet, Faults> {
    let mut faults = Faults::default();
    let sources: Vec<Source<'_>> = files
        .iter()
        .map(|file| {
            let fits = file.text.len() <= MAX_FILE_BYTES;
            if !fits {
                let message = format!("the file has {} bytes", file.text.len());
                let cure = format!("at most {MAX_FILE_BYTES} bytes are read; split it into several files");
                faults.push(whole_file(&file.path, message, cure));
            }
            Source::new(&file.path, if fits { &file.text } else { "" })
        })
        .collect();

    let (mut names, mut drafts, mut total) = (Vec::new(), Vec::new(), 0);
    for (file, source) in sources.iter().enumerate() {
        let documents = tree::documents(source);
        total += documents.len();
        if documents.len() > MAX_POLICIES_PER_FILE || total > MAX_POLICIES {
            let (message, cure) = (
                format!(
                    "the file has {} policies, all files together have {total} up to here",
                    documents.len()
                ),
                format!("at most {MAX_POLICIES_PER_FILE} in one file and {MAX_POLICIES} in all are read"),
            );
            faults.push(whole_file(source.path, message, cure));
            total -= documents.len();
            continue;
        }
        for at in &documents {
            let mut report = Report { source, faults: &mut faults };
            let Some(node) = tree::parse(at, &mut report) else { continue };
            let document = document::read(&node, documents.len() == 1, &mut report);
            names.extend(document.name.map(|value| InFile { file, value }));
            drafts.extend(document.policy.map(|value| InFile { file, value }));
        }
    }
    conflict::names(&names, &sources, &mut faults);
    conflict::claims(&drafts, &sources, &mut faults);
    if !faults.is_empty() {
        let order: HashMap<&Path, usize> =
            files.iter().enumerate().rev().map(|(at, file)| (file.path.as_path(), at)).collect();
        faults
            .faults
            .sort_by_key(|fault| (order.get(fault.path.as_path()).copied(), fault.line, fault.column));
        return Err(faults);
    }
    let policies = drafts.into_iter().map(|draft| {
        let place = sources[draft.file].place(draft.value.name.at.start);
        let document::Draft { name, priority, selector, plan } = draft.value;
        Policy { name: name.value, priority: priority.value, selector, plan, place }
    });
    Ok(PolicySet::new(policies.collect()))
}

fn whole_file(path: &Path, message: String, cure: String) -> Fault {
    Fault { path: path.to_owned(), line: 0, column: 0, message, cure, snippet: String::new(), note: None }
}

#[cfg(test)]
mod tests;
