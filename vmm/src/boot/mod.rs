//! Everything the guest finds in memory and registers when its first instruction runs: the 64-bit boot protocol of
//! Linux (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

pub mod bzimage;
pub mod command_line;
pub mod elf;
pub mod initrd;
pub mod params;
pub mod registers;

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use devices::virtio::Memory;
use linux_loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryError};

use crate::spec::VmSpec;

/// Lowest address at which a kernel may be loaded: below lie the tables of this module and the BIOS area.
pub const KERNEL_MIN: u64 = 0x10_0000;

/// Why a kernel or an initramfs could not be loaded.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file of the machine could not be opened or read.
    #[error("{what} {path}: {source}")]
    File {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The path as given.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel file is not one that can be booted.
    #[error("kernel {path}: {reason}; give an x86-64 vmlinux (ELF) or bzImage with --kernel")]
    Kernel {
        /// The path as given.
        path: String,
        /// What is wrong with it, with the values found.
        reason: String,
    },
    /// The initramfs has no place in guest memory.
    #[error(
        "an initramfs of {bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}; give the machine more memory"
    )]
    InitrdTooBig {
        /// All files together, padded.
        bytes: u64,
        /// First address behind the kernel.
        kernel_end: u64,
        /// First address that the kernel cannot take an initramfs from.
        limit: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel's command line has {length} bytes and at most {limit} are possible")]
    CommandLineTooLong {
        /// Bytes without the final zero.
        length: usize,
        /// Bytes possible.
        limit: usize,
    },
    /// A table of the boot protocol lies outside guest memory.
    #[error("guest memory is too small for the boot tables: {0}")]
    Tables(#[from] GuestMemoryError),
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Guest physical address of the 64-bit entry point.
    pub entry: GuestAddress,
    /// First address behind what the kernel needs at its start, its bss included.
    pub end: u64,
    /// The setup header of a bzImage, which the zero page must repeat.
    pub setup_header: Option<setup_header>,
    /// Its text, if that fills a huge page.
    pub text: Option<KernelText>,
}

/// Where a kernel's text is, with the read-only data that linkers put behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelText {
    /// Whole huge pages, in one piece, that hold nothing else.
    pub range: Range<u64>,
    /// What of them is in no file, in order. It is zeros, until a kernel uses the memory for something else.
    pub padding: Vec<Range<u64>>,
}

/// A file and what it is called.
#[derive(Debug)]
pub struct Named {
    /// As given.
    pub path: PathBuf,
    /// Open for reading.
    pub file: File,
}

impl Named {
    /// Opens the file.
    ///
    /// # Errors
    /// The host's; `what` says what it is for.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        match File::open(path) {
            Ok(file) => Ok(Self { path: path.to_path_buf(), file }),
            Err(source) => Err(BootError::File { what, path: path.display().to_string(), source }),
        }
    }
}

/// The files that a machine boots from.
#[derive(Debug)]
pub struct Files {
    /// The kernel.
    pub kernel: Named,
    /// What makes up the initramfs.
    pub initrd: Vec<Named>,
}

impl Files {
    /// Opens those of the spec.
    ///
    /// # Errors
    /// The first that does not open.
    pub fn open(spec: &VmSpec) -> Result<Self, BootError> {
        let initrd = spec.initrd.iter().map(|path| Named::open("initramfs", path));
        Ok(Self { kernel: Named::open("kernel", &spec.kernel)?, initrd: initrd.collect::<Result<_, _>>()? })
    }
}

/// Loads an ELF vmlinux or a bzImage, whichever the file is.
///
/// # Errors
/// The file cannot be read, or is neither, or is broken, or does not fit the memory.
pub fn load_kernel(memory: &Memory, Named { path, file }: Named) -> Result<LoadedKernel, BootError> {
    let shown = || path.display().to_string();
    let mut magic = [0u8; 4];
    let loaded = match file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == *b"\x7fELF" => elf::load(memory, &file),
        Ok(()) => bzimage::load(memory, file),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err("the file has less than 4 bytes".to_owned())
        }
        Err(source) => return Err(BootError::File { what: "kernel", path: shown(), source }),
    };
    loaded.map_err(|reason| BootError::Kernel { path: shown(), reason })
}
