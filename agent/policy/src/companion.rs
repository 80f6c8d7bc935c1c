//! `spec.companions`: what is to be started.
//!
//! Owns reading one companion and the checks that need nothing but itself. Whether a redirect fits it is checked
//! in `redirect`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use pillion_workload::{
    CompanionKind, CompanionName, CompanionSpec, ExecSpec, Probe, Readiness, Resources, UserSpec,
};

use crate::{
    external,
    fault::quoted,
    quantity,
    reader::{At, Fields, found, integer, list, nearest, port, text, texts},
    source::Report,
    template,
    tree::{Node, Value},
};

/// Companions of one policy.
const MAX_COMPANIONS: usize = 16;
/// Arguments of one command, and the bytes of all of them; the kernel takes 128 KiB for one argument.
const MAX_ARGUMENTS: usize = 1_024;
const MAX_ARGUMENT_BYTES: usize = 64 << 10;
/// Linux's highest `pid_max`.
const MAX_PIDS: i128 = 4_194_304;

const KINDS: [&str; 3] = ["exec", "builtin", "external"];
const LATER_KINDS: [&str; 2] = ["image", "shared"];
/// What says nothing of a companion that Pillion does not start.
const OF_STARTED: [&str; 2] = ["resources", "stopGrace"];
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const READY_TIMEOUTS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(600));
const STOP_GRACE: Duration = Duration::from_secs(10);
const STOP_GRACES: (Duration, Duration) = (Duration::ZERO, Duration::from_secs(600));
/// nobody and its group by number, since the group's name differs between distributions.
const NOBODY: &str = "65534";

/// A companion, and what the redirect's checks need to know of it.
pub(crate) struct Companion {
    pub(crate) name: At<CompanionName>,
    pub(crate) spec: CompanionSpec,
    /// The variables of its command, and their places.
    pub(crate) variables: Vec<At<&'static str>>,
    /// Whether it can learn its ports from a template, whose text is not known here.
    pub(crate) has_templates: bool,
}

/// Reads `spec.companions`.
pub(crate) fn read_all(node: &Node, report: &mut Report<'_>) -> Vec<Companion> {
    if matches!(&node.value, Value::List(items) if items.is_empty()) {
        report.fault(
            &node.at,
            "spec.companions is empty: a policy without a companion does nothing",
            "add one, such as - { name: relay, builtin: relay }",
        );
        return Vec::new();
    }
    let items = list(node, "spec.companions", report);
    if let Some(surplus) = items.get(MAX_COMPANIONS) {
        report.fault(
            &surplus.at,
            format!("{} companions in one policy", items.len()),
            format!("at most {MAX_COMPANIONS} are started for a workload"),
        );
    }
    let mut companions: Vec<Companion> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Some(companion) = read(item, &format!("spec.companions[{index}]"), report) else { continue };
        if let Some(first) = companions.iter().find(|first| first.name.value == companion.name.value) {
            report.fault_with_note(
                &companion.name.at,
                format!("two companions are named {}", quoted(companion.name.value.as_str())),
                "give each a name of its own",
                (&first.name.at, "first named here"),
            );
        }
        companions.push(companion);
    }
    companions
}

