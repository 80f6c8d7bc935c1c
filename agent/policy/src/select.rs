//! `spec.select`: which workloads a policy is for.
//!
//! Owns reading it, matching it, saying field by field why it matched or failed, and telling whether two selectors can
//! match the same workload. Every field given must match; a list matches when any item does.

use std::collections::BTreeMap;

use pillion_workload::{Facet, Glob, InvalidGlob, RuntimeKind, Sighting, Subject};
use serde::Serialize;

use crate::{
    fault::{any_of, quoted},
    programs::ProgramName,
    reader::{At, Fields, nearest, text_map, texts},
    source::Report,
    tree::Node,
};

const FIELDS: [&str; 7] = ["runtimes", "namespaces", "labels", "images", "units", "executables", "names"];
/// What others call a runtime, and what it is here.
const ALIASES: [(&str, RuntimeKind); 7] = [
    ("cri", RuntimeKind::Containerd),
    ("nri", RuntimeKind::Containerd),
    ("kubernetes", RuntimeKind::Containerd),
    ("k8s", RuntimeKind::Containerd),
    ("cri-o", RuntimeKind::Crio),
    ("moby", RuntimeKind::Docker),
    ("libpod", RuntimeKind::Podman),
];

/// A validated selector. An empty field was not given; at least one is not empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Selector {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    runtimes: Vec<RuntimeKind>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    images: Vec<Glob>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    units: Vec<Glob>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    executables: Vec<Glob>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    names: Vec<Glob>,
}

/// What became of one field of a selector. Labels have one for each label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldReason {
    /// The field's name, as in the policy file.
    pub field: &'static str,
    /// Whether it matched.
    pub matched: bool,
    /// What the policy wants: alternatives are separated by commas, a label is `key=value`.
    pub wanted: String,
    /// What the workload has; absent when it has no such thing.
    pub actual: Option<String>,
}

impl Selector {
    /// Whether every field matches.
    pub fn matches(&self, subject: &Subject) -> bool {
        let exact = |wanted: &[String], actual: Option<&str>| {
            wanted.is_empty() || actual.is_some_and(|actual| wanted.iter().any(|item| item == actual))
        };
        (self.runtimes.is_empty() || self.runtimes.contains(&subject.runtime))
            && exact(&self.namespaces, subject.namespace.as_deref())
            && self.labels.iter().all(|(key, value)| subject.labels.get(key) == Some(value))
            && self.globs(subject).into_iter().all(|(_, globs, actual)| any(globs, actual))
    }

    /// Whether a workload can match of which only this is known; and whether it does for certain.
    pub(crate) fn may_match(&self, sighting: &Sighting) -> (bool, bool) {
        let unknown = |field: &str| sighting.unknown.iter().any(|facet| named(*facet) == field);
        let fields = self.explain(&sighting.subject);
        let may = fields.iter().all(|field| field.matched || unknown(field.field));
        (may, may && !fields.iter().any(|field| unknown(field.field)))
    }

    /// Whether a systemd unit with this name can match, whatever it runs.
    pub fn may_match_unit(&self, unit: &str) -> bool {
        self.is_for_units() && any(&self.units, Some(unit)) && any(&self.names, Some(unit))
    }

    /// Patterns of which every systemd unit that matches has at least one: names of units that need not exist yet. Empty
    /// when no unit can match, and when the selector does not speak of units at all.
    pub fn unit_patterns(&self) -> Vec<&str> {
        if !self.is_for_units() {
            return Vec::new();
        }
        let says_so = self.runtimes.contains(&RuntimeKind::Systemd);
        let globs = if self.units.is_empty() { &self.names } else { &self.units };
        if globs.is_empty() && says_so {
            return vec!["*"];
        }
        // A name may be a container's, unless it can only be a unit's.
        let of_unit = |glob: &&str| says_so || !self.units.is_empty() || glob.ends_with(".service");
        globs.iter().map(Glob::as_str).filter(of_unit).collect()
    }

    /// Units have no namespace, labels or image.
    fn is_for_units(&self) -> bool {
        (self.runtimes.is_empty() || self.runtimes.contains(&RuntimeKind::Systemd))
            && self.namespaces.is_empty()
            && self.labels.is_empty()
            && self.images.is_empty()
    }

    /// Whether it selects processes of the host by their program: only then are those held at their exec.
    pub fn selects_programs(&self) -> bool {
        !self.executables.is_empty()
            && (self.runtimes.is_empty() || self.runtimes.contains(&RuntimeKind::Process))
    }

