//! What a child of guest-init does for a client: it has the connection to itself and may block, on a slow client, a
//! slow disk or a filesystem of the workload's that never answers.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use protocol::{
    FailureKind, frame,
    session::{FromSession, PathInfo, Request},
};
use rustix::process::Pid;
use serde::{Serialize, de::DeserializeOwned};

use super::{client::Client, copy_in, copy_out, failed, figures};
use crate::{
    failure::{Failure, OrSetup},
    run::cgroup::Cgroup,
    sys::{self, Fork},
};

/// Starts a child that serves this request.
///
/// # Errors
/// [`FailureKind::Setup`] when there is no process or descriptor left.
pub fn start(request: Request, client: &Client, cgroup: &Cgroup) -> Result<Pid, Failure> {
    match sys::fork().or_setup(|| "start a process".into())? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            // Other clients' connections and other processes' pipes must not stay open because of this one.
            if let Some(socket) = client.fd()
                && let Ok([socket, cgroup]) = sys::keep_only([socket, cgroup.as_fd()])
                && rustix::io::ioctl_fionbio(&socket, false).is_ok()
            {
                let mut peer = Peer { stream: File::from(socket), decoder: client.decoder().clone() };
                if let Err(failure) = serve(request, &mut peer, cgroup.as_fd()) {
                    let _ = peer.send(&failed(&failure));
                }
            }
            sys::exit_now(0)
        }
    }
}

fn serve(request: Request, peer: &mut Peer, cgroup: BorrowedFd<'_>) -> Result<(), Failure> {
    match request {
        Request::Exec(_) | Request::Rejoin { .. } => {
            Err(Failure::new(FailureKind::Setup, "a command is not a helper's work"))
        }
        Request::Stats => peer.send(&FromSession::Stats(figures::stats(cgroup))),
        Request::Processes => figures::processes(|some| peer.send(&FromSession::Processes(some))),
        Request::CopyIn { directory } => copy_in::receive(&directory, peer),
        Request::CopyOut { path, follow_link } => copy_out::send(Path::new(&path), follow_link, peer),
        Request::Stat { path } => peer.send(&FromSession::PathInfo(path_info(&path))),
    }
}

fn path_info(path: &str) -> Option<PathInfo> {
    let found = std::fs::metadata(path).ok()?;
    Some(PathInfo { is_directory: found.is_dir(), size: found.len() })
}

/// A client, for a process that may block on it.
#[derive(Debug)]
pub struct Peer {
    stream: File,
    decoder: frame::Decoder,
}

impl Peer {
    /// Sends a frame.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] when the client has gone, which nobody will be told.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), Failure> {
        let gone = |error: &dyn std::fmt::Display| {
            Failure::new(FailureKind::Setup, format!("cannot answer the client: {error}"))
        };
        let bytes = frame::encode(message).map_err(|error| gone(&error))?;
        self.stream.write_all(&bytes).map_err(|error| gone(&error))
    }

    /// Waits for a frame; `None` when the client has closed or makes no sense.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Option<T> {
        loop {
            match self.decoder.decode() {
                Ok(Some(message)) => return Some(message),
                Ok(None) => {}
                Err(_) => return None,
            }
            let mut chunk = vec![0; self.decoder.wanted()];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }
}
