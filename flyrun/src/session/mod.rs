//! Conversations with a running machine: a command in it, an attachment to it, its figures, copies.
//!
//! [`connect`] reaches guest-init, [`drive`] joins the user's streams, terminal and signals with a session's frames.
//! The frames are [`protocol::session`]'s; an attachment speaks the same with the machine's monitor.

mod connect;
mod detach_keys;
mod drive;
mod end;
mod find;
mod link;

pub use connect::connect;
pub use drive::{Wishes, drive};
pub use end::End;
pub use find::find_running;
pub use link::Link;
