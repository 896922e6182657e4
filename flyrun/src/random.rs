//! The host's random numbers.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Context, Result};

/// Fills the bytes with random ones.
///
/// # Errors
/// The host has none.
pub fn fill(bytes: &mut [u8]) -> Result<()> {
    let mut rest = bytes;
    // Many at once may be given in parts (getrandom(2)).
    while !rest.is_empty() {
        match getrandom(&mut *rest, GetRandomFlags::empty()) {
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("the host has no random numbers"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_are_filled_however_many_there_are() {
        let (mut one, mut other) = (vec![0; 100_000], vec![0; 100_000]);
        fill(&mut one).unwrap();
        fill(&mut other).unwrap();
        assert!(one.chunks(1000).zip(other.chunks(1000)).all(|(one, other)| one != other));
        assert!(one.chunks(1000).all(|part| part.iter().any(|byte| *byte != 0)));
        fill(&mut []).unwrap();
    }
}
