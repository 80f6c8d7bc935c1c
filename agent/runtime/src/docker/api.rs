//! What an engine's API answers, and what is kept of it.
//!
//! Owns the parsing of lists, inspections and events (Docker Engine API 1.41; Podman answers the same). Never does IO. Names,
//! labels and commands are whatever users gave: bounded, and a broken part is left out, with a reason.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use pillion_workload::{Pid, Subject};
use serde::Deserialize;

use super::{ContainerId, EngineKind};

/// More containers than a node can run: beyond it an answer is broken or hostile.
const LIST_LIMIT: usize = 65_536;
/// The labels of one container, keys and values together.
const TEXT_LIMIT: usize = 1 << 20;
/// `PATH_MAX`.
const PATH_LIMIT: usize = 4096;

/// An answer that makes no sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum Nonsense {
    #[error("not the JSON that was asked for")]
    Json(#[from] serde_json::Error),
    #[error("a list of {0} containers, more than {LIST_LIMIT}")]
    TooMany(usize),
}

/// One container of `GET /containers/json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Summary {
    id: String,
    names: Option<Vec<String>>,
    image: Option<String>,
    command: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

/// `GET /containers/ID/json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Inspection {
    id: String,
    name: String,
    path: Option<String>,
    state: InspectedState,
    config: Option<InspectedConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedState {
    running: bool,
    pid: i64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedConfig {
    image: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

/// One event of `GET /events`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    action: String,
    actor: Actor,
}

#[derive(Debug, Deserialize)]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
}

/// `GET /info`, and what Docker itself keeps of a container in `config.v2.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    docker_root_dir: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Kept {
    config: InspectedConfig,
}

/// `GET /version`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    version: String,
}

pub(super) fn version(json: &[u8]) -> Result<String, Nonsense> {
    Ok(serde_json::from_slice::<Version>(json)?.version)
}

/// Where Docker keeps its containers.
pub(super) fn root_directory(json: &[u8]) -> Result<PathBuf, Nonsense> {
    Ok(serde_json::from_slice::<Info>(json)?.docker_root_dir)
}

/// The image's name in what Docker keeps of a container.
pub(super) fn kept_image(json: &[u8]) -> Result<Option<String>, Nonsense> {
    Ok(serde_json::from_slice::<Kept>(json)?.config.image)
}

pub(super) fn list(json: &[u8]) -> Result<Vec<Summary>, Nonsense> {
    let list: Vec<Summary> = serde_json::from_slice(json)?;
    if list.len() > LIST_LIMIT { Err(Nonsense::TooMany(list.len())) } else { Ok(list) }
}

pub(super) fn inspection(json: &[u8]) -> Result<Inspection, Nonsense> {
    Ok(serde_json::from_slice(json)?)
}

/// The container that an event makes worth a look. Both engines tell of much more, health checks foremost.
pub(super) fn event(json: &[u8]) -> Result<Option<ContainerId>, Nonsense> {
    let event: Event = serde_json::from_slice(json)?;
    let wanted = ["start", "restart", "rename", "die", "died", "destroy", "remove"];
    Ok(wanted.contains(&event.action.as_str()).then(|| event.actor.id.parse().ok()).flatten())
}

impl Summary {
    /// Its id; `None` when that is none.
    pub(super) fn id(&self) -> Option<ContainerId> {
        self.id.parse().ok()
    }

    /// What policies select on. The list has the command as one text: a program with a blank in its path is cut short.
    pub(super) fn subject(&self, engine: EngineKind) -> Option<Subject> {
        // A container that others link to has names such as `/other/alias` as well.
        let mut names = self.names.iter().flatten().filter_map(|name| name.strip_prefix('/'));
        let name = names.find(|name| !name.contains('/'))?;
        let program = self.command.as_deref().and_then(|command| command.split(' ').next());
        Some(subject(engine, name, self.labels.clone(), self.image.clone(), program))
    }

    /// Whether the engine names the image by its digest, because the name that the container was made from means another
    /// image now. An inspection has the name.
    pub(super) fn image_is_digest(&self) -> bool {
        self.image.as_ref().is_some_and(|image| image.starts_with("sha256:"))
    }
}

impl Inspection {
    /// Its id; `None` when that is none.
    pub(super) fn id(&self) -> Option<ContainerId> {
        self.id.parse().ok()
    }

    /// The first process; `None` when there is none.
    pub(super) fn pid(&self) -> Option<Pid> {
        let pid = i32::try_from(self.state.pid).ok().filter(|pid| *pid > 0)?;
        self.state.running.then_some(Pid(pid))
    }

    /// What policies select on.
    pub(super) fn subject(&self, engine: EngineKind) -> Subject {
        let name = self.name.strip_prefix('/').unwrap_or(&self.name);
        let config = self.config.as_ref();
        let labels = config.and_then(|config| config.labels.clone());
        let image = config.and_then(|config| config.image.clone());
        subject(engine, name, labels, image, self.path.as_deref())
    }
}

