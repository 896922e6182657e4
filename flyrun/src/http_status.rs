//! The status of an HTTP/1 answer: all that a check wants of it.

use std::io;

/// The most bytes of an answer's head that are waited for.
pub const MAX_HEAD: usize = 16 << 10;
const MAX_FIELDS: usize = 64;

/// The status; `None` as long as the head is not complete.
///
/// # Errors
/// It is no HTTP.
pub fn status_of(head: &[u8]) -> io::Result<Option<u16>> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(head) {
        // More fields than anybody reads: the status came first.
        Ok(httparse::Status::Complete(_)) | Err(httparse::Error::TooManyHeaders) => Ok(response.code),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(error) => Err(io::Error::other(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_there_when_the_head_is_and_however_long_that_is() {
        assert_eq!(status_of(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap(), Some(204));
        assert_eq!(status_of(b"HTTP/1.1 204 No Content\r\nA: b\r\n").unwrap(), None);
        assert_eq!(status_of(b"").unwrap(), None);
        let many = format!("HTTP/1.1 500 Oh\r\n{}\r\n", "a: b\r\n".repeat(MAX_FIELDS + 1));
        assert_eq!(status_of(many.as_bytes()).unwrap(), Some(500));
        assert!(status_of(b"SSH-2.0-x\r\n").is_err());
    }
}
