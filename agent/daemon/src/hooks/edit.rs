//! Settings put into a configuration, and taken out again.
//!
//! Owns the reversal: what was there before comes back, what its owner has changed since stays. Pure; never touches a file.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::document::{Document, DocumentError, Language, Path};

/// One value that is to be in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Setting {
    /// Where.
    pub(crate) path: Path,
    /// What: a text or a truth value.
    pub(crate) value: Value,
}

impl Setting {
    pub(crate) fn new<T: Into<String>>(path: impl IntoIterator<Item = T>, value: impl Into<Value>) -> Self {
        Self { path: path.into_iter().map(Into::into).collect(), value: value.into() }
    }
}

/// How to take settings out again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Undo {
    /// What was set, and what was there before.
    pub(crate) set: Vec<(Setting, Option<Value>)>,
    /// Tables that were made for it, outermost first.
    pub(crate) made: Vec<Path>,
}

/// Puts settings into a text. The text comes back unchanged when all are there already.
pub(crate) fn apply(
    language: Language,
    text: &str,
    settings: &[Setting],
) -> Result<(String, Undo), DocumentError> {
    let mut document = Document::parse(language, text)?;
    let mut undo = Undo::default();
    for setting in settings {
        let before = document.get(&setting.path);
        if before.as_ref() == Some(&setting.value) {
            continue;
        }
        undo.made.extend(document.set(&setting.path, &setting.value)?);
        undo.set.push((setting.clone(), before));
    }
    if undo.set.is_empty() {
        return Ok((text.to_owned(), undo));
    }
    let text = document.text();
    // What comes out must be what went in.
    let again = Document::parse(language, &text)?;
    for setting in settings {
        if again.get(&setting.path).as_ref() != Some(&setting.value) {
            return Err(DocumentError::NotATable(setting.path.join(".")));
        }
    }
    Ok((text, undo))
}

