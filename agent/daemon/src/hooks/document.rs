//! A configuration file as a tree of named values that keeps its comments, its order and its blanks.
//!
//! Owns reading and writing one value by its path, in JSON (strict, as Docker reads it) and in TOML. Never knows what a value means.

use jsonc_parser::{
    ParseOptions,
    cst::{CstInputValue, CstObject, CstRootNode},
};
use serde_json::Value;
use toml_edit::{DocumentMut, Item, Table};

/// Names from the root to a value.
pub(crate) type Path = Vec<String>;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DocumentError {
    /// It is not JSON.
    #[error("it is not valid JSON: {0}")]
    Json(String),
    /// It is not TOML.
    #[error("it is not valid TOML: {0}")]
    Toml(String),
    /// A part of it is of another kind than the runtime would accept.
    #[error("{0} is not a table of settings there")]
    NotATable(String),
    /// A value of a kind that is never set.
    #[error("a value of this kind cannot be written: {0}")]
    Kind(String),
}

/// The languages of configuration files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Language {
    /// `daemon.json`.
    Json,
    /// `config.toml`.
    Toml,
}

/// A parsed file.
pub(crate) enum Document {
    /// JSON.
    Json(CstRootNode),
    /// TOML.
    Toml(Box<DocumentMut>),
}

/// As Go's encoding/json reads it.
const STRICT: ParseOptions = ParseOptions {
    allow_comments: false,
    allow_loose_object_property_names: false,
    allow_trailing_commas: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

impl Document {
    /// Reads a file. An empty one has no settings.
    pub(crate) fn parse(language: Language, text: &str) -> Result<Self, DocumentError> {
        match language {
            Language::Json => {
                let text = if text.trim().is_empty() { "{\n}\n" } else { text };
                let root = CstRootNode::parse(text, &STRICT);
                let root = root.map_err(|error| DocumentError::Json(error.to_string()))?;
                if root.object_value().is_none() {
                    return Err(DocumentError::NotATable("the file".to_owned()));
                }
                // The tree takes some forms that Go does not.
                serde_json::from_str::<Value>(text)
                    .map_err(|error| DocumentError::Json(error.to_string()))?;
                Ok(Self::Json(root))
            }
            Language::Toml => {
                let document = text.parse::<DocumentMut>();
                let document = document.map_err(|error| DocumentError::Toml(error.to_string()))?;
                Ok(Self::Toml(Box::new(document)))
            }
        }
    }

    /// The file's text.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Json(root) => root.to_string(),
            Self::Toml(document) => document.to_string(),
        }
    }

    /// The value at a path, with all that is below it.
    pub(crate) fn get(&self, path: &[String]) -> Option<Value> {
        match self {
            Self::Json(root) => {
                let whole: Value = serde_json::from_str(&root.to_string()).ok()?;
                path.iter().try_fold(whole, |value, name| value.get(name).cloned())
            }
            Self::Toml(document) => {
                let item = path.iter().try_fold(document.as_item(), |item, name| item.get(name))?;
                to_json(item)
            }
        }
    }

    /// Whether something is at a path, of whatever kind.
    fn exists(&self, path: &[String]) -> bool {
        match self {
            Self::Json(_) => self.get(path).is_some(),
            Self::Toml(document) => {
                path.iter().try_fold(document.as_item(), |item, name| item.get(name)).is_some()
            }
        }
    }

    /// Sets a value, and makes the tables above it. Returns the paths of what had to be made, outermost first.
    pub(crate) fn set(&mut self, path: &[String], value: &Value) -> Result<Vec<Path>, DocumentError> {
        let Some((name, tables)) = path.split_last() else { return Ok(Vec::new()) };
        let made: Vec<Path> = (1..path.len())
            .map(|length| path.get(..length).unwrap_or_default().to_vec())
            .filter(|table| !self.exists(table))
            .collect();
        match self {
            Self::Json(root) => {
                let mut object = root.object_value_or_set();
                for table in tables {
                    object = enter(&object, table)?;
                }
                match object.get(name) {
                    Some(property) => property.set_value(input(value)?),
                    None => _ = object.append(name, input(value)?),
                }
            }
            Self::Toml(document) => {
                let mut table = document.as_table_mut() as &mut dyn toml_edit::TableLike;
                for name in tables {
                    let item = table.entry(name).or_insert_with(|| {
                        let mut table = Table::new();
                        // Only the innermost needs a head line.
                        table.set_implicit(true);
                        Item::Table(table)
                    });
                    let not_a_table = || DocumentError::NotATable(name.clone());
                    table = item.as_table_like_mut().ok_or_else(not_a_table)?;
                }
                let mut value = toml_value(value)?;
                if let Some(old) = table.get_mut(name).and_then(Item::as_value_mut) {
                    // A comment behind it stays.
                    *value.decor_mut() = old.decor().clone();
                    *old = value;
                } else {
                    table.insert(name, Item::Value(value));
                }
            }
        }
        Ok(made)
    }

    /// Takes a value away, if it is there.
    pub(crate) fn remove(&mut self, path: &[String]) {
        let Some((name, tables)) = path.split_last() else { return };
        match self {
            Self::Json(root) => {
                let Some(object) = root.object_value() else { return };
                let object = tables.iter().try_fold(object, |object, table| object.object_value(table));
                if let Some(property) = object.and_then(|object| object.get(name)) {
                    property.remove();
                }
            }
            Self::Toml(document) => {
                let mut table = document.as_table_mut() as &mut dyn toml_edit::TableLike;
                for name in tables {
                    match table.get_mut(name).and_then(Item::as_table_like_mut) {
                        Some(inner) => table = inner,
                        None => return,
                    }
                }
                table.remove(name);
            }
        }
    }

    /// Takes a table away when nothing is in it.
    pub(crate) fn remove_empty(&mut self, path: &[String]) {
        if self.get(path).is_some_and(|value| value.as_object().is_some_and(serde_json::Map::is_empty)) {
            self.remove(path);
        }
    }
}

fn enter(object: &CstObject, name: &str) -> Result<CstObject, DocumentError> {
    match object.get(name) {
        Some(property) => property.object_value().ok_or_else(|| DocumentError::NotATable(name.to_owned())),
        None => Ok(object.object_value_or_set(name)),
    }
}

fn input(value: &Value) -> Result<CstInputValue, DocumentError> {
    Ok(match value {
        Value::String(text) => CstInputValue::String(text.clone()),
        Value::Bool(value) => CstInputValue::Bool(*value),
        Value::Null | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            return Err(DocumentError::Kind(value.to_string()));
        }
    })
}

fn toml_value(value: &Value) -> Result<toml_edit::Value, DocumentError> {
    match value {
        Value::String(text) => Ok(text.into()),
        Value::Bool(value) => Ok((*value).into()),
        Value::Null | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            Err(DocumentError::Kind(value.to_string()))
        }
    }
}

/// Tables, texts and truth values as JSON; other values as their text, which nobody here looks into.
fn to_json(item: &Item) -> Option<Value> {
    if let Some(table) = item.as_table_like() {
        let values = table.iter().filter_map(|(key, item)| Some((key.to_owned(), to_json(item)?)));
        return Some(Value::Object(values.collect()));
    }
    if item.is_none() {
        return None;
    }
    let text = item.as_str().map(Value::from);
    let other = || item.as_bool().map_or_else(|| Value::from(item.to_string().trim()), Value::from);
    Some(text.unwrap_or_else(other))
}