/// What policies select on, within bounds.
pub(crate) fn subject(
    engine: EngineKind,
    name: &str,
    labels: Option<BTreeMap<String, String>>,
    image: Option<String>,
    program: Option<&str>,
) -> Subject {
    let labels = labels.unwrap_or_default();
    let size: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    let labels = if size <= TEXT_LIMIT {
        labels
    } else {
        tracing::warn!(workload = %format_args!("{}/{name}", engine.kind()), size, "its labels are too long and left out");
        BTreeMap::new()
    };
    Subject {
        labels,
        image: image.filter(|image| !image.is_empty() && image.len() <= PATH_LIMIT),
        executable: program.and_then(absolute),
        ..Subject::new(engine.kind(), name)
    }
}

fn absolute(program: &str) -> Option<PathBuf> {
    (program.len() < PATH_LIMIT && Path::new(program).is_absolute() && !program.contains('\0'))
        .then(|| program.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "7865c3c3aa2d2a95e6ea66ab4a652df0aaf970ef3ee16bc5c3203be970dc762e";

    #[test]
    fn a_list_and_an_inspection_of_one_container_say_the_same() {
        // As Docker 20.10 answered, shortened.
        let json = format!(
            r#"[{{"Id":"{ID}","Names":["/other/alias","/web"],"Image":"localhost/busybox:1","ImageID":"sha256:00ea",
            "Command":"/bin/sleep 60","Created":1795644809,"Ports":[],"Labels":{{"app":"web"}},"State":"running"}}]"#
        );
        let list = list(json.as_bytes()).expect("valid");
        let json = format!(
            r#"{{"Id":"{ID}","Path":"/bin/sleep","Args":["60"],"Name":"/web","State":{{"Running":true,"Pid":12508}},
            "Image":"sha256:00ea","Config":{{"Labels":{{"app":"web"}},"Image":"localhost/busybox:1"}}}}"#
        );
        let inspection = inspection(json.as_bytes()).expect("valid");
        assert_eq!(list[0].id(), inspection.id());
        assert_eq!(inspection.pid(), Some(Pid(12508)));
        assert!(!list[0].image_is_digest());
        let subject = inspection.subject(EngineKind::Docker);
        assert_eq!(list[0].subject(EngineKind::Docker), Some(subject.clone()));
        assert_eq!((subject.name.as_str(), subject.image.as_deref()), ("web", Some("localhost/busybox:1")));
        assert_eq!(subject.executable.as_deref(), Some(Path::new("/bin/sleep")));
    }

    #[test]
    fn only_what_begins_ends_or_renames_is_worth_a_look() {
        for (action, wanted) in [
            ("start", true),
            ("die", true),
            ("rename", true),
            ("exec_start: /bin/sh", false),
            ("health_status: healthy", false),
            ("create", false),
        ] {
            let json = format!(
                r#"{{"status":"x","Type":"container","Action":"{action}","Actor":{{"ID":"{ID}","Attributes":{{"a":"b"}}}}}}"#
            );
            assert_eq!(event(json.as_bytes()).expect("valid").is_some(), wanted, "{action}");
        }
        assert!(event(br#"{"Action":"start","Actor":{"ID":"../x"}}"#).expect("valid").is_none());
        assert!(event(b"{}").is_err() && event(b"").is_err());
    }

    #[test]
    fn what_does_not_run_has_no_process() {
        for (state, pid) in [
            (r#"{"Running":true,"Pid":7}"#, Some(Pid(7))),
            (r#"{"Running":false,"Pid":7}"#, None),
            (r#"{"Running":true,"Pid":0}"#, None),
            (r#"{"Running":true,"Pid":-7}"#, None),
            (r#"{"Running":true,"Pid":99999999999}"#, None),
        ] {
            let json = format!(r#"{{"Id":"{ID}","Name":"web","State":{state}}}"#);
            assert_eq!(inspection(json.as_bytes()).expect("valid").pid(), pid, "{state}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_answers_never_panic(bytes: Vec<u8>, name in ".*", command in ".*", label in ".*") {
            let _ = (root_directory(&bytes).is_ok(), kept_image(&bytes).is_ok());
            let _ = (version(&bytes).is_ok(), event(&bytes).is_ok(), inspection(&bytes).is_ok());
            let json = serde_json::json!([{ "Id": name, "Names": [format!("/{name}")], "Command": command,
                "Image": label, "Labels": { &label: &label } }]);
            for summary in list(json.to_string().as_bytes()).expect("valid") {
                let _ = (summary.id(), summary.image_is_digest());
                let subject = summary.subject(EngineKind::Podman);
                prop_assert!(subject.is_none_or(|it| it.executable.is_none_or(|path| path.is_absolute())));
            }
        }
    }
}
