//! Faults of a document that is not YAML, or more YAML than a policy needs.
//!
//! Owns the wording. The YAML parser speaks of tokens and contexts; whoever writes a policy is told what to change.

use std::ops::Range;

use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};

use crate::{
    fault::quoted,
    source::Report,
    tree::{MAX_DEPTH, MAX_NODES},
};

/// Reports what kept the document at `document` from being parsed.
pub(crate) fn report(error: &Error, document: &Range<usize>, report: &mut Report<'_>) {
    let mut inner = error;
    while let Error::AliasError { error, .. } | Error::WithSnippet { error, .. } = inner {
        inner = error;
    }
    let start = error.location().map_or(document.start, |location| {
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX / 4);
        report.source.offset(document.start, number(location.line()), number(location.column()))
    });
    let at = token(report.source.text, document, start);
    let written = report.written(&at).to_owned();
    let (message, cure) = words(inner, &written);
    report.fault(&at, message, cure);
}

/// The word at `start`; the end of the document is no place to point at, the last thing written is.
fn token(text: &str, document: &Range<usize>, start: usize) -> Range<usize> {
    let start = start.clamp(document.start, document.end);
    let rest = &text[start..document.end];
    let length = rest.find(|c: char| c.is_whitespace() || matches!(c, ',' | ']' | '}')).unwrap_or(rest.len());
    if length > 0 {
        return start..start + length;
    }
    if let Some(c) = rest.chars().next()
        && !c.is_whitespace()
    {
        return start..start + c.len_utf8();
    }
    let before = text[document.start..start].trim_end();
    let last = before.chars().next_back().map_or(0, char::len_utf8);
    let end = document.start + before.len();
    end - last..end
}

/// Words of the parser, what is wrong, and what to do.
const SLIPS: &[(&str, &str, &str)] = &[
    ("unclosed bracket", "a bracket is never closed", "add the missing `]` or `}`"),
    ("unclosed quote", "a quoted text is never closed", "add the missing quote at the end of the text"),
    ("tab", "a tab stands where only spaces may", "indent with spaces"),
    (
        "mapping values are not allowed",
        "a `:` stands where no field may begin",
        "check the indentation of this line and of the one above, write a space after the `:` of each field, \
         and put a text that holds `: ` in quotes",
    ),
    (
        "illegal placement of ':'",
        "a `:` stands where it cannot",
        "close the `[` or `{` that was opened before it",
    ),
    (
        "block sequence entries are not allowed",
        "a list begins where it cannot",
        "write each `- item` on a line of its own below the field's name, or the list as [item, item]",
    ),
    (
        "unknown escape",
        "an unknown `\\` escape in a text between double quotes",
        "write `\\\\` for a backslash, or use single quotes",
    ),
    (
        "did not find expected key",
        "a field was expected here",
        "indent it like the other fields of the same mapping",
    ),
    (
        "expected ',' or '}'",
        "a `,` or `}` is missing",
        "separate the fields by `,` and close the mapping with `}`",
    ),
    (
        "expected ',' or ']'",
        "a `,` or `]` is missing",
        "separate the items by `,` and close the list with `]`",
    ),
    (
        "did not find expected '-'",
        "a list item was expected here",
        "begin each item with `- ` in the same column",
    ),
    ("simple key", "a field's name without a `:`", "write `name: value`"),
    (
        "multiple YAML documents",
        "text after the end of the document",
        "begin another document with a line `---`",
    ),
];

/// What is wrong and what to do. The parser's errors carry no code for most of this, so its words are matched; an
/// unknown one is passed on as it is.
fn words(error: &Error, written: &str) -> (String, String) {
    let quote = format!("put it in quotes: \"{}\"", written.replace('\\', "\\\\").replace('"', "\\\""));
    match error {
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            return ("an anchor contains itself".into(), "write the value out where it is needed".into());
        }
        Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. }
        | Error::AliasReplayCounterOverflow { .. } => return too_many_aliases(),
        Error::UnsupportedTag { .. } => {
            return ("tags (`!name`) are not supported".into(), "remove the tag".into());
        }
        _ => {}
    }
    let said = UserMessageFormatter.format_message(error).into_owned();
    let has = |needle: &str| said.contains(needle);
    let debug = format!("{error:?}").to_lowercase();
    if debug.contains("recursion limit") || debug.contains("nesting") || debug.contains("depth") {
        return (
            "nested too deeply".into(),
            format!("a policy needs 7 levels, and at most {MAX_DEPTH} are read; remove the surplus ones"),
        );
    }
    if matches!(error, Error::Budget { .. }) {
        if debug.contains("alias") || debug.contains("anchor") {
            return too_many_aliases();
        }
        return (
            "the document is too large".into(),
            format!("a document may hold {MAX_NODES} keys and values; split it into several policies"),
        );
    }
    if has("unknown anchor") || written.starts_with(['*', '&']) {
        let what =
            format!("{} is no text: a leading `*` or `&` has a meaning of its own in YAML", quoted(written));
        return (what, quote);
    }
    if has("unexpected character") {
        return (
            format!("{} is no text: it begins with a character that YAML reserves", quoted(written)),
            quote,
        );
    }
    if let Some((_, message, cure)) = SLIPS.iter().find(|(needle, ..)| has(needle)) {
        return ((*message).to_owned(), (*cure).to_owned());
    }
    (
        format!("not valid YAML: {said}"),
        "check indentation, quotes and brackets here and on the lines above".into(),
    )
}

fn too_many_aliases() -> (String, String) {
    ("aliases stand for too much".into(), "write the values out, or split the document".into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{fault::Faults, source::Source, tree};

    #[test]
    fn every_common_slip_has_a_place_and_a_cure() {
        for (text, place, message, cure) in [
            ("images: [*/web:*]", (1, 10), "`*/web:*` is no text", "\"*/web:*\""),
            ("a: *", (1, 4), "`*` is no text", "\"*\""),
            ("a: @x", (1, 4), "`@x` is no text", "\"@x\""),
            ("a:\n\tb: c\n", (2, 2), "tab", "spaces"),
            ("a: b: c\n", (1, 5), "`:`", "quotes"),
            ("a: [1, 2\nb: c\n", (2, 2), "`:`", "close the `[`"),
            ("a: [1, 2\n\n\n", (1, 4), "never closed", "missing `]`"),
            ("a: 'x\n", (1, 4), "never closed", "missing quote"),
            ("a: \"\\q\"\n", (1, 4), "escape", "single quotes"),
            ("x: - a", (1, 4), "list begins", "line of its own"),
            ("a:\n  b: 1\n c: 2\n", (3, 2), "field", "indent"),
            ("a: !secret x", (1, 12), "tags", "remove"),
            ("a: b\n... c\n", (2, 5), "", ""),
        ] {
            let source = Source::new(Path::new("p"), text);
            let mut faults = Faults::default();
            let node = tree::parse(&(0..text.len()), &mut Report { source: &source, faults: &mut faults });
            assert_eq!(node, None, "{text:?}");
            let fault = &faults.faults[0];
            assert_eq!((fault.line, fault.column), place, "{text:?}: {fault}");
            assert!(fault.message.contains(message), "{text:?}: {fault}");
            assert!(fault.cure.contains(cure), "{text:?}: {fault}");
        }
    }
}