fn read(node: &Node, what: &str, report: &mut Report<'_>) -> Option<Companion> {
    let known = ["name", "exec", "builtin", "external", "ready", "resources", "stopGrace"];
    let fields = Fields::open(node, what, &known, &LATER_KINDS, report)?;
    let name = fields.need("name", "name: relay", report).and_then(|node| name(node, what, report));
    match (fields.present(&KINDS)[..].len(), fields.get("builtin")) {
        (1, _) => {}
        (0, _) => {
            // An unsupported kind has been reported as such.
            let later = matches!(&node.value, Value::Map(entries) if entries.iter()
                .any(|(key, _)| key.text.as_deref().is_some_and(|text| LATER_KINDS.contains(&text))));
            if !later {
                let cure = "add `builtin: relay`, `exec: { command: [/usr/bin/program] }`, or `external` for one that runs already";
                report.fault(fields.at(), format!("{what}: nothing says what to run"), cure);
            }
        }
        (_, builtin) => {
            let kinds = fields.present(&KINDS);
            let at = builtin.or(fields.get(kinds[1])).map_or(fields.at(), |node| &node.at).clone();
            let (first, second) = (quoted(kinds[0]), quoted(kinds[1]));
            report.fault(&at, format!("{what} has both {first} and {second}"), "keep one of the two");
        }
    }
    let mut variables = Vec::new();
    let exec =
        fields.get("exec").and_then(|node| exec(node, &format!("{what}.exec"), &mut variables, report));
    let relay = fields.get("builtin").and_then(|node| builtin(node, &format!("{what}.builtin"), report));
    let external = fields.get("external").map(|node| {
        for field in fields.present(&OF_STARTED) {
            let at = fields.key(field).map_or(fields.at(), |key| &key.at).clone();
            let message =
                format!("{what}: {} says nothing of a companion that Pillion does not start", quoted(field));
            report.fault(&at, message, "remove it: who runs the companion limits and stops it");
        }
        external::read(node, &format!("{what}.external"), report)
    });
    let ready = fields.get("ready").map_or(Readiness { probe: None, timeout: READY_TIMEOUT }, |node| {
        readiness(node, &format!("{what}.ready"), &mut variables, report)
    });
    let resources = fields
        .get("resources")
        .map(|node| resources(node, &format!("{what}.resources"), report))
        .unwrap_or_default();
    let stop_grace = fields
        .get("stopGrace")
        .and_then(|node| quantity::duration(node, &format!("{what}.stopGrace"), STOP_GRACES, report))
        .unwrap_or(STOP_GRACE);
    let name = name?;
    let (kind, user) = match (exec, external, relay) {
        (Some((exec, user)), ..) => (CompanionKind::Exec(exec), user),
        // The user of its probe.
        (None, Some(external), _) => (CompanionKind::External(external), nobody()),
        // What is none of them has been reported; reading on lets the redirect's faults be told as well.
        (None, None, _) => (CompanionKind::Relay, nobody()),
    };
    let has_templates = matches!(&kind, CompanionKind::Exec(exec) if !exec.templates.is_empty());
    let spec = CompanionSpec { name: name.value.clone(), kind, user, ready, resources, stop_grace };
    Some(Companion { name, spec, variables, has_templates })
}

fn nobody() -> UserSpec {
    UserSpec { user: NOBODY.to_owned(), group: Some(NOBODY.to_owned()) }
}

fn name(node: &Node, what: &str, report: &mut Report<'_>) -> Option<At<CompanionName>> {
    let name = text(node, &format!("{what}.name"), report)?;
    let Ok(value) = CompanionName::try_from(name.value.clone()) else {
        report.fault(
            &name.at,
            format!("{} is no name for a companion", quoted(&name.value)),
            "use at most 63 ASCII letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
        );
        return None;
    };
    Some(At { at: name.at, value })
}

fn builtin(node: &Node, what: &str, report: &mut Report<'_>) -> Option<()> {
    let name = text(node, what, report)?;
    if name.value == "relay" {
        return Some(());
    }
    report.fault(&name.at, format!("unknown builtin {}", quoted(&name.value)), "the only one is `relay`");
    None
}

fn exec(
    node: &Node,
    what: &str,
    variables: &mut Vec<At<&'static str>>,
    report: &mut Report<'_>,
) -> Option<(ExecSpec, UserSpec)> {
    let fields = Fields::open(node, what, &["command", "user", "group", "templates"], &[], report)?;
    let command = fields
        .need("command", "command: [/usr/bin/program, --flag]", report)
        .and_then(|node| command(node, &format!("{what}.command"), variables, report));
    let templates = fields
        .get("templates")
        .map(|node| templates(node, &format!("{what}.templates"), report))
        .unwrap_or_default();
    let user = fields.get("user").and_then(|node| account(node, &format!("{what}.user"), report));
    let group = fields.get("group").and_then(|node| account(node, &format!("{what}.group"), report));
    let user = match (user, group) {
        (None, None) => nobody(),
        (user, group) => UserSpec { user: user.unwrap_or_else(|| NOBODY.to_owned()), group },
    };
    Some((ExecSpec { command: command?, templates }, user))
}

