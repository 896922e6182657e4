//! The console: lines out, and the host's word to go on in.

use core::fmt::{self, Write};

use crate::cpu;

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;

pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(PORT, byte));
        Ok(())
    }
}

#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {{
        use core::fmt::Write;
        // The serial port takes everything.
        let _always = writeln!($crate::serial::Serial, $($part)*);
    }};
}

/// Makes the port usable again after somebody has written to all of its registers: no divisor latch, no loopback.
pub fn mend() {
    for (register, value) in [(3, 3), (4, 0), (1, 0), (2, 7)] {
        cpu::out8(PORT + register, value);
    }
    while cpu::in8(LINE_STATUS) & 1 != 0 {
        cpu::in8(PORT);
    }
}

/// Waits for a byte of the host.
pub fn wait_for_host() {
    while cpu::in8(LINE_STATUS) & 1 == 0 {
        cpu::rest(2000);
    }
    cpu::in8(PORT);
}
