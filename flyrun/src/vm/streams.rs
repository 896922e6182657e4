//! The workload's standard streams: each a unix socket that the guest connects to, copied by a thread of its own.
//!
//! A thread for each, because the other end may be anything (a terminal, a pipe, a file) and must block nobody else.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Sender;

use protocol::port;

use super::events::{Event, spawn};
use crate::error::{Context, Result};
use crate::paths::RunDir;

/// Where the workload's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    None,
    /// flyrun's own standard input.
    Own,
}

/// How the workload's output arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output and standard error, told apart.
    Separate,
    /// One terminal, whose input and output share a connection.
    Terminal,
}

/// Which streams a workload has.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    pub input: Input,
    pub output: Output,
}

impl Streams {
    /// How many [`Event::OutputDone`] will come.
    pub fn outputs(self) -> usize {
        match self.output {
            Output::Separate => 2,
            Output::Terminal => 1,
        }
    }

    /// Listens for the guest's streams and starts copying. Call before the machine starts.
    pub fn serve(self, run_dir: &RunDir, events: &Sender<Event>) -> Result<()> {
        let listen = |port| listen(run_dir, port);
        let stdin = || io::stdin().as_fd().try_clone_to_owned().context("cannot use standard input");
        let stdout = io::stdout().as_fd().try_clone_to_owned().context("cannot use standard output")?;
        let started = match self.output {
            Output::Terminal => {
                let input = if self.input == Input::Own { Some(stdin()?) } else { None };
                serve_terminal(listen(port::STDOUT)?, stdout, input, events.clone())
            }
            Output::Separate => {
                let stderr =
                    io::stderr().as_fd().try_clone_to_owned().context("cannot use standard error")?;
                if self.input == Input::Own {
                    serve_input(listen(port::STDIN)?, stdin()?).context("cannot start a thread")?;
                }
                let (out, err) = (listen(port::STDOUT)?, listen(port::STDERR)?);
                serve_output("stdout", out, stdout, events.clone())
                    .and_then(|()| serve_output("stderr", err, stderr, events.clone()))
            }
        };
        started.context("cannot start a thread")
    }
}

/// A listening socket for one port of the guest's vsock.
pub fn listen(run_dir: &RunDir, port: u32) -> Result<UnixListener> {
    let path = run_dir.vsock_port(port);
    UnixListener::bind(&path).context(format!("cannot listen on {}", path.display()))
}

fn serve_output(
    name: &str,
    listener: UnixListener,
    target: OwnedFd,
    events: Sender<Event>,
) -> io::Result<()> {
    spawn(name, move || {
        if let Ok((stream, _)) = listener.accept() {
            copy(&stream, &File::from(target), &stream);
        }
        let _ = events.send(Event::OutputDone);
    })
}

fn serve_input(listener: UnixListener, source: OwnedFd) -> io::Result<()> {
    spawn("stdin", move || {
        if let Ok((stream, _)) = listener.accept() {
            feed(&File::from(source), &stream);
        }
    })
}

fn serve_terminal(
    listener: UnixListener,
    target: OwnedFd,
    source: Option<OwnedFd>,
    events: Sender<Event>,
) -> io::Result<()> {
    spawn("terminal", move || {
        if let Ok((stream, _)) = listener.accept() {
            if let (Some(source), Ok(writer)) = (source, stream.try_clone()) {
                let _ = spawn("stdin", move || feed(&File::from(source), &writer));
            }
            copy(&stream, &File::from(target), &stream);
        }
        let _ = events.send(Event::OutputDone);
    })
}

/// Copies until the guest is done, or until nobody reads any more: then the guest is told, as a pipe would.
fn copy(mut from: &UnixStream, mut to: &File, stream: &UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    let _ = stream.shutdown(Shutdown::Both);
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Passes input on; its end is the end of the guest's.
fn feed(mut from: &File, mut to: &UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if to.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