/// A program by its absolute path, and its arguments.
fn command(
    node: &Node,
    what: &str,
    variables: &mut Vec<At<&'static str>>,
    report: &mut Report<'_>,
) -> Option<Vec<String>> {
    let before = report.faults.len();
    let mut arguments = Vec::new();
    for (index, item) in list(node, what, report).iter().enumerate() {
        // An argument may be empty, and may be there twice.
        if matches!(&item.value, Value::Text(text) if text.is_empty()) && index > 0 {
            arguments.push(String::new());
            continue;
        }
        let Some(argument) = text(item, &format!("{what}[{index}]"), report) else { continue };
        let used = template::variables(&argument, report);
        if index == 0 {
            program(&argument, !used.is_empty(), report);
        }
        variables.extend(used.into_iter().map(|value| At { at: argument.at.clone(), value }));
        arguments.push(argument.value);
    }
    let bytes: usize = arguments.iter().map(String::len).sum();
    if arguments.len() > MAX_ARGUMENTS || bytes > MAX_ARGUMENT_BYTES {
        report.fault(
            &node.at,
            format!("{what} is too long: {} arguments with {bytes} bytes", arguments.len()),
            format!(
                "at most {MAX_ARGUMENTS} arguments with {MAX_ARGUMENT_BYTES} bytes; use a configuration file"
            ),
        );
    }
    (report.faults.len() == before).then_some(arguments)
}

fn program(path: &At<String>, templated: bool, report: &mut Report<'_>) {
    if templated {
        report.fault(&path.at, "variables are not replaced in the program's path", "write the path out");
    } else if path.value.contains(' ') && !path.value.trim().starts_with('/')
        || path.value.starts_with('/') && path.value.contains(" -")
    {
        report.fault(
            &path.at,
            format!(
                "{} is a whole command line, but each argument is an item of its own",
                quoted(&path.value)
            ),
            format!("write [{}]", path.value.split_whitespace().take(12).collect::<Vec<_>>().join(", ")),
        );
    } else if !path.value.starts_with('/') {
        let cure = match path.value.rsplit('/').next() {
            Some(base) if !base.is_empty() && base != "." => {
                format!("write the whole path, such as /usr/bin/{base}; PATH is not searched")
            }
            _ => "write the whole path of the program; PATH is not searched".to_owned(),
        };
        report.fault(&path.at, format!("{} is not an absolute path", quoted(&path.value)), cure);
    } else if path.value.ends_with('/') {
        report.fault(&path.at, format!("{} is a directory", quoted(&path.value)), "write the program's path");
    }
}

fn templates(node: &Node, what: &str, report: &mut Report<'_>) -> Vec<PathBuf> {
    let mut seen: Vec<At<String>> = Vec::new();
    let mut paths = Vec::new();
    for item in texts(node, what, report) {
        let path = Path::new(&item.value);
        let base = path.file_name().and_then(|base| base.to_str());
        let (true, Some(base), false) = (path.is_absolute(), base, item.value.ends_with('/')) else {
            let message = format!("{} is not the absolute path of a file", quoted(&item.value));
            report.fault(&item.at, message, "write the whole path, such as /etc/pillion/envoy.yaml");
            continue;
        };
        if let Some(first) = seen.iter().find(|first| first.value == base) {
            report.fault_with_note(
                &item.at,
                format!("two templates are named {}, and both are rendered into {{{{ dir }}}}", quoted(base)),
                "rename one of them",
                (&first.at, "the other one"),
            );
            continue;
        }
        seen.push(At { at: item.at.clone(), value: base.to_owned() });
        paths.push(path.to_owned());
    }
    paths
}

/// A user or group, by name or by number.
pub(crate) fn account(node: &Node, what: &str, report: &mut Report<'_>) -> Option<String> {
    if let Value::Int(_) = &node.value {
        // 2^32 - 1 means "no change" to the kernel.
        return integer(node, what, 0..=4_294_967_294, report).map(|id| id.to_string());
    }
    let name = text(node, what, report)?;
    let valid = name.value.len() <= 32
        && name.value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !name.value.starts_with('-')
        && (!name.value.bytes().all(|byte| byte.is_ascii_digit())
            || name.value.parse::<u32>().is_ok_and(|id| id < u32::MAX));
    if !valid {
        report.fault(
            &name.at,
            format!("{what} {} is no name or number of an account", quoted(&name.value)),
            "write a name such as envoy, or a number such as 1000",
        );
    }
    valid.then_some(name.value)
}

