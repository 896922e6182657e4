//! Which device answers an access to a port or to a register in memory.

use std::sync::{Arc, Mutex, PoisonError};

/// A device that a guest reaches through ports or memory-mapped registers. `offset` counts from the start of the
/// device's range and lies inside it; the access may reach beyond its end.
pub trait BusDevice: Send {
    /// The guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// One address space: ranges that do not overlap, each with its device.
#[derive(Default)]
pub struct Bus {
    /// Sorted by first address.
    ranges: Vec<Range>,
}

struct Range {
    first: u64,
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ranges.iter().map(|r| (r.first, r.length))).finish()
    }
}

impl Bus {
    /// Puts a device at `first..first + length`. Returns whether the range was free and not empty.
    pub fn insert(&mut self, first: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) -> bool {
        let Some(end) = first.checked_add(length) else { return false };
        let index = self.ranges.partition_point(|r| r.first < first);
        let before_fits =
            index == 0 || self.ranges.get(index - 1).is_none_or(|r| r.first + r.length <= first);
        let after_fits = self.ranges.get(index).is_none_or(|r| end <= r.first);
        if length == 0 || !before_fits || !after_fits {
            return false;
        }
        self.ranges.insert(index, Range { first, length, device });
        true
    }

    /// A guest's read. Where there is no device, all bits read as one, as on an open bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, range)) => {
                range.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A guest's write. Where there is no device, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, range)) = self.find(address) {
            range.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &Range)> {
        let index = self.ranges.partition_point(|r| r.first <= address).checked_sub(1)?;
        let range = self.ranges.get(index)?;
        let offset = address - range.first;
        (offset < range.length).then_some((offset, range))
    }
}

/// The two address spaces of a machine, beside its memory.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Memory-mapped registers.
    pub registers: Bus,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Cell(u64);

    impl BusDevice for Cell {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill((self.0 + offset) as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = u64::from(data[0]) - offset;
        }
    }

    fn cell(value: u64) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Cell(value)))
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut byte = [0];
        bus.read(address, &mut byte);
        byte[0]
    }

    #[test]
    fn an_access_reaches_its_device_with_the_offset() {
        let mut bus = Bus::default();
        assert!(bus.insert(0x3f8, 8, cell(10)) && bus.insert(0x60, 5, cell(50)));
        assert_eq!([read(&bus, 0x3f8), read(&bus, 0x3ff), read(&bus, 0x64)], [10, 17, 54]);
        bus.write(0x61, &[9]);
        assert_eq!(read(&bus, 0x60), 8);
    }

    #[test]
    fn an_open_bus_reads_as_ones() {
        let mut bus = Bus::default();
        assert!(bus.insert(0x60, 5, cell(0)));
        for address in [0, 0x5f, 0x65, u64::MAX] {
            assert_eq!(read(&bus, address), 0xff);
            bus.write(address, &[0]);
        }
    }

    #[test]
    fn an_overlapping_or_endless_range_is_refused() {
        let mut bus = Bus::default();
        assert!(bus.insert(0x100, 0x10, cell(0)));
        for (first, length) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0x0, 0x1000), (0x200, 0), (u64::MAX, 2)] {
            assert!(!bus.insert(first, length, cell(0)), "{first:#x}");
        }
        assert!(bus.insert(0x110, 1, cell(0)) && bus.insert(0xff, 1, cell(0)));
    }

    proptest! {
        #[test]
        fn every_address_is_answered_by_at_most_the_range_that_holds_it(
            ranges in proptest::collection::vec((0u64..300, 1u64..40), 1..12), address in 0u64..400,
        ) {
            let mut bus = Bus::default();
            let mut kept = Vec::new();
            for (first, length) in ranges {
                if bus.insert(first, length, cell(0)) {
                    kept.push((first, length));
                }
            }
            let expected = kept.iter().find(|(f, l)| (*f..f + l).contains(&address));
            prop_assert_eq!(bus.find(address).map(|(o, r)| (address - o, r.length)), expected.copied());
        }
    }
}
