//! One YAML document as a tree in which every key and value knows its place in the file.
//!
//! Owns the limits on what the YAML parser may do, and the turning of its complaints into faults. Never knows what
//! a policy is. A tree stands between text and policy because a deserialiser that goes straight to structs
//! stops at the first field that does not fit, and all faults of a file are to be told at once.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{
    Location, Spanned,
    options::{DuplicateKeyPolicy, MergeKeyPolicy, NonFiniteFloatPolicy},
};

use crate::{
    source::{Report, Source},
    syntax,
};

/// Collections within collections; a policy needs 7.
pub(crate) const MAX_DEPTH: usize = 32;
/// Keys, values and collections of one document, with aliases replaced by what they stand for.
pub(crate) const MAX_NODES: usize = 400_000;

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// Bytes of the file; of a collection only the first. Of an alias: the place of its use.
    pub(crate) at: Range<usize>,
    pub(crate) value: Value,
}

/// What YAML's core schema makes of a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A field's name and its place. Names may repeat within a map: that is for the reader to refuse.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Key {
    pub(crate) at: Range<usize>,
    /// Absent for a key that is not a text.
    pub(crate) text: Option<String>,
}

/// Parses the document at `at`; a syntax fault is reported and gives nothing.
pub(crate) fn parse(at: &Range<usize>, report: &mut Report<'_>) -> Option<Node> {
    let text = &report.source.text[at.clone()];
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_documents: 2,
            max_recorded_anchor_events: MAX_NODES,
            max_recorded_anchor_bytes: 4 << 20,
            max_total_scalar_bytes: 4 << 20,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: 16,
        },
        emit_comments: false,
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::AsOrdinary,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Node>(text, options) {
        Ok(mut node) => {
            node.shift(at.start);
            Some(node)
        }
        Err(error) => {
            syntax::report(&error, at, report);
            None
        }
    }
}

/// The places of a file's documents, those without content left out.
///
/// A line that begins with `---` or `...` ends a document wherever it stands (YAML 1.2.2, 9.1.4 and 9.2), even within
/// a block or a quoted scalar, so that cutting at such lines needs no parser and a broken document cannot
/// swallow the next.
pub(crate) fn documents(source: &Source<'_>) -> Vec<Range<usize>> {
    let mut documents = Vec::new();
    let (mut start, mut has_content, mut has_marker) = (0, false, false);
    for line in source.lines() {
        let text = source.text[line.clone()].trim_end_matches(['\n', '\r']);
        let rest = |marker: &str| {
            text.strip_prefix(marker).filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        };
        if let Some(rest) = rest("---") {
            // Directives and comments before the first marker belong to the document that follows.
            if has_content || has_marker {
                if has_content {
                    documents.push(start..line.start);
                }
                start = line.start;
            }
            (has_content, has_marker) = (!is_blank(rest), true);
        } else if let Some(rest) = rest("...") {
            if has_content || !is_blank(rest) {
                documents.push(start..line.end);
            }
            (start, has_content, has_marker) = (line.end, false, false);
        } else {
            let directive = !has_content && !has_marker && text.starts_with('%');
            has_content |= !directive && !is_blank(text);
            start = if line.start == 3 && start == 0 { 3 } else { start };
        }
    }
    if has_content {
        documents.push(start..source.text.len());
    }
    documents
}

fn is_blank(text: &str) -> bool {
    let text = text.trim_start_matches([' ', '\t', '\u{feff}']);
    text.is_empty() || text.starts_with('#')
}

impl Node {
    /// From places within the document to places within the file.
    fn shift(&mut self, by: usize) {
        self.at = self.at.start + by..self.at.end + by;
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|item| item.shift(by)),
            Value::Map(entries) => {
                for (key, node) in entries {
                    key.at = key.at.start + by..key.at.end + by;
                    node.shift(by);
                }
            }
            Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) => {}
        }
    }
}

