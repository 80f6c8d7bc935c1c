//! From the tree to values: which fields a mapping may have, and of which type each is.
//!
//! Owns the faults of shape: unknown, repeated, missing and mistyped fields. Never knows what a field means.

use std::ops::{Range, RangeInclusive};

use crate::{
    fault::{any_of, quoted},
    source::Report,
    tree::{Key, Node, Value},
};

/// Items of a list and entries of a map; looking for repeated ones takes the square of it.
pub(crate) const MAX_ITEMS: usize = 1_024;

/// A value and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct At<T> {
    pub(crate) at: Range<usize>,
    pub(crate) value: T,
}

/// Fields that the format has, or will have, elsewhere: the place where each belongs.
const HOMES: &[(&str, &str)] = &[
    ("name", "metadata"),
    ("priority", "spec"),
    ("select", "spec"),
    ("companions", "spec"),
    ("redirect", "spec"),
    ("onFailure", "spec"),
    ("runtimes", "spec.select"),
    ("namespaces", "spec.select"),
    ("labels", "spec.select"),
    ("images", "spec.select"),
    ("units", "spec.select"),
    ("executables", "spec.select"),
    ("names", "spec.select"),
    ("outbound", "spec.redirect"),
    ("dns", "spec.redirect"),
    ("exclude", "spec.redirect"),
    ("inbound", "spec.redirect"),
    ("exec", "a companion"),
    ("builtin", "a companion"),
    ("ready", "a companion"),
    ("resources", "a companion"),
    ("stopGrace", "a companion"),
    ("command", "exec"),
    ("user", "exec"),
    ("group", "exec"),
    ("templates", "exec"),
    ("timeout", "ready"),
];

/// The fields of a mapping, each at most once and all known.
pub(crate) struct Fields<'n> {
    /// The mapping's path, such as `spec.redirect`; empty for the document.
    what: String,
    at: Range<usize>,
    entries: Vec<(&'n Key, &'n str, &'n Node)>,
}

impl<'n> Fields<'n> {
    /// Takes `node` for a mapping with no other fields than `known`. `later` are fields of later versions.
    pub(crate) fn open(
        node: &'n Node,
        what: &str,
        known: &[&str],
        later: &[&str],
        report: &mut Report<'_>,
    ) -> Option<Self> {
        let entries = mapping(node, what, &any_of(known), report)?;
        let mut fields = Self { what: what.to_owned(), at: node.at.clone(), entries: Vec::new() };
        for (key, value) in entries {
            let Some(name) = &key.text else {
                unnamed(key, report);
                continue;
            };
            let name = name.as_str();
            if later.contains(&name) {
                let message = format!("{} is not supported in this version", quoted(name));
                report.fault(&key.at, message, format!("remove it; supported here: {}", any_of(known)));
            } else if !known.contains(&name) {
                fields.unknown(key, name, known, report);
            } else if let Some(first) = fields.key(name) {
                repeated(key, name, &first.at, report);
            } else {
                fields.entries.push((key, name, value));
            }
        }
        Some(fields)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(_, field, _)| *field == name).map(|(.., node)| *node)
    }

    /// The place of the field's name.
    pub(crate) fn key(&self, name: &str) -> Option<&'n Key> {
        self.entries.iter().find(|(_, field, _)| *field == name).map(|(key, ..)| *key)
    }

    /// Where to point at when the whole mapping is meant.
    pub(crate) fn at(&self) -> &Range<usize> {
        self.entries.first().map_or(&self.at, |(key, ..)| &key.at)
    }

    /// The fields that are there, out of `names`.
    pub(crate) fn present<'a>(&self, names: &[&'a str]) -> Vec<&'a str> {
        names.iter().copied().filter(|name| self.get(name).is_some()).collect()
    }

    /// The field, or a fault that it is missing.
    pub(crate) fn need(&self, name: &str, example: &str, report: &mut Report<'_>) -> Option<&'n Node> {
        let node = self.get(name);
        if node.is_none() {
            report.fault(
                self.at(),
                format!("{}{} is missing", self.prefix(), quoted(name)),
                format!("add it: {example}"),
            );
        }
        node
    }

    fn prefix(&self) -> String {
        if self.what.is_empty() { String::new() } else { format!("{}: ", self.what) }
    }

    fn unknown(&self, key: &Key, name: &str, known: &[&str], report: &mut Report<'_>) {
        let message = format!("{}unknown field {}", self.prefix(), quoted(name));
        let homes: Vec<&str> =
            HOMES.iter().filter(|(field, _)| *field == name).map(|(_, home)| *home).collect();
        let cure = if name == "<<" {
            "merge keys are not supported; write the fields out".to_owned()
        } else if let Some(near) = nearest(name, known.iter().copied()) {
            format!("did you mean {}?", quoted(near))
        } else if let [home] = homes[..] {
            format!("{} belongs in {home}; check the indentation", quoted(name))
        } else {
            format!("remove it, or use one of {}", any_of(known))
        };
        report.fault(&key.at, message, cure);
    }
}

