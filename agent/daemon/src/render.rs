//! How results look: `-o table|wide|json|yaml|name` on stdout, and notes on stderr.
//!
//! Owns formats, columns, colour and the treatment of a closed pipe. Knows nothing of what it prints: each command
//! implements [`View`] for its result. Everything that goes into a table may come from a hostile workload, so control
//! characters are shown escaped and never reach the terminal.

use std::{
    fmt::{self, Write as _},
    io::{self, IsTerminal as _, Write as _},
};

use clap::ValueEnum;
use serde::Serialize;

/// How to print a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For people with wide terminals
    Wide,
    /// One JSON document
    Json,
    /// One YAML document
    Yaml,
    /// Names only, one a line
    Name,
}

/// A result that can be printed in every format. JSON and YAML come from `Serialize`.
pub(crate) trait View: Serialize {
    /// The text for people; `wide` asks for every column.
    fn text(&self, wide: bool, paint: Paint) -> String;
    /// One name a line.
    fn names(&self) -> Vec<String>;
}

/// Prints `view` to stdout.
pub(crate) fn print(view: &impl View, format: Format) -> anyhow::Result<()> {
    let text = match format {
        Format::Table | Format::Wide => view.text(format == Format::Wide, Paint::for_stdout()),
        Format::Json => serde_json::to_string_pretty(view)? + "\n",
        Format::Yaml => yaml(view)?,
        Format::Name => view.names().iter().fold(String::new(), |mut lines, name| {
            lines.push_str(&plain(name));
            lines.push('\n');
            lines
        }),
    };
    stdout(&text).map(|_| ()).map_err(Into::into)
}

/// A document as YAML.
pub(crate) fn yaml(value: &impl Serialize) -> anyhow::Result<String> {
    // By way of JSON: it settles what a key may be, and flattened structs come out alike in both formats.
    let value = serde_json::to_value(value)?;
    let mut text = serde_saphyr::to_string(&value)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// Whether the reader of stdout is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// It took the text.
    Listening,
    /// It closed the pipe, as `head -1` does once it has its line: not an error, but no reason to go on.
    Gone,
}

/// Writes `text` to stdout and flushes it.
pub(crate) fn stdout(text: &str) -> io::Result<Reader> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::Listening),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error),
    }
}

/// Writes a line to stderr. When stderr is gone there is nobody to tell.
pub(crate) fn note(line: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// How good or bad something is; becomes a colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// No colour.
    Plain,
    /// Green.
    Good,
    /// Yellow.
    Warn,
    /// Red.
    Bad,
    /// Faint.
    Dim,
    /// Bold.
    Strong,
}

/// Whether colours are written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    enabled: bool,
}

impl Paint {
    /// No colours.
    #[cfg(test)]
    pub(crate) const OFF: Self = Self { enabled: false };

    /// Colours when stdout is a terminal and nobody objects (<https://no-color.org>, `TERM=dumb`).
    pub(crate) fn for_stdout() -> Self {
        Self { enabled: wanted() && io::stdout().is_terminal() }
    }

    /// The same for stderr.
    pub(crate) fn for_stderr() -> Self {
        Self { enabled: wanted() && io::stderr().is_terminal() }
    }

    /// `text` in the colour of `tone`. `text` must have gone through [`plain`] when it is not our own.
    pub(crate) fn tone(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => None,
            Tone::Good => Some("32"),
            Tone::Warn => Some("33"),
            Tone::Bad => Some("31"),
            Tone::Dim => Some("2"),
            Tone::Strong => Some("1"),
        };
        match code {
            Some(code) if self.enabled => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// `text` with control characters (escape sequences, line breaks) and direction marks made visible.
pub(crate) fn plain(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        // U+202A–202E and U+2066–2069 turn the direction of what follows: a name could pass for another.
        if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        out
    })
}

/// The same, line by line: for messages that are meant to have several.
pub(crate) fn plain_lines(text: &str) -> String {
    text.lines().map(plain).collect::<Vec<_>>().join("\n")
}

/// A field of a table.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A coloured field.
    pub(crate) fn toned(text: impl fmt::Display, tone: Tone) -> Self {
        let text = plain(&text.to_string());
        Self { text: if text.is_empty() { "-".to_owned() } else { text }, tone }
    }

    /// A field that may be absent.
    pub(crate) fn optional(text: Option<impl fmt::Display>) -> Self {
        text.map_or_else(|| Self::toned("-", Tone::Plain), |text| Self::toned(text, Tone::Plain))
    }
}

