//! Guests of a few instructions, and whether there is a KVM to run them.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::{path::Path, sync::OnceLock};

use vmm::{
    probe::{Verdict, probe},
    spec::{ConsoleSpec, VmSpec},
};

const LOAD_AT: u64 = 0x20_0000;
/// mov al, 0xfe; out 0x64, al; hlt; jmp to the hlt.
pub const RESET: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// ud2, which no handler takes.
pub const CRASH: [u8; 2] = [0x0f, 0x0b];
/// jmp to itself.
pub const SPIN: [u8; 2] = [0xeb, 0xfe];
/// mov ecx, 50 million; dec ecx; jnz back.
pub const WAIT: [u8; 9] = [0xb9, 0x80, 0xf0, 0xfa, 0x02, 0xff, 0xc9, 0x75, 0xfc];

/// Code that writes the text to the first serial port.
pub fn say(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code
}

/// An ELF file with that code as its only segment.
fn kernel(code: &[&[u8]]) -> Vec<u8> {
    let code = code.concat();
    let mut elf = vec![0u8; 4096];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[2, 0, 62, 0]);
    put(24, &LOAD_AT.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    put(64, &1u32.to_le_bytes());
    for (at, value) in
        [(72, 4096), (80, LOAD_AT), (88, LOAD_AT), (96, code.len() as u64), (104, code.len() as u64)]
    {
        put(at, &value.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Whether KVM runs guests here; panics if it must and does not.
pub fn kvm() -> bool {
    static VERDICT: OnceLock<Verdict> = OnceLock::new();
    let verdict = VERDICT.get_or_init(probe);
    if !verdict.usable() {
        let required = std::env::var_os("FLYRUN_REQUIRE_KVM").is_some_and(|v| v == "1");
        assert!(!required, "FLYRUN_REQUIRE_KVM=1, but {}", verdict.message());
        eprintln!("SKIPPED, nothing was tested: {}", verdict.message());
    }
    verdict.usable()
}

pub fn spec(dir: &Path, code: &[&[u8]], cpus: u8) -> VmSpec {
    let path = dir.join("kernel");
    std::fs::write(&path, kernel(code)).unwrap();
    VmSpec {
        cpus,
        memory_mib: 16,
        kernel: path,
        initrd: Vec::new(),
        command_line: String::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        shares: vec![],
        console: ConsoleSpec::File(dir.join("console")),
        balloon: false,
    }
}
