//! The container runtimes: where their settings are, and which settings hold their containers.
//!
//! Owns this knowledge. Pure but for looking for programs; never writes.

use std::{
    fmt, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    document::{Document, Language},
    edit::Setting,
};

/// What Pillion's runtime is called in Docker's and containerd's settings.
pub(crate) const NAME: &str = "pillion";
/// Where programs are.
const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// A runtime whose settings can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Runtime {
    /// A runtime of containerd and of its CRI: `config.toml`.
    Containerd,
    /// A runtime of Docker Engine: `daemon.json`.
    Docker,
    /// OCI hooks: two files in a directory.
    Podman,
    /// The same files, for CRI-O.
    Crio,
}

impl Runtime {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Containerd, Self::Docker, Self::Podman, Self::Crio];

    /// The name used on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Crio => "crio",
        }
    }

    /// The file that has the settings; `None` for those that read a directory.
    pub(crate) fn config(self) -> Option<(&'static str, Language)> {
        match self {
            Self::Containerd => Some(("/etc/containerd/config.toml", Language::Toml)),
            Self::Docker => Some(("/etc/docker/daemon.json", Language::Json)),
            Self::Podman | Self::Crio => None,
        }
    }

    /// What its administrator is to do once the settings have changed.
    pub(crate) fn restart(self) -> &'static str {
        match self {
            Self::Containerd => "restart containerd: systemctl restart containerd (running containers go on)",
            Self::Docker => {
                "have Docker read its settings again: systemctl reload docker (running containers go on)"
            }
            Self::Podman => {
                "nothing has to be restarted: Podman reads its hooks at each start of a container"
            }
            Self::Crio => "restart CRI-O: systemctl restart crio (running containers go on)",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What holds containerd's containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    /// A program in the place of the runtime (`BinaryName`): all of its containers, pods' sandboxes too, when they are started.
    #[default]
    Wrapper,
    /// An OCI hook in the specification that containers begin with (`base_runtime_spec`): the containers of pods, when they are created.
    Hook,
}

/// The real runtime that a wrapper is to stand for, by the settings, and the settings that make it so.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The program.
    pub(crate) real: PathBuf,
    /// Makes settings out of the wrapper's path.
    settings: Vec<(Vec<String>, Slot)>,
}

#[derive(Debug)]
enum Slot {
    /// The path of what is made for it: the wrapper, or the specification.
    Place,
    Fixed(Value),
}

impl Wanted {
    /// The settings, for a wrapper at this path.
    pub(crate) fn settings(&self, wrapper: &Path) -> Vec<Setting> {
        filled(&self.settings, wrapper)
    }
}

fn filled(settings: &[(Vec<String>, Slot)], place: &Path) -> Vec<Setting> {
    let value = |slot: &Slot| match slot {
        Slot::Place => Value::from(place.to_string_lossy().as_ref()),
        Slot::Fixed(value) => value.clone(),
    };
    settings.iter().map(|(path, slot)| Setting { path: path.clone(), value: value(slot) }).collect()
}

/// What Docker's settings are to be. The wrapper stands for the runtime that is the default now.
pub(crate) fn docker(text: &str, default: bool, real: Option<PathBuf>) -> anyhow::Result<Wanted> {
    let document = Document::parse(Language::Json, text)?;
    let string = |path: &[&str]| {
        let path: Vec<String> = path.iter().map(|&name| name.to_owned()).collect();
        document.get(&path).and_then(|value| value.as_str().map(str::to_owned))
    };
    let current = string(&["default-runtime"]).filter(|name| name != NAME).unwrap_or_else(|| "runc".into());
    let configured = || string(&["runtimes", &current, "path"]).map(|path| in_path(&path));
    let real = match real {
        Some(real) => real,
        None => match configured() {
            Some(real) => real?,
            None => in_path(&current)?,
        },
    };
    let path = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let mut settings = vec![(path(&["runtimes", NAME, "path"]), Slot::Place)];
    if default {
        settings.push((path(&["default-runtime"]), Slot::Fixed(json!(NAME))));
    }
    Ok(Wanted { real, settings })
}

