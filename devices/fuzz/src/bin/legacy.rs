//! The serial port and the keyboard controller with any accesses of the guest, input of the host, and states that they go on from.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use devices::legacy::{Buffering, Console, ConsoleState, ResetController};
use devices_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("there are descriptors")
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let buffering = if input.u8() & 1 == 0 { Buffering::Line } else { Buffering::None };
    let mut console = Console::new(event(), event(), Vec::new(), buffering);
    let reset = event();
    let mut controller = ResetController::new(reset.try_clone().expect("there are descriptors"));
    let mut typed = 0;
    while !input.is_empty() {
        match input.u8() % 8 {
            0..3 => console.write(input.u8(), input.u8()),
            3 => _ = console.read(input.u8()),
            4 => {
                let bytes = input.bytes(70);
                typed += console.input(bytes);
                assert!(typed <= data.len());
            }
            5 => {
                let mut state = console.save();
                change(&mut state, &mut input);
                console.remind();
                if let Ok(next) = Console::restore(&state, event(), event(), Vec::new(), buffering) {
                    console = next;
                }
            }
            6 => controller.write(input.u8(), input.u8()),
            _ => _ = controller.read(input.u8()),
        }
    }
    let _ = (console.flush(), console.panic());
    let _ = reset.read();
});

/// A byte of a saved state that nobody has saved.
fn change(state: &mut ConsoleState, input: &mut Input<'_>) {
    let value = input.u8();
    match input.u8() % 12 {
        0 => state.baud_divisor_low = value,
        1 => state.baud_divisor_high = value,
        2 => state.interrupt_enable = value,
        3 => state.interrupt_identification = value,
        4 => state.line_control = value,
        5 => state.line_status = value,
        6 => state.modem_control = value,
        7 => state.modem_status = value,
        8 => state.scratch = value,
        9 => state.input = vec![value; usize::from(input.u8())],
        _ => {}
    }
}
