//! Requests that wait, in the order in which they came.

use std::collections::VecDeque;

use super::{Moment, Request};

/// All have the same patience, so that the first is also the first to lose it.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<Waiting>,
    /// How many of them wait for one machine alone.
    choosy: usize,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    request: Request,
    deadline: Moment,
    /// The slot that it must be.
    only: Option<usize>,
}

impl Queue {
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many take any machine.
    pub fn free(&self) -> usize {
        self.waiting.len() - self.choosy
    }

    pub fn push(&mut self, request: Request, deadline: Moment, only: Option<usize>) {
        self.choosy += usize::from(only.is_some());
        self.waiting.push_back(Waiting { request, deadline, only });
    }

    /// The first that takes any machine.
    pub fn pop(&mut self) -> Option<Request> {
        self.take(|waiting| waiting.only.is_none())
    }

    /// The first of all.
    pub fn pop_any(&mut self) -> Option<Request> {
        self.take(|_| true)
    }

    /// The first that waits for this slot alone.
    pub fn pop_for(&mut self, slot: usize) -> Option<Request> {
        if self.choosy == 0 { None } else { self.take(|waiting| waiting.only == Some(slot)) }
    }

    pub fn pop_expired(&mut self, now: Moment) -> Option<Request> {
        self.take_first(|first| first.deadline <= now)
    }

    pub fn remove(&mut self, request: Request) {
        let _ = self.take(|waiting| waiting.request == request);
    }

    /// The slots that somebody waits for.
    pub fn wanted(&self) -> Vec<usize> {
        if self.choosy == 0 {
            return Vec::new();
        }
        let mut slots: Vec<_> = self.waiting.iter().filter_map(|waiting| waiting.only).collect();
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// When the next one loses its patience.
    pub fn deadline(&self) -> Option<Moment> {
        self.waiting.front().map(|waiting| waiting.deadline)
    }

    fn take_first(&mut self, is_meant: impl Fn(&Waiting) -> bool) -> Option<Request> {
        self.waiting.front().is_some_and(is_meant).then(|| self.take(|_| true)).flatten()
    }

    fn take(&mut self, is_meant: impl Fn(&Waiting) -> bool) -> Option<Request> {
        let taken = self.waiting.remove(self.waiting.iter().position(is_meant)?)?;
        self.choosy -= usize::from(taken.only.is_some());
        Some(taken.request)
    }
}
