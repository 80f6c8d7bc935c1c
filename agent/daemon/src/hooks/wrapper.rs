//! The wrapper: a link to `pillion-hook` under the name of a runtime, and the file that says which runtime that is.
//!
//! Owns both. A link that running containers were started through is never taken from under them: their shim calls it to
//! signal and to delete them.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde_json::json;

use super::file;
use crate::config::Paths;

/// Where shims keep the options of their containers: containerd's own, and the one that Docker starts.
const TASKS: [&str; 2] = [
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/docker/containerd/daemon/io.containerd.runtime.v2.task",
];

/// A wrapper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wrapper {
    /// The link.
    pub(crate) link: PathBuf,
    /// `runtimes.d/NAME.json`.
    pub(crate) config: PathBuf,
    text: String,
}

/// What became of a wrapper that is not wanted any more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Nothing is left.
    Removed,
    /// The link leads to the real runtime, because containers that run were started through it.
    InUse,
}

impl Wrapper {
    /// For this real runtime, in this directory.
    pub(crate) fn new(real: &Path, directory: &Path, etc: &Path, paths: &Paths) -> anyhow::Result<Self> {
        let name = real.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{} has no name that can be told", real.display()))?;
        let name = format!("pillion-{name}");
        let text = json!({ "runtime": real, "runDir": paths.run_dir, "stateDir": paths.state_dir });
        Ok(Self {
            link: directory.join(&name),
            config: etc.join("runtimes.d").join(format!("{name}.json")),
            text: format!("{text:#}\n"),
        })
    }

    /// The wrapper of which only the link is known.
    pub(crate) fn at(link: &Path, etc: &Path) -> Self {
        let mut name = link.file_name().unwrap_or_default().to_owned();
        name.push(".json");
        Self { link: link.to_owned(), config: etc.join("runtimes.d").join(name), text: String::new() }
    }

    /// Makes it, before any setting names it.
    pub(crate) fn make(&self, hook: &Path) -> anyhow::Result<()> {
        match fs::read_to_string(&self.config) {
            Ok(text) if text == self.text => {}
            Ok(_) => bail!(
                "{} says something else than is wanted: another runtime has been wrapped, or another agent is to be asked\n\
                 see to it first; uninstall-hooks removes it with its runtime's settings",
                self.config.display()
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                file::write_own(&self.config, &self.text)?;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", self.config.display()));
            }
        }
        match fs::read_link(&self.link) {
            Ok(target) if target == hook => Ok(()),
            Ok(_) => self.lead_to(hook),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.lead_to(hook),
            Err(_) => bail!("{} is there and not a link of Pillion's", self.link.display()),
        }
    }

    /// The real runtime, by its file.
    pub(crate) fn real(&self) -> Option<PathBuf> {
        let value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&self.config).ok()?).ok()?;
        Some(value.get("runtime")?.as_str()?.into())
    }

    /// Takes it away, after no setting names it any more.
    pub(crate) fn unmake(&self) -> anyhow::Result<Gone> {
        self.unmake_unless(&TASKS.map(PathBuf::from))
    }

    fn unmake_unless(&self, tasks: &[PathBuf]) -> anyhow::Result<Gone> {
        let real = self.real();
        let gone = match real {
            Some(real) if tasks.iter().any(|tasks| self.is_used(tasks)) => {
                self.lead_to(&real)?;
                Gone::InUse
            }
            Some(_) | None => {
                if fs::symlink_metadata(&self.link).is_ok_and(|it| it.is_symlink()) {
                    file::remove(&self.link)?;
                }
                Gone::Removed
            }
        };
        file::remove(&self.config)?;
        if let Some(directory) = self.config.parent() {
            file::remove_empty(directory);
        }
        Ok(gone)
    }

    /// Whether a shim has the link among its options. What cannot be read counts as using it.
    fn is_used(&self, tasks: &Path) -> bool {
        let Some(link) = self.link.to_str() else { return true };
        let subdirectories =
            |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|it| it.path());
        let mut bundles =
            subdirectories(tasks).flat_map(|namespace| subdirectories(&namespace).collect::<Vec<_>>());
        bundles.any(|bundle| match fs::read(bundle.join("options.json")) {
            // JSON, or a message that has the path as it is.
            Ok(options) => options.windows(link.len()).any(|part| part == link.as_bytes()),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        })
    }

    /// In one step, so that there is always a runtime at the other end.
    fn lead_to(&self, target: &Path) -> anyhow::Result<()> {
        let link = self.link.display();
        if let Some(directory) = self.link.parent() {
            file::make_directory(directory)?;
        }
        let mut new = self.link.clone().into_os_string();
        new.push(".new");
        let _ = fs::remove_file(&new);
        symlink(target, &new).with_context(|| format!("cannot make {link}"))?;
        fs::rename(&new, &self.link).with_context(|| format!("cannot make {link}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_stays_while_containers_need_it() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let paths = Paths { state_dir: at("state"), run_dir: at("run"), pin_root: at("pins") };
        let (real, hook, tasks) = (at("runc"), at("pillion-hook"), at("tasks"));
        let wrapper = Wrapper::new(&real, root.path(), &at("etc"), &paths).unwrap();
        let target = || fs::read_link(at("pillion-runc")).ok();
        for _ in 0..2 {
            wrapper.make(&hook).unwrap();
            assert_eq!(target().as_deref(), Some(&*hook));
            assert_eq!(Wrapper::at(&at("pillion-runc"), &at("etc")).real().as_deref(), Some(&*real));
        }
        let other = Wrapper::new(&at("elsewhere/runc"), root.path(), &at("etc"), &paths).unwrap();
        assert!(other.make(&hook).is_err());

        let bundle = tasks.join("moby/0123");
        fs::create_dir_all(&bundle).unwrap();
        let options = format!(r#"{{"binary_name":"{}"}}"#, at("pillion-runc").display());
        fs::write(bundle.join("options.json"), options).unwrap();
        assert_eq!(wrapper.unmake_unless(std::slice::from_ref(&tasks)).unwrap(), Gone::InUse);
        assert_eq!(target().as_deref(), Some(&*real));
        wrapper.make(&hook).unwrap();
        fs::remove_dir_all(&bundle).unwrap();
        assert_eq!(wrapper.unmake_unless(&[tasks]).unwrap(), Gone::Removed);
        assert_eq!(target(), None);
        assert!(!at("etc/runtimes.d").exists());
    }
}