fn bytes(location: Location) -> Range<usize> {
    let span = location.span();
    let number = |value: Option<u64>| usize::try_from(value.unwrap_or(0)).unwrap_or(usize::MAX / 4);
    let start = number(span.byte_offset());
    start..start + number(span.byte_len())
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { at: bytes(spanned.referenced), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let text = match spanned.value {
            Value::Text(text) => Some(text),
            // What a number was written like is lost: `1.10` is no name until it is in quotes.
            Value::Null
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Float(_)
            | Value::List(_)
            | Value::Map(_) => None,
        };
        Ok(Self { at: bytes(spanned.referenced), text })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::fault::Faults;

    fn split(text: &str) -> Vec<&str> {
        documents(&Source::new(Path::new("p"), text)).into_iter().map(|at| &text[at]).collect()
    }

    fn tree(text: &str) -> Result<Node, Faults> {
        let mut faults = Faults::default();
        let source = Source::new(Path::new("p"), text);
        let node = parse(&(0..text.len()), &mut Report { source: &source, faults: &mut faults });
        node.ok_or(faults)
    }

    #[test]
    fn documents_are_cut_at_markers() {
        for (text, wanted) in [
            ("", vec![]),
            ("# only a comment\n---\n---\n# and another\n", vec![]),
            ("a: 1\n", vec!["a: 1\n"]),
            ("---\na: 1\n---\nb: 2", vec!["---\na: 1\n", "---\nb: 2"]),
            ("# c\n--- {a: 1}\n...\nb: 2", vec!["# c\n--- {a: 1}\n...\n", "b: 2"]),
            ("%YAML 1.2\n---\na: 1\n", vec!["%YAML 1.2\n---\na: 1\n"]),
            ("a: '\n--- b\n'", vec!["a: '\n", "--- b\n'"]),
            ("a: ----\n---x: 1\n", vec!["a: ----\n---x: 1\n"]),
            ("a: 1\r\n---\r\nb: 2\r---\rc: 3", vec!["a: 1\r\n", "---\r\nb: 2\r", "---\rc: 3"]),
            ("\u{feff}a: 1\n", vec!["a: 1\n"]),
        ] {
            assert_eq!(split(text), wanted, "{text:?}");
        }
    }

    #[test]
    fn keys_and_values_know_their_places_and_may_repeat() {
        let node = tree("é: 1\nb: [x, 2.50, yes, ~]\nb: 010\n").expect("well-formed");
        let Value::Map(entries) = node.value else { panic!("a map") };
        let keys: Vec<_> = entries.iter().map(|(key, _)| (key.text.as_deref(), key.at.clone())).collect();
        assert_eq!(keys, [(Some("é"), 0..2), (Some("b"), 6..7), (Some("b"), 27..28)]);
        let Value::List(items) = &entries[1].1.value else { panic!("a list") };
        let items: Vec<_> = items.iter().map(|item| (item.at.clone(), item.value.clone())).collect();
        assert_eq!(
            items,
            [
                (10..11, Value::Text("x".into())),
                (13..17, Value::Float(2.5)),
                (19..22, Value::Text("yes".into())),
                (24..25, Value::Null),
            ]
        );
        assert_eq!(entries[2].1.value, Value::Text("010".into()), "neither octal nor ten");
    }

    #[test]
    fn an_alias_stands_where_it_is_used() {
        let node = tree("a: &x {k: v}\nb: *x\n").expect("well-formed");
        let Value::Map(entries) = node.value else { panic!("a map") };
        assert_eq!(entries[1].1.at, 16..18);
    }

    #[test]
    fn bombs_are_refused() {
        let laughs = (1..12).fold("a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned(), |text, level| {
            format!("{text}a{level}: &a{level} [{}]\n", vec![format!("*a{}", level - 1); 9].join(", "))
        });
        for (text, wanted) in [
            ("[".repeat(100_000), "deep"),
            ("{a: ".repeat(40) + &"}".repeat(40), "deep"),
            ("a:\n".to_owned() + &(1..60).map(|n| " ".repeat(n) + "a:\n").collect::<String>(), "deep"),
            (laughs, "alias"),
            ("a: &a [*a]".to_owned(), "itself"),
            ("- x\n".repeat(MAX_NODES + 1), "large"),
        ] {
            let faults = tree(&text).expect_err("a bomb");
            let message = &faults.faults[0].message;
            assert!(message.contains(wanted), "{wanted}: {message}");
        }
    }
}
