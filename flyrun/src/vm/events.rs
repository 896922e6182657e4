//! What happens to a virtual machine, told by threads that each wait for one thing.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Sender;
use std::thread;

use protocol::{FromGuest, ToGuest, frame};

/// The owner of a machine receives these in the order in which they were noticed.
#[derive(Debug)]
pub enum Event {
    /// Guest-init has connected; this is where to talk to it.
    Connected(Control),
    /// Guest-init says something.
    Guest(FromGuest),
    /// The control connection has ended, cleanly or with the error told.
    ControlClosed(Option<String>),
    /// An output stream of the workload has been copied to its end.
    OutputDone,
    /// The process flyrun-vmm has ended.
    VmmExited(io::Result<std::process::ExitStatus>),
    /// flyrun itself has received a signal.
    Signal(i32),
}

/// The writing side of the control connection.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
}

impl Control {
    /// Sends one message. A guest that is gone is noticed elsewhere, so a failure here says only that it was not heard.
    pub fn send(&mut self, message: &ToGuest) -> bool {
        frame::write(&mut self.stream, message).is_ok()
    }
}

impl Drop for Control {
    /// Tells guest-init that everything was received and it may end.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Waits for guest-init on the control socket and passes on what it says.
pub fn watch_control(listener: UnixListener, events: Sender<Event>) -> io::Result<()> {
    spawn("control", move || {
        let error = match listener.accept().and_then(|(stream, _)| Ok((stream.try_clone()?, stream))) {
            Ok((writer, reader)) => {
                let _ = events.send(Event::Connected(Control { stream: writer }));
                pass_frames(reader, &events)
            }
            Err(error) => Some(error.to_string()),
        };
        let _ = events.send(Event::ControlClosed(error));
    })
}

fn pass_frames(mut reader: UnixStream, events: &Sender<Event>) -> Option<String> {
    loop {
        match frame::read::<FromGuest>(&mut reader) {
            Ok(Some(message)) => {
                if events.send(Event::Guest(message)).is_err() {
                    return None;
                }
            }
            Ok(None) => return None,
            Err(error) => return Some(error.to_string()),
        }
    }
}

/// Waits for the VMM process to end.
pub fn watch_process(mut child: std::process::Child, events: Sender<Event>) -> io::Result<()> {
    spawn("vmm", move || {
        let _ = events.send(Event::VmmExited(child.wait()));
    })
}

/// Starts a thread that needs little stack, as all of these do.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).stack_size(128 * 1024).spawn(body).map(drop)
}
