//! As a hook of an OCI runtime: the container's state is on standard input (OCI runtime specification 1.0.2, `runtime.md`).
//!
//! Only the hooks that run in the runtime's namespaces are taken: in `createContainer` and later ones the pid is as the container sees it,
//! and the socket may not be there.

use std::{collections::BTreeMap, io, time::Duration};

use pillion_common::hook::{Container, ContainerId, Point, Question, Spec, Stopped};
use serde::Deserialize;

use crate::{
    container::{FILE_LIMIT, bounded, read_spec},
    deadline::Deadline,
    decision::{Decision, decide, tell},
    places::Places,
    report::say,
};

/// The runtime has written the state before the hook reads it.
const STATE: Duration = Duration::from_secs(5);

/// A hook that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    CreateRuntime,
    Prestart,
    Poststop,
}

impl Hook {
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "createRuntime" => Some(Self::CreateRuntime),
            "prestart" => Some(Self::Prestart),
            "poststop" => Some(Self::Poststop),
            _ => None,
        }
    }
}

/// The state. After the container's end there is no pid.
#[derive(Debug, Deserialize)]
struct State {
    id: String,
    #[serde(default)]
    pid: i32,
    bundle: String,
    annotations: Option<BTreeMap<String, String>>,
}

pub(crate) fn run(hook: Hook, places: &Places) -> Decision {
    let text = Deadline::after(STATE).read_to_end(&io::stdin(), FILE_LIMIT);
    let state = text.and_then(|text| serde_json::from_slice::<State>(&text).map_err(io::Error::other));
    let state = match (state, hook) {
        (Ok(state), _) => state,
        // Nothing depends on it.
        (Err(error), Hook::Poststop) => {
            return Decision::Admit(Some(format!("pillion: cannot read the container's state: {error}")));
        }
        // A runtime that breaks the specification here cannot have its containers held.
        (Err(error), Hook::CreateRuntime | Hook::Prestart) => {
            return Decision::Refuse(format!(
                "pillion: cannot read the container's state on standard input: {error}; refused, because it cannot be told \
                 what is starting; take pillion-hook out of the runtime's hooks if this runtime cannot be mended"
            ));
        }
    };
    let spec = read_spec(&state.bundle).unwrap_or_else(|error| {
        say(&format!("pillion: {error}; going on with what the state says"));
        Spec { annotations: bounded(state.annotations.unwrap_or_default()), ..Spec::default() }
    });
    let id = ContainerId { id: state.id, bundle: state.bundle, root: None };
    let point = match hook {
        Hook::CreateRuntime => Point::CreateRuntime,
        Hook::Prestart => Point::Prestart,
        Hook::Poststop => {
            tell(places, Question::Stopped(Stopped { id, spec }));
            return Decision::Admit(None);
        }
    };
    // The runtime, which waits for this hook, is the process's parent: its pid stays its own.
    let started = None;
    decide(places, Question::Container(Container { point, id, pid: state.pid, started, spec }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As crun 1.8 writes it, and as it is after the end.
    #[test]
    fn states() {
        let state: State = serde_json::from_str(
            "{\n  \"ociVersion\": \"1.0\",\n  \"id\": \"x\",\n  \"pid\": 4711,\n  \"root\": \"\\/r\",\n  \
             \"bundle\": \"\\/var\\/b\",\n  \"status\": \"creating\",\n  \"annotations\": {\"a\": \"b\"}\n}",
        )
        .unwrap();
        assert_eq!((state.id.as_str(), state.pid, state.bundle.as_str()), ("x", 4711, "/var/b"));
        let state: State = serde_json::from_str(r#"{"id":"x","status":"stopped","bundle":"/b"}"#).unwrap();
        assert_eq!((state.pid, state.annotations), (0, None));
    }

    #[test]
    fn only_hooks_of_the_runtime_namespace() {
        assert_eq!(Hook::named("createRuntime"), Some(Hook::CreateRuntime));
        for other in ["createContainer", "startContainer", "poststart", "createruntime", ""] {
            assert_eq!(Hook::named(other), None, "{other}");
        }
    }
}
