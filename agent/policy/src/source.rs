//! A file's text, from byte offsets to lines, columns and snippets, and the pen that writes faults about it.
//!
//! Owns the arithmetic of places. Never looks at what the text means.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::fault::{Fault, Faults, Note, is_unprintable};

/// Characters of a line that a snippet shows; longer ones are cut around the place.
const SNIPPET_WIDTH: usize = 100;

/// A file to be parsed. Reading it is the caller's business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Shown in faults; its stem names the policy when the file gives none.
    pub path: PathBuf,
    /// The whole text.
    pub text: String,
}

/// Where a policy is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// 1-based line.
    pub line: usize,
    /// 1-based column, counted in characters.
    pub column: usize,
}

/// A file with its lines found.
pub(crate) struct Source<'a> {
    pub(crate) path: &'a Path,
    pub(crate) text: &'a str,
    line_starts: Vec<usize>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(path: &'a Path, text: &'a str) -> Self {
        let bytes = text.as_bytes();
        // A byte order mark belongs to no column.
        let mut line_starts = vec![if text.starts_with('\u{feff}') { 3 } else { 0 }];
        for (at, byte) in bytes.iter().enumerate() {
            if *byte == b'\n' || (*byte == b'\r' && bytes.get(at + 1) != Some(&b'\n')) {
                line_starts.push(at + 1);
            }
        }
        Self { path, text, line_starts }
    }

    /// Byte ranges of the lines, line ends included.
    pub(crate) fn lines(&self) -> impl Iterator<Item = Range<usize>> {
        let ends = self.line_starts.iter().skip(1).copied().chain([self.text.len()]);
        self.line_starts.iter().copied().zip(ends).map(|(start, end)| start..end)
    }

    /// 1-based line and column of a byte offset.
    pub(crate) fn locate(&self, offset: usize) -> (usize, usize) {
        let offset = self.boundary(offset);
        let line = self.line_starts.partition_point(|start| *start <= offset).max(1);
        let start = self.line_starts[line - 1].min(offset);
        (line, self.text[start..offset].chars().count() + 1)
    }

    /// Byte offset of a 1-based line and column within the part of the file that begins at `base`.
    pub(crate) fn offset(&self, base: usize, line: usize, column: usize) -> usize {
        let first = self.locate(base).0;
        let start = match self.line_starts.get(first + line.max(1) - 2) {
            Some(start) => (*start).max(base),
            None => return self.text.len(),
        };
        let rest = &self.text[start..];
        start + rest.char_indices().nth(column.max(1) - 1).map_or(rest.len(), |(at, _)| at)
    }

    pub(crate) fn place(&self, offset: usize) -> Place {
        let (line, column) = self.locate(offset);
        Place { path: self.path.to_owned(), line, column }
    }

    /// The line of `at` behind a gutter with its number, and carets below `at`.
    pub(crate) fn snippet(&self, at: &Range<usize>) -> String {
        let (line, column) = self.locate(at.start);
        let start = self.line_starts[line - 1];
        let end = self.line_starts.get(line).copied().unwrap_or(self.text.len());
        let text = self.text[start..end].trim_end_matches(['\n', '\r']);
        let stop = self.boundary(at.end.clamp(start, start + text.len()));
        let begin = self.boundary(at.start).clamp(start, stop.max(start));
        let marked = self.text[begin..stop].chars().count().max(1);

        let length = text.chars().count();
        let skip = if length <= SNIPPET_WIDTH { 0 } else { (column - 1).saturating_sub(SNIPPET_WIDTH / 2) };
        let shown: String = text.chars().skip(skip).take(SNIPPET_WIDTH).map(printable).collect();
        let (before, after) =
            (if skip > 0 { "…" } else { "" }, if skip + SNIPPET_WIDTH < length { "…" } else { "" });
        let number = line.to_string();
        let gutter = " ".repeat(number.len());
        let pad = " ".repeat(column - 1 - skip + before.chars().count());
        let room = (skip + SNIPPET_WIDTH).saturating_sub(column - 1).max(1);
        let carets = "^".repeat(marked.min(room));
        format!("{gutter} |\n{number} | {before}{shown}{after}\n{gutter} | {pad}{carets}")
    }

    /// The nearest character boundary at or before `offset`.
    fn boundary(&self, offset: usize) -> usize {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        offset
    }
}