    /// What the names of the program files that it selects begin with, or are.
    pub(crate) fn program_names(&self) -> impl Iterator<Item = ProgramName> {
        let patterns = if self.selects_programs() { self.executables.as_slice() } else { &[] };
        patterns.iter().map(|pattern| ProgramName::of(pattern.as_str()))
    }

    /// Every field that was given, and whether it matches.
    pub fn explain(&self, subject: &Subject) -> Vec<FieldReason> {
        let mut reasons = Vec::new();
        let runtime = subject.runtime.as_str();
        if !self.runtimes.is_empty() {
            reasons.push(FieldReason {
                field: "runtimes",
                matched: self.runtimes.contains(&subject.runtime),
                wanted: joined(&self.runtimes),
                actual: Some(runtime.to_owned()),
            });
        }
        if !self.namespaces.is_empty() {
            let actual = subject.namespace.clone();
            reasons.push(FieldReason {
                field: "namespaces",
                matched: actual.as_ref().is_some_and(|actual| self.namespaces.contains(actual)),
                wanted: joined(&self.namespaces),
                actual,
            });
        }
        for (key, value) in &self.labels {
            let actual = subject.labels.get(key);
            reasons.push(FieldReason {
                field: "labels",
                matched: actual == Some(value),
                wanted: format!("{key}={value}"),
                actual: actual.map(|actual| format!("{key}={actual}")),
            });
        }
        for (field, globs, actual) in self.globs(subject) {
            if !globs.is_empty() {
                reasons.push(FieldReason {
                    field,
                    matched: any(globs, actual),
                    wanted: joined(globs),
                    actual: actual.map(str::to_owned),
                });
            }
        }
        reasons
    }

    /// Whether some workload can match both. Says no only when that is certain: a field that both have, and
    /// that no value can satisfy for both. `steps` grows by what it cost.
    pub(crate) fn meets(&self, other: &Self, steps: &mut u64) -> bool {
        *steps += 1 + (self.namespaces.len() * other.namespaces.len()) as u64 + self.labels.len() as u64;
        let shared = |one: bool, two: bool, meet: bool| one || two || meet;
        if !shared(
            self.runtimes.is_empty(),
            other.runtimes.is_empty(),
            self.runtimes.iter().any(|runtime| other.runtimes.contains(runtime)),
        ) || !shared(
            self.namespaces.is_empty(),
            other.namespaces.is_empty(),
            self.namespaces.iter().any(|namespace| other.namespaces.contains(namespace)),
        ) || self
            .labels
            .iter()
            .any(|(key, value)| other.labels.get(key).is_some_and(|theirs| theirs != value))
        {
            return false;
        }
        let pairs = [
            (&self.images, &other.images),
            (&self.units, &other.units),
            (&self.executables, &other.executables),
            (&self.names, &other.names),
        ];
        let mut meet = |test: &dyn Fn(&Glob, &Glob, &mut u64) -> bool| {
            pairs.into_iter().all(|(ours, theirs)| {
                ours.is_empty()
                    || theirs.is_empty()
                    || ours.iter().any(|glob| theirs.iter().any(|their| test(glob, their, steps)))
            })
        };
        // The exact test costs a hundred times the cheap one, which mostly suffices in one field or another.
        meet(&|ours, theirs, steps| {
            *steps += 1;
            !ours.is_plainly_apart(theirs)
        }) && meet(&Glob::meets)
    }

    fn globs<'a>(&'a self, subject: &'a Subject) -> [(&'static str, &'a [Glob], Option<&'a str>); 4] {
        [
            ("images", &self.images, subject.image.as_deref()),
            ("units", &self.units, subject.unit.as_deref()),
            // A path that is not UTF-8 cannot be written in a policy either.
            ("executables", &self.executables, subject.executable.as_deref().and_then(|path| path.to_str())),
            ("names", &self.names, Some(subject.name.as_str())),
        ]
    }
}

/// A facet's field in a selector.
fn named(facet: Facet) -> &'static str {
    match facet {
        Facet::Namespace => "namespaces",
        Facet::Labels => "labels",
        Facet::Image => "images",
        Facet::Executable => "executables",
        Facet::Name => "names",
    }
}

fn any(globs: &[Glob], actual: Option<&str>) -> bool {
    globs.is_empty() || actual.is_some_and(|actual| globs.iter().any(|glob| glob.matches(actual)))
}

