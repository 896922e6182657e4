//! The names of machines.

use crate::error::Result;
use crate::random;

/// A new machine's id: 14 hexadecimal digits, as Fly's are.
pub fn new_id() -> Result<String> {
    let mut bytes = [0; 7];
    random::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether a user may call a machine this: docker's rule.
pub fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    name.len() <= 63 && chars.next().is_some_and(|c| c.is_ascii_alphanumeric()) && chars.all(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_and_differ() {
        let (one, two) = (new_id().unwrap(), new_id().unwrap());
        assert!(is_name(&one) && one.len() == 14 && one != two);
    }

    #[test]
    fn a_name_cannot_lead_out_of_its_directory() {
        for bad in ["", ".", "..", "a/b", "-x", "a b", "ü", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
