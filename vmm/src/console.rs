//! The first serial port: where its output goes, where its input comes from, and the line that says why a kernel died.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::{Serial, Trigger, serial::SerialEvents};
use vmm_sys_util::{
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
    timerfd::TimerFd,
};

use crate::{bus::BusDevice, trace::Trace};

/// Bytes kept until a line is complete or [`FLUSH_AFTER`] is over: one write instead of one a byte.
const BUFFER_BYTES: usize = 256;
const FLUSH_AFTER: Duration = Duration::from_millis(5);
const PANIC_MARK: &str = "Kernel panic - not syncing";

/// An eventfd as vm-superio wants it.
#[derive(Debug)]
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input when the port can take more.
#[derive(Debug)]
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter wakes the input just as well.
        let _full = self.0.write(1);
    }
}

/// Where the bytes go.
#[derive(Debug)]
struct Output {
    target: File,
    /// The bytes of the present line that were not written yet.
    waiting: Vec<u8>,
    /// The present line's beginning, for [`PANIC_MARK`].
    line: Vec<u8>,
    panic: Option<String>,
    timer: TimerFd,
    trace: Arc<Trace>,
    silent: bool,
}

impl Output {
    fn push(&mut self, byte: u8) {
        if self.silent {
            self.silent = false;
            self.trace.step("first console byte");
        }
        if self.waiting.is_empty() && byte != b'\n' {
            // Without the timer the bytes still go out with the line's end.
            let _late = self.timer.reset(FLUSH_AFTER, None);
        }
        self.waiting.push(byte);
        if byte == b'\n' {
            self.send();
            self.end_line();
        } else {
            if self.line.len() < BUFFER_BYTES {
                self.line.push(byte);
            }
            if self.waiting.len() >= BUFFER_BYTES {
                self.send();
            }
        }
    }

    /// A reader that went away does not stop the machine.
    fn send(&mut self) {
        let _gone = self.target.write_all(&self.waiting);
        self.waiting.clear();
    }

    fn end_line(&mut self) {
        if self.panic.is_none() {
            let text = String::from_utf8_lossy(&self.line);
            if let Some((_, rest)) = text.split_once(PANIC_MARK) {
                let rest: String = rest.chars().filter(|c| !c.is_control()).collect();
                self.panic = Some(format!("{PANIC_MARK}{rest}"));
            }
        }
        self.line.clear();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.push(*byte));
        Ok(bytes.len())
    }

    /// vm-superio flushes after each byte, which is what the buffer is there to avoid.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port, shared by the vCPU that writes to it and the event loop that feeds it.
#[derive(Clone)]
pub struct Console {
    port: Arc<Mutex<Serial<Line, Room, Output>>>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

impl Console {
    /// A port with that interrupt line and output.
    ///
    /// # Errors
    /// The host gives no event or timer.
    pub fn new(line: EventFd, target: File, trace: Arc<Trace>) -> io::Result<Self> {
        let output = Output {
            target,
            waiting: Vec::with_capacity(BUFFER_BYTES),
            line: Vec::with_capacity(BUFFER_BYTES),
            panic: None,
            timer: TimerFd::new()?,
            trace,
            silent: true,
        };
        let room = Room(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        Ok(Self { port: Arc::new(Mutex::new(Serial::with_events(Line(line), room, output))) })
    }

    fn port(&self) -> MutexGuard<'_, Serial<Line, Room, Output>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what waits for the end of its line.
    pub fn flush(&self) {
        self.port().writer_mut().send();
    }

    /// The line with which the kernel panicked.
    pub fn panic_line(&self) -> Option<String> {
        self.port().writer().panic.clone()
    }

    /// The part that the event loop runs: late output, and `input` if there is one.
    ///
    /// # Errors
    /// The host gives no further event.
    pub fn pump(&self, input: Option<File>) -> io::Result<ConsolePump> {
        let port = self.port();
        let timer = port.writer().timer.as_raw_fd();
        let room = port.events().0.try_clone()?;
        drop(port);
        Ok(ConsolePump { console: self.clone(), timer, room, input, input_polled: false })
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        let mut port = self.port();
        data.iter_mut().for_each(|byte| *byte = port.read(offset));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        let mut port = self.port();
        for byte in data {
            // An interrupt that is already pending is as good as a second one.
            let _pending = port.write(offset, *byte);
        }
    }
}

/// The event loop's side of a console.
#[derive(Debug)]
pub struct ConsolePump {
    console: Console,
    timer: RawFd,
    room: EventFd,
    input: Option<File>,
    /// Whether the input is in the poll set; a plain file never is, it is always ready.
    input_polled: bool,
}

impl ConsolePump {
    fn watch_input(&mut self, ops: &mut EventOps) {
        if let (Some(input), false) = (&self.input, self.input_polled) {
            self.input_polled = ops.add(Events::new(input, EventSet::IN)).is_ok();
            if !self.input_polled {
                self.read_input(ops);
            }
        }
    }

