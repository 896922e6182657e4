//! Repeatable randomness (splitmix64), and values that are known to hurt.

use crate::memory::{ARENA, ARENA_END, CANARIES, END, TABLES, TABLES_END};

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// A number that is near a limit, or any.
    pub fn number(&mut self) -> u64 {
        let any = self.next();
        let near = [
            0,
            1,
            2,
            0x7f,
            0xff,
            0x100,
            0xffff,
            0x1_0000,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 32,
            1 << 63,
            u64::MAX,
        ];
        match self.below(4) {
            0 => any,
            1 => any & 0xff,
            2 => self.of(&near),
            _ => self.of(&near).wrapping_add(self.below(9)).wrapping_sub(4),
        }
    }

    /// An address that a device may write to, or none of this machine's memory: whole or in part.
    pub fn writable(&mut self) -> u64 {
        let inside = ARENA + self.below(ARENA_END - ARENA - (1 << 20));
        match self.below(16) {
            0..9 => inside,
            9 => END - self.below(4096),
            10 => inside & !0xfff,
            11 => self.outside(),
            12 => 0xd000_0000 + self.below(8 << 12),
            13 => 0xfee0_0000 + self.below(4096),
            14 => u64::MAX - self.below(4096),
            _ => END + self.below(1 << 40),
        }
    }

    /// An address that a device may read, or none of this machine's memory.
    pub fn readable(&mut self) -> u64 {
        match self.below(8) {
            0 => self.of(&CANARIES).0 + self.below(4096),
            1 => TABLES + self.below(TABLES_END - TABLES),
            2 => END - self.below(4096),
            _ => self.writable(),
        }
    }

    /// Just behind the end of memory, or in the holes above it.
    pub fn outside(&mut self) -> u64 {
        let small = self.below(64);
        self.of(&[END, END + 4096, 0xd000_0000, 0xffff_f000, 1 << 32, 1 << 52, u64::MAX - 64]) + small
    }

    /// A length in bytes.
    pub fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1 => self.below(64) as u32,
            2 => 512 * self.below(64) as u32,
            3 => 4096,
            4 => self.below(70_000) as u32,
            5 => self.below(1 << 20) as u32,
            6 => self.of(&[u32::MAX, u32::MAX - 4095, 1 << 31, (1 << 31) - 1]),
            _ => self.next() as u32,
        }
    }
}
