//! What is wrong with policy files, told so that the reader can put it right at once.
//!
//! Owns the shape and the text of faults. Never finds one.

use std::{
    error::Error,
    fmt::{self, Write as _},
    path::{Path, PathBuf},
};

use serde::Serialize;

/// Faults that are kept; of a file with more, only their number is told.
const MAX_KEPT: usize = 500;

/// Everything that is wrong with a set of files, in the order of files and lines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// The faults themselves, at most 500.
    pub faults: Vec<Fault>,
    /// How many more there were.
    pub omitted: usize,
}

/// One thing that is wrong, where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// 1-based line; 0 when the fault is the whole file's.
    pub line: usize,
    /// 1-based column, counted in characters; 0 when the fault is the whole file's.
    pub column: usize,
    /// What is wrong, in lower case and without a full stop.
    pub message: String,
    /// What to do about it.
    pub cure: String,
    /// The line with a caret below the place, without colours; empty when the fault is the whole file's.
    pub snippet: String,
    /// A second place that has to do with it, such as the other of two policies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<Note>,
}

/// A second place that a fault is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// The file.
    pub path: PathBuf,
    /// 1-based line.
    pub line: usize,
    /// 1-based column, counted in characters.
    pub column: usize,
    /// What is there.
    pub message: String,
    /// The line with a caret below the place.
    pub snippet: String,
}

impl Faults {
    /// The number of all faults, kept or not.
    pub fn len(&self) -> usize {
        self.faults.len() + self.omitted
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The faults that were kept.
    pub fn iter(&self) -> std::slice::Iter<'_, Fault> {
        self.faults.iter()
    }

    pub(crate) fn push(&mut self, fault: Fault) {
        if self.faults.len() < MAX_KEPT {
            self.faults.push(fault);
        } else {
            self.omitted += 1;
        }
    }
}

impl<'a> IntoIterator for &'a Faults {
    type Item = &'a Fault;
    type IntoIter = std::slice::Iter<'a, Fault>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Error for Faults {}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in self {
            writeln!(f, "{fault}\n")?;
        }
        let mut paths: Vec<&Path> = self.iter().map(|fault| fault.path.as_path()).collect();
        paths.sort_unstable();
        paths.dedup();
        write!(f, "{} in {}", count(self.len(), "fault"), count(paths.len(), "file"))?;
        if self.omitted > 0 {
            write!(f, "; the last {} are not shown", self.omitted)?;
        }
        Ok(())
    }
}

impl Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", self.message)?;
        place(f, &self.path, self.line, self.column, &self.snippet)?;
        if let Some(note) = &self.note {
            writeln!(f, "note: {}", note.message)?;
            place(f, &note.path, note.line, note.column, &note.snippet)?;
        }
        write!(f, "cure: {}", self.cure)
    }
}

fn place(f: &mut fmt::Formatter<'_>, path: &Path, line: usize, column: usize, snippet: &str) -> fmt::Result {
    write!(f, "  --> {}", path.display().to_string().escape_debug())?;
    if line > 0 {
        write!(f, ":{line}:{column}")?;
    }
    writeln!(f)?;
    if snippet.is_empty() { Ok(()) } else { writeln!(f, "{snippet}") }
}

/// `1 fault`, `2 faults`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// What a file holds, between backticks: cut to 60 characters, and with nothing in it that a terminal would obey.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from("`");
    for (at, c) in text.chars().enumerate() {
        if at == 60 {
            out.push('…');
            break;
        }
        match c {
            '\n' => out.push_str("\\n"),
            c if is_unprintable(c) => {
                // Writing to a String cannot fail.
                let _ = write!(out, "{}", c.escape_unicode());
            }
            c => out.push(c),
        }
    }
    out.push('`');
    out
}

/// Control characters, and those that reorder or hide what stands beside them.
pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// `a`, `a or b`, `a, b or c`, each between backticks.
pub(crate) fn any_of<T: AsRef<str>>(names: &[T]) -> String {
    let mut out = String::new();
    for (at, name) in names.iter().enumerate() {
        if at > 0 {
            out.push_str(if at + 1 == names.len() { " or " } else { ", " });
        }
        out.push_str(&quoted(name.as_ref()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_disarm_what_a_terminal_would_obey() {
        for (text, wanted) in [
            ("web", "`web`"),
            ("a\u{1b}[31mb", "`a\\u{1b}[31mb`"),
            ("x\u{202e}y", "`x\\u{202e}y`"),
            ("two\nlines", "`two\\nlines`"),
        ] {
            assert_eq!(quoted(text), wanted);
        }
        assert_eq!(quoted(&"é".repeat(100)).chars().count(), 63);
    }

    #[test]
    fn lists_read_as_a_sentence() {
        for (names, wanted) in
            [(&["a"][..], "`a`"), (&["a", "b"][..], "`a` or `b`"), (&["a", "b", "c"][..], "`a`, `b` or `c`")]
        {
            assert_eq!(any_of(names), wanted);
        }
    }

    #[test]
    fn more_faults_than_anybody_reads_are_counted() {
        let mut faults = Faults::default();
        let fault = Fault {
            path: "p.yaml".into(),
            line: 1,
            column: 1,
            message: "m".into(),
            cure: "c".into(),
            snippet: String::new(),
            note: None,
        };
        for _ in 0..MAX_KEPT + 7 {
            faults.push(fault.clone());
        }
        assert_eq!((faults.faults.len(), faults.len()), (MAX_KEPT, MAX_KEPT + 7));
        assert!(faults.to_string().ends_with("507 faults in 1 file; the last 7 are not shown"));
    }
}
