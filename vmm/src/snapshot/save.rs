//! Writes a machine that stands still to a directory.
//!
//! What is written takes its place last, by rename. Only a `memory` that the machine itself is mapped from is written in
//! place: the `state` that goes with what was in it is removed before, as the machine has gone on from there anyway.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use thiserror::Error;

use super::{
    BASE, MEMORY, STATE,
    dir::Dir,
    format,
    format::Section,
    image::{self, Plan, Written},
    pages::Still,
    sections::State,
    subject::{Asked, Subject},
};
use crate::{hold, machine::Standing, worker::Worker};

const NEW_MEMORY: &str = "memory.new";
const NEW_STATE: &str = "state.new";
/// How often it is looked whether the snapshot is still wanted, while the host's disk is written.
const PATIENCE: Duration = Duration::from_millis(10);

/// Why there is no snapshot.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NotSaved {
    /// It is no longer wanted.
    #[error("the snapshot was given up")]
    GivenUp,
    /// It cannot be made.
    #[error("{0}")]
    Failed(String),
}

/// What a snapshot was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether all of memory was looked at, or only what was written since the machine was resumed.
    pub full: bool,
    /// Size of guest memory.
    pub memory_bytes: u64,
    /// Pages.
    #[serde(flatten)]
    pub written: Written,
    /// Length of `state`.
    pub state_bytes: u64,
}

fn failed(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> NotSaved {
    move |error| NotSaved::Failed(format!("{what}: {error}"))
}

/// What is asked of a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// Where it goes.
    pub dir: &'a Dir,
    /// Whether the header is to have a checksum of memory, which takes reading all of it.
    pub checksum: bool,
    /// Whether the guest has read nothing of its disks, so that it may go on with others.
    pub any_disks: bool,
}

/// Writes the machine to a directory. On the thread of the event loop. The machine is
/// afterwards as it was before, also if this fails or is given up.
///
/// # Errors
/// Why there is no snapshot. Half-written files are gone then.
pub fn save(
    subject: &Subject,
    standing: &Standing<'_>,
    order: Order<'_>,
    given_up: &mut dyn FnMut() -> bool,
) -> Result<Report, NotSaved> {
    let saved = attempt(subject, standing, order, given_up);
    subject.go_on();
    if saved.is_err() {
        for name in [NEW_MEMORY, NEW_STATE] {
            // Most often it was not there.
            let _ = order.dir.remove(name);
        }
    }
    saved
}

fn attempt(
    subject: &Subject,
    _standing: &Standing<'_>,
    Order { dir, checksum, any_disks }: Order<'_>,
    given_up: &mut dyn FnMut() -> bool,
) -> Result<Report, NotSaved> {
    let devices = subject.stop_devices().map_err(NotSaved::Failed)?;
    // SAFETY: `_standing` says that no vCPU runs, and none will before it is given back. `stop_devices` has taken guest
    // memory from the host's kernel; the devices of this process use it on this thread alone.
    let still = unsafe { Still::new(&subject.memory) };
    let plan = subject.backing.plan(dir, &still).map_err(failed("/proc/self/pagemap"))?;
    let mut state = subject.state(devices).map_err(NotSaved::Failed)?;
    hold::at("vmm writes");
    let written = write_memory(&plan, &still, dir, &subject.worker, given_up)?;
    state.memory = plan.state(&written);
    hold::at("vmm has written memory");
    let checksum = match checksum {
        true => Some(sum(subject, &still, given_up)?),
        false => None,
    };
    let text = subject.text.id(&still, &subject.backing.given_back().ranges(), any_disks);
    let text = text.map_err(failed("/proc/self/pagemap"))?;
    let asked = Asked { any_disks, checksum, text };
    let state_bytes = write_state(subject, &plan, &state, asked, dir, given_up)?;
    hold::at("vmm has written state");
    if given_up() {
        return Err(NotSaved::GivenUp);
    }
    put_in_place(&plan, dir).map_err(failed(dir.path().display()))?;
    hold::at("vmm has put in place");
    let memory_bytes = super::pages::image_bytes(&subject.memory);
    Ok(Report { full: !plan.since_resume(), memory_bytes, written, state_bytes })
}

