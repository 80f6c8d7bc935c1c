//! Whether the container runtimes of this machine hold their containers, and by a program that is there.

use std::path::Path;

use pillion_runtime::{EngineKind, PodmanFiles};

use super::Finding;
use crate::{
    cli::CheckArgs,
    hooks::{self, Hooked, Runtime},
};

/// One finding for each runtime that is in use here, or that calls Pillion.
pub(super) fn checks(args: &CheckArgs) -> Vec<Finding> {
    let found = |runtime: Runtime| match runtime {
        // containerd 1.7 and later needs no hooks: it has NRI.
        Runtime::Containerd => false,
        Runtime::Docker => Path::new(EngineKind::Docker.default_socket()).exists(),
        Runtime::Podman => PodmanFiles::usual().exist(),
        Runtime::Crio => Path::new("/run/crio/crio.sock").exists(),
    };
    let all = Runtime::ALL.into_iter();
    all.filter_map(|runtime| judge(runtime, found(runtime), hooks::hooked(&args.etc.etc, runtime))).collect()
}

fn judge(runtime: Runtime, found: bool, hooked: anyhow::Result<Vec<Hooked>>) -> Option<Finding> {
    let check = format!("hooks of {runtime}");
    let hooked = match hooked {
        Ok(hooked) => hooked,
        Err(error) => {
            return Some(Finding::warn(
                check,
                "not known",
                format!("{error:#}"),
                "see to the file, or try: pillion uninstall-hooks",
            ));
        }
    };
    let Some(first) = hooked.first() else {
        let late =
            "its containers are attached after their start, and those of closed policies are not refused";
        let cure = format!("pillion install-hooks --runtime {runtime}");
        return found.then(|| Finding::warn(check, "not installed", late, cure));
    };
    if let Some(dangling) = hooked.iter().find(|hooked| !hooked.program.is_file()) {
        return Some(Finding::fail(
            check,
            format!("{} is not there", dangling.program.display()),
            format!("{} names it: containers cannot be started", dangling.file.display()),
            format!("pillion uninstall-hooks --runtime {runtime}, or install Pillion again"),
        ));
    }
    let which = if hooked.iter().any(|hooked| hooked.all) {
        "every container"
    } else {
        "containers with runtime pillion"
    };
    Some(Finding::ok(check, format!("{which}, by {}", first.program.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn a_program_that_is_not_there_is_a_failure() {
        let hooked = |program: &str, all| Hooked { program: program.into(), file: "/etc/x".into(), all };
        for (found, hooks, verdict) in [
            (false, Ok(vec![]), None),
            (true, Ok(vec![]), Some(Verdict::Warn)),
            (true, Ok(vec![hooked("/bin/sh", true)]), Some(Verdict::Ok)),
            (false, Ok(vec![hooked("/bin/sh", false)]), Some(Verdict::Ok)),
            (false, Ok(vec![hooked("/bin/sh", true), hooked("/nowhere", true)]), Some(Verdict::Fail)),
            (false, Err(anyhow::anyhow!("broken")), Some(Verdict::Warn)),
        ] {
            assert_eq!(judge(Runtime::Docker, found, hooks).map(|finding| finding.verdict), verdict);
        }
    }
}
