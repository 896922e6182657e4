//! The workload's standard streams: each a unix socket that the guest connects to, copied by a thread of its own.
//!
//! A thread for each, because the other end may be anything (a terminal, a pipe, a file) and must block nobody else.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use protocol::{port, session};

use super::events::{Event, Post, spawn};
use crate::error::{Context, Result};
use crate::monitor::log::Stream;
use crate::monitor::outputs::{Input, Outputs};
use crate::paths::RunDir;

/// Which streams a workload has, and where they go.
#[derive(Clone, Debug)]
pub struct Streams {
    pub outputs: Arc<Outputs>,
    /// `None` for a workload without input.
    pub input: Option<Arc<Input>>,
    /// Whether there is one terminal, whose input and output share a connection.
    pub terminal: bool,
}

impl Streams {
    /// How many [`Event::OutputDone`] will come.
    pub fn count(&self) -> usize {
        if self.terminal { 1 } else { 2 }
    }

    /// Listens for the guest's streams and starts copying. Call before the machine starts.
    pub fn serve(&self, run_dir: &RunDir, post: &Post) -> Result<()> {
        let listen = |port| listen(run_dir, port);
        let started = if self.terminal {
            self.serve_output("terminal", listen(port::STDOUT)?, Stream::Stdout, self.input.clone(), post)
        } else {
            if let Some(input) = self.input.clone() {
                let listener = listen(port::STDIN)?;
                spawn("stdin", move || {
                    if let Ok((stream, _)) = listener.accept() {
                        input.connect(stream);
                    }
                })
                .context("cannot start a thread")?;
            }
            let (out, err) = (listen(port::STDOUT)?, listen(port::STDERR)?);
            self.serve_output("stdout", out, Stream::Stdout, None, post)
                .and_then(|()| self.serve_output("stderr", err, Stream::Stderr, None, post))
        };
        started.context("cannot start a thread")
    }

    fn serve_output(
        &self,
        name: &str,
        listener: UnixListener,
        which: Stream,
        input: Option<Arc<Input>>,
        post: &Post,
    ) -> io::Result<()> {
        let (outputs, post) = (self.outputs.clone(), post.clone());
        spawn(name, move || {
            if let Ok((stream, _)) = listener.accept() {
                if let (Some(input), Ok(writer)) = (input, stream.try_clone()) {
                    input.connect(writer);
                }
                copy(&stream, which, &outputs);
            }
            post.send(Event::OutputDone);
        })
    }
}

/// A listening socket for one port of the guest's vsock.
pub fn listen(run_dir: &RunDir, port: u32) -> Result<UnixListener> {
    let path = run_dir.vsock_port(port);
    UnixListener::bind(&path).context(format!("cannot listen on {}", path.display()))
}

/// Copies until the guest is done, or until nobody reads any more: then the guest is told, as a pipe would.
fn copy(mut stream: &UnixStream, which: Stream, outputs: &Outputs) {
    let mut buffer = vec![0; session::MAX_CHUNK];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if outputs.deliver(which, buffer.get(..count).unwrap_or_default()).is_err() {
                    let _ = stream.shutdown(Shutdown::Both);
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
