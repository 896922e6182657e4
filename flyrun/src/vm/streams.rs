//! The workload's standard streams: each a unix socket that the guest connects to, copied by a thread of its own.
//!
//! A thread for each, because the other end may be anything (a terminal, a pipe, a file) and must block nobody else. A guest
//! connects once, and once more each time it has stood still for a snapshot.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

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

    /// Listens for the guest's streams. Call before the machine starts.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn listen(&self, run_dir: &RunDir) -> Result<Entrance> {
        let output = |name, port, which| (port, Way::Output { name, which, input: None });
        let input = self.input.clone();
        let ways = if self.terminal {
            vec![(port::STDOUT, Way::Output { name: "terminal", which: Stream::Stdout, input })]
        } else {
            let outputs = [
                output("stdout", port::STDOUT, Stream::Stdout),
                output("stderr", port::STDERR, Stream::Stderr),
            ];
            input.map(|input| (port::STDIN, Way::Input(input))).into_iter().chain(outputs).collect()
        };
        let mut serving = Serving::default();
        let doors = ways.into_iter().map(|(port, way)| Ok((way, serving.door(run_dir, port)?)));
        Ok(Entrance { doors: doors.collect::<Result<_>>()?, outputs: self.outputs.clone(), serving })
    }
}

/// What is copied through one connection.
#[derive(Debug)]
enum Way {
    Input(Arc<Input>),
    /// With the input that shares a terminal's connection.
    Output {
        name: &'static str,
        which: Stream,
        input: Option<Arc<Input>>,
    },
}

/// Where the guest connects its streams, and nobody copies them yet.
#[derive(Debug)]
pub struct Entrance {
    doors: Vec<(Way, Door)>,
    outputs: Arc<Outputs>,
    serving: Serving,
}

impl Entrance {
    /// Starts copying.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn serve(self, post: &Post) -> Result<Serving> {
        for (way, door) in self.doors {
            match way {
                Way::Input(input) => spawn("stdin", move || door.each(|stream| input.connect(stream))),
                Way::Output { name, which, input } => {
                    let (outputs, post) = (self.outputs.clone(), post.clone());
                    spawn(name, move || {
                        door.each(|stream| {
                            if let (Some(input), Ok(writer)) = (&input, stream.try_clone()) {
                                input.connect(writer);
                            }
                            copy(&stream, which, &outputs);
                            drop(stream);
                            post.send(Event::OutputDone);
                        });
                    })
                }
            }
            .context("cannot start a thread")?;
        }
        Ok(self.serving)
    }
}

/// The threads that serve one life's streams; they end when it is dropped, but for what they still copy.
#[derive(Debug, Default)]
pub struct Serving {
    listeners: Vec<UnixListener>,
    keys: Vec<Sender<()>>,
}

impl Serving {
    fn door(&mut self, run_dir: &RunDir, port: u32) -> Result<Door> {
        let listener = listen(run_dir, port)?;
        let (key, keys) = channel();
        self.listeners.push(listener.try_clone().context("cannot share a socket")?);
        self.keys.push(key);
        Ok(Door { listener, keys })
    }

    /// Lets the guest connect each stream once more.
    pub fn again(&self) {
        for key in &self.keys {
            // A thread that has ended serves nobody.
            let _ = key.send(());
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        for listener in &self.listeners {
            // Whoever waits for a connection is told that none comes.
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
    }
}

/// Where the guest connects one stream: once, and once more for each key.
#[derive(Debug)]
struct Door {
    listener: UnixListener,
    keys: Receiver<()>,
}

impl Door {
    fn each(self, mut serve: impl FnMut(UnixStream)) {
        while let Ok((stream, _)) = self.listener.accept() {
            serve(stream);
            if self.keys.recv().is_err() {
                return;
            }
        }
    }
}

/// A listening socket for one port of the guest's vsock.
pub fn listen(run_dir: &RunDir, port: u32) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let path = run_dir.vsock_port(port);
    let listen = || {
        let listener = UnixListener::bind(&path)?;
        // For flyrun-vmm, another user. Nobody else gets into the directory above.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        Ok::<_, io::Error>(listener)
    };
    listen().context(format!("cannot listen on {}", path.display()))
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
