//! Conversations with a running machine: a command in it, an attachment to it, its figures, copies.
//!
//! [`connect`] reaches guest-init, [`drive`] joins the user's streams, terminal and signals with a session's frames.
//! The frames are [`protocol::session`]'s; an attachment speaks the same with the machine's monitor. Commands and attachments
//! go on when their machine was suspended and is there again ([`returning`]).

mod connect;
mod copy;
mod detach_keys;
mod drive;
mod end;
mod find;
mod link;
mod reattach;
mod rejoin;
mod returning;
mod window;

pub use connect::{connect, connect_before};
pub use copy::{Found, Place, copy_in, copy_in_tar, copy_out, copy_out_tar};
pub use drive::{Wishes, drive};
pub use end::{End, failure, printable};
pub use find::find_running;
pub use link::Link;
pub use reattach::Reattach;
pub use rejoin::Rejoin;

use protocol::session::{FromSession, Request};

use crate::error::{Context, Error, Result};
use crate::machine::Record;
use crate::paths::Paths;

/// Asks a machine for something that it answers with frames until it closes.
///
/// # Errors
/// The machine is not there, fails, or what it says makes no sense to `take`.
pub fn ask(
    paths: &Paths,
    machine: &Record,
    request: &Request,
    mut take: impl FnMut(FromSession) -> Result<()>,
) -> Result<()> {
    let link = connect(paths, machine)?;
    link.request(request)?;
    let mut frames = link.frames();
    while let Some(frame) = frames.next().context("lost the machine")? {
        match frame {
            FromSession::Failed { kind, message } => return Err(failure(kind, message)),
            answer => take(answer)?,
        }
    }
    Ok(())
}

/// What is said of a machine that does not keep to the protocol.
pub fn unasked() -> Error {
    Error::new("the machine answers what it was not asked")
}