fn joined<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Reads `spec.select`.
pub(crate) fn read(node: &Node, report: &mut Report<'_>) -> Selector {
    let Some(fields) = Fields::open(node, "spec.select", &FIELDS, &[], report) else {
        return Selector::default();
    };
    if fields.present(&FIELDS).is_empty() {
        report.fault(
            &node.at,
            "spec.select is empty, so it would select every workload of the node",
            "name the workloads, such as runtimes: [process]; to select all on purpose write names: [\"*\"]",
        );
    }
    let mut list = |field: &str| {
        let what = format!("spec.select.{field}");
        fields.get(field).map(|node| texts(node, &what, report)).unwrap_or_default()
    };
    let (runtimes, namespaces) = (list("runtimes"), list("namespaces"));
    let [images, units, executables, names] = ["images", "units", "executables", "names"].map(list);
    check_labels(&fields, report);
    Selector {
        runtimes: runtimes.into_iter().filter_map(|item| runtime(&item, report)).collect(),
        namespaces: namespaces.into_iter().filter_map(|item| namespace(item, report)).collect(),
        labels: labels(&fields, report),
        images: images.iter().filter_map(|item| glob("spec.select.images", item, report)).collect(),
        units: units.iter().filter_map(|item| unit(item, report)).collect(),
        executables: executables
            .iter()
            .filter_map(|item| executable("spec.select.executables", item, report))
            .collect(),
        names: names.iter().filter_map(|item| glob("spec.select.names", item, report)).collect(),
    }
}

fn check_labels(fields: &Fields<'_>, report: &mut Report<'_>) {
    if let Some(node) = fields.get("labels")
        && matches!(&node.value, crate::tree::Value::Map(entries) if entries.is_empty())
    {
        report.fault(&node.at, "spec.select.labels is empty", "add a label, or remove the field");
    }
}

fn labels(fields: &Fields<'_>, report: &mut Report<'_>) -> BTreeMap<String, String> {
    let Some(node) = fields.get("labels") else { return BTreeMap::new() };
    let labels = text_map(node, "spec.select.labels", report);
    labels.into_iter().map(|(key, value)| (key.value, value.value)).collect()
}

fn runtime(item: &At<String>, report: &mut Report<'_>) -> Option<RuntimeKind> {
    if let Ok(kind) = item.value.parse() {
        return Some(kind);
    }
    let known = RuntimeKind::ALL.map(RuntimeKind::as_str);
    let name = item.value.to_lowercase();
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, kind)| kind.as_str());
    let message = format!("unknown runtime {}", quoted(&item.value));
    let cure = alias
        .or_else(|| nearest(&name, known))
        .map_or_else(|| format!("use {}", any_of(&known)), |near| format!("did you mean {}?", quoted(near)));
    report.fault(&item.at, message, cure);
    None
}

fn namespace(item: At<String>, report: &mut Report<'_>) -> Option<String> {
    if item.value.contains(['*', '?']) {
        report.fault(
            &item.at,
            format!("namespaces are compared as they are, and none is named {}", quoted(&item.value)),
            "list the namespaces one by one; leave the field out to take every namespace",
        );
        return None;
    }
    Some(item.value)
}

/// A pattern in the list `field`, which is a whole path such as `spec.select.images`.
pub(crate) fn glob(field: &str, item: &At<String>, report: &mut Report<'_>) -> Option<Glob> {
    let error = match Glob::new(&item.value) {
        Ok(glob) => return Some(glob),
        Err(error) => error,
    };
    let cure = match error {
        InvalidGlob::Long => "write a shorter pattern with `*`".to_owned(),
        InvalidGlob::Reserved(c) => format!(
            "only `*` (any text) and `?` (any character) are known: write each alternative as an item of its own, \
             and `?` where a {c:?} is meant"
        ),
    };
    report.fault(&item.at, format!("{field}: the pattern {} {error}", quoted(&item.value)), cure);
    None
}

fn unit(item: &At<String>, report: &mut Report<'_>) -> Option<Glob> {
    if !item.value.contains(['.', '*']) {
        report.fault(
            &item.at,
            format!("no systemd unit is named {}: the name of a unit has a suffix", quoted(&item.value)),
            format!("write \"{}.service\"", item.value),
        );
        return None;
    }
    glob("spec.select.units", item, report)
}

pub(crate) fn executable(field: &str, item: &At<String>, report: &mut Report<'_>) -> Option<Glob> {
    if !item.value.starts_with(['/', '*', '?']) {
        report.fault(
            &item.at,
            format!("{} matches no executable: they are compared as absolute paths", quoted(&item.value)),
            format!("write the whole path, or \"*/{}\" for any directory", item.value),
        );
        return None;
    }
    glob(field, item, report)
}