/// containerd's settings, as far as they are about runtimes.
pub(crate) struct Classes {
    document: Document,
    section: [&'static str; 3],
    /// The default class.
    class: String,
}

impl Classes {
    /// Reads them; an error when they cannot have another class, or their default one is of a kind that calls no program.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let document = Document::parse(Language::Toml, text)?;
        let version = document.get(&["version".to_owned()]);
        let version = version.map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        let plugin = match version.as_deref() {
            // Without it the file would be of version 1. containerd takes numbers and nothing else here.
            None if text.trim().is_empty() => bail!(
                "there is no configuration yet\nmake one first: containerd config default > /etc/containerd/config.toml"
            ),
            Some("2") => "io.containerd.grpc.v1.cri",
            Some("3") => "io.containerd.cri.v1.runtime",
            Some("1") | None => bail!(
                "it is of version 1, which has no runtime classes\nconvert it first: containerd config migrate"
            ),
            Some(other) => bail!("it is of version {other}, which this release does not know"),
        };
        let mut classes = Self { document, section: ["plugins", plugin, "containerd"], class: String::new() };
        classes.class = classes.text(&["default_runtime_name"]).unwrap_or_else(|| "runc".to_owned());
        let kind = classes.of_default(&["runtime_type"]).unwrap_or_else(|| RUNC_V2.to_owned());
        if kind != RUNC_V2 {
            bail!(
                "its runtime {} is of type {kind}, and only {RUNC_V2} calls a program that can be wrapped",
                classes.class
            );
        }
        Ok(classes)
    }

    fn path(&self, rest: &[&str]) -> Vec<String> {
        self.section.iter().chain(rest).map(|&name| name.to_owned()).collect()
    }

    /// A text that is not empty.
    fn text(&self, rest: &[&str]) -> Option<String> {
        let value = self.document.get(&self.path(rest));
        value.and_then(|value| value.as_str().map(str::to_owned)).filter(|text| !text.is_empty())
    }

    fn of_default(&self, rest: &[&str]) -> Option<String> {
        self.text(&[&["runtimes", self.class.as_str()], rest].concat())
    }

    /// The program of the default class, unless it is a wrapper.
    fn program(&self) -> Option<String> {
        self.of_default(&["options", "BinaryName"]).filter(|name| !is_wrapper(Path::new(name)))
    }

    /// The specification that the default class begins with, unless that is Pillion's.
    pub(crate) fn base(&self) -> Option<PathBuf> {
        self.of_default(&["base_runtime_spec"]).map(PathBuf::from).filter(|path| !is_base(path))
    }

    /// Settings of the class that is to be held: the default one, or another beside it that is like it in the rest.
    fn settings(&self, default: bool, own: Vec<(&[&str], Slot)>) -> Vec<(Vec<String>, Slot)> {
        let name = if default { self.class.as_str() } else { NAME };
        let at = |rest: &[&str]| self.path(&[&["runtimes", name], rest].concat());
        let mut settings = vec![(at(&["runtime_type"]), Slot::Fixed(json!(RUNC_V2)))];
        settings.extend(own.into_iter().map(|(rest, slot)| (at(rest), slot)));
        let options = self.document.get(&self.path(&["runtimes", &self.class, "options"]));
        if !default && let Some(options) = options.as_ref().and_then(Value::as_object) {
            for (key, value) in options.iter().filter(|(_, value)| value.is_boolean()) {
                settings.push((at(&["options", key]), Slot::Fixed(value.clone())));
            }
        }
        settings
    }
}

/// What containerd's settings are to be: another runtime class beside the default one, like it in all but its program; or the
/// default one's program.
pub(crate) fn containerd(text: &str, default: bool, real: Option<PathBuf>) -> anyhow::Result<Wanted> {
    let classes = Classes::parse(text)?;
    let real = match real {
        Some(real) => real,
        None => in_path(classes.program().as_deref().unwrap_or("runc"))?,
    };
    let program: &[&str] = &["options", "BinaryName"];
    Ok(Wanted { real, settings: classes.settings(default, vec![(program, Slot::Place)]) })
}

/// What they are to be where the specification has the hooks: the same class, but for the specification it begins with.
pub(crate) fn containerd_by_hook(text: &str, default: bool, base: &Path) -> anyhow::Result<Vec<Setting>> {
    let classes = Classes::parse(text)?;
    let mut own: Vec<(&[&str], Slot)> = vec![(&["base_runtime_spec"], Slot::Place)];
    if let Some(program) = classes.program().filter(|_| !default) {
        own.push((&["options", "BinaryName"], Slot::Fixed(json!(program))));
    }
    Ok(filled(&classes.settings(default, own), base))
}

/// The name of the specification with hooks.
pub(crate) const BASE: &str = "pillion-base-spec.json";

/// Whether a specification is, by its name, Pillion's.
pub(crate) fn is_base(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == BASE)
}

