//! Which cgroup is the container's own, when its first process sits deeper.
//!
//! Owns the reading of the specification's `linux.cgroupsPath`. Never creates or moves a cgroup.
//!
//! systemd as a container's init moves itself to `…/<container>/init.scope` and starts services beside it. What holds all
//! of the container is the cgroup that the runtime made.

use std::path::Path;

use pillion_workload::Instance;

use crate::{
    cgroup2::{Cgroup2Error, inspect},
    instance::InstanceError,
};

/// The instance with the runtime's cgroup in place of the one that its first process is in, where that is deeper.
pub(crate) fn own_cgroup(
    mut instance: Instance,
    cgroups_path: Option<&str>,
) -> Result<Instance, InstanceError> {
    let path = cgroups_path.and_then(|path| enclosing(&instance.cgroup.path, path));
    if let Some(path) = path.filter(|path| *path != instance.cgroup.path) {
        let pid = instance.process.pid;
        instance.cgroup = match inspect(path.to_owned()) {
            Ok(cgroup) => cgroup,
            // An ancestor goes after its descendants, and those after the process.
            Err(Cgroup2Error::Gone { .. }) => return Err(InstanceError::Gone { pid }),
            Err(source) => return Err(InstanceError::Cgroup { pid, source }),
        };
    }
    Ok(instance)
}

/// The runtime's cgroup among `directory` (where the first process is) and its ancestors; `None` when none fits.
///
/// `cgroups_path` is a path, or `slice:prefix:name` for runtimes that ask systemd for a scope `prefix-name.scope` (runc's
/// `--systemd-cgroup`).
pub(super) fn enclosing<'a>(directory: &'a Path, cgroups_path: &str) -> Option<&'a Path> {
    let mut parts = cgroups_path.split(':');
    let wanted = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(path), None, ..) => path.trim_matches('/').to_owned(),
        (Some(_slice), Some(_), Some(name), None) if name.strip_suffix(".slice").is_some() => name.to_owned(),
        (Some(_slice), Some(""), Some(name), None) => format!("{name}.scope"),
        (Some(_slice), Some(prefix), Some(name), None) => format!("{prefix}-{name}.scope"),
        _ => return None,
    };
    if wanted.is_empty() {
        return None;
    }
    // The outermost one that fits: the runtime's cgroup may hold one of the same name.
    directory.ancestors().filter(|ancestor| ancestor.ends_with(&wanted)).last()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_runtimes_cgroup() {
        for (directory, path, wanted) in [
            ("/cg/default/c1", "/default/c1", Some("/cg/default/c1")),
            ("/cg/default/c1/init.scope", "/default/c1", Some("/cg/default/c1")),
            ("/cg/default/c1/default/c1", "/default/c1", Some("/cg/default/c1")),
            ("/cg/outer/default/c1/x", "default/c1", Some("/cg/outer/default/c1")),
            ("/cg/default/c10", "/default/c1", None),
            ("/cg/elsewhere", "/default/c1", None),
            ("/cg/a", "/", None),
            ("/cg/a", "", None),
            ("/cg/k.slice/cri-ab.scope/init.scope", "k.slice:cri:ab", Some("/cg/k.slice/cri-ab.scope")),
            ("/cg/k.slice/ab.scope", "k.slice::ab", Some("/cg/k.slice/ab.scope")),
            ("/cg/k.slice/own.slice", "k.slice:cri:own.slice", Some("/cg/k.slice/own.slice")),
            ("/cg/k.slice", "a:b:c:d", None),
        ] {
            assert_eq!(enclosing(Path::new(directory), path), wanted.map(Path::new), "{directory} {path}");
        }
    }
}
