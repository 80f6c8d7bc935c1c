//! What Podman's files say of a container.
//!
//! Owns where they are and what is kept of them. Their contents are whatever users gave: bounded, and never trusted for more
//! than what policies select on.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Read as _,
    path::{Path, PathBuf},
};

use futures_util::future::BoxFuture;
use pillion_workload::{Facet, Pid};
use serde::Deserialize;

use super::events;
use crate::{
    docker::{ContainerId, EngineKind, LookupError, subject},
    hook::{AskError, Described, Engine},
};

/// A node with a thousand containers has some 600 KiB.
const CONTAINERS_LIMIT: u64 = 64 << 20;
/// A specification of even 1 MiB has not been seen.
const SPEC_LIMIT: u64 = 4 << 20;
/// More containers than a node can run.
const LIST_LIMIT: usize = 65_536;
/// Says on a workload what is not known of it. For people; no policy selects on it.
const LABELS_UNKNOWN: &str = "pillion.dev/labels-unknown";

/// Where root's Podman keeps things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodmanFiles {
    /// `graphroot` of storage.conf, with the directory of the containers in it.
    containers: PathBuf,
    /// `runroot` of storage.conf, likewise.
    running: PathBuf,
    events: PathBuf,
}

/// One of `containers.json`.
#[derive(Debug, Deserialize)]
struct Listed {
    id: String,
    names: Option<Vec<String>>,
    /// JSON within JSON.
    metadata: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(rename = "image-name")]
    image: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Spec {
    process: Option<SpecProcess>,
}

#[derive(Debug, Deserialize)]
struct SpecProcess {
    args: Option<Vec<String>>,
}

/// What is kept of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    name: String,
    image: Option<String>,
}

impl PodmanFiles {
    /// The places that root's Podman has unless its configuration says otherwise.
    pub fn usual() -> Self {
        Self::below(Path::new("/var/lib/containers/storage"), Path::new("/run/containers/storage"))
    }

    /// The places for these `graphroot` and `runroot`.
    pub fn below(graph_root: &Path, run_root: &Path) -> Self {
        Self {
            containers: graph_root.join("overlay-containers"),
            running: run_root.join("overlay-containers"),
            events: "/run/libpod/events/events.log".into(),
        }
    }

    /// Whether Podman has ever been used here.
    pub fn exist(&self) -> bool {
        self.containers.is_dir()
    }

    /// The id and the subject of a container that exists, whether it runs or not; `None` when there is none of this id.
    async fn find(&self, container: &str) -> Result<Option<Described>, LookupError> {
        let Ok(id) = container.parse() else { return Ok(None) };
        let named = self.listed().map_err(LookupError::Files)?.remove(&id);
        let Some(named) = named else { return Ok(None) };
        self.read(&id, named).await.map(Some)
    }

    async fn read(&self, id: &ContainerId, named: Named) -> Result<Described, LookupError> {
        let labels = events::labels(&self.events, id).await.unwrap_or_else(|error| {
            tracing::warn!(container = %id, %error, "cannot read Podman's events");
            None
        });
        let unknown = if labels.is_none() { vec![Facet::Labels] } else { Vec::new() };
        let program = self.program(id);
        let mut subject = subject(EngineKind::Podman, &named.name, labels, named.image, program.as_deref());
        if !unknown.is_empty() {
            let why = "Podman keeps no event of it any more; no policy selects it by a label";
            subject.annotations.insert(LABELS_UNKNOWN.to_owned(), why.to_owned());
        }
        Ok(Described { id: EngineKind::Podman.workload_id(&named.name)?, subject, unknown })
    }

    /// All containers that have a process, with what is known of them.
    pub(super) async fn running(&self) -> Result<Vec<(ContainerId, Pid, Described)>, LookupError> {
        let mut listed = self.listed().map_err(LookupError::Files)?;
        let mut running = Vec::new();
        for (id, pid) in self.processes().map_err(LookupError::Files)? {
            // Podman's API service and Buildah have containers of their own in the same place.
            let Some(named) = listed.remove(&id) else { continue };
            match self.read(&id, named).await {
                Ok(described) => running.push((id, pid, described)),
                Err(error) => tracing::warn!(container = %id, %error, "container left alone"),
            }
        }
        Ok(running)
    }

