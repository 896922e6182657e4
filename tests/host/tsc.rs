//! Prints how many kHz this machine's time stamp counter has. The test host's kernel cannot find out by itself where its emulator
//! is often interrupted: it then believes in a frequency that makes its clock run many times too fast.
use std::arch::x86_64::_rdtsc;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The counter and the clock at one moment: of several readings the one that was interrupted least.
fn now(since: Instant) -> (u64, u128) {
    (0..64)
        .map(|_| {
            let before = since.elapsed().as_nanos();
            // SAFETY: every x86-64 processor has this instruction, which reads a counter and nothing else.
            let ticks = unsafe { _rdtsc() };
            let after = since.elapsed().as_nanos();
            (after - before, ticks, before + (after - before) / 2)
        })
        .min()
        .map_or((0, 0), |(_, ticks, ns)| (ticks, ns))
}

fn main() {
    let since = Instant::now();
    let (first, began) = now(since);
    sleep(Duration::from_millis(50));
    let (last, ended) = now(since);
    println!("{}", u128::from(last - first) * 1_000_000 / (ended - began));
}
