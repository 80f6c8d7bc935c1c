//! Policies from text to decision. What the reader sees of a fault is kept in `testdata/faults`, text beside file.

mod accepted;
mod decisions;
mod external;
mod faults;
mod properties;

use crate::{Faults, PolicySet, SourceFile, parse};

/// Parses one file named `test.yaml`.
pub(crate) fn one(text: &str) -> Result<PolicySet, Faults> {
    parse(&[file("test.yaml", text)])
}

fn file(path: &str, text: &str) -> SourceFile {
    SourceFile { path: path.into(), text: text.to_owned() }
}

/// A policy with a header, a relay, and whatever `spec` adds, in flow style.
pub(crate) fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: pillion.dev/v1alpha1\nkind: InjectionPolicy\nmetadata: {{ name: {name} }}\n\
         spec: {{ companions: [{{ name: r, builtin: relay }}], {spec} }}\n"
    )
}