fn readiness(
    node: &Node,
    what: &str,
    variables: &mut Vec<At<&'static str>>,
    report: &mut Report<'_>,
) -> Readiness {
    let mut readiness = Readiness { probe: None, timeout: READY_TIMEOUT };
    let kinds = ["tcp", "http", "exec"];
    let Some(fields) = Fields::open(node, what, &["tcp", "http", "exec", "timeout"], &["grpc"], report)
    else {
        return readiness;
    };
    if let Some(node) = fields.get("timeout") {
        let timeout = quantity::duration(node, &format!("{what}.timeout"), READY_TIMEOUTS, report);
        readiness.timeout = timeout.unwrap_or(READY_TIMEOUT);
    }
    let present = fields.present(&kinds);
    if present.len() > 1 {
        let at = fields.key(present[1]).map_or(fields.at(), |key| &key.at).clone();
        report.fault(&at, format!("{what} has more than one probe"), "keep one of them");
    }
    for kind in present {
        let Some(node) = fields.get(kind) else { continue };
        let what = format!("{what}.{kind}");
        let probe = match kind {
            "tcp" => tcp(node, &what, report),
            "http" => http(node, &what, report),
            _ => Fields::open(node, &what, &["command"], &[], report)
                .and_then(|fields| fields.need("command", "command: [/usr/bin/program]", report))
                .and_then(|node| command(node, &format!("{what}.command"), variables, report))
                .map(|command| Probe::Exec { command }),
        };
        readiness.probe = probe;
    }
    readiness
}

fn tcp(node: &Node, what: &str, report: &mut Report<'_>) -> Option<Probe> {
    let fields = Fields::open(node, what, &["port"], &[], report)?;
    let node = fields.need("port", "port: 15001", report)?;
    Some(Probe::Tcp { port: port(node, &format!("{what}.port"), report)? })
}

fn http(node: &Node, what: &str, report: &mut Report<'_>) -> Option<Probe> {
    let fields = Fields::open(node, what, &["port", "path"], &[], report)?;
    let port = fields
        .need("port", "port: 9901", report)
        .and_then(|node| port(node, &format!("{what}.port"), report));
    let path = match fields.get("path") {
        None => "/".to_owned(),
        Some(node) => {
            let path = text(node, &format!("{what}.path"), report)?;
            let plain = path.value.bytes().all(|byte| byte.is_ascii_graphic());
            if !path.value.starts_with('/') || !plain || path.value.len() > 1_024 {
                report.fault(
                    &path.at,
                    format!("{what}.path {} is no path of a URL", quoted(&path.value)),
                    "begin it with `/`, percent-encode blanks and all but ASCII, and keep it below 1024 bytes",
                );
                return None;
            }
            path.value
        }
    };
    Some(Probe::Http { port: port?, path })
}

fn resources(node: &Node, what: &str, report: &mut Report<'_>) -> Resources {
    let Some(fields) = Fields::open(node, what, &["memory", "cpu", "pids"], &[], report) else {
        return Resources::default();
    };
    if fields.present(&["memory", "cpu", "pids"]).is_empty() {
        let message = format!(
            "{what} is {}",
            if matches!(node.value, Value::Map(_)) { "empty".into() } else { found(node, report) }
        );
        report.fault(&node.at, message, "add memory, cpu or pids, or remove the field");
    }
    Resources {
        memory: fields
            .get("memory")
            .and_then(|node| quantity::memory(node, &format!("{what}.memory"), report)),
        cpu_millis: fields.get("cpu").and_then(|node| quantity::cpu(node, &format!("{what}.cpu"), report)),
        pids: fields
            .get("pids")
            .and_then(|node| integer(node, &format!("{what}.pids"), 1..=MAX_PIDS, report))
            .and_then(|pids| u32::try_from(pids).ok()),
    }
}

/// The companion that a name was probably meant for.
pub(crate) fn nearest_name<'a>(name: &str, companions: &'a [Companion]) -> Option<&'a str> {
    nearest(name, companions.iter().map(|companion| companion.name.value.as_str()))
}
