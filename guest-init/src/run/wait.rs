//! Waiting, right behind the kernel's boot, to be told what to run.
//!
//! A snapshot of a machine that waits is the start of any other of its size: nothing of an image is mounted, no disk was read but maybe
//! the machine's own, which all of them begin with, no stream is open, and the random generator is seeded anew before anybody asks it.
//! What the kernel itself drew before, such as its own stack's canary, is the same in all of them.

use std::time::Duration;

use protocol::{FailureKind, FromGuest, RunConfig, Start, ToGuest};
use rustix::fs::{CWD, Mode, OFlags, SeekFrom, openat, seek};

use super::{
    clock,
    clock::Told,
    root::Disk,
    suspend::{renew_random, wait_for},
};
use crate::{
    control::{Control, monotonic_ms},
    failure::{Failure, OrSetup},
    sys,
};

/// Blocks of so many doublings of a page are the kernel's largest. Those of 2 MiB are few, and the initramfs was in one.
const WHOLE_ORDER: usize = 10;
/// The most pages that are set aside.
const MAX_FRAGMENTS: usize = 4096;
const PAGE_BYTES: usize = 4096;
/// How long the kernel may take to learn of a disk's length.
const DISK_LIMIT_MS: i64 = 5_000;
const DISK_PAUSE: Duration = Duration::from_micros(200);

/// Waits for what to run, most often in a machine that goes on from a snapshot of this moment. Its own disk may be mounted.
///
/// # Errors
/// No host tells, or the disks do not become what it says.
pub fn for_config(control: &mut Control, own: Option<&Disk>) -> Result<RunConfig, Failure> {
    control.establish()?;
    own.map_or(Ok(()), Disk::settle)?;
    set_fragments_aside();
    control.send(&FromGuest::Ready);
    let start = wait_for(control, |frame, asked_ns| match frame {
        ToGuest::Run(start) => {
            let time = Told::since(asked_ns, start.realtime_ns);
            Some((*start, time))
        }
        _ => None,
    });
    let Some((Start { disks, mut config, .. }, time)) = start else {
        return Err(Failure::new(FailureKind::Setup, "the host does not say what to run"));
    };
    clock::set(time, control)?;
    renew_random(&std::mem::take(&mut config.entropy))?;
    let others = disks.into_iter().enumerate().map(|(index, bytes)| (protocol::disk_name(index), bytes));
    for (device, bytes) in others.filter(|(device, _)| !own.is_some_and(|own| own.is(device))) {
        wait_for_disk(&device, bytes)?;
    }
    Ok(config)
}

/// Takes the free memory for programs and files that lies about in pieces, and offers it to the kernel again for when there is no
/// other: what it hands out next is then whole and untouched. In a machine that goes on from here a new page of that kind comes many
/// at a time, and one that the boot has used would be read from the snapshot first.
fn set_fragments_aside() {
    let pages =
        fragments(&std::fs::read_to_string("/proc/pagetypeinfo").unwrap_or_default()).min(MAX_FRAGMENTS);
    let _ = sys::set_memory_aside(pages * PAGE_BYTES);
}

/// The free pages of the movable kind in blocks of less than [`WHOLE_ORDER`] (Documentation/filesystems/proc.rst, pagetypeinfo). Of
/// other kinds the kernel gives a program none as long as it has these.
fn fragments(pagetypeinfo: &str) -> usize {
    let counts = pagetypeinfo.lines().flat_map(|line| {
        // Node 0, zone Normal, type Movable, count of blocks of one page, of two, of four, …
        let counts = line.split_once("type").and_then(|(_, rest)| rest.trim_start().strip_prefix("Movable "));
        counts.unwrap_or_default().split_whitespace().take(WHOLE_ORDER).enumerate()
    });
    counts.filter_map(|(order, count)| count.parse::<usize>().ok()?.checked_shl(order as u32)).sum()
}

/// The device tells of its new length by an interrupt, which the kernel follows in a work queue.
fn wait_for_disk(path: &str, bytes: u64) -> Result<(), Failure> {
    let until = monotonic_ms() + DISK_LIMIT_MS;
    loop {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let found = openat(CWD, path, flags, Mode::empty())
            .and_then(|disk| seek(&disk, SeekFrom::End(0)))
            .or_setup(|| format!("look at the disk {path}"))?;
        if found == bytes {
            return Ok(());
        }
        if monotonic_ms() >= until {
            let told = format!("the disk {path} has {found} bytes and not {bytes}");
            return Err(Failure::new(FailureKind::Setup, told));
        }
        std::thread::sleep(DISK_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_are_what_no_huge_page_is_made_of() {
        let text = "Page block order: 9\nPages per block:  512\n\n\
                    Free pages count per migrate type at order       0      1      2 \n\
                    Node    0, zone    DMA32, type    Unmovable     10     10     10      0      0      0      0      0      0      0      0 \n\
                    Node    0, zone    DMA32, type      Movable      3      2      1      0      0      0      0      0      1      5     61 \n\
                    Node    0, zone   Normal, type      Movable      1      0      0      0      0      0      0      0      0      0      0 \n\n\
                    Number of blocks type     Unmovable      Movable  Reclaimable \n\
                    Node 0, zone    DMA32           12           50            2 \n";
        assert_eq!(fragments(text), 3 + 4 + 4 + 256 + 5 * 512 + 1);
        assert_eq!(fragments(""), 0);
        assert_eq!(fragments("Node 0, zone DMA, type Movable -1 x 99999999999999999999999"), 0);
    }
}
