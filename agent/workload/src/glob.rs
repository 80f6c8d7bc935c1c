//! Patterns with `*` and `?`, whether one matches a text, and whether two can match the same text.
//!
//! Owns the pattern language, which is kept this small so that the second question has an exact answer: it decides
//! whether two policies may claim the same workload. Alternatives are items of the list that the pattern is in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a pattern.
const MAX_LENGTH: usize = 256;

/// A pattern: `*` stands for any text, also an empty one and one with `/`; `?` for any one character.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Glob(String);

/// Why a text is no pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGlob {
    /// Too long.
    #[error("is longer than 256 bytes")]
    Long,
    /// Holds a character that other glob languages give a meaning.
    #[error("holds {0:?}, which has no meaning in this pattern language")]
    Reserved(char),
}

impl Glob {
    /// Checks a pattern.
    pub fn new(pattern: &str) -> Result<Self, InvalidGlob> {
        if pattern.len() > MAX_LENGTH {
            return Err(InvalidGlob::Long);
        }
        if let Some(reserved) = pattern.chars().find(|c| matches!(c, '[' | ']' | '{' | '}')) {
            return Err(InvalidGlob::Reserved(reserved));
        }
        // `**` says no more than `*`, and costs the matcher.
        let mut kept = String::with_capacity(pattern.len());
        for c in pattern.chars() {
            if !(c == '*' && kept.ends_with('*')) {
                kept.push(c);
            }
        }
        Ok(Self(kept))
    }

    /// The pattern as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it matches the whole of `text`.
    pub fn matches(&self, text: &str) -> bool {
        let (mut pattern, mut rest) = (self.0.as_str(), text);
        // Where to go on when what follows the last `*` does not fit: the `*` takes one character more.
        let mut retry: Option<(&str, &str)> = None;
        loop {
            let mut after = pattern.chars();
            match after.next() {
                Some('*') => {
                    pattern = after.as_str();
                    if pattern.is_empty() {
                        return true;
                    }
                    retry = Some((pattern, rest));
                    continue;
                }
                None if rest.is_empty() => return true,
                Some(wanted) => {
                    let mut left = rest.chars();
                    if left.next().is_some_and(|c| wanted == '?' || c == wanted) {
                        (pattern, rest) = (after.as_str(), left.as_str());
                        continue;
                    }
                }
                None => {}
            }
            let Some((star, at)) = retry else { return false };
            let mut left = at.chars();
            if left.next().is_none() {
                return false;
            }
            (pattern, rest) = (star, left.as_str());
            retry = Some((star, rest));
        }
    }

    /// Whether the literal text at their beginnings or ends already keeps them apart: cheap, and tells most pairs.
    pub fn is_plainly_apart(&self, other: &Self) -> bool {
        apart(self.0.bytes(), other.0.bytes()) || apart(self.0.bytes().rev(), other.0.bytes().rev())
    }

    /// Whether some text is matched by both; exact. `steps` grows by what it cost.
    pub fn meets(&self, other: &Self, steps: &mut u64) -> bool {
        *steps += 1;
        if self.is_plainly_apart(other) {
            return false;
        }
        let (a, b): (Vec<char>, Vec<char>) = (self.0.chars().collect(), other.0.chars().collect());
        *steps += ((a.len() + 1) * (b.len() + 1)) as u64;
        // `row[j]`: what is left of `a` from `i` on and of `b` from `j` on have a text in common.
        let mut below: Vec<bool> = Vec::new();
        for i in (0..=a.len()).rev() {
            let mut row = vec![false; b.len() + 1];
            for j in (0..=b.len()).rev() {
                let (left, right) = (a.get(i), b.get(j));
                row[j] = match (left, right) {
                    (None, None) => true,
                    (Some('*'), _) if below[j] => true,
                    (_, Some('*')) if row[j + 1] => true,
                    // A `*` takes what the other side wants.
                    (Some('*'), Some(_)) => row[j + 1],
                    (Some(_), Some('*')) => below[j],
                    (Some(left), Some(right)) => {
                        (left == right || *left == '?' || *right == '?') && below[j + 1]
                    }
                    (None, Some(_)) | (Some(_), None) => false,
                };
            }
            below = row;
        }
        below[0]
    }
}

