//! Which hooks are in a runtime's configuration, by what it says and without any record.
//!
//! Owns the recognition. Never writes.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

use super::{
    document::{Document, Language},
    edit::{Setting, Undo},
    file,
    install::HOOKS,
    record::{Changed, Record},
    runtime::{NAME, Runtime, is_base, is_wrapper},
    wrapper::Wrapper,
};

/// What holds a runtime's containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hooked {
    /// The program that it calls.
    pub(crate) program: PathBuf,
    /// The file that says so.
    pub(crate) file: PathBuf,
    /// Whether it holds every container, or those alone that ask for the runtime `pillion`.
    pub(crate) all: bool,
}

/// Whether a file in a directory of hooks calls `pillion-hook`.
pub(crate) fn is_our_hook(text: &str) -> bool {
    hook_program(text).is_some_and(|program| program.file_name().is_some_and(|name| name == "pillion-hook"))
}

fn hook_program(text: &str) -> Option<PathBuf> {
    let value: Value = serde_json::from_str(text).ok()?;
    Some(value.get("hook")?.get("path")?.as_str()?.into())
}

/// What is installed; an error when the configuration cannot be read.
pub(crate) fn hooked(etc: &Path, runtime: Runtime) -> anyhow::Result<Vec<Hooked>> {
    let Some(record) = Record::read(etc, runtime)?.map_or_else(|| record(etc, runtime), |it| Ok(Some(it)))?
    else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for changed in record.files {
        let Some(text) = file::read(&changed.path)? else { continue };
        let file = changed.path.clone();
        match runtime.config() {
            // The settings that name it are in another file.
            Some(_) if is_base(&file) => {}
            Some((_, language)) => {
                let found = found(language, &text).with_context(|| file.display().to_string())?;
                for Found { class, link, default, .. } in found {
                    let program = if is_base(&link) { base_program(&link)? } else { link };
                    all.push(Hooked { program, file: file.clone(), all: default || class != NAME });
                }
            }
            None => all.extend(hook_program(&text).map(|program| Hooked { program, file, all: true })),
        }
    }
    Ok(all)
}

/// The program that a specification with hooks calls; the specification itself when it does not say.
fn base_program(path: &Path) -> anyhow::Result<PathBuf> {
    let text = file::read(path)?.unwrap_or_default();
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    let hooks = value.pointer("/hooks/createRuntime").and_then(Value::as_array);
    let programs = hooks.into_iter().flatten().filter_map(|hook| hook.get("path")?.as_str());
    let ours = programs.map(PathBuf::from).find(|path| path.ends_with("pillion-hook"));
    Ok(ours.unwrap_or_else(|| path.to_owned()))
}

/// A record made up from what is there; `None` when nothing of Pillion is.
pub(crate) fn record(etc: &Path, runtime: Runtime) -> anyhow::Result<Option<Record>> {
    let mut record =
        Record { state_dir: PathBuf::new(), files: Vec::new(), directories: Vec::new(), wrapper: None };
    match runtime.config() {
        Some((path, language)) => {
            let path = PathBuf::from(path);
            let Some(text) = file::read(&path)? else { return Ok(None) };
            let found = found(language, &text).with_context(|| path.display().to_string())?;
            let mut undo = Undo::default();
            for one in found {
                undo.set.extend(one.undo(language, &Wrapper::at(&one.link, etc)));
                undo.made.extend(one.above);
                if !is_base(&one.link) {
                    record.wrapper = Some(one.link);
                } else if let Some(after) = file::read(&one.link)? {
                    record.files.push(Changed { path: one.link, before: None, after, undo: None });
                }
            }
            if !undo.set.is_empty() {
                // No text is `after`: so the settings are taken out one by one.
                let undo = Some((language, undo));
                record.files.push(Changed { path, before: None, after: String::new(), undo });
            }
        }
        None => {
            for name in ["pillion.json", "pillion-poststop.json"] {
                let path = Path::new(HOOKS).join(name);
                if let Some(after) = file::read(&path)?.filter(|text| is_our_hook(text)) {
                    record.files.push(Changed { path, before: None, after, undo: None });
                }
            }
        }
    }
    Ok(Some(record).filter(|record| !record.files.is_empty()))
}

/// A runtime of the configuration that is a wrapper, or begins with a specification that has hooks.
struct Found {
    class: String,
    /// The wrapper, or the specification.
    link: PathBuf,
    default: bool,
    /// Where it is, and its whole table.
    path: Vec<String>,
    table: Value,
    above: Vec<Vec<String>>,
}