/// One column for one character, whatever a terminal would have made of it.
fn printable(c: char) -> char {
    match c {
        '\t' => ' ',
        c if is_unprintable(c) => '\u{fffd}',
        c => c,
    }
}

/// Writes faults about one file.
pub(crate) struct Report<'a> {
    pub(crate) source: &'a Source<'a>,
    pub(crate) faults: &'a mut Faults,
}

impl Report<'_> {
    pub(crate) fn fault(&mut self, at: &Range<usize>, message: impl Into<String>, cure: impl Into<String>) {
        let fault = self.make(at, message.into(), cure.into());
        self.faults.push(fault);
    }

    /// A fault with a second place in the same file.
    pub(crate) fn fault_with_note(
        &mut self,
        at: &Range<usize>,
        message: impl Into<String>,
        cure: impl Into<String>,
        (other, note): (&Range<usize>, &str),
    ) {
        let mut fault = self.make(at, message.into(), cure.into());
        fault.note = Some(note_at(self.source, other, note));
        self.faults.push(fault);
    }

    /// The text that stands at `at`.
    pub(crate) fn written(&self, at: &Range<usize>) -> &str {
        self.source.text.get(at.clone()).unwrap_or_default()
    }

    fn make(&self, at: &Range<usize>, message: String, cure: String) -> Fault {
        fault_at(self.source, at, message, cure)
    }
}

pub(crate) fn fault_at(source: &Source<'_>, at: &Range<usize>, message: String, cure: String) -> Fault {
    let (line, column) = source.locate(at.start);
    let (path, snippet) = (source.path.to_owned(), source.snippet(at));
    Fault { path, line, column, message, cure, snippet, note: None }
}

pub(crate) fn note_at(source: &Source<'_>, at: &Range<usize>, message: &str) -> Note {
    let (line, column) = source.locate(at.start);
    let (path, snippet) = (source.path.to_owned(), source.snippet(at));
    Note { path, line, column, message: message.to_owned(), snippet }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_become_lines_and_columns_and_back() {
        let source = Source::new(Path::new("p"), "ab\r\ncé x\rd\n\nlast");
        for (offset, place) in [
            (0, (1, 1)),
            (1, (1, 2)),
            (4, (2, 1)),
            (7, (2, 3)),
            (8, (2, 4)),
            (10, (3, 1)),
            (13, (5, 1)),
            (99, (5, 5)),
        ] {
            assert_eq!(source.locate(offset), place, "offset {offset}");
            if offset < 99 {
                assert_eq!(source.offset(0, place.0, place.1), offset, "place {place:?}");
            }
        }
        assert_eq!(source.locate(6), (2, 2), "the middle of a character is the character");
        assert_eq!(source.offset(4, 2, 1), 10, "lines are counted from the part's first");
        assert_eq!(source.offset(0, 70, 1), source.text.len());
    }

    #[test]
    fn a_byte_order_mark_has_no_column() {
        let source = Source::new(Path::new("p"), "\u{feff}spec: 1");
        assert_eq!(source.locate(3), (1, 1));
        assert_eq!(source.locate(0), (1, 1));
        assert_eq!(source.snippet(&(3..7)), "  |\n1 | spec: 1\n  | ^^^^");
    }

    #[test]
    fn snippets_are_cut_and_harmless() {
        let text = format!("{}HERE{}", "é".repeat(300), "y".repeat(300));
        let source = Source::new(Path::new("p"), &text);
        let snippet = source.snippet(&(600..604));
        let lines: Vec<&str> = snippet.lines().collect();
        let caret = lines[2].chars().position(|c| c == '^').expect("a caret");
        let at = lines[1].chars().skip(caret).take(4).collect::<String>();
        assert_eq!(at, "HERE");
        assert!(lines[1].chars().count() < 110);

        let source = Source::new(Path::new("p"), "a:\t\u{1b}[2J\n");
        assert_eq!(source.snippet(&(3..4)), "  |\n1 | a: \u{fffd}[2J\n  |    ^");
        assert_eq!(source.snippet(&(9000..9001)), "  |\n2 | \n  | ^");
    }
}
