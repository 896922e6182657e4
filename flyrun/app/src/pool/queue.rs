//! Requests that wait, in the order in which they came.

use std::collections::VecDeque;

use super::{Moment, Request};

/// All have the same patience, so that the first is also the first to lose it.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<(Request, Moment)>,
}

impl Queue {
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn push(&mut self, request: Request, deadline: Moment) {
        self.waiting.push_back((request, deadline));
    }

    pub fn pop(&mut self) -> Option<Request> {
        self.waiting.pop_front().map(|(request, _)| request)
    }

    pub fn pop_expired(&mut self, now: Moment) -> Option<Request> {
        let (_, deadline) = self.waiting.front()?;
        if *deadline <= now { self.pop() } else { None }
    }

    pub fn remove(&mut self, request: Request) {
        self.waiting.retain(|(waiting, _)| *waiting != request);
    }

    /// When the next one loses its patience.
    pub fn deadline(&self) -> Option<Moment> {
        self.waiting.front().map(|(_, deadline)| *deadline)
    }
}
