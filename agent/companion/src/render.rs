//! `{{ variable }}` in arguments and template files. Pure.

use std::collections::BTreeMap;

/// Rendered text is at most this long, in bytes.
pub const LONGEST: usize = 4 << 20;

/// Why a text cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// No such variable.
    #[error("line {line}: there is no variable {name:?}; there are: {known}")]
    Unknown {
        /// Line, from 1.
        line: usize,
        /// What stands between the braces, shortened.
        name: String,
        /// All variables.
        known: String,
    },
    /// A variable without a value here.
    #[error("line {line}: {name} has no value here: {reason}")]
    Absent {
        /// Line, from 1.
        line: usize,
        /// The variable.
        name: &'static str,
        /// Why it has none.
        reason: &'static str,
    },
    /// A value that might be read as something else than a value.
    #[error(
        "line {line}: the value {value:?} of {name} holds characters other than letters, digits and -_./:@+=~"
    )]
    Unsafe {
        /// Line, from 1.
        line: usize,
        /// The variable.
        name: &'static str,
        /// Its value, shortened.
        value: String,
    },
    /// Braces without an end.
    #[error("line {line}: {{{{ without }}}}; for two literal braces write {{{{ \"{{{{\" }}}}")]
    Unclosed {
        /// Line, from 1.
        line: usize,
    },
    /// Too long.
    #[error("the result is longer than {LONGEST} bytes")]
    TooLong,
}

/// Values for one companion.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Variables {
    values: BTreeMap<&'static str, Result<String, &'static str>>,
}

impl Variables {
    /// Sets a variable.
    pub fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.values.insert(name, Ok(value.into()));
    }

    /// Says that a variable exists but has no value here, and why.
    pub fn absent(&mut self, name: &'static str, reason: &'static str) {
        self.values.insert(name, Err(reason));
    }

    /// Replaces every variable in `text`. Two literal braces are written `{{ "{{" }}`.
    ///
    /// Values come from whoever starts workloads, templates from whoever writes policies: a value that could end a
    /// string or a line of a configuration file is refused rather than quoted, as nobody knows the file's syntax.
    pub fn render(&self, text: &str) -> Result<String, RenderError> {
        let mut result = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(begin) = rest.find("{{") {
            let line = 1 + text[..text.len() - rest.len() + begin].matches('\n').count();
            result.push_str(&rest[..begin]);
            let inner = &rest[begin + 2..];
            if let Some(after) = inner.trim_start_matches(' ').strip_prefix("\"{{\"") {
                let after = after.trim_start_matches(' ').strip_prefix("}}");
                rest = after.ok_or(RenderError::Unclosed { line })?;
                result.push_str("{{");
                continue;
            }
            let end = inner.find("}}").ok_or(RenderError::Unclosed { line })?;
            result.push_str(self.value(inner[..end].trim(), line)?);
            rest = &inner[end + 2..];
            if result.len() > LONGEST {
                return Err(RenderError::TooLong);
            }
        }
        result.push_str(rest);
        if result.len() > LONGEST { Err(RenderError::TooLong) } else { Ok(result) }
    }

    fn value(&self, name: &str, line: usize) -> Result<&str, RenderError> {
        let Some((name, value)) = self.values.get_key_value(name) else {
            let known = self.values.keys().copied().collect::<Vec<_>>().join(", ");
            return Err(RenderError::Unknown { line, name: name.chars().take(40).collect(), known });
        };
        let value = value.as_ref().map_err(|reason| RenderError::Absent { line, name, reason })?;
        if value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:@+=~".contains(&b)) {
            Ok(value)
        } else {
            Err(RenderError::Unsafe { line, name, value: value.chars().take(80).collect() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_or_refused() {
        let mut variables = Variables::default();
        variables.set("port", "15001");
        variables.set("evil", "a\"\nb: c");
        variables.set("long", "x".repeat(LONGEST / 2 + 1));
        variables.absent("inbound", "no redirection");
        let unclosed = |line| Err(RenderError::Unclosed { line });
        let cases = [
            ("", Ok("")),
            ("plain } { }} text", Ok("plain } { }} text")),
            ("a{{port}}b{{ port }}c", Ok("a15001b15001c")),
            ("{{\tport }}", Ok("15001")),
            (r#"{{ "{{" }} port }}"#, Ok("{{ port }}")),
            (r#"{{"{{"}}"#, Ok("{{")),
            ("ü{{port}}ü", Ok("ü15001ü")),
            ("a\n{{ port", unclosed(2)),
            ("{{", unclosed(1)),
            (r#"{{ "{{" "#, unclosed(1)),
            (
                "\n\n{{ nosuch }}",
                Err(RenderError::Unknown {
                    line: 3,
                    name: "nosuch".into(),
                    known: "evil, inbound, long, port".into(),
                }),
            ),
            (
                "{{ inbound }}",
                Err(RenderError::Absent { line: 1, name: "inbound", reason: "no redirection" }),
            ),
            ("{{ evil }}", Err(RenderError::Unsafe { line: 1, name: "evil", value: "a\"\nb: c".into() })),
            ("{{ long }}{{ long }}", Err(RenderError::TooLong)),
        ];
        for (text, want) in cases {
            assert_eq!(variables.render(text), want.map(str::to_owned), "{text:?}");
        }
        let text = RenderError::Unclosed { line: 1 }.to_string();
        assert_eq!(text, r#"line 1: {{ without }}; for two literal braces write {{ "{{" }}"#);
    }

    #[test]
    fn a_value_is_not_rendered_again() {
        let mut variables = Variables::default();
        variables.set("a", "{{b}}");
        assert!(matches!(variables.render("{{a}}"), Err(RenderError::Unsafe { .. })));
    }
}
