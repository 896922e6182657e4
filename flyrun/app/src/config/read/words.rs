//! What names, paths and commands look like.

use crate::config::table::Node;

/// A part of a host name, which becomes `<app>.internal`.
pub(super) fn is_app_name(text: &str) -> bool {
    is_label(text) && !text.starts_with('-') && !text.ends_with('-')
}

/// A short word of lower-case letters, digits and dashes.
pub(super) fn is_label(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(good)
}

/// What docker and flyrun call volumes and machines.
pub(super) fn is_name(text: &str) -> bool {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    text.len() <= 63
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(rest)
}

/// An absolute path of the guest below its root that leads nowhere else.
pub(super) fn is_guest_path(text: &str) -> bool {
    let inside = text.starts_with('/') && !text.trim_matches('/').is_empty() && !text.contains('\0');
    inside && !text.split('/').any(|part| part == "..")
}
pub(super) const GUEST_PATH: &str = "an absolute path below / without '..'";

/// What can stand in a request line.
pub(super) fn is_url_path(text: &str) -> bool {
    text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) && !text.contains('#')
}
pub(super) const URL_PATH: &str = "a path that begins with '/', without spaces";

/// RFC 9110, section 5.6.2.
pub(super) fn is_header_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(good)
}

/// RFC 9110, section 5.5, without bytes beyond ASCII.
pub(super) fn is_header_value(text: &str) -> bool {
    text.trim() == text && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
}
pub(super) const HEADER_VALUE: &str = "a text of printable ASCII";

pub(super) fn is_host_path(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
}

/// The words of a command, as a shell splits them.
pub(super) fn command(node: &Node<'_>) -> Option<Vec<String>> {
    const WANTED: &str = "a command as a shell has it, with quotes that end";
    let text = node.text(WANTED)?;
    let words = shlex::split(text).filter(|_| !text.contains('\0'));
    if words.is_none() {
        node.wrong(WANTED);
    }
    words
}

/// What the contact of an ACME account can be (RFC 8555, section 7.3).
pub(super) fn is_email(text: &str) -> bool {
    let good = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_graphic() && !b"?,<>".contains(&byte))
    };
    text.split_once('@').is_some_and(|(who, host)| good(who) && good(host) && !host.contains('@'))
}
pub(super) const EMAIL: &str = "one address such as admin@example.com";

/// Directories are asked over https alone (RFC 8555, section 6.1).
pub(super) fn is_https_url(text: &str) -> bool {
    let rest = text.strip_prefix("https://");
    rest.is_some_and(|rest| {
        !rest.starts_with('/') && !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic())
    })
}
pub(super) const HTTPS_URL: &str = "a URL that begins with https://";
