//! Names of requests, by which lines of the log are found.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use http::HeaderValue;

/// Crockford's alphabet, in the order of its values.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// A ULID and the region, as at Fly: unique, in the order of time, no secret.
pub(crate) fn next(now: SystemTime, region: &str) -> HeaderValue {
    static SEED: OnceLock<u64> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let seed = *SEED.get_or_init(|| RandomState::new().hash_one(std::process::id()));
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // An odd factor makes a permutation of it: no two are equal, and neighbours look different.
    let mixed = seed.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let millis = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let value = (millis & 0xffff_ffff_ffff) << 80 | u128::from(seed & 0xffff) << 64 | u128::from(mixed);
    let mut text = Vec::with_capacity(27 + region.len());
    for place in (0..26).rev() {
        let digit = (value >> (5 * place)) & 31;
        text.push(ALPHABET.get(digit as usize).copied().unwrap_or(b'0'));
    }
    text.push(b'-');
    text.extend_from_slice(region.as_bytes());
    HeaderValue::from_maybe_shared(bytes::Bytes::from(text)).unwrap_or(HeaderValue::from_static("unknown"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn ids_differ_and_follow_time() {
        let at = |seconds| next(UNIX_EPOCH + Duration::from_secs(seconds), "local");
        let ids: std::collections::HashSet<_> = (0..1000).map(|_| at(7)).collect();
        assert_eq!(ids.len(), 1000);
        assert!(at(1).to_str().unwrap() < at(2).to_str().unwrap());
        assert_eq!(at(0).len(), 26 + "-local".len());
    }
}
