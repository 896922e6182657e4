//! Places the initramfs: all files behind one another, as high in memory as the kernel takes it.

use devices::virtio::Memory;

use super::{BootError, LoadedKernel, Named};
use crate::memory::{self, LOW_END, PAGE};

/// Where the initramfs lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// First guest address.
    pub address: u64,
    /// Bytes, padding included.
    pub size: u64,
}

/// What a kernel without a setup header takes: everything below the gap for devices.
const NO_LIMIT: u64 = LOW_END;
/// cpio archives begin on this boundary.
const ARCHIVE_ALIGN: u64 = 4;

/// Loads the files to the end of the memory below the gap; `None` if there are none.
///
/// # Errors
/// A file cannot be read or there is no room for all.
pub fn load(
    memory: &Memory,
    low_memory: u64,
    kernel: &LoadedKernel,
    initrd: Vec<Named>,
) -> Result<Option<Initrd>, BootError> {
    let mut files = Vec::with_capacity(initrd.len());
    let mut total = 0u64;
    for Named { path, file } in initrd {
        let error = |source| BootError::File { what: "initramfs", path: path.display().to_string(), source };
        let length = file.metadata().map_err(error)?.len();
        files.push((path, file, total, length));
        total = total.saturating_add(length).saturating_add(ARCHIVE_ALIGN - 1) & !(ARCHIVE_ALIGN - 1);
    }
    if total == 0 {
        return Ok(None);
    }
    let address = place(low_memory, kernel, total)?;
    for (path, file, offset, length) in files {
        if length > 0 {
            memory::load(memory, address + offset, &file, 0, length).map_err(|source| BootError::File {
                what: "initramfs",
                path: path.display().to_string(),
                source,
            })?;
        }
    }
    Ok(Some(Initrd { address, size: total }))
}

/// The highest page from which `total` bytes fit.
fn place(low_memory: u64, kernel: &LoadedKernel, total: u64) -> Result<u64, BootError> {
    let by_kernel = kernel.setup_header.map_or(NO_LIMIT, |header| u64::from(header.initrd_addr_max) + 1);
    let limit = low_memory.min(by_kernel);
    let fits = limit.checked_sub(total).map(|address| address - address % PAGE);
    fits.filter(|address| *address >= kernel.end).ok_or(BootError::InitrdTooBig {
        bytes: total,
        kernel_end: kernel.end,
        limit,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::reserve;

    fn kernel(end: u64) -> LoadedKernel {
        LoadedKernel { entry: GuestAddress(0x10_0000), end, setup_header: None, text: None }
    }

    fn named(paths: &[std::path::PathBuf]) -> Vec<Named> {
        paths.iter().map(|path| Named::open("initramfs", path).unwrap()).collect()
    }

    #[test]
    fn files_follow_one_another_on_four_bytes() {
        let memory = reserve(4).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("a"), dir.path().join("b")];
        std::fs::write(&paths[0], b"first").unwrap();
        std::fs::write(&paths[1], b"second").unwrap();
        let initrd = load(&memory, 4 << 20, &kernel(0x20_0000), named(&paths)).unwrap().unwrap();
        assert_eq!(initrd, Initrd { address: (4 << 20) - 4096, size: 16 });
        let mut bytes = [0u8; 14];
        memory.read_slice(&mut bytes, GuestAddress(initrd.address)).unwrap();
        assert_eq!(&bytes, b"first\0\0\0second");
    }

    #[test]
    fn no_files_and_empty_files_are_no_initramfs() {
        let memory = reserve(4).unwrap();
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(load(&memory, 4 << 20, &kernel(0), vec![]).unwrap(), None);
        assert_eq!(load(&memory, 4 << 20, &kernel(0), named(&[empty.path().to_owned()])).unwrap(), None);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Named::open("initramfs", "/no/such".as_ref()).unwrap_err().to_string();
        assert!(error.contains("/no/such"), "{error}");
    }

    proptest! {
        #[test]
        fn it_never_overlaps_the_kernel_or_leaves_memory(low in 1u64..LOW_END, end in 0u64..LOW_END, total in 1u64..LOW_END) {
            if let Ok(address) = place(low, &kernel(end), total) {
                prop_assert!(address % PAGE == 0 && address >= end && address + total <= low);
            }
        }
    }
}
