//! The kernel's command line: as few words as a fast and quiet boot takes, each with its reason.

use std::fmt::Write;

use devices::virtio::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;

/// Where the command line lies.
pub const ADDRESS: u64 = 0x8000;
/// Linux's COMMAND_LINE_SIZE on x86, with the final zero.
const ROOM: usize = 2048;

/// Reset through the i8042 at once when the kernel panics; trust the TSC, which KVM keeps steady; do not test
/// whether timer interrupts arrive; set no memory aside for bounce buffers, 64 MiB above 3 GiB that no device needs.
const ALWAYS: &str = "reboot=k panic=-1 tsc=reliable no_timer_check swiotlb=noforce";
/// One UART is looked for, not four. Only what is worse than an error is printed, a panic above all: each byte is two exits, and
/// with `quiet`, one level more, a kernel without CPU mitigations says so in two lines at every boot.
const CONSOLE: &str = "console=ttyS0 loglevel=3 8250.nr_uarts=1";

/// Linux reports free blocks of this order and above to a balloon: 128 KiB. Left to itself it takes 2 MiB, and then wants 64 MiB
/// to be free before it begins, which a small machine never has.
pub const REPORTING_ORDER: u32 = 5;

/// One device behind virtio-mmio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioWindow {
    /// First guest address of its registers, which take one page.
    pub address: u64,
    /// Its interrupt line.
    pub irq: u32,
}

/// The command line for a machine with these devices, one of them perhaps a balloon, followed by the user's words.
pub fn build(console: bool, balloon: bool, devices: &[MmioWindow], user: &str) -> String {
    let mut line = String::with_capacity(512);
    if console {
        line.push_str(CONSOLE);
        line.push(' ');
    }
    line.push_str(ALWAYS);
    for device in devices {
        // Writing to a String cannot fail.
        let _always = write!(line, " virtio_mmio.device=4K@{:#x}:{}", device.address, device.irq);
    }
    if balloon {
        let _always = write!(line, " page_reporting.page_reporting_order={REPORTING_ORDER}");
    }
    let user = user.trim();
    if !user.is_empty() {
        line.push(' ');
        line.push_str(user);
    }
    line
}

/// Writes the command line to its place.
///
/// # Errors
/// It is too long for Linux, or has a zero in it.
pub fn write(memory: &Memory, line: &str) -> Result<(), BootError> {
    if line.len() >= ROOM {
        return Err(BootError::CommandLineTooLong { length: line.len(), limit: ROOM - 1 });
    }
    let mut bytes = Vec::with_capacity(line.len() + 1);
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(0);
    Ok(memory.write_slice(&bytes, GuestAddress(ADDRESS))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    #[test]
    fn the_users_words_come_last() {
        let windows = [MmioWindow { address: 0xd000_0000, irq: 5 }];
        let line = build(true, false, &windows, " init=/x -- a ");
        assert!(line.starts_with("console=ttyS0 loglevel=3"));
        assert!(line.ends_with(" virtio_mmio.device=4K@0xd0000000:5 init=/x -- a"), "{line}");
    }

    #[test]
    fn without_a_console_none_is_named() {
        assert!(!build(false, true, &[], "").contains("console"));
    }

    #[test]
    fn a_line_that_linux_would_cut_is_refused() {
        let memory = reserve(2).unwrap();
        assert!(write(&memory, &"x".repeat(ROOM - 1)).is_ok());
        assert!(matches!(
            write(&memory, &"x".repeat(ROOM)),
            Err(BootError::CommandLineTooLong { length: ROOM, limit: 2047 })
        ));
    }
}