fn write_memory(
    plan: &Plan,
    still: &Still<'_>,
    dir: &Dir,
    worker: &Worker,
    given_up: &mut dyn FnMut() -> bool,
) -> Result<Written, NotSaved> {
    let name = if plan.in_place { MEMORY } else { NEW_MEMORY };
    let path = dir.path().join(name);
    let file = if plan.in_place { dir.write(name) } else { dir.create(name) };
    let file = file.map_err(failed(path.display()))?;
    if plan.in_place {
        remove_state(dir).map_err(failed(dir.path().display()))?;
    }
    let written = plan.write(still, &file, given_up).map_err(failed(path.display()))?;
    let written = written.ok_or(NotSaved::GivenUp)?;
    sync(file, worker, given_up).map_err(failed(path.display()))?.then_some(written).ok_or(NotSaved::GivenUp)
}

/// Waits until the file is on the disk, or the snapshot is given up: then the disk goes on by itself. Returns whether it is.
fn sync(file: File, worker: &Worker, given_up: &mut dyn FnMut() -> bool) -> io::Result<bool> {
    let result = Arc::new((Mutex::new(None), Condvar::new()));
    let told = Arc::clone(&result);
    worker.give(move |_| {
        let (synced, changed) = &*told;
        *synced.lock().unwrap_or_else(PoisonError::into_inner) = Some(file.sync_all());
        changed.notify_all();
    })?;
    let (synced, changed) = &*result;
    loop {
        let waited = changed.wait_timeout_while(
            synced.lock().unwrap_or_else(PoisonError::into_inner),
            PATIENCE,
            |synced| synced.is_none(),
        );
        if let Some(synced) = waited.unwrap_or_else(PoisonError::into_inner).0.take() {
            return synced.map(|()| true);
        }
        if given_up() {
            return Ok(false);
        }
    }
}

fn sum(subject: &Subject, still: &Still<'_>, given_up: &mut dyn FnMut() -> bool) -> Result<u32, NotSaved> {
    let sum = image::checksum(&subject.backing, still, given_up).map_err(failed("checksum of memory"))?;
    sum.ok_or(NotSaved::GivenUp)
}

fn write_state(
    subject: &Subject,
    plan: &Plan,
    state: &State,
    asked: Asked,
    dir: &Dir,
    given_up: &mut dyn FnMut() -> bool,
) -> Result<u64, NotSaved> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let header = subject.header(now.as_millis() as u64, plan, asked).map_err(NotSaved::Failed)?;
    let bytes = encode(&header, state).map_err(NotSaved::Failed)?;
    if bytes.len() as u64 > format::MAX_FILE_BYTES {
        return Err(NotSaved::Failed(format!(
            "the state has {} bytes, which nobody would read",
            bytes.len()
        )));
    }
    let path = dir.path().join(NEW_STATE);
    let write = || {
        let mut file = dir.create(NEW_STATE)?;
        file.write_all(&bytes)?;
        Ok(file)
    };
    let synced =
        write().and_then(|file| sync(file, &subject.worker, given_up)).map_err(failed(path.display()))?;
    synced.then_some(bytes.len() as u64).ok_or(NotSaved::GivenUp)
}

/// The bytes of the file `state`.
///
/// # Errors
/// A path in the spec is not UTF-8.
pub fn encode(header: &super::header::Header, state: &State) -> Result<Vec<u8>, String> {
    let header = header.to_json().map_err(|error| format!("header: {error}"))?;
    let sections = state.encode().map_err(|error| format!("state: {error}"))?;
    let sections: Vec<_> = sections
        .iter()
        .map(|(id, version, payload)| Section { id: *id, version: *version, payload })
        .collect();
    Ok(format::encode(&header, &sections))
}

fn put_in_place(plan: &Plan, dir: &Dir) -> io::Result<()> {
    if !plan.in_place {
        // Between here and the last rename there is no snapshot rather than a state with another's memory.
        remove_state(dir)?;
        if plan.promote {
            dir.rename(MEMORY, BASE)?;
        }
        dir.rename(NEW_MEMORY, MEMORY)?;
    }
    dir.rename(NEW_STATE, STATE)?;
    dir.sync()
}

fn remove_state(dir: &Dir) -> io::Result<()> {
    match dir.remove(STATE) {
        Ok(()) => dir.sync(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
