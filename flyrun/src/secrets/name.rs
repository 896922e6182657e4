//! What secrets are called, what they may contain, and how `flyrun secrets import` is told of them.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// The longest name of a secret, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// The longest value: half of what the kernel takes as one variable (execve(2), MAX_ARG_STRLEN).
pub const MAX_VALUE_BYTES: usize = 64 << 10;
/// All values of an app together: a quarter of what the kernel takes as an environment and arguments.
pub const MAX_APP_BYTES: usize = 512 << 10;
/// How many secrets an app may have.
pub const MAX_SECRETS: usize = 1000;
/// Begins and ends a value of several lines.
const QUOTES: &str = "\"\"\"";

/// The name of a secret, which is that of a variable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Name(String);

/// What a secret contains. It is never shown, and wiped from memory.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Value(Zeroizing<String>);

impl Name {
    /// A name that a secret can have: letters, digits and underscores, no digit first.
    ///
    /// # Errors
    /// It is none, or one that machines are given by flyrun itself.
    pub fn new(text: &str) -> Result<Name> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let is_name = (1..=MAX_NAME_BYTES).contains(&text.len())
            && text.bytes().all(good)
            && !text.starts_with(|first: char| first.is_ascii_digit());
        if !is_name {
            return Err(Error::new(format!("{:?} cannot be a secret's name", shown(text)))
                .advice(format!("Use up to {MAX_NAME_BYTES} letters, digits and '_', no digit first.")));
        }
        if text.starts_with("FLY_") {
            return Err(Error::new(format!("{text} cannot be a secret: machines are told FLY_… themselves"))
                .advice("Choose a name that does not begin with FLY_."));
        }
        Ok(Name(text.to_string()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Value {
    /// What the secret of this name is to contain.
    ///
    /// # Errors
    /// No variable can contain it.
    pub fn new(name: &Name, text: Zeroizing<String>) -> Result<Value> {
        if text.len() > MAX_VALUE_BYTES {
            return Err(Error::new(format!("the value of {name} has {} bytes", text.len()))
                .advice(format!("A secret has {} KiB at most.", MAX_VALUE_BYTES >> 10)));
        }
        if text.contains('\0') {
            return Err(Error::new(format!(
                "the value of {name} has a NUL byte, which no variable can have"
            ))
            .advice("Encode it as base64."));
        }
        Ok(Value(text))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Value({} bytes)", self.0.len())
    }
}

/// The beginning of what was given as a name: behind it may be the value, which is not for messages.
fn shown(text: &str) -> String {
    text.chars().take(32).collect()
}

/// Reads lines of NAME=VALUE as flyctl does: comments and empty lines are passed over, quotes around a value are not part
/// of it, and one that begins with three quotes goes on to the line that ends with three. Nothing else has a meaning, a `#` behind a
/// value neither.
///
/// # Errors
/// A line is none of these; it is told by its number, never by what it says.
pub fn read_lines(text: &str) -> Result<Vec<(Name, Value)>> {
    let mut secrets = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let bad = |what: &str| {
            Error::new(format!("line {}: {what}", index + 1)).advice("Write NAME=VALUE on each line.")
        };
        let (name, rest) = line.split_once('=').ok_or_else(|| bad("there is no '='"))?;
        let name = Name::new(name.trim()).map_err(|error| bad(&error.to_string()))?;
        let value = match rest.strip_prefix(QUOTES) {
            Some(first) => several_lines(first, &mut lines)
                .ok_or_else(|| bad(&format!("the value of {name} does not end with {QUOTES}")))?,
            None => Zeroizing::new(unquoted(rest).to_string()),
        };
        secrets.push((name.clone(), Value::new(&name, value)?));
    }
    Ok(secrets)
}

fn several_lines<'a>(
    first: &str,
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
) -> Option<Zeroizing<String>> {
    if let Some(only) = first.strip_suffix(QUOTES) {
        return Some(Zeroizing::new(only.to_string()));
    }
    let mut value = Zeroizing::new(first.to_string());
    value.push('\n');
    for (_, line) in lines {
        if let Some(last) = line.strip_suffix(QUOTES) {
            value.push_str(last);
            return Some(value);
        }
        value.push_str(line);
        value.push('\n');
    }
    None
}

fn unquoted(text: &str) -> &str {
    let between = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    between('"').or_else(|| between('\'')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        let secrets = read_lines(text).unwrap();
        secrets.iter().map(|(name, value)| (name.to_string(), value.expose().to_string())).collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn names_are_those_of_variables() {
        for name in ["A", "_", "DATABASE_URL", "a1"] {
            assert!(Name::new(name).is_ok(), "{name}");
        }
        for name in ["", "1A", "A-B", "A B", "A=B", "ü", "A\n", "FLY_REGION", &"A".repeat(256)] {
            assert!(Name::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_value_is_what_a_variable_can_be_and_is_not_shown() {
        let name = Name::new("A").unwrap();
        let value = |text: &str| Value::new(&name, Zeroizing::new(text.into()));
        assert_eq!(format!("{:?}", value("geheim").unwrap()), "Value(6 bytes)");
        assert!(value("a\0b").unwrap_err().to_string().contains("NUL"));
        assert!(value(&"x".repeat(MAX_VALUE_BYTES)).is_ok());
        let told = value(&"x".repeat(MAX_VALUE_BYTES + 1)).unwrap_err().to_string();
        assert!(told.contains("65537 bytes") && !told.contains("xx"), "{told}");
    }

    #[test]
    fn lines_are_read_as_flyctl_does() {
        let text = "# comment\n\nA=1\nB=\"two words\"\nC='x'\nD=a=b#c\nE=\n F =\"\"\"one\n# two\n\nthree\"\"\"\nG=\"\"\"g\"\"\"\nH=\"\n";
        let expected = [
            ("A", "1"),
            ("B", "two words"),
            ("C", "x"),
            ("D", "a=b#c"),
            ("E", ""),
            ("F", "one\n# two\n\nthree"),
            ("G", "g"),
            ("H", "\""),
        ];
        assert_eq!(read(text), pairs(&expected));
    }

    #[test]
    fn a_line_that_is_none_is_told_by_its_number_alone() {
        for (text, wanted) in [
            ("A=1\nhunter2\n", "line 2: there is no '='"),
            ("A=\"\"\"hunter2\n", "line 1: the value of A"),
            ("1=hunter2\n", "line 1: \"1\" cannot be"),
        ] {
            let told = read_lines(text).unwrap_err().to_string();
            assert!(told.starts_with(wanted) && !told.contains("hunter2"), "{told}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[A-C=\"'#\\n ]{0,60}") {
            let _ = read_lines(&text);
        }
    }
}
