//! One document: from its tree to a policy.
//!
//! Owns the header (`apiVersion`, `kind`, `metadata`) and putting the parts of `spec` together. Never compares policies.

use std::{ops::Range, path::Path, sync::Arc};

use pillion_workload::{ExistingConnections, FailureMode, Plan, PolicyName, RedirectSpec};

use crate::{
    companion,
    fault::quoted,
    reader::{At, Fields, integer, nearest, text},
    redirect, select,
    select::Selector,
    source::Report,
    tree::{Node, Value},
};

/// The format that this version reads.
pub const API_VERSION: &str = "pillion.dev/v1alpha1";
/// The only kind of document.
pub const KIND: &str = "InjectionPolicy";

const PRIORITY: i128 = 1_000_000;
const LATER_SPEC: [&str; 1] = ["rollout"];

/// What was made of a document; the policy is there only when nothing is wrong with it.
pub(crate) struct Document {
    /// For finding two of the same name, also when something else is wrong.
    pub(crate) name: Option<At<PolicyName>>,
    pub(crate) policy: Option<Draft>,
}

/// A policy that has not been compared with the others.
pub(crate) struct Draft {
    pub(crate) name: At<PolicyName>,
    pub(crate) priority: At<i32>,
    pub(crate) selector: Selector,
    pub(crate) plan: Arc<Plan>,
}

/// Reads one document. `alone` tells whether it is the only one of its file, which then may leave out its header
/// and be named after the file.
pub(crate) fn read(node: &Node, alone: bool, report: &mut Report<'_>) -> Document {
    let before = report.faults.len();
    let nothing = Document { name: None, policy: None };
    if is_foreign(node, report) {
        return nothing;
    }
    let known = ["apiVersion", "kind", "metadata", "spec"];
    let Some(fields) = Fields::open(node, "", &known, &[], report) else { return nothing };
    let bare = fields.present(&["apiVersion", "kind", "metadata"]).is_empty();
    let name = if bare && !alone {
        report.fault(
            fields.at(),
            "`apiVersion`, `kind` and `metadata` are missing",
            format!(
                "add apiVersion: {API_VERSION}, kind: {KIND} and metadata: {{ name: … }}; only in a file with a single \
                 document they may be left out"
            ),
        );
        None
    } else {
        header(&fields, alone, report);
        name(&fields, alone, report)
    };
    let spec = fields.need("spec", "spec: { select: …, companions: … }", report);
    let draft = spec.and_then(|node| spec_of(node, name.as_ref(), report));
    let policy = draft.filter(|_| report.faults.len() == before);
    Document { name, policy }
}

/// A document of another kind altogether: one fault says so, and its fields are not gone through.
fn is_foreign(node: &Node, report: &mut Report<'_>) -> bool {
    let Value::Map(entries) = &node.value else { return false };
    let kind = entries.iter().find(|(key, _)| key.text.as_deref() == Some("kind")).map(|(_, node)| node);
    let Some(Node { at, value: Value::Text(kind) }) = kind else { return false };
    if kind == KIND || nearest(kind, [KIND]).is_some() {
        return false;
    }
    let message = format!("{} is not a kind of policy", quoted(kind));
    report.fault(at, message, format!("write kind: {KIND}, or move this document elsewhere"));
    true
}

fn header(fields: &Fields<'_>, alone: bool, report: &mut Report<'_>) {
    let expected = [("apiVersion", API_VERSION), ("kind", KIND)];
    let given = fields.present(&["apiVersion", "kind"]);
    for (field, wanted) in expected {
        match fields.get(field) {
            Some(node) => {
                let Some(value) = text(node, field, report) else { continue };
                if value.value != wanted {
                    let message = format!("unknown {field} {}", quoted(&value.value));
                    report.fault(&value.at, message, format!("write {field}: {wanted}"));
                }
            }
            // The smallest policy has neither of them.
            None if alone && given.is_empty() => {}
            None => report.fault(
                fields.at(),
                format!("{} is missing", quoted(field)),
                if given.is_empty() {
                    format!("add {field}: {wanted}; it may be left out only in a file with a single document")
                } else {
                    format!("add {field}: {wanted}")
                },
            ),
        }
    }
}

