//! The web page of `flyrun serve` at [`PREFIX`]: machines, a live timeline of their starts and suspends, latencies.
//!
//! Without I/O: whoever has the connections calls [`answer`] for each request below [`PREFIX`], and whoever has the machines is
//! the [`Source`]. [`Answer::Events`] is a stream: the caller asks [`Events::next`] a few times a second and sends what it gives.
//!
//! The page shows what runs on a host, and so is for that host alone: other peers, and names that are not loopback's (a
//! rebound DNS name in somebody's browser), are refused. It loads nothing from elsewhere, and what machines and apps are called is
//! text in it, never markup.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod answer;
mod events;
mod model;

pub use answer::{Answer, Request, Whole, answer};
pub use events::{Events, TICK};
pub use model::{App, Event, LastStart, Latencies, MAX_EVENTS, Machine, State, What};

/// Below which the page is.
pub const PREFIX: &str = "/_flyrun";

/// Whoever knows what is to be shown.
pub trait Source {
    /// All of it, as it is now.
    fn state(&self) -> State;
}

impl<F: Fn() -> State> Source for F {
    fn state(&self) -> State {
        self()
    }
}
