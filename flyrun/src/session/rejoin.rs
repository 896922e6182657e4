//! Coming back to a command in a machine that was suspended meanwhile: with the ticket that it was started with.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::FailureKind;
use protocol::frame::{self, FrameError};
use protocol::replay::Count;
use protocol::session::{FromSession, Request, Ticket};

use super::connect::open_before;
use super::link::{Frames, Link};
use super::returning::{Prospect, Return, Returning, booted_cold, wait};
use super::{End, unasked};
use crate::error::{Context, Result};
use crate::machine::{LastStart, Machines, Record};
use crate::paths::Paths;
use crate::random;

/// How long a machine may take to answer one attempt.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(10);

/// A command's client, which may have to come back.
#[derive(Debug)]
pub struct Rejoin {
    paths: Paths,
    machines: Machines,
    id: String,
    link: Link,
    ticket: Ticket,
    received: Count,
}

impl Rejoin {
    /// For the session over this link, whose request has not been made yet.
    ///
    /// # Errors
    /// The host has no randomness.
    pub fn new(paths: &Paths, machines: Machines, machine: &Record, link: &Link) -> Result<Rejoin> {
        let mut ticket = Ticket::default();
        random::fill(&mut ticket.0)?;
        link.outlast();
        let (paths, id, link) = (paths.clone(), machine.id.clone(), link.clone());
        Ok(Rejoin { paths, machines, id, link, ticket, received: Count::default() })
    }

    /// For the request.
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    fn attempt(&self, machine: &Record) -> Result<Option<Return>> {
        let deadline = Instant::now() + ATTEMPT_LIMIT;
        let Ok(stream) = open_before(&self.paths, machine, deadline).map(Arc::new) else { return Ok(None) };
        let request = Request::Rejoin { ticket: self.ticket, received: self.received.frames() };
        if frame::write(&mut &*stream, &request).is_err() {
            return Ok(None);
        }
        let mut frames = Frames::of(Arc::clone(&stream));
        match frames.next_before(deadline) {
            Ok(Some(FromSession::Rejoined { frames: counted })) => {
                be_patient(&stream).context("cannot use a connection")?;
                if self.link.go_on(stream, counted) { Ok(Some(Return::Back(frames))) } else { Err(unasked()) }
            }
            Ok(Some(FromSession::Failed { kind: FailureKind::NoSession, .. })) => {
                Ok(Some(Return::Over(forgotten(machine, self.received.frames()))))
            }
            // As when there are too many at this moment.
            Ok(Some(FromSession::Failed { .. }) | None) | Err(FrameError::Io(_)) => Ok(None),
            Ok(Some(_)) | Err(_) => Err(unasked()),
        }
    }
}

impl Returning for Rejoin {
    fn received(&mut self, bytes: usize) {
        self.received.add(bytes);
        if let Some(frames) = self.received.due() {
            self.link.tell_received(frames);
        }
    }

    fn come_back(&mut self, _: bool, left: &dyn Fn() -> bool) -> Result<Return> {
        wait(&self.machines, &self.id, left, &mut |machine, prospect| match prospect {
            Prospect::Runs => self.attempt(machine),
            _ => Ok(None),
        })
    }
}

fn be_patient(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)
}

/// Why a machine that runs knows nothing of the session.
fn forgotten(machine: &Record, received: u64) -> End {
    match &machine.last_start {
        Some(LastStart::ColdBoot { reason: Some(_), .. }) => booted_cold(),
        // It has ended, and runs again.
        Some(LastStart::ColdBoot { reason: None, .. } | LastStart::Base) => End::Lost,
        _ if received == 0 => End::Gone("the machine was suspended before the command had begun".into()),
        _ => End::Gone("the machine was resumed and has given the command up, as nobody came for it".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_become_of_a_command_is_told() {
        let machine = |last_start| Record { last_start, ..Record::example("web") };
        let booted = |reason: Option<&str>| LastStart::ColdBoot {
            reason: reason.map(str::to_string),
            no_base: Some("another flyrun makes it now".into()),
        };
        assert_eq!(forgotten(&machine(Some(booted(Some("another CPU")))), 3), booted_cold());
        for again in [booted(None), LastStart::Base] {
            assert_eq!(forgotten(&machine(Some(again)), 3), End::Lost);
        }
        let told = |received| match forgotten(&machine(Some(LastStart::Resumed)), received) {
            End::Gone(told) => told,
            end => panic!("{end:?}"),
        };
        assert!(told(0).contains("before the command"));
        assert!(told(1).contains("given the command up"));
    }
}
