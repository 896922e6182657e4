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

/// The most bytes of a console's file. A guest may write for ever, and the host's disk has an end.
pub const FILE_BYTES: u64 = 1 << 20;
/// What stays of a file that is full: its end, where a kernel's last words are.
const KEPT_BYTES: usize = 256 << 10;
const CUT: &[u8] = b"[flyrun-vmm: what came before is gone: the console has written more than 1 MiB]\n";

/// A file that notes when its first bytes come, and if it is a plain one, stays small.
#[derive(Debug)]
struct Output {
    file: File,
    /// Of a plain file.
    length: Option<u64>,
    /// What was written last, and up to as much before that.
    tail: Vec<u8>,
    trace: Arc<Trace>,
    silent: bool,
}

impl Output {
    fn new(file: File, trace: Arc<Trace>) -> Self {
        let length = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|it| it.len());
        Self { file, length, tail: Vec::new(), trace, silent: true }
    }

    /// Drops what is in the file but for the end of what this process has written: it is not read again, as vCPUs' threads may
    /// read no file.
    fn cut(&mut self) -> io::Result<u64> {
        let kept = self.tail.get(self.tail.len().saturating_sub(KEPT_BYTES)..).unwrap_or_default();
        self.file.set_len(0)?;
        self.file.write_all(CUT)?;
        self.file.write_all(kept)?;
        Ok((CUT.len() + kept.len()) as u64)
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        if self.tail.len() > 2 * KEPT_BYTES {
            self.tail.drain(..self.tail.len() - KEPT_BYTES);
        }
    }
}

impl Write for Output {
    /// A reader that went away does not stop the machine.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.silent && !bytes.is_empty() {
            self.silent = false;
            self.trace.step("first console output");
        }
        if let Some(length) = self.length {
            let grown = length.saturating_add(bytes.len() as u64);
            if grown <= FILE_BYTES {
                self.length = Some(grown);
            } else {
                match self.cut() {
                    Ok(left) => self.length = Some(left.saturating_add(bytes.len() as u64)),
                    // Output that cannot be kept small is lost.
                    Err(_) => return Ok(bytes.len()),
                }
            }
        }
        let _gone = self.file.write_all(bytes);
        if self.length.is_some() {
            self.remember(bytes);
        }
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
        let output = Output::new(output, trace);
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

    fn appended() -> (tempfile::NamedTempFile, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let output = File::options().read(true).append(true).open(file.path()).unwrap();
        (file, output)
    }

    #[test]
    fn a_console_that_never_ends_keeps_its_end_in_a_small_file() {
        let (file, output) = appended();
        let mut output = Output::new(output, Arc::new(Trace::off()));
        let mut longest = 0;
        for n in 0..60_000 {
            output.write_all(format!("line {n:>60}\n").as_bytes()).unwrap();
            longest = longest.max(file.as_file().metadata().unwrap().len());
        }
        assert!(longest <= FILE_BYTES, "{longest}");
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(
            text.starts_with("[flyrun-vmm: what came before is gone") && text.contains("1 MiB"),
            "{}",
            &text[..90]
        );
        let numbers: Vec<u32> =
            text.lines().skip(2).map(|line| line["line ".len()..].trim().parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "lines are missing");
        assert_eq!(numbers.last(), Some(&59_999));
    }

    #[test]
    fn a_console_goes_on_in_the_file_of_its_last_life_and_keeps_it_small() {
        let (file, output) = appended();
        file.as_file().set_len(5 << 20).unwrap();
        let mut output = Output::new(output, Arc::new(Trace::off()));
        output.write_all(b"new\n").unwrap();
        assert!(file.as_file().metadata().unwrap().len() <= FILE_BYTES);
        assert!(std::fs::read(file.path()).unwrap().ends_with(b"new\n"));
    }

    #[test]
    fn the_panic_line_has_no_control_characters() {
        let (mut console, _file) = console();
        console.write(0, b"[    0.1] Kernel panic - not syncing: \x1b[31mVFS\r\n");
        assert_eq!(console.panic_line().unwrap(), "Kernel panic - not syncing: [31mVFS");
    }
}
