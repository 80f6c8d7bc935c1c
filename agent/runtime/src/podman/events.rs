//! Labels, from the events that Podman has logged.
//!
//! Owns the parsing of one event a line, and the choice between Podman's file and its journal. Every event of a container bears
//! the container's labels, and the first is logged when it is created.

use std::{collections::BTreeMap, io, path::Path, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
    process::Command,
    time::timeout,
};

use crate::docker::ContainerId;

/// Podman lets its file grow to 1 MB (`events_logfile_max_size`).
const FILE_LIMIT: u64 = 8 << 20;
/// What `podman events` may print about one container.
const OUTPUT_LIMIT: u64 = 4 << 20;
/// What it may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// One event, of Podman 4 and 5.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    #[serde(rename = "ID")]
    id: Option<String>,
    #[serde(rename = "Type")]
    kind: Option<String>,
    attributes: Option<BTreeMap<String, String>>,
}

/// The labels of a container by its latest event that is kept; `None` when there is none.
pub(super) async fn labels(file: &Path, id: &ContainerId) -> io::Result<Option<BTreeMap<String, String>>> {
    match read_end(file).await {
        Ok(text) => Ok(latest(&text, id)),
        // Podman logs to the journal then, which it alone can read.
        Err(error) if error.kind() == io::ErrorKind::NotFound => asked(id).await,
        Err(error) => Err(error),
    }
}

async fn read_end(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path).await?;
    let length = file.metadata().await?.len();
    file.seek(io::SeekFrom::Start(length.saturating_sub(FILE_LIMIT))).await?;
    let mut text = Vec::new();
    file.take(FILE_LIMIT).read_to_end(&mut text).await?;
    Ok(text)
}

/// `podman events` reads the journal without waiting for any container.
async fn asked(id: &ContainerId) -> io::Result<Option<BTreeMap<String, String>>> {
    let mut command = Command::new("podman");
    command.args(["events", "--stream=false", "--format=json", "--filter=type=container", "--filter"]);
    command.arg(format!("container={id}")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.kill_on_drop(true).spawn()?;
    let Some(output) = child.stdout.take() else { return Ok(None) };
    let mut text = Vec::new();
    timeout(PATIENCE, output.take(OUTPUT_LIMIT).read_to_end(&mut text)).await??;
    Ok(latest(&text, id))
}

fn latest(text: &[u8], id: &ContainerId) -> Option<BTreeMap<String, String>> {
    let mentions = |line: &&[u8]| line.windows(id.as_str().len()).any(|part| part == id.as_str().as_bytes());
    text.rsplit(|byte| *byte == b'\n').filter(mentions).find_map(|line| {
        let event: Event = serde_json::from_slice(line).ok()?;
        let is_its = event.id.as_deref() == Some(id.as_str()) && event.kind.as_deref() == Some("container");
        is_its.then(|| event.attributes.unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "c9d9565d2d8e5ad03c0be0247e750e5b858e7267ded86970ee287205c697e6a5";

    #[test]
    fn the_latest_event_of_the_container_counts() {
        let id: ContainerId = ID.parse().expect("valid");
        let event = |id: &str, kind: &str, attributes: &str| {
            format!(
                r#"{{"ID":"{id}","Image":"localhost/busybox:1","Name":"web","Status":"create","Type":"{kind}","Attributes":{attributes}}}"#
            )
        };
        let other = ID.replace('c', "d");
        for (lines, labels) in [
            (vec![event(ID, "container", r#"{"app":"web","x":"y z"}"#)], Some(2)),
            (vec![event(ID, "container", "null")], Some(0)),
            (vec![event(ID, "container", r#"{"a":"b"}"#), event(&other, "container", "{}")], Some(1)),
            (vec![event(ID, "container", r#"{"a":"b"}"#), format!(r#"{{"ID":"{ID}","Type"#)], Some(1)),
            // A container whose label is another's id.
            (vec![event(&other, "container", &format!(r#"{{"a":"{ID}"}}"#))], None),
            (vec![event(ID, "image", r#"{"a":"b"}"#)], None),
            (vec![], None),
        ] {
            let found = latest(lines.join("\n").as_bytes(), &id);
            assert_eq!(found.map(|labels| labels.len()), labels, "{lines:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let id: ContainerId = ID.parse().expect("valid");
            prop_assert_eq!(latest(&bytes, &id), None);
        }
    }
}
