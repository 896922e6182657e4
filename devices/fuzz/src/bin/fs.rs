//! What virtiofsd, or whoever has taken its place, answers while the device is set up: it works, or is refused in time.
#![no_main]

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream, time::Duration};

use devices::{testing::Guest, virtio::fs::Fs};
use devices_fuzz::{Input, start};
use libfuzzer_sys::fuzz_target;

/// An input never waits for it: what does not come ends the connection.
const LIMIT: Duration = Duration::from_secs(10);

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let answers = usize::from(input.u8()) * 8;
    let answers = input.bytes(answers);
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    if theirs.set_nonblocking(true).is_err() {
        return;
    }
    let _ = theirs.write_all(answers);
    let _ = theirs.shutdown(Shutdown::Write);
    let Ok(device) = Fs::new("fuzz", ours, LIMIT, || {}) else { return };
    let mut guest = Guest::new(device);
    start(&mut guest, &mut input);
    guest.run();
    guest.write(0x70, 0);
    start(&mut guest, &mut input);
    guest.kick(0);
    guest.run();
});
