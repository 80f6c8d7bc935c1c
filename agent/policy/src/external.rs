//! `external`: by what a companion is known that somebody else runs.
//!
//! Owns reading it. Whether such a companion is there is seen when a workload is attached.

use pillion_workload::{ExternalSpec, Glob};

use crate::{
    companion::account,
    fault::quoted,
    reader::{At, Fields, list, text, texts},
    select::{executable, glob},
    source::Report,
    tree::Node,
};

const FIELDS: [&str; 4] = ["executables", "users", "container", "cgroup"];
/// What is said of a program that Pillion starts.
const OF_STARTED: [&str; 4] = ["command", "user", "group", "templates"];

/// Reads one. What is wrong with it is reported, and left out.
pub(crate) fn read(node: &Node, what: &str, report: &mut Report<'_>) -> ExternalSpec {
    let known = [&FIELDS[..], &OF_STARTED].concat();
    let Some(fields) = Fields::open(node, what, &known, &[], report) else { return ExternalSpec::default() };
    for field in fields.present(&OF_STARTED) {
        let at = fields.key(field).map_or(fields.at(), |key| &key.at).clone();
        let cure = if field == "user" {
            "write `users: [NAME]` for the user that it must run as"
        } else {
            "remove it; use `exec` for a program that Pillion is to start"
        };
        let message =
            format!("{what}: {} says nothing of a companion that Pillion does not start", quoted(field));
        report.fault(&at, message, cure);
    }
    if fields.present(&known).is_empty() {
        report.fault(
            fields.at(),
            format!("{what} does not say which process the companion is"),
            "add one of executables, users, container and cgroup, such as users: [envoy]",
        );
    }
    let executables = fields.get("executables").map(|node| {
        let field = format!("{what}.executables");
        texts(node, &field, report).iter().filter_map(|item| executable(&field, item, report)).collect()
    });
    let users = fields.get("users").map(|node| {
        let field = format!("{what}.users");
        let items = list(node, &field, report).iter().enumerate();
        items.filter_map(|(index, item)| account(item, &format!("{field}[{index}]"), report)).collect()
    });
    ExternalSpec {
        executables: executables.unwrap_or_default(),
        users: users.unwrap_or_default(),
        container: fields
            .get("container")
            .and_then(|node| container(&text(node, &format!("{what}.container"), report)?, report)),
        cgroup: fields
            .get("cgroup")
            .and_then(|node| cgroup(&text(node, &format!("{what}.cgroup"), report)?, what, report)),
    }
}

/// A DNS label, as Kubernetes demands of it.
fn container(name: &At<String>, report: &mut Report<'_>) -> Option<String> {
    let valid = name.value.len() <= 63
        && name.value.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if !valid {
        report.fault(
            &name.at,
            format!("no container of a pod is named {}", quoted(&name.value)),
            "write the name that it has in the pod's specification, such as istio-proxy",
        );
    }
    valid.then(|| name.value.clone())
}

fn cgroup(path: &At<String>, what: &str, report: &mut Report<'_>) -> Option<Glob> {
    if !path.value.starts_with(['/', '*']) {
        report.fault(
            &path.at,
            format!("{} matches no cgroup: they are compared as paths from the root", quoted(&path.value)),
            format!("write \"/system.slice/envoy.service\", or \"*/{}\" for any place", path.value),
        );
        return None;
    }
    glob(&format!("{what}.cgroup"), path, report)
}
