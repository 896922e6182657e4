//! What a registry, and whoever it names, can answer: header fields, tokens and errors.

use reqwest::{Url, header::HeaderValue};

use super::{blob::range_start, challenge::Challenge, session};

/// # Panics
/// Something of an answer is taken for what it is not.
pub(crate) fn answer(bytes: &[u8]) {
    if let Some(message) = session::registry_message(bytes) {
        assert!(message.chars().count() <= 120 && !message.contains(char::is_control), "{message:?}");
    }
    if let Ok(Some(token)) = session::token_of(bytes) {
        assert!(!token.is_empty());
        if let Ok(value) = HeaderValue::try_from(format!("Bearer {token}")) {
            assert!(!value.as_bytes().contains(&b'\n'));
        }
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(start) = range_start(text) {
        assert!(text.starts_with("bytes ") && text.contains(&start.to_string()), "{text}");
    }
    if let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(text) {
        // Nothing comes of it that was not there, but for what was behind a backslash.
        for word in [Some(realm.clone()), service, scope].into_iter().flatten() {
            assert!(word.len() <= text.len() && word.chars().all(|character| text.contains(character)));
        }
        shown(&realm);
    }
    shown(text);
}

/// An address is shown without what may be secret in it.
fn shown(address: &str) {
    let Ok(base) = Url::parse("https://registry.example/v2/") else { return };
    if let Ok(url) = base.join(address) {
        let shown = session::show(&url);
        assert!(!shown.contains(char::is_control) && shown.chars().count() <= 120, "{shown:?}");
        if url.has_authority() {
            let rest = shown.split_once("://").map_or("", |(_, rest)| rest);
            assert!(!rest.split('/').next().unwrap_or_default().contains('@'), "{shown}");
        }
    }
}
