//! Bytes to a TOML tree in which each key and value knows where it stands.

use toml::Spanned;
use toml::de::DeTable;

use super::MAX_FILE_BYTES;
use super::problem::{Log, Problem, Refused};

/// The text of a file.
///
/// # Errors
/// It is too long, or not UTF-8.
pub(crate) fn text<'t>(name: &str, bytes: &'t [u8]) -> Result<&'t str, Refused> {
    let refuse = |message: String, advice: &str| {
        Refused::from(Problem {
            file: name.to_string(),
            position: None,
            message,
            advice: Some(advice.into()),
        })
    };
    if bytes.len() > MAX_FILE_BYTES {
        return Err(refuse(
            format!("the file has more than {} KiB", MAX_FILE_BYTES >> 10),
            "Is it a fly.toml? Name large [[files]] by local_path.",
        ));
    }
    std::str::from_utf8(bytes).map_err(|error| {
        refuse(
            format!("the byte at offset {} is not UTF-8", error.valid_up_to()),
            "TOML is UTF-8: save the file so.",
        )
    })
}

/// The tree, and everything that is not TOML as problems.
pub(crate) fn tree<'t>(text: &'t str, log: &Log<'_>) -> Spanned<DeTable<'t>> {
    let (tree, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let at = error.span().map_or(0, |span| span.start);
        log.add(at, format!("this is not TOML: {}", error.message().escape_debug()));
    }
    tree
}
