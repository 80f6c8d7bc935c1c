//! `{{ name }}` variables in commands: which exist, and which a text uses.
//!
//! Owns the check at the time of parsing. Never fills them in: that is the companion's business, at its start.

use crate::{
    fault::{any_of, quoted},
    reader::{At, nearest},
    source::Report,
};

/// All variables, with the same meaning in commands and in template files.
pub const VARIABLES: [&str; 8] =
    ["outboundPort", "inboundPort", "dnsPort", "workload", "name", "namespace", "companion", "dir"];

/// The variables that `text` uses; what is wrong with it is reported.
pub(crate) fn variables(text: &At<String>, report: &mut Report<'_>) -> Vec<&'static str> {
    let mut used = Vec::new();
    let mut rest = text.value.as_str();
    while let Some((_, after)) = rest.split_once("{{") {
        let Some((inside, next)) = after.split_once("}}") else {
            report.fault(
                &text.at,
                format!("`{{{{` is never closed in {}", quoted(&text.value)),
                "write {{ name }} with both pairs of braces",
            );
            return used;
        };
        let name = inside.trim();
        if let Some(known) = VARIABLES.into_iter().find(|known| *known == name) {
            used.push(known);
        } else {
            let cure = nearest(name, VARIABLES).map_or_else(
                || format!("use {}", any_of(&VARIABLES)),
                |near| format!("did you mean {{{{ {near} }}}}?"),
            );
            report.fault(&text.at, format!("unknown variable {}", quoted(name)), cure);
        }
        rest = next;
    }
    used
}