impl Found {
    /// How to take it out. A class of Pillion's own goes as a whole; of another one the real runtime's program comes back.
    fn undo(&self, language: Language, wrapper: &Wrapper) -> Vec<(Setting, Option<Value>)> {
        let mut set = Vec::new();
        if self.class == NAME {
            set.push((Setting::new(self.path.clone(), self.table.clone()), None));
        } else {
            let name: &[&str] = match language {
                Language::Json => &["path"],
                Language::Toml if is_base(&self.link) => &["base_runtime_spec"],
                Language::Toml => &["options", "BinaryName"],
            };
            let path = self.path.iter().cloned().chain(name.iter().map(|&name| name.to_owned()));
            let real = wrapper.real().map(|real| Value::from(real.to_string_lossy().as_ref()));
            set.push((Setting::new(path, self.link.to_string_lossy().as_ref()), real));
        }
        if self.default && language == Language::Json && self.class == NAME {
            set.push((Setting::new(["default-runtime"], NAME), None));
        }
        set
    }
}

fn found(language: Language, text: &str) -> anyhow::Result<Vec<Found>> {
    let document = Document::parse(language, text)?;
    let get = |path: &[String]| document.get(path);
    let mut all = Vec::new();
    let places: &[&[&str]] = match language {
        Language::Json => &[&["runtimes"]],
        Language::Toml => &[
            &["plugins", "io.containerd.grpc.v1.cri", "containerd", "runtimes"],
            &["plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes"],
        ],
    };
    for place in places {
        let place: Vec<String> = place.iter().map(|&name| name.to_owned()).collect();
        let Some(Value::Object(classes)) = get(&place) else { continue };
        for (class, table) in classes {
            let text = |value: Option<&Value>| value.and_then(Value::as_str).map(PathBuf::from);
            let program = match language {
                Language::Json => text(table.get("path")),
                Language::Toml => text(table.get("options").and_then(|options| options.get("BinaryName"))),
            };
            let base = text(table.get("base_runtime_spec"));
            let Some(link) = program.filter(|it| is_wrapper(it)).or(base.filter(|it| is_base(it))) else {
                continue;
            };
            let default = match language {
                Language::Json => get(&["default-runtime".to_owned()]),
                Language::Toml => {
                    let mut path = place.clone();
                    path.pop();
                    path.push("default_runtime_name".to_owned());
                    get(&path)
                }
            };
            let mut path = place.clone();
            path.push(class.clone());
            all.push(Found {
                default: default.is_some_and(|default| default == class.as_str()),
                path,
                link,
                class,
                above: vec![place.clone()],
                table,
            });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::edit;

    #[test]
    fn pillions_settings_are_known_without_a_record() {
        for (language, text, count, left) in [
            (
                Language::Json,
                r#"{"runtimes":{"pillion":{"path":"/usr/bin/pillion-runc"}},"default-runtime":"pillion","debug":true}"#,
                1,
                r#"{"debug":true}"#,
            ),
            (
                Language::Json,
                r#"{"runtimes":{"kata":{"path":"/k"}}}"#,
                0,
                r#"{"runtimes":{"kata":{"path":"/k"}}}"#,
            ),
            (
                Language::Toml,
                "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'x'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nBinaryName = '/b/pillion-runc'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.pillion.options]\nBinaryName = '/b/pillion-runc'\n",
                2,
                "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'x'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\n",
            ),
            (
                Language::Toml,
                "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'x'\n\
                 base_runtime_spec = '/etc/pillion/pillion-base-spec.json'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.own]\nbase_runtime_spec = '/own.json'\n",
                1,
                "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'x'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.own]\nbase_runtime_spec = '/own.json'\n",
            ),
        ] {
            let found = found(language, text).unwrap();
            assert_eq!(found.len(), count, "{text}");
            let mut undo = Undo::default();
            for one in &found {
                undo.set.extend(one.undo(language, &Wrapper::at(&one.link, Path::new("/nowhere"))));
                undo.made.extend(one.above.clone());
            }
            let (out, _) = edit::revert(language, text, &undo).unwrap();
            let whole = |text: &str| Document::parse(language, text).unwrap().get(&[]);
            assert_eq!(whole(&out), whole(left), "{out}");
        }
        assert!(is_our_hook(r#"{"hook":{"path":"/usr/bin/pillion-hook"}}"#));
        assert!(!is_our_hook(r#"{"hook":{"path":"/usr/bin/other"}}"#) && !is_our_hook("{"));
    }
}