    fn unwatch_input(&mut self, ops: &mut EventOps) {
        if let (Some(input), true) = (&self.input, self.input_polled) {
            let _gone = ops.remove(Events::new(input, EventSet::IN));
        }
        self.input_polled = false;
    }

    /// Reads as much as the port has room for; without room, waits until the guest made some.
    fn read_input(&mut self, ops: &mut EventOps) {
        let mut bytes = [0u8; 64];
        let mut port = self.console.port();
        let room = port.fifo_capacity().min(bytes.len());
        let Some(free) = bytes.get_mut(..room).filter(|free| !free.is_empty()) else {
            drop(port);
            return self.unwatch_input(ops);
        };
        let Some(input) = &mut self.input else { return };
        match input.read(free) {
            Ok(0) => {}
            Ok(got) => {
                let _fits = port.enqueue_raw_bytes(free.get(..got).unwrap_or_default());
                return;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return,
            Err(_) => {}
        }
        drop(port);
        self.unwatch_input(ops);
        self.input = None;
    }
}

impl MutEventSubscriber for ConsolePump {
    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.timer, self.room.as_raw_fd()] {
            // A descriptor of our own always polls; without it only late output is later.
            let _never = ops.add(Events::new(&fd, EventSet::IN));
        }
        self.watch_input(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.timer {
            let mut port = self.console.port();
            let _expirations = port.writer_mut().timer.wait();
            port.writer_mut().send();
        } else if events.fd() == self.room.as_raw_fd() {
            let _count = self.room.read();
            self.watch_input(ops);
        } else {
            self.read_input(ops);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;

    fn console() -> (Console, File) {
        let mut file = tempfile::tempfile().unwrap();
        file.rewind().unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        (Console::new(line, file.try_clone().unwrap(), Arc::new(Trace::off())).unwrap(), file)
    }

    fn text(file: &mut File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_line_is_written_at_its_end_and_a_rest_when_flushed() {
        let (mut console, mut file) = console();
        console.write(0, b"one\ntw");
        assert_eq!(text(&mut file), "one\n");
        console.flush();
        assert_eq!(text(&mut file), "one\ntw");
    }

    #[test]
    fn the_panic_line_is_kept_without_its_time_stamp() {
        let (mut console, _file) = console();
        console.write(0, b"[    0.1] Kernel panic - not syncing: VFS: no root\r\n[ 0.2] Rebooting\n");
        assert_eq!(console.panic_line().unwrap(), "Kernel panic - not syncing: VFS: no root");
    }

    #[test]
    fn an_endless_line_is_written_and_not_kept() {
        let (mut console, mut file) = console();
        console.write(0, &[b'x'; 10_000]);
        console.flush();
        assert_eq!(text(&mut file).len(), 10_000);
        assert!(console.port().writer().line.len() <= BUFFER_BYTES);
    }
}