/// A specification with hooks, made of one without. Those that it has stay, and come first.
pub(crate) fn with_hooks(spec: &str, hook: &Path, places: &[String]) -> anyhow::Result<String> {
    let mut spec: Value = serde_json::from_str(spec).context("it is not valid JSON")?;
    let Some(root) = spec.as_object_mut().filter(|root| root.contains_key("ociVersion")) else {
        bail!("it is not a specification of a container: it has no ociVersion");
    };
    let hooks = root.entry("hooks").or_insert_with(|| json!({}));
    if hooks.is_null() {
        *hooks = json!({});
    }
    for point in POINTS {
        let hooks = hooks.as_object_mut().context("its hooks are no table")?;
        let list = hooks.entry(point).or_insert_with(|| json!([]));
        if list.is_null() {
            *list = json!([]);
        }
        let list = list.as_array_mut().with_context(|| format!("its hooks {point} are no list"))?;
        list.push(json!({ "path": hook, "args": arguments(hook, places, point) }));
    }
    Ok(format!("{spec:#}\n"))
}

/// Where the hooks are called.
const POINTS: [&str; 2] = ["createRuntime", "poststop"];

fn arguments(hook: &Path, places: &[String], point: &str) -> Vec<String> {
    let program = hook.to_string_lossy().into_owned();
    [program].into_iter().chain(places.iter().cloned()).chain([point.to_owned()]).collect()
}

/// The shim that calls a program of runc's command line.
const RUNC_V2: &str = "io.containerd.runc.v2";

/// The OCI hooks, by the name of their file. One file has one program with one list of arguments.
pub(crate) fn hooks(hook: &Path, places: &[String]) -> Vec<(&'static str, String)> {
    let file = |point: &str| {
        let json = json!({
            "version": "1.0.0",
            "hook": { "path": hook, "args": arguments(hook, places, point) },
            "when": { "always": true },
            "stages": [point],
        });
        format!("{json:#}\n")
    };
    vec![("pillion.json", file(POINTS[0])), ("pillion-poststop.json", file(POINTS[1]))]
}

/// Whether a program is, by its name, a wrapper of Pillion's.
pub(crate) fn is_wrapper(program: &Path) -> bool {
    program.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("pillion-"))
}

