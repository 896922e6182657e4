//! The kernel's command line.

use crate::cpu;

const ROOM: usize = 2048;

pub struct Words {
    text: [u8; ROOM],
    length: usize,
}

impl Words {
    /// Copies the line whose address the zero page tells (boot protocol, cmd_line_ptr).
    pub fn read(zero_page: u64) -> Self {
        let from = u64::from(cpu::read32(zero_page + 0x228));
        let mut words = Self { text: [0; ROOM], length: 0 };
        for (at, place) in (from..).zip(&mut words.text) {
            *place = cpu::read8(at);
            if *place == 0 {
                break;
            }
            words.length += 1;
        }
        words
    }

    fn all(&self) -> impl Iterator<Item = &str> {
        core::str::from_utf8(&self.text[..self.length]).unwrap_or_default().split_ascii_whitespace()
    }

    /// What follows `name=` in each word that begins so.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.all().filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='))
    }

    pub fn value(&self, name: &str) -> &str {
        self.values(name).next().unwrap_or_default()
    }

    pub fn number(&self, name: &str) -> u64 {
        number(self.value(name)).unwrap_or(0)
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The address in `4K@ADDRESS:LINE`.
pub fn window(text: &str) -> Option<u64> {
    number(text.split_once('@')?.1.split_once(':')?.0)
}
