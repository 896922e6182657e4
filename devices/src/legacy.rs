//! The two devices of a PC that Linux still wants here: a serial port for the kernel's console and the keyboard
//! controller for its reset. Both are vm-superio's, with this crate's events and console sink around them.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::{
    I8042Device, Serial, Trigger,
    serial::{SerialEvents, SerialState},
};
use vmm_sys_util::eventfd::EventFd;

/// What every Linux panic begins with on the console.
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// The most of a panic's line that is kept, in bytes.
const PANIC_LINE_BYTES: usize = 512;
/// The most output that waits for the end of its line, in bytes.
const LINE_BYTES: usize = 1024;

/// An eventfd as vm-superio wants it.
#[derive(Debug)]
struct EventTrigger(EventFd);

impl Trigger for EventTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full, so the event is pending anyway.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// Tells by an eventfd that the guest has read all input, so that there is room for more.
#[derive(Debug)]
struct InputTaken(EventFd);

impl SerialEvents for InputTaken {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Full means pending.
        let _ = self.0.write(1);
    }
}

/// When the console's output is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffering {
    /// At the end of each line: one system call a line. For logs.
    Line,
    /// At once: one system call a byte. For a person at a terminal.
    None,
}

/// Where the guest's serial output goes; it also listens for the kernel's panic.
struct ConsoleSink<W> {
    out: W,
    buffering: Buffering,
    line: Vec<u8>,
    panic: PanicWatch,
}

impl<W: Write> ConsoleSink<W> {
    fn new(out: W, buffering: Buffering) -> Self {
        ConsoleSink { out, buffering, line: Vec::with_capacity(LINE_BYTES), panic: PanicWatch::default() }
    }

    fn drain(&mut self) -> io::Result<()> {
        let written = self.out.write_all(&self.line).and_then(|()| self.out.flush());
        // Output that cannot be written is lost: the guest must not be able to fill the host's memory with it.
        self.line.clear();
        written
    }
}

impl<W: Write> Write for ConsoleSink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.panic.see(*byte);
            self.line.push(*byte);
            if self.buffering == Buffering::None || *byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.drain()?;
            }
        }
        Ok(bytes.len())
    }

    /// vm-superio flushes after every byte; [`ConsoleSink::drain`] is what really does.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Finds [`PANIC`] in a stream of bytes and keeps the rest of that line.
#[derive(Debug, Default)]
struct PanicWatch {
    matched: usize,
    line: Option<Vec<u8>>,
    complete: bool,
}

impl PanicWatch {
    fn see(&mut self, byte: u8) {
        if let Some(line) = &mut self.line {
            self.complete |= byte == b'\n';
            if !self.complete && byte != b'\r' && line.len() < PANIC_LINE_BYTES {
                line.push(byte);
            }
            return;
        }
        // The pattern's first byte does not come again in it, so a mismatch can only start anew.
        self.matched = match PANIC.get(self.matched) {
            Some(wanted) if *wanted == byte => self.matched + 1,
            _ => usize::from(PANIC.first() == Some(&byte)),
        };
        if self.matched == PANIC.len() {
            self.line = Some(PANIC.to_vec());
        }
    }
}

/// What a snapshot keeps of the serial port: its registers, by the names of the 16550A, and what the guest has not read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// DLL.
    pub baud_divisor_low: u8,
    /// DLM.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Input that the guest has not read.
    pub input: Vec<u8>,
}

/// The first serial port (16550A), with the kernel's console on it.
pub struct Console<W: Write> {
    serial: Serial<EventTrigger, InputTaken, ConsoleSink<W>>,
}

impl<W: Write> Console<W> {
    /// Creates the port: `irq` is the event of its interrupt line, `input_taken` fires when the guest has read all that
    /// was given to [`Console::input`].
    pub fn new(irq: EventFd, input_taken: EventFd, out: W, buffering: Buffering) -> Self {
        let sink = ConsoleSink::new(out, buffering);
        Console { serial: Serial::with_events(EventTrigger(irq), InputTaken(input_taken), sink) }
    }