/// A program by its path, or by its name where runtimes look for it.
pub(crate) fn in_path(program: &str) -> anyhow::Result<PathBuf> {
    let named = Path::new(program);
    let candidates: Vec<PathBuf> = if named.is_absolute() {
        vec![named.to_owned()]
    } else {
        PATH.iter().map(|directory| Path::new(directory).join(program)).collect()
    };
    let found = candidates.iter().find(|path| is_executable(path));
    match found {
        Some(path) => Ok(path.clone()),
        None => bail!("there is no program {program}\nname the real runtime: --real PATH"),
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_stands_for_the_default_of_today() {
        for (text, path) in [
            ("", "/bin/true"),
            (r#"{"default-runtime": "other", "runtimes": {"other": {"path": "/bin/sh"}}}"#, "/bin/sh"),
            (r#"{"default-runtime": "sh"}"#, "sh"),
            (
                r#"{"default-runtime": "pillion", "runtimes": {"pillion": {"path": "/usr/bin/pillion-runc"}}}"#,
                "/bin/true",
            ),
        ] {
            let given = (path == "/bin/true").then(|| PathBuf::from(path));
            let wanted = docker(text, true, given).unwrap();
            assert!(wanted.real.ends_with(path.trim_start_matches('/')), "{text}: {:?}", wanted.real);
            let settings = wanted.settings(Path::new("/usr/bin/pillion-x"));
            assert_eq!(settings[0].value, "/usr/bin/pillion-x");
            assert_eq!(settings[1], Setting::new(["default-runtime"], "pillion"));
        }
        assert!(docker(r#"{"default-runtime": "no-such-runtime"}"#, false, None).is_err());
        assert_eq!(docker("{}", false, Some("/bin/sh".into())).unwrap().settings(Path::new("/w")).len(), 1);
    }

    #[test]
    fn a_class_of_containerd_is_like_the_default_one() {
        let text = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndefault_runtime_name = 'own'\n\
            [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.own]\nruntime_type = 'io.containerd.runc.v2'\n\
            [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.own.options]\nSystemdCgroup = true\nBinaryName = '/bin/sh'\n";
        let wanted = containerd(text, false, None).unwrap();
        assert_eq!(wanted.real, Path::new("/bin/sh"));
        let settings = wanted.settings(Path::new("/w/pillion-sh"));
        let shown: Vec<String> =
            settings.iter().map(|it| format!("{}={}", it.path[4..].join("."), it.value)).collect();
        assert_eq!(
            shown,
            [
                "pillion.runtime_type=\"io.containerd.runc.v2\"",
                "pillion.options.BinaryName=\"/w/pillion-sh\"",
                "pillion.options.SystemdCgroup=true"
            ]
        );
        let settings = containerd(text, true, None).unwrap().settings(Path::new("/w/pillion-sh"));
        assert_eq!(settings[1].path[4..].join("."), "own.options.BinaryName");
        let three = text
            .replace("version = 2", "version = 3")
            .replace("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime");
        assert_eq!(containerd(&three, true, None).unwrap().settings(Path::new("/w")).len(), 2);
        for (text, words) in [
            ("", "config default"),
            ("root = '/x'\n", "config migrate"),
            ("version = 1\n", "config migrate"),
            ("version = 9\n", "version 9"),
            (
                "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type='io.containerd.kata.v2'\n",
                "kata",
            ),
        ] {
            let error = containerd(text, true, Some("/bin/sh".into())).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_class_may_begin_with_a_specification_that_has_hooks() {
        let runc = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n";
        let options = "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nSystemdCgroup = true\nBinaryName = '/r/runc'\n";
        let shown = |text: &str, default| -> Vec<String> {
            let settings = containerd_by_hook(text, default, Path::new("/e/base.json")).unwrap();
            settings.iter().map(|it| format!("{}={}", it.path[4..].join("."), it.value)).collect()
        };
        assert_eq!(
            shown(&format!("{runc}{options}"), false),
            [
                "pillion.runtime_type=\"io.containerd.runc.v2\"",
                "pillion.base_runtime_spec=\"/e/base.json\"",
                "pillion.options.BinaryName=\"/r/runc\"",
                "pillion.options.SystemdCgroup=true"
            ]
        );
        assert_eq!(
            shown(&format!("{runc}{options}"), true),
            ["runc.runtime_type=\"io.containerd.runc.v2\"", "runc.base_runtime_spec=\"/e/base.json\""]
        );
        for (spec, base) in
            [("", None), ("/own.json", Some("/own.json")), ("/e/pillion-base-spec.json", None)]
        {
            let text = format!("{runc}base_runtime_spec = '{spec}'\n");
            assert_eq!(Classes::parse(&text).unwrap().base(), base.map(PathBuf::from));
        }
    }

    #[test]
    fn hooks_are_added_to_those_that_are_there() {
        let hook = Path::new("/usr/bin/pillion-hook");
        for (spec, others) in [
            (r#"{"ociVersion":"1.0.2"}"#, 0),
            (r#"{"ociVersion":"1.0.2","hooks":null}"#, 0),
            (r#"{"ociVersion":"1.0.2","hooks":{"createRuntime":null}}"#, 0),
            (r#"{"ociVersion":"1.0.2","hooks":{"createRuntime":[{"path":"/x"}],"prestart":[]}}"#, 1),
        ] {
            let text = with_hooks(spec, hook, &["--run-dir".into(), "/r".into()]).unwrap();
            let value: Value = serde_json::from_str(&text).unwrap();
            let create = value["hooks"]["createRuntime"].as_array().unwrap();
            assert_eq!(create.len(), others + 1, "{text}");
            assert_eq!(create[others]["args"], json!([hook, "--run-dir", "/r", "createRuntime"]));
            assert_eq!(value["hooks"]["poststop"][0]["path"], json!(hook));
        }
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"ociVersion":"1","hooks":[]}"#,
            r#"{"ociVersion":"1","hooks":{"poststop":{}}}"#,
        ] {
            assert!(with_hooks(bad, hook, &[]).is_err(), "{bad}");
        }
    }

    #[test]
    fn hooks_are_of_version_1_0_0() {
        for (name, text) in hooks(Path::new("/usr/bin/pillion-hook"), &["--run-dir".into(), "/r".into()]) {
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["version"], "1.0.0");
            let point = value["stages"][0].as_str().unwrap();
            assert_eq!(value["hook"]["args"], json!(["/usr/bin/pillion-hook", "--run-dir", "/r", point]));
            assert!(name.starts_with("pillion") && ["createRuntime", "poststop"].contains(&point));
        }
    }
}
