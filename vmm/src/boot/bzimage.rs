//! Loads a bzImage: its protected-mode part to the address it prefers, to be entered in long mode.

use std::fs::File;

use devices::virtio::Memory;
use linux_loader::{
    bootparam::setup_header,
    loader::{KernelLoader, bzimage::BzImage},
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{KERNEL_MIN, LoadedKernel};

/// The 64-bit entry point lies that far behind the start (boot protocol 2.12).
const ENTRY_64: u64 = 0x200;
const PROTOCOL_2_12: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;

/// Loads the file into memory.
///
/// # Errors
/// Says what is wrong with the file.
pub fn load(memory: &Memory, mut file: File) -> Result<LoadedKernel, String> {
    let loaded = BzImage::load(memory, None, &mut file, Some(GuestAddress(KERNEL_MIN)))
        .map_err(|e| format!("neither an ELF file nor a bzImage that loads ({e})"))?;
    let header = loaded.setup_header.ok_or("it has no setup header")?;
    let start = loaded.kernel_load.0;
    let init_size = check(&header)?;
    let size = usize::try_from(init_size).map_err(|e| e.to_string())?;
    if !memory.check_range(loaded.kernel_load, size) {
        return Err(format!("it needs {init_size:#x} bytes at {start:#x}, more than the machine's memory"));
    }
    Ok(LoadedKernel {
        entry: GuestAddress(start + ENTRY_64),
        end: loaded.kernel_end.max(start + init_size),
        setup_header: Some(header),
        // It is packed.
        text: None,
    })
}

/// The bytes that the kernel needs from its start on to unpack itself.
fn check(header: &setup_header) -> Result<u64, String> {
    let (version, flags, init_size) = (header.version, header.xloadflags, header.init_size);
    if version < PROTOCOL_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(format!(
            "boot protocol {}.{:02} without a 64-bit entry point, 2.12 or later is needed",
            version >> 8,
            version & 0xff
        ));
    }
    if u64::from(init_size) < ENTRY_64 {
        return Err(format!("its init_size is {init_size:#x}"));
    }
    Ok(u64::from(init_size))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::reserve;

    fn image() -> Vec<u8> {
        let mut image = vec![0u8; 8192];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x236] = 1;
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image
    }

    fn try_load(image: &[u8]) -> Result<LoadedKernel, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        load(&reserve(4).unwrap(), file)
    }

    #[test]
    fn a_bzimage_is_entered_at_its_64_bit_entry_point() {
        let kernel = try_load(&image()).unwrap();
        assert_eq!((kernel.entry.0, kernel.end), (0x10_0200, 0x20_0000));
        assert!(kernel.setup_header.is_some());
    }

    #[test]
    fn one_without_a_64_bit_entry_point_is_refused() {
        let mut old = image();
        old[0x236] = 0;
        assert!(try_load(&old).unwrap_err().contains("2.15"));
    }

    #[test]
    fn one_that_needs_more_memory_than_there_is_is_refused() {
        let mut big = image();
        big[0x263] = 0x7f;
        assert!(try_load(&big).unwrap_err().contains("more than the machine's memory"));
    }

    proptest! {
        #[test]
        fn no_header_panics(noise in proptest::collection::vec((0x1f1usize..0x268, any::<u8>()), 0..16), length in 0usize..8192) {
            let mut bytes = image();
            for (at, byte) in noise {
                bytes[at] = byte;
            }
            bytes.truncate(length);
            if let Ok(kernel) = try_load(&bytes) {
                prop_assert!(kernel.end <= 4 << 20);
            }
        }
    }
}