    /// The same, going on where a saved port was.
    ///
    /// # Errors
    /// The state is that of no port.
    pub fn restore(
        state: &ConsoleState,
        irq: EventFd,
        input_taken: EventFd,
        out: W,
        buffering: Buffering,
    ) -> io::Result<Self> {
        let registers = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let sink = ConsoleSink::new(out, buffering);
        Serial::from_state(&registers, EventTrigger(irq), InputTaken(input_taken), sink)
            .map(|serial| Console { serial })
            .map_err(|error| io::Error::other(format!("the saved serial port: {error}")))
    }

    /// What a snapshot keeps. Output that waits for the end of its line is written out.
    pub fn save(&mut self) -> ConsoleState {
        // The sink of a console swallows errors, or its output is lost either way.
        let _ = self.flush();
        let state = self.serial.state();
        ConsoleState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Raises the line again if an interrupt is pending: the saved one may have been on its way to the vCPU.
    pub fn remind(&self) {
        const NOTHING_PENDING: u8 = 1;
        if self.serial.state().interrupt_identification & NOTHING_PENDING == 0 {
            // The one error is a full counter, which is as good as one more.
            let _ = self.serial.interrupt_evt().trigger();
        }
    }

    /// Handles the guest's read of the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.serial.read(offset)
    }

    /// Handles the guest's write to the register at `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.serial.write(offset, value) {
            log::debug!("console: {error}");
        }
    }

    /// Gives the guest as much of `bytes` as its input buffer takes now; returns how many it took.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.serial.fifo_capacity().min(bytes.len());
        self.serial.enqueue_raw_bytes(bytes.get(..room).unwrap_or_default()).unwrap_or_default()
    }

    /// Writes out a line that has not ended yet. To be called when the machine ends.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.serial.writer_mut().drain()
    }

    /// The line in which the guest's kernel said that it panicked, as far as it has come out.
    pub fn panic(&self) -> Option<String> {
        let line = self.serial.writer().panic.line.as_ref()?;
        Some(String::from_utf8_lossy(line).into_owned())
    }
}

/// The keyboard controller, of which only the reset line is connected.
#[derive(Debug)]
pub struct ResetController {
    i8042: I8042Device<EventTrigger>,
}

impl ResetController {
    /// Creates the controller; `reset` fires when the guest asks for a reset.
    pub fn new(reset: EventFd) -> Self {
        ResetController { i8042: I8042Device::new(EventTrigger(reset)) }
    }

