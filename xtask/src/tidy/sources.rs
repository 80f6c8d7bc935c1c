//! The form of the files: how each opens, what none may contain, and where the exceptions are.

use super::SourceFile;

/// Longer files are reported, not refused.
const LONG: usize = 400;

/// Files that may contain unsafe code; a directory ends with `/`.
const UNSAFE: &[&str] = &[
    // Programs in the kernel are raw pointers throughout; the verifier checks them.
    "ebpf/src/",
    // aya's marker for layouts shared with the kernel side.
    "common/src/layout.rs",
    "common/src/slot.rs",
    // System calls, options and registrations that no library wraps safely; a few lines each.
    "agent/redirect/src/sys.rs",
    "agent/companion/src/launch/raw.rs",
    "agent/companion/src/relay/outq.rs",
    "agent/runtime/src/pidfd.rs",
    "agent/daemon/src/memory.rs",
    "tests/src/foreign/bpf.rs",
    // aya-build is configured by this process's environment.
    "agent/redirect/build.rs",
];

/// Who may say that a companion is ready: the check itself.
const READY: &str = "agent/companion/src/readiness.rs";
/// Where else the words may stand: the type's own definition, and tests of redirection without the companion crate.
const READY_TOO: &[&str] = &["agent/workload/src/ready.rs", "tests/"];

/// What no file may contain. In pieces, so that this file does not.
const FORBIDDEN: &[(&str, &str)] = &[
    (concat!("TO", "DO"), "finish it or leave it out"),
    (concat!("FIX", "ME"), "fix it or leave it out"),
    (concat!("dbg", "!("), "a debugging aid"),
    (concat!("to", "do!("), "finish it or leave it out"),
    (concat!("unimple", "mented!("), "finish it or leave it out"),
    (concat!("/wo", "rk/"), "a path of one machine"),
    (concat!("/fa", "rm/"), "a path of one machine"),
    (concat!("py", "pi.org"), "the name of a registry's host"),
    (concat!("pythonhos", "ted.org"), "the name of a registry's host"),
    (concat!("crates", ".io"), "the name of a registry's host"),
    (concat!("deb.", "debian.org"), "the name of a registry's host"),
    (concat!("npm", "js.org"), "the name of a registry's host"),
];

/// Texts that are not ours to change.
fn is_foreign(file: &SourceFile) -> bool {
    file.path.file_name().is_some_and(|name| {
        let name = name.to_string_lossy();
        name == "Cargo.lock" || name.starts_with("LICENSE")
    })
}

pub(super) fn faults(files: &[SourceFile]) -> Vec<String> {
    let mut faults: Vec<String> = of_files(files);
    let used = |entry: &&str| {
        let mut listed = files.iter().filter(|file| file.is_rust() && is_listed(file, &[entry]));
        listed.any(|file| file.text.lines().any(is_unsafe))
    };
    for entry in UNSAFE.iter().filter(|entry| !used(entry)) {
        faults.push(format!("xtask/src/tidy/sources.rs lists {entry}, which has no unsafe code"));
    }
    faults
}

fn of_files(files: &[SourceFile]) -> Vec<String> {
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| !is_foreign(file)) {
        for (number, line) in (1..).zip(file.text.lines()) {
            faults.extend(
                of_line(file, line).map(|fault| format!("{}:{number}: {fault}", file.path.display())),
            );
        }
        if file.is_rust() && !opens_with_doc(&file.text) {
            faults.push(format!(
                "{}: must open with //!: what it owns, what it never does",
                file.path.display()
            ));
        }
    }
    faults
}

/// One line for each file that is longer than it should be.
pub(super) fn long_files(files: &[SourceFile]) -> Vec<String> {
    let lengths = files.iter().filter(|file| file.is_rust()).map(|file| (file.text.lines().count(), file));
    let long = lengths.filter(|(length, _)| *length > LONG);
    long.map(|(length, file)| format!("{} has {length} lines", file.path.display())).collect()
}

fn of_line(file: &SourceFile, line: &str) -> impl Iterator<Item = String> {
    let forbidden = FORBIDDEN
        .iter()
        .filter(|(word, _)| line.contains(word))
        .map(|(word, reason)| format!("{word:?}: {reason}"));
    let rust = file.is_rust();
    let ready =
        rust && line.contains(concat!("probe_", "passed(")) && !file.is(READY) && !is_listed(file, READY_TOO);
    let ready = ready.then(|| format!("only {READY} may say that a companion is ready"));
    let hidden = rust && is_unsafe(line) && !is_listed(file, UNSAFE);
    let hidden =
        hidden.then(|| "unsafe code outside the files listed in xtask/src/tidy/sources.rs".to_owned());
    forbidden.chain(ready).chain(hidden)
}

/// Whether the line has the keyword in code. Comments and the lint's name are none.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["{", "fn", "impl", "extern", "trait", "("]
        .iter()
        .any(|next| code.contains(&format!("{} {next}", concat!("un", "safe"))))
        || code.contains(concat!("#[un", "safe("))
}

fn is_listed(file: &SourceFile, list: &[&str]) -> bool {
    list.iter().any(|entry| file.is(entry) || (entry.ends_with('/') && file.path.starts_with(entry)))
}

/// Whether the first line that is no attribute of the crate is `//!`.
fn opens_with_doc(text: &str) -> bool {
    text.lines().find(|line| !line.starts_with("#![")).is_some_and(|line| line.starts_with("//! "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        of_files(&[SourceFile { path: path.into(), text: text.to_owned() }]).len()
    }

    #[test]
    fn faults_are_found_where_they_are_faults() {
        let word = concat!("TO", "DO");
        let block = concat!("un", "safe { x() }");
        let ready = concat!("ReadyCompanion::probe_", "passed(name)");
        let cases = [
            ("a.rs", "//! Owns a.\n".to_owned(), 0),
            ("a.rs", "fn a() {}\n".to_owned(), 1),
            ("a.rs", "#![no_std]\n//! Owns a.\n".to_owned(), 0),
            ("a.md", "no doc needed\n".to_owned(), 0),
            ("a.md", format!("{word}: more\n"), 1),
            ("Cargo.lock", format!("{word}\n"), 0),
            ("a.rs", format!("//! Owns a.\n{block}\n"), 1),
            ("a.rs", format!("//! Owns a.\n// {block}\n"), 0),
            ("ebpf/src/a.rs", format!("//! Owns a.\n{block}\n"), 0),
            ("agent/policy/src/a.rs", format!("//! Owns a.\n{ready}\n"), 1),
            ("agent/companion/src/readiness.rs", format!("//! Owns a.\n{ready}\n"), 0),
        ];
        for (path, text, expected) in cases {
            assert_eq!(count(path, &text), expected, "{path}: {text}");
        }
    }
}