fn name(fields: &Fields<'_>, alone: bool, report: &mut Report<'_>) -> Option<At<PolicyName>> {
    const RULE: &str =
        "use at most 253 ASCII letters, digits, `-`, `_` and `.`, beginning with a letter or digit";
    let Some(metadata) = fields.get("metadata") else {
        if !alone {
            report.fault(
                fields.at(),
                "`metadata` is missing",
                "add metadata: { name: … }; it may be left out only in a file with a single document",
            );
            return None;
        }
        let stem = stem(report.source.path);
        let Ok(value) = PolicyName::try_from(stem.clone()) else {
            report.fault(
                fields.at(),
                format!("the policy has no name, and the file's name {} cannot serve as one", quoted(&stem)),
                "add metadata: { name: … }, or rename the file",
            );
            return None;
        };
        return Some(At { at: fields.at().clone(), value });
    };
    let fields = Fields::open(metadata, "metadata", &["name"], &[], report)?;
    let name = text(fields.need("name", "name: my-policy", report)?, "metadata.name", report)?;
    let Ok(value) = PolicyName::try_from(name.value.clone()) else {
        report.fault(&name.at, format!("{} is no name for a policy", quoted(&name.value)), RULE);
        return None;
    };
    Some(At { at: name.at, value })
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Reads `spec` to its end even where the name is missing, so that all faults are found.
fn spec_of(node: &Node, name: Option<&At<PolicyName>>, report: &mut Report<'_>) -> Option<Draft> {
    let known = ["priority", "select", "companions", "redirect", "onFailure", "existingConnections"];
    let fields = Fields::open(node, "spec", &known, &LATER_SPEC, report)?;
    let select_at = fields.key("select").map_or_else(|| fields.at().clone(), |key| key.at.clone());
    let priority = priority(&fields, select_at, report);
    let selector = fields
        .need("select", "select: { runtimes: [process] }", report)
        .map(|node| select::read(node, report));
    let companions = fields
        .need("companions", "companions: [{ name: relay, builtin: relay }]", report)
        .map(|node| companion::read_all(node, report));
    let redirect = match (fields.get("redirect"), &companions) {
        (Some(node), Some(companions)) => redirect::read(node, companions, report),
        // Without companions each of its targets would be one more fault that says so.
        (Some(_), None) | (None, _) => RedirectSpec::default(),
    };
    let on_failure = fields.get("onFailure").map_or(Some(FailureMode::Open), |node| on_failure(node, report));
    let existing_connections = match fields.get("existingConnections") {
        Some(node) => existing_connections(node, report),
        None => Some(ExistingConnections::default()),
    };
    Some(Draft {
        name: name?.clone(),
        priority,
        selector: selector?,
        plan: Arc::new(Plan {
            policy: name?.value.clone(),
            companions: companions?.into_iter().map(|companion| companion.spec).collect(),
            redirect,
            on_failure: on_failure?,
            existing_connections: existing_connections?,
        }),
    })
}

fn priority(fields: &Fields<'_>, default_at: Range<usize>, report: &mut Report<'_>) -> At<i32> {
    let Some(node) = fields.get("priority") else { return At { at: default_at, value: 0 } };
    let value = integer(node, "spec.priority", -PRIORITY..=PRIORITY, report)
        .and_then(|value| i32::try_from(value).ok())
        .unwrap_or(0);
    At { at: node.at.clone(), value }
}

fn on_failure(node: &Node, report: &mut Report<'_>) -> Option<FailureMode> {
    let mode = text(node, "spec.onFailure", report)?;
    match mode.value.as_str() {
        "open" => return Some(FailureMode::Open),
        "closed" => return Some(FailureMode::Closed),
        _ => report.fault(
            &mode.at,
            format!("unknown spec.onFailure {}", quoted(&mode.value)),
            "write `open` (traffic passes without the companion) or `closed` (connections are refused)",
        ),
    }
    None
}

fn existing_connections(node: &Node, report: &mut Report<'_>) -> Option<ExistingConnections> {
    let value = text(node, "spec.existingConnections", report)?;
    match value.value.as_str() {
        "keep" => return Some(ExistingConnections::Keep),
        "reset" => return Some(ExistingConnections::Reset),
        _ => report.fault(
            &value.at,
            format!("unknown spec.existingConnections {}", quoted(&value.value)),
            "write `keep` (open connections stay as they are) or `reset` (they are cut, to be made anew through the \
             companion)",
        ),
    }
    None
}