/// The entries of a mapping.
fn mapping<'n>(
    node: &'n Node,
    what: &str,
    fields: &str,
    report: &mut Report<'_>,
) -> Option<&'n Vec<(Key, Node)>> {
    if let Value::Map(entries) = &node.value {
        return Some(entries);
    }
    let what = if what.is_empty() { "a policy" } else { what };
    report.fault(
        &node.at,
        format!("{what} must be a mapping, found {}", found(node, report)),
        format!("write `field: value` lines below it, with the fields {fields}"),
    );
    None
}

fn repeated(key: &Key, name: &str, first: &Range<usize>, report: &mut Report<'_>) {
    let message = format!("{} is given twice", quoted(name));
    report.fault_with_note(&key.at, message, "keep one of the two", (first, "first given here"));
}

fn unnamed(key: &Key, report: &mut Report<'_>) {
    report.fault(
        &key.at,
        "a field's name must be a text",
        "write `name: value`; put a name that is a number or begins with `{` or `[` in quotes",
    );
}

/// A map from text to text, such as labels.
pub(crate) fn text_map(node: &Node, what: &str, report: &mut Report<'_>) -> Vec<(At<String>, At<String>)> {
    let mut out: Vec<(At<String>, At<String>)> = Vec::new();
    let entries = mapping(node, what, "that you want to select on", report).map_or(&[][..], Vec::as_slice);
    if let Some((surplus, _)) = entries.get(MAX_ITEMS) {
        let message = format!("{what} has {} entries", entries.len());
        report.fault(&surplus.at, message, format!("at most {MAX_ITEMS} are read"));
    }
    for (key, value) in entries.iter().take(MAX_ITEMS) {
        let Some(name) = &key.text else {
            unnamed(key, report);
            continue;
        };
        if let Some((first, _)) = out.iter().find(|(first, _)| first.value == *name) {
            repeated(key, name, &first.at, report);
            continue;
        }
        if let Some(value) = text(value, &format!("{what}.{name}"), report) {
            out.push((At { at: key.at.clone(), value: name.clone() }, value));
        }
    }
    out
}

/// A text that is not empty.
pub(crate) fn text(node: &Node, what: &str, report: &mut Report<'_>) -> Option<At<String>> {
    match &node.value {
        Value::Text(value) if value.is_empty() => {
            report.fault(&node.at, format!("{what} is empty"), "write a value, or remove it");
            None
        }
        Value::Text(value) if value.contains('\0') => {
            report.fault(&node.at, format!("{what} holds a NUL character"), "remove the `\\0`");
            None
        }
        Value::Text(value) => Some(At { at: node.at.clone(), value: value.clone() }),
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => {
            let cure = match &node.value {
                Value::Bool(_) | Value::Int(_) | Value::Float(_) => match report.written(&node.at) {
                    alias if alias.starts_with('*') => "put it in quotes where its anchor is".to_owned(),
                    written => format!("put it in quotes: \"{written}\""),
                },
                Value::Map(_) if written_as_template(node, report) => {
                    "put it in quotes: \"{{ … }}\"; without them it is a mapping to YAML".to_owned()
                }
                _ => "write a text".to_owned(),
            };
            report.fault(&node.at, format!("{what} must be a text, found {}", found(node, report)), cure);
            None
        }
    }
}

/// A list with at least one item, and at most [`MAX_ITEMS`].
pub(crate) fn list<'n>(node: &'n Node, what: &str, report: &mut Report<'_>) -> &'n [Node] {
    long_list(node, what, MAX_ITEMS, report)
}

