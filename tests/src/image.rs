//! A container image made by hand: busybox, and this crate's puppet with the libraries it is linked to. No registry.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::programs;

/// What the image is called once imported.
pub const REFERENCE: &str = "localhost/pillion-test:1";
/// The puppet's path in it.
pub const PUPPET: &str = "/bin/pillion-puppet";

/// Makes the image in `directory` and returns the archive, in the format of `docker save`, which all runtimes import.
pub fn archive(directory: &Path) -> Result<PathBuf> {
    let root = directory.join("root");
    fill(&root)?;
    let layer = directory.join("layer.tar");
    tar(&root, &layer, &["."])?;
    let digest = printed(Command::new("sha256sum").arg(&layer))?;
    let digest = digest.split_whitespace().next().context("sha256sum prints a digest")?;
    let architecture = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(directory.join("config.json"), config.to_string())?;
    let manifest =
        serde_json::json!([{ "Config": "config.json", "RepoTags": [REFERENCE], "Layers": ["layer.tar"] }]);
    fs::write(directory.join("manifest.json"), manifest.to_string())?;
    let archive = directory.join("image.tar");
    tar(directory, &archive, &["config.json", "layer.tar", "manifest.json"])?;
    Ok(archive)
}

/// Puts the image's files into the directory `root`, for containers without an image.
pub fn fill(root: &Path) -> Result<()> {
    for directory in ["bin", "etc", "proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    let busybox = programs::system("busybox")?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    for applet in printed(Command::new(&busybox).arg("--list"))?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let puppet = programs::puppet()?;
    fs::copy(&puppet, root.join(PUPPET.trim_start_matches('/')))?;
    for library in libraries(&puppet)? {
        let path = root.join(library.strip_prefix("/")?);
        fs::create_dir_all(path.parent().context("a library is in a directory")?)?;
        fs::copy(&library, &path).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    Ok(())
}

/// The shared libraries of a program and its loader: every absolute path that ldd prints.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let printed = printed(Command::new("ldd").arg(program))?;
    Ok(printed
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}

fn tar(directory: &Path, archive: &Path, members: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-C"]);
    printed(command.arg(directory).arg("-cf").arg(archive).args(members)).map(drop)
}

fn printed(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