    /// Handles the guest's read at `offset` from port 0x60.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.i8042.read(offset)
    }

    /// Handles the guest's write at `offset` from port 0x60.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.i8042.write(offset, value) {
            log::error!("cannot signal the guest's reset: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// Counts the writes, to tell one a line from one a byte.
    #[derive(Default)]
    struct Out {
        bytes: Vec<u8>,
        writes: usize,
    }

    impl Write for &mut Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.bytes.extend_from_slice(bytes);
            self.writes += 1;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    fn print(out: &mut Out, buffering: Buffering, text: &[u8]) -> Option<String> {
        let mut console = Console::new(event(), event(), out, buffering);
        for byte in text {
            console.write(0, *byte);
        }
        console.flush().unwrap();
        console.panic()
    }

    #[test]
    fn a_line_is_one_write_and_its_end_is_not_lost() {
        let mut out = Out::default();
        print(&mut out, Buffering::Line, b"one\ntwo\nthree");
        assert_eq!((out.bytes.as_slice(), out.writes), (&b"one\ntwo\nthree"[..], 3));
    }

    #[test]
    fn unbuffered_output_is_written_at_once() {
        let mut out = Out::default();
        print(&mut out, Buffering::None, b"ab");
        assert_eq!((out.bytes.as_slice(), out.writes), (&b"ab"[..], 2));
    }

    #[test]
    fn output_without_line_ends_does_not_pile_up() {
        let mut out = Out::default();
        print(&mut out, Buffering::Line, &[b'x'; 10 * LINE_BYTES]);
        assert_eq!((out.bytes.len(), out.writes), (10 * LINE_BYTES, 10));
    }

    #[test]
    fn a_panic_is_found_with_its_reason() {
        let text = b"[    0.1] Kernel KKernel panic - not syncing: no init found\r\nmore\n";
        let panic = print(&mut Out::default(), Buffering::Line, text);
        assert_eq!(panic.as_deref(), Some("Kernel panic - not syncing: no init found"));
        assert_eq!(print(&mut Out::default(), Buffering::Line, b"Kernel panic - not synching"), None);
    }

    #[test]
    fn a_panic_without_end_is_kept_in_bounds() {
        let mut text = PANIC.to_vec();
        text.extend([b'x'; 5000]);
        assert_eq!(print(&mut Out::default(), Buffering::Line, &text).unwrap().len(), PANIC_LINE_BYTES);
    }

    #[test]
    fn input_reaches_the_guest_and_asks_for_more() {
        let (irq, taken) = (event(), event());
        let mut console =
            Console::new(irq.try_clone().unwrap(), taken.try_clone().unwrap(), io::sink(), Buffering::Line);
        console.write(1, 1);
        assert_eq!(console.input(&[b'x'; 100]), 64, "the FIFO's size");
        assert_eq!(console.input(b"y"), 0);
        assert!(irq.read().unwrap() >= 1);
        let _ = taken.read();
        for _ in 0..64 {
            assert_eq!(console.read(0), b'x');
        }
        assert_eq!(taken.read().unwrap(), 1);
    }

    #[test]
    fn the_reset_command_fires_the_event_and_nothing_else_does() {
        let reset = event();
        let mut controller = ResetController::new(reset.try_clone().unwrap());
        controller.write(0, 0xfe);
        controller.write(4, 0xff);
        assert!(reset.read().is_err());
        controller.write(4, 0xfe);
        assert_eq!(reset.read().unwrap(), 1);
    }

    #[test]
    fn a_saved_port_goes_on_with_its_registers_its_input_and_its_interrupt() {
        let mut console = Console::new(event(), event(), io::sink(), Buffering::Line);
        for (register, value) in [(1, 1), (3, 3), (4, 0xb), (7, 0x5a)] {
            console.write(register, value);
        }
        console.input(b"waiting");
        let state = console.save();
        let bytes = postcard::to_allocvec(&state).unwrap();
        let state: ConsoleState = postcard::from_bytes(&bytes).unwrap();
        let irq = event();
        let mut restored =
            Console::restore(&state, irq.try_clone().unwrap(), event(), io::sink(), Buffering::Line).unwrap();
        let _ = irq.read();
        restored.remind();
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!([restored.read(3), restored.read(4), restored.read(7)], [3, 0xb, 0x5a]);
        assert_eq!((0..7).map(|_| restored.read(0)).collect::<Vec<_>>(), b"waiting");
    }

    #[test]
    fn a_saved_port_with_more_input_than_a_port_holds_is_refused() {
        let state = ConsoleState { input: vec![b'x'; 65], ..ConsoleState::default() };
        assert!(Console::restore(&state, event(), event(), io::sink(), Buffering::Line).is_err());
    }

    proptest! {
        #[test]
        fn any_register_access_is_harmless(accesses in prop::collection::vec(any::<(u8, u8, bool)>(), 0..300)) {
            let mut console = Console::new(event(), event(), io::sink(), Buffering::Line);
            let mut controller = ResetController::new(event());
            for (offset, value, write) in accesses {
                if write {
                    console.write(offset, value);
                    controller.write(offset, value);
                } else {
                    console.read(offset);
                    controller.read(offset);
                }
                console.input(&[value]);
            }
        }
    }
}