/// A list with at least one item, and at most `most`.
pub(crate) fn long_list<'n>(node: &'n Node, what: &str, most: usize, report: &mut Report<'_>) -> &'n [Node] {
    match &node.value {
        Value::List(items) if items.is_empty() => {
            report.fault(&node.at, format!("{what} is an empty list"), "add an item, or remove the field");
            &[]
        }
        Value::List(items) => {
            if let Some(surplus) = items.get(most) {
                let message = format!("{what} has {} items", items.len());
                report.fault(
                    &surplus.at,
                    message,
                    format!("at most {most} are read; split it, or use patterns"),
                );
            }
            &items[..items.len().min(most)]
        }
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) | Value::Map(_) => {
            let cure = match &node.value {
                Value::Text(_) | Value::Int(_) => {
                    format!("write it between brackets: [{}]", report.written(&node.at))
                }
                _ => "write `- item` lines below it, or [item, item]".to_owned(),
            };
            report.fault(&node.at, format!("{what} must be a list, found {}", found(node, report)), cure);
            &[]
        }
    }
}

/// A list of texts, none of them twice.
pub(crate) fn texts(node: &Node, what: &str, report: &mut Report<'_>) -> Vec<At<String>> {
    let mut out: Vec<At<String>> = Vec::new();
    for (index, item) in list(node, what, report).iter().enumerate() {
        let Some(item) = text(item, &format!("{what}[{index}]"), report) else { continue };
        if let Some(first) = out.iter().find(|first| first.value == item.value) {
            let message = format!("{what} lists {} twice", quoted(&item.value));
            report.fault_with_note(
                &item.at,
                message,
                "remove one of the two",
                (&first.at, "first listed here"),
            );
        } else {
            out.push(item);
        }
    }
    out
}

/// A whole number within `range`.
pub(crate) fn integer(
    node: &Node,
    what: &str,
    range: RangeInclusive<i128>,
    report: &mut Report<'_>,
) -> Option<i128> {
    match &node.value {
        Value::Int(value) if range.contains(value) => return Some(*value),
        Value::Int(value) => report.fault(
            &node.at,
            format!("{what} is {value}, which is out of range"),
            format!("write a number from {} to {}", range.start(), range.end()),
        ),
        Value::Text(value) if value.trim().parse::<i128>().is_ok_and(|value| range.contains(&value)) => {
            report.fault(
                &node.at,
                format!("{what} must be a number, found a text"),
                format!(
                    "write it plainly, without quotes or leading zeros: {}",
                    value.trim().parse::<i128>().unwrap_or(0)
                ),
            );
        }
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => {
            report.fault(
                &node.at,
                format!("{what} must be a whole number, found {}", found(node, report)),
                format!("write a number from {} to {}", range.start(), range.end()),
            );
        }
    }
    None
}

/// A TCP port.
pub(crate) fn port(node: &Node, what: &str, report: &mut Report<'_>) -> Option<u16> {
    integer(node, what, 1..=65_535, report).and_then(|port| u16::try_from(port).ok())
}

/// What stands there, for "must be a list, found …".
pub(crate) fn found(node: &Node, report: &Report<'_>) -> String {
    match &node.value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => format!("`{value}`"),
        Value::Int(_) | Value::Float(_) => format!("the number {}", quoted(report.written(&node.at))),
        Value::Text(value) => format!("the text {}", quoted(value)),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a mapping".to_owned(),
    }
}

fn written_as_template(node: &Node, report: &Report<'_>) -> bool {
    report.source.text.get(node.at.start..).is_some_and(|text| text.starts_with("{{"))
}

/// The known name that was probably meant.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted: String = name.chars().take(40).collect::<String>().to_lowercase().replace(['-', '_'], "");
    known
        .into_iter()
        .map(|candidate| (distance(&wanted, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len().min(wanted.len()) + 1) / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Optimal string alignment: insertions, deletions, replacements and swapped neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j - 1] + same).min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested_when_it_is_near() {
        let known = ["priority", "select", "companions", "redirect", "onFailure", "user"];
        for (name, wanted) in [
            ("prioritty", Some("priority")),
            ("companion", Some("companions")),
            ("on_failure", Some("onFailure")),
            ("onfailure", Some("onFailure")),
            ("slect", Some("select")),
            ("selcet", Some("select")),
            ("uesr", Some("user")),
            ("dns", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(name, known), wanted, "{name}");
        }
    }
}