    /// Containers with a pidfile. It stays when the process has ended, so whose the pid is must be asked of `/proc`.
    pub(super) fn processes(&self) -> io::Result<Vec<(ContainerId, Pid)>> {
        let directory = match fs::read_dir(&self.running) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in directory.take(LIST_LIMIT) {
            let name = entry?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<ContainerId>().ok()) else { continue };
            let path = self.running.join(id.as_str()).join("userdata/pidfile");
            let pid = read(&path, 32).ok().and_then(|text| String::from_utf8(text).ok()?.trim().parse().ok());
            found.extend(pid.map(|pid| (id, Pid(pid))));
        }
        found.sort();
        Ok(found)
    }

    /// Every container, from both lists: what is made with `--rm` may be in one that a reboot empties.
    fn listed(&self) -> io::Result<BTreeMap<ContainerId, Named>> {
        let mut all = BTreeMap::new();
        let (lasting, volatile) =
            (self.containers.join("containers.json"), self.running.join("volatile-containers.json"));
        for path in [lasting, volatile] {
            match read(&path, CONTAINERS_LIMIT) {
                Ok(json) => all.extend(parse(&json).map_err(io::Error::other)?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    fn program(&self, id: &ContainerId) -> Option<String> {
        let path = self.containers.join(id.as_str()).join("userdata/config.json");
        let spec: Spec = serde_json::from_slice(&read(&path, SPEC_LIMIT).ok()?).ok()?;
        spec.process?.args?.into_iter().next()
    }
}

impl Engine for PodmanFiles {
    fn describe<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<Described>, AskError>> {
        Box::pin(async { Ok(self.find(id).await?) })
    }
}

fn parse(json: &[u8]) -> serde_json::Result<BTreeMap<ContainerId, Named>> {
    if json.is_empty() {
        return Ok(BTreeMap::new());
    }
    let listed: Vec<Listed> = serde_json::from_slice(json)?;
    let named = listed.into_iter().take(LIST_LIMIT).filter_map(|it| {
        let metadata: Metadata = serde_json::from_str(&it.metadata.unwrap_or_default()).unwrap_or_default();
        let name = it.names?.into_iter().next()?;
        Some((it.id.parse().ok()?, Named { name, image: metadata.image }))
    });
    Ok(named.collect())
}

fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    fs::File::open(path)?.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "c9d9565d2d8e5ad03c0be0247e750e5b858e7267ded86970ee287205c697e6a5";

    fn written(root: &Path) -> PodmanFiles {
        let mut files = PodmanFiles::below(&root.join("graph"), &root.join("run"));
        files.events = root.join("events.log");
        let userdata = files.containers.join(ID).join("userdata");
        fs::create_dir_all(&userdata).expect("works");
        fs::create_dir_all(files.running.join(ID).join("userdata")).expect("works");
        // As Podman 4.3 wrote them, shortened.
        let containers = format!(
            r#"[{{"id":"{ID}","names":["web"],"image":"00ea","layer":"b45b","metadata":
            "{{\"image-name\":\"localhost/busybox:1\",\"name\":\"web\"}}","created":"2026-11-25T22:13:35Z"}}]"#
        );
        fs::write(files.containers.join("containers.json"), containers).expect("works");
        fs::write(userdata.join("config.json"), r#"{"process":{"args":["/bin/sleep","60"]}}"#)
            .expect("works");
        let events =
            format!(r#"{{"ID":"{ID}","Name":"web","Type":"container","Attributes":{{"app":"web"}}}}"#);
        fs::write(&files.events, events + "\n").expect("works");
        files
    }

    #[tokio::test]
    async fn all_is_read_that_policies_select_on() {
        let root = tempfile::tempdir().expect("works");
        let files = written(root.path());
        let Described { id, subject, unknown } =
            files.find(ID).await.expect("readable").expect("it is there");
        assert_eq!(id.as_str(), "podman/web");
        assert_eq!(subject.image.as_deref(), Some("localhost/busybox:1"));
        assert_eq!(subject.labels["app"], "web");
        assert_eq!(subject.executable.as_deref(), Some(Path::new("/bin/sleep")));
        assert_eq!((subject.annotations.len(), unknown.len()), (0, 0));

        // Not one event is kept.
        fs::write(&files.events, "").expect("works");
        let Described { subject, unknown, .. } =
            files.find(ID).await.expect("readable").expect("it is there");
        assert_eq!(unknown, [Facet::Labels]);
        assert!(subject.labels.is_empty() && subject.annotations.contains_key(LABELS_UNKNOWN));
        for other in ["web", &ID.replace('c', "d")] {
            assert!(files.find(other).await.expect("readable").is_none());
        }
        fs::write(files.containers.join("containers.json"), "[{").expect("works");
        assert!(files.find(ID).await.is_err());
    }

    #[tokio::test]
    async fn what_has_a_pidfile_may_be_running() {
        let root = tempfile::tempdir().expect("works");
        let files = written(root.path());
        assert!(files.running().await.expect("readable").is_empty());
        let pidfile = files.running.join(ID).join("userdata/pidfile");
        for (text, count) in [("4711", 1), ("4711\n", 1), ("x", 0), ("", 0)] {
            fs::write(&pidfile, text).expect("works");
            assert_eq!(files.running().await.expect("readable").len(), count, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_lists_never_panic(bytes: Vec<u8>, name in ".*", metadata in ".*") {
            let _ = parse(&bytes).is_ok();
            let json = serde_json::json!([{ "id": ID, "names": [name], "metadata": metadata }]);
            prop_assert_eq!(parse(json.to_string().as_bytes()).expect("valid").len(), 1);
        }
    }
}
