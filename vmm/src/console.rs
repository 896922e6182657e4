//! The host's side of the first serial port: its output's file and its input's.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::legacy::{self, Buffering, ConsoleState};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{bus::BusDevice, trace::Trace};

/// A file that notes when its first bytes come.
#[derive(Debug)]
struct Output {
    file: File,
    trace: Arc<Trace>,
    silent: bool,
}

impl Write for Output {
    /// A reader that went away does not stop the machine.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.silent && !bytes.is_empty() {
            self.silent = false;
            self.trace.step("first console output");
        }
        let _gone = self.file.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Port = Arc<Mutex<legacy::Console<Output>>>;

fn lock(port: &Port) -> MutexGuard<'_, legacy::Console<Output>> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The serial port as the vCPUs reach it.
#[derive(Clone)]
pub struct Console {
    port: Port,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

impl Console {
    /// A new or a saved port with that interrupt line and output, and the part of it that the event loop runs for `input`.
    /// A terminal gets each byte at once, everything else whole lines.
    ///
    /// # Errors
    /// The host gives no event, or the saved port is none.
    pub fn new(
        saved: Option<&ConsoleState>,
        irq: EventFd,
        output: File,
        input: Option<File>,
        trace: Arc<Trace>,
    ) -> io::Result<(Self, ConsoleInput)> {
        let taken = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let buffering = if output.is_terminal() { Buffering::None } else { Buffering::Line };
        let output = Output { file: output, trace, silent: true };
        let taken_there = taken.try_clone()?;
        let port = match saved {
            None => legacy::Console::new(irq, taken_there, output, buffering),
            Some(state) => legacy::Console::restore(state, irq, taken_there, output, buffering)?,
        };
        let port = Arc::new(Mutex::new(port));
        let input =
            ConsoleInput { port: Arc::clone(&port), taken, input, polled: false, waiting: Vec::new() };
        Ok((Self { port }, input))
    }

    /// What a snapshot keeps of the port.
    pub fn save(&self) -> ConsoleState {
        lock(&self.port).save()
    }

    /// Raises the port's line again if an interrupt is pending.
    pub fn remind(&self) {
        lock(&self.port).remind();
    }

    /// Writes a line that has not ended.
    pub fn flush(&self) {
        // `Output` swallows errors.
        let _never = lock(&self.port).flush();
    }

    /// The line with which the kernel panicked.
    pub fn panic_line(&self) -> Option<String> {
        let line = lock(&self.port).panic()?;
        Some(line.chars().filter(|c| !c.is_control()).collect())
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        let mut port = lock(&self.port);
        data.iter_mut().for_each(|byte| *byte = port.read(offset));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        let mut port = lock(&self.port);
        data.iter().for_each(|byte| port.write(offset, *byte));
    }
}

/// Feeds a file to the serial port, as fast as the guest takes it.
pub struct ConsoleInput {
    port: Port,
    /// Fires when the guest took all it was given.
    taken: EventFd,
    /// `None` after its end.
    input: Option<File>,
    /// Whether the input is in the poll set; a plain file never is, it is always ready.
    polled: bool,
    /// What was read and did not fit.
    waiting: Vec<u8>,
}

impl ConsoleInput {
    fn go_on(&mut self, ops: &mut EventOps) {
        self.offer();
        if !self.waiting.is_empty() || self.polled {
            return;
        }
        if let Some(input) = &self.input {
            self.polled = ops.add(Events::new(input, EventSet::IN)).is_ok();
            if !self.polled {
                self.read(ops);
            }
        }
    }

    fn offer(&mut self) {
        let took = lock(&self.port).input(&self.waiting).min(self.waiting.len());
        self.waiting.drain(..took);
    }

    fn stop_polling(&mut self, ops: &mut EventOps) {
        if let (Some(input), true) = (&self.input, self.polled) {
            let _gone = ops.remove(Events::new(input, EventSet::IN));
        }
        self.polled = false;
    }

    fn read(&mut self, ops: &mut EventOps) {
        let mut bytes = [0u8; 64];
        let Some(input) = &mut self.input else { return };
        match input.read(&mut bytes) {
            Ok(0) => {}
            Ok(got) => {
                self.waiting.extend_from_slice(bytes.get(..got).unwrap_or_default());
                self.offer();
                if !self.waiting.is_empty() {
                    self.stop_polling(ops);
                }
                return;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return,
            Err(_) => {}
        }
        self.stop_polling(ops);
        self.input = None;
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps) {
        // An eventfd of our own always polls; without it input only stops at a full port.
        let _always = ops.add(Events::new(&self.taken, EventSet::IN));
        self.go_on(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.taken.as_raw_fd() {
            let _count = self.taken.read();
            self.go_on(ops);
        } else {
            self.read(ops);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;

    fn console() -> (Console, File) {
        let file = tempfile::tempfile().unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let output = file.try_clone().unwrap();
        (Console::new(None, line, output, None, Arc::new(Trace::off())).unwrap().0, file)
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
    fn the_panic_line_has_no_control_characters() {
        let (mut console, _file) = console();
        console.write(0, b"[    0.1] Kernel panic - not syncing: \x1b[31mVFS\r\n");
        assert_eq!(console.panic_line().unwrap(), "Kernel panic - not syncing: [31mVFS");
    }
}
