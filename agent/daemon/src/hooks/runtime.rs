//! The container runtimes: where their settings are, and which settings hold their containers.
//!
//! Owns this knowledge. Pure but for looking for programs; never writes.

use std::{
    fmt, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::bail;
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
    Wrapper,
    Fixed(Value),
}

impl Wanted {
    /// The settings, for a wrapper at this path.
    pub(crate) fn settings(&self, wrapper: &Path) -> Vec<Setting> {
        let value = |slot: &Slot| match slot {
            Slot::Wrapper => Value::from(wrapper.to_string_lossy().as_ref()),
            Slot::Fixed(value) => value.clone(),
        };
        self.settings.iter().map(|(path, slot)| Setting { path: path.clone(), value: value(slot) }).collect()
    }
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
    let mut settings = vec![(path(&["runtimes", NAME, "path"]), Slot::Wrapper)];
    if default {
        settings.push((path(&["default-runtime"]), Slot::Fixed(json!(NAME))));
    }
    Ok(Wanted { real, settings })
}

/// What containerd's settings are to be: another runtime class beside the default one, like it in all but its program; or the
/// default one's program.
pub(crate) fn containerd(text: &str, default: bool, real: Option<PathBuf>) -> anyhow::Result<Wanted> {
    let document = Document::parse(Language::Toml, text)?;
    let get = |path: &[&str]| {
        let path: Vec<String> = path.iter().map(|&name| name.to_owned()).collect();
        document.get(&path)
    };
    let version =
        get(&["version"]).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    let plugin = match version.as_deref() {
        Some("2") => "io.containerd.grpc.v1.cri",
        Some("3") => "io.containerd.cri.v1.runtime",
        None if text.trim().is_empty() => "io.containerd.grpc.v1.cri",
        Some("1") | None => {
            bail!(
                "it is of version 1, which has no runtime classes\nconvert it first: containerd config migrate"
            )
        }
        Some(other) => bail!("it is of version {other}, which this release does not know"),
    };
    let section = ["plugins", plugin, "containerd"];
    let text_at = |path: &[&str]| {
        get(&[&section[..], path].concat()).and_then(|value| value.as_str().map(str::to_owned))
    };
    let class = text_at(&["default_runtime_name"]).unwrap_or_else(|| "runc".to_owned());
    let kind = text_at(&["runtimes", &class, "runtime_type"]).unwrap_or_else(|| RUNC_V2.to_owned());
    if kind != RUNC_V2 {
        bail!(
            "its runtime {class} is of type {kind}, and only {RUNC_V2} calls a program that can be wrapped"
        );
    }
    let options = get(&[&section[..], &["runtimes", &class, "options"]].concat());
    let configured = text_at(&["runtimes", &class, "options", "BinaryName"]);
    let configured = configured.filter(|name| !name.is_empty() && !is_wrapper(Path::new(name)));
    let real = match real {
        Some(real) => real,
        None => in_path(configured.as_deref().unwrap_or("runc"))?,
    };

    let at = |name: &str, rest: &[&str]| {
        let path = [&section[..], &["runtimes", name], rest].concat();
        path.into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    let mut settings = Vec::new();
    if text.trim().is_empty() {
        // Without it the file would be of version 1. containerd takes numbers and nothing else here.
        bail!(
            "there is no configuration yet\nmake one first: containerd config default > /etc/containerd/config.toml"
        );
    }
    let name = if default { class.as_str() } else { NAME };
    settings.push((at(name, &["runtime_type"]), Slot::Fixed(json!(RUNC_V2))));
    settings.push((at(name, &["options", "BinaryName"]), Slot::Wrapper));
    if !default && let Some(options) = options.as_ref().and_then(Value::as_object) {
        for (key, value) in options.iter().filter(|(key, value)| *key != "BinaryName" && value.is_boolean()) {
            settings.push((at(NAME, &["options", key]), Slot::Fixed(value.clone())));
        }
    }
    Ok(Wanted { real, settings })
}

/// The shim that calls a program of runc's command line.
const RUNC_V2: &str = "io.containerd.runc.v2";

/// The OCI hooks, by the name of their file. One file has one program with one list of arguments.
pub(crate) fn hooks(hook: &Path, places: &[String]) -> Vec<(&'static str, String)> {
    let file = |point: &str| {
        let program = hook.to_string_lossy();
        let mut arguments = vec![program.to_string()];
        arguments.extend(places.iter().cloned());
        arguments.push(point.to_owned());
        let json = json!({
            "version": "1.0.0",
            "hook": { "path": program, "args": arguments },
            "when": { "always": true },
            "stages": [point],
        });
        format!("{json:#}\n")
    };
    vec![("pillion.json", file("createRuntime")), ("pillion-poststop.json", file("poststop"))]
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