/// Takes settings out of a text that may have been edited since. Returns it with the paths of what somebody else has set since, which
/// stays.
pub(crate) fn revert(
    language: Language,
    text: &str,
    undo: &Undo,
) -> Result<(String, Vec<Path>), DocumentError> {
    let mut document = Document::parse(language, text)?;
    let mut others = Vec::new();
    for (setting, before) in undo.set.iter().rev() {
        match document.get(&setting.path) {
            Some(now) if now == setting.value => match before {
                Some(before) => _ = document.set(&setting.path, before)?,
                None => document.remove(&setting.path),
            },
            Some(_) => others.push(setting.path.clone()),
            None => {}
        }
    }
    for table in undo.made.iter().rev() {
        document.remove_empty(table);
    }
    let text = document.text();
    Document::parse(language, &text)?;
    Ok((text, others))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn docker() -> Vec<Setting> {
        vec![
            Setting::new(["runtimes", "pillion", "path"], "/usr/bin/pillion-runc"),
            Setting::new(["default-runtime"], "pillion"),
        ]
    }

    fn containerd() -> Vec<Setting> {
        let runc = ["plugins", "io.containerd.grpc.v1.cri", "containerd", "runtimes", "runc"];
        vec![
            Setting::new([&runc[..], &["runtime_type"]].concat(), "io.containerd.runc.v2"),
            Setting::new([&runc[..], &["options", "BinaryName"]].concat(), "/usr/bin/pillion-runc"),
        ]
    }

    #[test]
    fn what_is_put_in_can_be_taken_out() {
        let json = [
            "{}",
            "{\n}\n",
            "{\n    \"debug\": true\n}\n",
            "{\"runtimes\": {\"kata\": {\"path\": \"/k\", \"runtimeArgs\": [\"x\"]}}, \"bip\": \"10.0.0.1/24\"}",
            "{\n\t\"default-runtime\": \"nvidia\",\n\t\"runtimes\": {\n\t\t\"nvidia\": {\"path\": \"/n\"}\n\t}\n}",
        ];
        let toml = [
            "",
            "version = 2\n",
            "# mine\nversion = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    sandbox_image = \"p\" # why\n",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\nSystemdCgroup = true\nBinaryName = '/n' # mine\n",
            "version = 2\nplugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options.BinaryName = \"\"\n",
            "version = 2\nplugins = { 'io.containerd.grpc.v1.cri' = { containerd = { snapshotter = 'native' } } }\n",
        ];
        let json = json.iter().map(|text| (Language::Json, *text, docker()));
        let toml = toml.iter().map(|text| (Language::Toml, *text, containerd()));
        for (language, before, settings) in json.chain(toml) {
            let (after, undo) = apply(language, before, &settings).expect(before);
            let document = Document::parse(language, &after).expect("valid");
            for setting in &settings {
                assert_eq!(document.get(&setting.path).as_ref(), Some(&setting.value), "{after}");
            }
            // Again: nothing more.
            let (again, nothing) = apply(language, &after, &settings).expect("valid");
            assert_eq!((again.as_str(), nothing), (after.as_str(), Undo::default()));
            let (out, others) = revert(language, &after, &undo).expect("valid");
            assert!(others.is_empty());
            let everything = |text: &str| Document::parse(language, text).expect("valid").get(&[]);
            assert_eq!(everything(&out), everything(before), "{before}\nbecame\n{after}\nand then\n{out}");
            // But for the quotes of a value that was replaced, which the record of an installation brings back.
            if language == Language::Toml && !before.contains("'/n'") {
                assert_eq!(out, before);
            }
        }
    }

    #[test]
    fn what_others_have_changed_since_stays() {
        let before = "{\n  \"default-runtime\": \"kata\",\n  \"debug\": true\n}\n";
        let (after, undo) = apply(Language::Json, before, &docker()).expect("valid");
        let edited = after.replace("\"default-runtime\": \"pillion\"", "\"default-runtime\": \"crun\"");
        let edited = edited.replace("\"debug\": true", "\"debug\": false");
        assert_ne!(edited, after);
        let (out, others) = revert(Language::Json, &edited, &undo).expect("valid");
        let value: Value = serde_json::from_str(&out).expect("valid");
        assert_eq!(value, serde_json::json!({ "default-runtime": "crun", "debug": false }));
        assert_eq!(others, [vec!["default-runtime".to_owned()]]);
    }

    #[test]
    fn nothing_is_written_into_what_is_not_understood() {
        for (language, text, settings) in [
            (Language::Json, "[]", docker()),
            (Language::Json, "{", docker()),
            (Language::Json, "{\"a\": 1,}", docker()),
            (Language::Json, "{\"a\": 1 /* why */}", docker()),
            (Language::Json, "{\"runtimes\": []}", docker()),
            (Language::Toml, "version = ", containerd()),
            (Language::Toml, "plugins = 1", containerd()),
        ] {
            assert!(apply(language, text, &settings).is_err(), "{text}");
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf =
            prop_oneof![any::<bool>().prop_map(Value::from), "[a-z\"\\\\é]{0,6}".prop_map(Value::from)];
        leaf.prop_recursive(3, 12, 4, |inner| {
            let key = prop_oneof![Just("runtimes".to_owned()), Just("pillion".to_owned()), "[a-z]{1,4}"];
            proptest::collection::btree_map(key, inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect()))
        })
    }

    proptest! {
        #[test]
        fn any_configuration_comes_back(value in json(), pretty: bool) {
            prop_assume!(value.is_object());
            let text = if pretty { format!("{value:#}\n") } else { value.to_string() };
            // Where there is another kind of thing in the way, nothing is done.
            let Ok((after, undo)) = apply(Language::Json, &text, &docker()) else { return Ok(()) };
            let (out, _) = revert(Language::Json, &after, &undo).expect("valid");
            prop_assert_eq!(serde_json::from_str::<Value>(&out).expect("valid"), value);
        }

        #[test]
        fn arbitrary_texts_never_panic(text in ".*") {
            let _ = apply(Language::Json, &text, &docker()).is_ok();
            let _ = apply(Language::Toml, &text, &containerd()).is_ok();
        }
    }
}