impl<T: fmt::Display> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// Rows under a head line, columns two blanks apart. An empty table is its head line alone.
#[derive(Debug)]
pub(crate) struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, which must have a cell for each column.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.head.len(), "a cell for each column");
        self.rows.push(cells);
    }

    /// The table as text; the last column is not padded.
    pub(crate) fn render(&self, paint: Paint) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].text.chars().count());
                cells.chain([self.head[column].len()]).max().unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        let head: Vec<Cell> = self.head.iter().map(|name| Cell::toned(name, Tone::Strong)).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            for (column, cell) in row.iter().enumerate() {
                out.push_str(&paint.tone(cell.tone, &cell.text));
                if column + 1 < row.len() {
                    let gap = widths[column] - cell.text.chars().count() + 2;
                    out.extend(std::iter::repeat_n(' ', gap));
                }
            }
            out.push('\n');
        }
        out
    }
}

/// `Name:  value` lines, the values under one another.
pub(crate) fn facts(facts: &[(&str, Cell)], paint: Paint) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    facts.iter().fold(String::new(), |mut out, (name, cell)| {
        let _ = writeln!(out, "{:width$}  {}", format!("{name}:"), paint.tone(cell.tone, &cell.text));
        out
    })
}

/// Indents every line that is not empty.
pub(crate) fn indent(text: &str, by: usize) -> String {
    text.lines().fold(String::new(), |mut out, line| {
        if !line.is_empty() {
            let _ = write!(out, "{:by$}{line}", "");
        }
        out.push('\n');
        out
    })
}

/// A duration as people say it: its two largest units at most, at least seconds; milliseconds below a second.
pub(crate) fn span(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    let pair = |major: u64, a: char, minor: u64, b: char| {
        if minor == 0 { format!("{major}{a}") } else { format!("{major}{a}{minor}{b}") }
    };
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{seconds}s"),
        60..3600 => pair(seconds / 60, 'm', seconds % 60, 's'),
        3600..86400 => pair(seconds / 3600, 'h', seconds % 3600 / 60, 'm'),
        _ => pair(seconds / 86400, 'd', seconds % 86400 / 3600, 'h'),
    }
}

/// A number and its noun: `1 fault`, `2 faults`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn columns_line_up_and_the_last_is_not_padded() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["containerd/default/web".into(), "attached".into()]);
        table.row(vec!["ü".into(), Cell::optional(None::<String>)]);
        assert_eq!(
            table.render(Paint::OFF),
            "NAME                    STATE\n\
             containerd/default/web  attached\n\
             ü                       -\n"
        );
    }

    #[test]
    fn colour_does_not_move_columns() {
        let mut table = Table::new(&["A", "B"]);
        table.row(vec![Cell::toned("x", Tone::Good), "y".into()]);
        let text = table.render(Paint { enabled: true });
        assert_eq!(text, "\x1b[1mA\x1b[0m  \x1b[1mB\x1b[0m\n\x1b[32mx\x1b[0m  y\n");
    }

    #[test]
    fn a_hostile_name_cannot_drive_the_terminal() {
        for (raw, shown) in [
            ("\x1b[2Jgone", "\\u{1b}[2Jgone"),
            ("two\nlines", "two\\nlines"),
            ("\u{202e}txt.exe", "\\u{202e}txt.exe"),
            ("grün", "grün"),
        ] {
            assert_eq!(Cell::from(raw).text, shown);
        }
    }

    #[test]
    fn spans_are_short() {
        for (millis, text) in [
            (7, "7ms"),
            (59_999, "59s"),
            (60_000, "1m"),
            (61_000, "1m1s"),
            (3_600_000, "1h"),
            (90_000_000, "1d1h"),
        ] {
            assert_eq!(span(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn yaml_is_read_back_as_it_was() {
        let value = serde_json::json!({ "a": ["1", 1, true, null, "x: y", "-", "no"], "b": { "c.d/e": "" } });
        let text = yaml(&value).unwrap();
        assert_eq!(serde_saphyr::from_str::<serde_json::Value>(&text).unwrap(), value, "{text}");
    }

    #[test]
    fn indentation_leaves_empty_lines_empty() {
        assert_eq!(indent("a\n\n  b", 2), "  a\n\n    b\n");
    }
}