/// Whether two patterns differ already in the literal text before their first wildcards.
fn apart(a: impl Iterator<Item = u8>, b: impl Iterator<Item = u8>) -> bool {
    for (left, right) in a.zip(b) {
        if matches!(left, b'*' | b'?') || matches!(right, b'*' | b'?') {
            return false;
        }
        if left != right {
            return true;
        }
    }
    false
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn glob(pattern: &str) -> Glob {
        Glob::new(pattern).expect("a pattern")
    }

    #[test]
    fn patterns_match_whole_texts() {
        for (pattern, text, wanted) in [
            ("", "", true),
            ("*", "", true),
            ("*", "a/b", true),
            ("web", "web", true),
            ("web", "web2", false),
            ("*/payments-api:*", "docker.io/library/payments-api:1.0", true),
            ("*/payments-api:*", "docker.io/library/payments-apis:1.0", false),
            ("payments-*.service", "payments-a.service.service", true),
            ("/usr/bin/payments*", "/usr/bin/payments", true),
            ("???", "a√c", true),
            ("???", "ab", false),
            ("*a*b?", "xxaxxbxb√", true),
            ("*a*b?", "xxaxxb", false),
            ("a\\x2d*", "a\\x2db", true),
        ] {
            assert_eq!(glob(pattern).matches(text), wanted, "{pattern} {text}");
        }
        // The classic that takes for ever with naive backtracking.
        let text = "a".repeat(4_000) + "c";
        assert!(!glob(&("a*".repeat(100) + "b")).matches(&text));
    }

    #[test]
    fn other_glob_languages_are_refused() {
        assert_eq!(Glob::new("a[bc]"), Err(InvalidGlob::Reserved('[')));
        assert_eq!(Glob::new("{a,b}"), Err(InvalidGlob::Reserved('{')));
        assert_eq!(Glob::new(&"a".repeat(257)), Err(InvalidGlob::Long));
        assert_eq!(glob("a***b").as_str(), "a*b");
    }

    #[test]
    fn two_patterns_meet_exactly_when_a_text_fits_both() {
        for (a, b, wanted) in [
            ("a*", "*b", true),
            ("a*", "b*", false),
            ("*a", "*b", false),
            ("a?c", "ab*", true),
            ("a?", "a", false),
            ("*x*", "*y*", true),
            ("a*b", "ab", true),
            ("a*b", "a", false),
            ("*", "", true),
            ("?*", "", false),
            ("*ab", "abc*", true),
            ("payments-?", "payments-10", false),
        ] {
            assert_eq!(glob(a).meets(&glob(b), &mut 0), wanted, "{a} {b}");
            assert_eq!(glob(b).meets(&glob(a), &mut 0), wanted, "{b} {a}");
        }
    }

    proptest! {
        #[test]
        fn meeting_agrees_with_trying_all_short_texts(a in "[ab*?]{0,5}", b in "[ab*?]{0,5}") {
            let (a, b) = (glob(&a), glob(&b));
            // A shortest common text needs no more characters than both patterns have.
            let mut texts = vec![String::new()];
            let mut from = 0;
            for _ in 0..10 {
                let to = texts.len();
                for at in from..to {
                    for c in ['a', 'b'] {
                        let text = format!("{}{c}", texts[at]);
                        texts.push(text);
                    }
                }
                from = to;
            }
            let wanted = texts.iter().any(|text| a.matches(text) && b.matches(text));
            prop_assert_eq!(a.meets(&b, &mut 0), wanted, "{} {}", a, b);
        }

        #[test]
        fn a_text_without_wildcards_matches_itself_alone(a in "[a-c/]{0,6}", b in "[a-c/]{0,6}") {
            prop_assert_eq!(glob(&a).matches(&b), a == b);
        }
    }
}
