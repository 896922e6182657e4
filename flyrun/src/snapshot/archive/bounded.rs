//! A reader that gives no more than it may.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// How many bytes may still be read. Shared with whoever decides that.
#[derive(Clone, Debug, Default)]
pub struct Budget(Rc<Cell<u64>>);

impl Budget {
    pub fn set(&self, bytes: u64) {
        self.0.set(bytes);
    }
}

/// Gives what `inner` does, within a budget.
#[derive(Debug)]
pub struct Bounded<R> {
    inner: R,
    budget: Budget,
}

impl<R> Bounded<R> {
    pub fn new(inner: R, budget: Budget) -> Bounded<R> {
        Bounded { inner, budget }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.0.get();
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(place) = buffer.get_mut(..most).filter(|place| !place.is_empty()) else {
            return if buffer.is_empty() {
                Ok(0)
            } else {
                Err(io::Error::other("it is longer than it may be"))
            };
        };
        let count = self.inner.read(place)?;
        self.budget.0.set(left.saturating_sub(count as u64));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_budget_is_an_error_until_there_is_more() {
        let budget = Budget::default();
        let mut reader = Bounded::new(&b"0123456789"[..], budget.clone());
        budget.set(4);
        let mut text = Vec::new();
        assert!(reader.read_to_end(&mut text).is_err());
        assert_eq!(text, b"0123");
        budget.set(7);
        assert_eq!(reader.read_to_end(&mut text).unwrap(), 6);
    }
}
