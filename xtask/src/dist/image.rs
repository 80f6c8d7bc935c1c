//! An image as an archive in the layout of OCI (image-spec 1.0: image-layout.md), with the list that `docker load` of older
//! versions goes by. The same programs make the same bytes: nothing in it tells when or where it was made.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::shell;

/// Where programs are in the image.
const DIRECTORY: &str = "usr/bin";

/// Writes the archive and returns the digest of the image's manifest.
pub(super) fn write(programs: &[PathBuf], version: &str, name: &str, output: &Path) -> Result<String> {
    let layer = archive(&files(programs)?)?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let labels = json!({
        "org.opencontainers.image.title": "Pillion",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": "Apache-2.0",
    });
    let mut blobs = Blobs::default();
    let layer = blobs.add("application/vnd.oci.image.layer.v1.tar", layer);
    let config = blobs.add_json(
        "application/vnd.oci.image.config.v1+json",
        &json!({
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Env": [format!("PATH=/{DIRECTORY}")],
                "Entrypoint": [format!("/{DIRECTORY}/pillion")],
                "Cmd": ["--help"],
                "Labels": labels,
            },
            // Not compressed: its digest is that of its content.
            "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        }),
    );
    let manifest = blobs.add_json(
        "application/vnd.oci.image.manifest.v1+json",
        &json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [layer],
            "annotations": labels,
        }),
    );
    let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
    let mut entry = manifest;
    entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
    // containerd takes the whole name from the first, others the tag from the second.
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    entry["annotations"] =
        json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag });
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry] });
    let docker = json!([{ "Config": path_of(&config), "RepoTags": [name], "Layers": [path_of(&layer)] }]);

    let mut members: BTreeMap<String, Vec<u8>> = blobs.0;
    members.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    members.insert("index.json".to_owned(), index.to_string().into_bytes());
    members.insert("manifest.json".to_owned(), docker.to_string().into_bytes());
    save(output, &archive(&members.into_iter().map(|(name, bytes)| (name, (0o644, bytes))).collect())?)?;
    Ok(digest)
}

/// Content by its digest.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Returns its descriptor.
    fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = format!("{:x}", Sha256::digest(&bytes));
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() });
        self.0.insert(path_of(&descriptor), bytes);
        descriptor
    }

    fn add_json(&mut self, media_type: &str, value: &Value) -> Value {
        self.add(media_type, value.to_string().into_bytes())
    }
}

fn path_of(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

/// What is in the image: paths without the leading slash, modes, contents.
type Files = BTreeMap<String, (u32, Vec<u8>)>;

fn files(programs: &[PathBuf]) -> Result<Files> {
    let mut files = Files::new();
    for program in programs {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let name = program.file_name().context("a program has a name")?.to_string_lossy();
        files.insert(format!("{DIRECTORY}/{name}"), (0o755, read(program)?));
        for library in libraries(program)? {
            let name = library.strip_prefix("/")?.to_string_lossy().into_owned();
            files.insert(name, (0o755, read(&library)?));
        }
    }
    Ok(files)
}

/// The libraries and the loader of a program that is linked dynamically: every absolute path that ldd prints.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    let output = ldd.arg(program).output().context("cannot run ldd")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if said.contains("statically linked") || said.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    ensure!(output.status.success(), "{} failed: {}", shell::show(&ldd), said.trim());
    Ok(said
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}

/// The files and the directories above them, in order.
fn archive(files: &Files) -> Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    let mut directories = std::collections::BTreeSet::new();
    for (name, (mode, bytes)) in files {
        let mut above: Vec<&Path> =
            Path::new(name).ancestors().skip(1).filter(|path| *path != Path::new("")).collect();
        above.reverse();
        for directory in above {
            if directories.insert(directory.to_owned()) {
                let mut header = header(0o755, 0, EntryType::Directory);
                archive.append_data(&mut header, directory, io::empty())?;
            }
        }
        let size = u64::try_from(bytes.len())?;
        archive.append_data(&mut header(*mode, size, EntryType::Regular), name, bytes.as_slice())?;
    }
    Ok(archive.into_inner()?)
}

/// Root's, of the beginning of time.
fn header(mode: u32, size: u64, kind: EntryType) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Written beside and renamed: half an image is never taken for one.
fn save(output: &Path, bytes: &[u8]) -> Result<()> {
    let directory = output.parent().context("the output is a file in a directory")?;
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let aside = output.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        fs::rename(&aside, output)
    };
    write().with_context(|| format!("cannot write {}", output.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn members(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        tar::Archive::new(archive)
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                assert_eq!((entry.header().mtime().unwrap(), entry.header().uid().unwrap()), (0, 0));
                let name = entry.path().unwrap().display().to_string();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (name, bytes)
            })
            .collect()
    }

    #[test]
    fn an_image_is_the_same_each_time_and_every_digest_in_it_is_right() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("pillion");
        // No program for ldd, hence without libraries.
        fs::write(&program, "a program").unwrap();
        let make = |name: &str| {
            let output = directory.path().join(name);
            let digest =
                write(std::slice::from_ref(&program), "1.2.3", "localhost/pillion:1.2.3", &output).unwrap();
            (digest, fs::read(output).unwrap())
        };
        let (digest, bytes) = make("a/1.tar");
        assert_eq!(make("a/2.tar"), (digest.clone(), bytes.clone()));

        let members = members(&bytes);
        let blob = |descriptor: &Value| {
            let bytes = &members[&path_of(descriptor)];
            let found = format!("{:x}", Sha256::digest(bytes));
            assert_eq!(descriptor["digest"], format!("sha256:{found}"));
            assert_eq!(descriptor["size"], bytes.len());
            bytes.clone()
        };
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let index = parse(&members["index.json"]);
        assert_eq!(
            index["manifests"][0]["annotations"]["io.containerd.image.name"],
            "localhost/pillion:1.2.3"
        );
        assert_eq!(index["manifests"][0]["digest"], digest);
        let manifest = parse(&blob(&index["manifests"][0]));
        let config = parse(&blob(&manifest["config"]));
        let layer = blob(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let files = self::members(&layer);
        assert_eq!(files["usr/bin/pillion"], b"a program");
        assert_eq!(
            files.keys().map(|name| name.trim_end_matches('/')).collect::<Vec<_>>(),
            ["usr", "usr/bin", "usr/bin/pillion"]
        );
        let docker = parse(&members["manifest.json"]);
        assert!(members.contains_key(docker[0]["Layers"][0].as_str().unwrap()));
    }
}
