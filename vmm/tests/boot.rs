//! Machines that run: tiny guests of a few instructions, on a real KVM.
//!
//! Where KVM cannot run guests each test says so and is skipped, unless FLYRUN_REQUIRE_KVM=1 makes that a failure.
//! `make test` runs them through tests/host/run.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
};

use vmm::{
    ending::End,
    exit::VmExit,
    probe::{Verdict, probe},
    spec::{ConsoleSpec, VmSpec},
    trace::Trace,
    vm::Vm,
};

const LOAD_AT: u64 = 0x20_0000;
/// mov al, 0xfe; out 0x64, al; hlt; jmp to the hlt.
const RESET: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// ud2, which no handler takes.
const CRASH: [u8; 2] = [0x0f, 0x0b];
/// jmp to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// mov ecx, 50 million; dec ecx; jnz back.
const WAIT: [u8; 9] = [0xb9, 0x80, 0xf0, 0xfa, 0x02, 0xff, 0xc9, 0x75, 0xfc];

/// Code that writes the text to the first serial port.
fn say(text: &str) -> Vec<u8> {
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
fn kvm() -> bool {
    static VERDICT: OnceLock<Verdict> = OnceLock::new();
    let verdict = VERDICT.get_or_init(probe);
    if !verdict.usable() {
        let required = std::env::var_os("FLYRUN_REQUIRE_KVM").is_some_and(|v| v == "1");
        assert!(!required, "FLYRUN_REQUIRE_KVM=1, but {}", verdict.message());
        eprintln!("SKIPPED, nothing was tested: {}", verdict.message());
    }
    verdict.usable()
}

fn spec(dir: &Path, code: &[&[u8]], cpus: u8) -> VmSpec {
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
    }
}

/// Runs the code as a guest until it ends; its end and its console's text.
fn run(code: &[&[u8]], cpus: u8, meanwhile: impl FnOnce(&mut Vm)) -> (End, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::new(&spec(dir.path(), code, cpus), Arc::new(Trace::off())).unwrap();
    vm.start().unwrap();
    meanwhile(&mut vm);
    let end = vm.serve();
    (end, std::fs::read_to_string(dir.path().join("console")).unwrap())
}

#[test]
fn a_guest_writes_to_its_console_and_resets() {
    if kvm() {
        let (end, text) = run(&[&say("hello\nrest"), &RESET], 1, |_| {});
        assert_eq!((end.exit, end.reason.as_str(), text.as_str()), (VmExit::Reset, "", "hello\nrest"));
    }
}

#[test]
fn a_triple_fault_is_not_a_reset() {
    if kvm() {
        let (end, text) = run(&[&say("x\n"), &CRASH], 1, |_| {});
        assert_eq!((end.exit, text.as_str()), (VmExit::TripleFault, "x\n"));
        assert!(end.reason.contains("triple"), "{}", end.reason);
    }
}

#[test]
fn a_panic_is_named_with_its_line() {
    if kvm() {
        let (end, _) = run(&[&say("Kernel panic - not syncing: no init\n"), &RESET], 1, |_| {});
        assert_eq!(end.exit, VmExit::Panic);
        assert!(end.reason.ends_with("not syncing: no init"), "{}", end.reason);
    }
}

#[test]
fn waiting_vcpus_do_not_keep_a_machine_alive() {
    if kvm() {
        let (end, _) = run(&[&RESET], 4, |_| {});
        assert_eq!(end.exit, VmExit::Reset);
    }
}

#[test]
fn a_paused_machine_runs_on_after_resume() {
    if kvm() {
        let (end, text) = run(&[&say("a"), &WAIT, &say("b"), &RESET], 2, |vm| {
            vm.machine().pause().unwrap();
            assert!(vm.machine().pause().is_err(), "it is paused already");
            vm.machine().resume().unwrap();
            vm.machine().pause().unwrap();
            vm.machine().resume().unwrap();
        });
        assert_eq!((end.exit, text.as_str()), (VmExit::Reset, "ab"));
    }
}

#[test]
fn a_machine_starts_once() {
    if kvm() {
        let (end, _) = run(&[&WAIT, &RESET], 1, |vm| assert!(vm.start().is_err()));
        assert_eq!(end.exit, VmExit::Reset);
    }
}

#[test]
fn sigterm_ends_a_guest_that_never_does() {
    if kvm() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path(), &[&say("up\n"), &SPIN], 1);
        spec.console = ConsoleSpec::Stdio;
        let file = dir.path().join("spec.json");
        std::fs::write(&file, serde_json::to_vec(&spec).unwrap()).unwrap();
        let mut vmm = Command::new(env!("CARGO_BIN_EXE_flyrun-vmm"))
            .arg("--spec")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(vmm.stdout.as_mut().unwrap()), &mut line)
            .unwrap();
        assert_eq!(line, "up\n");
        assert!(Command::new("kill").arg(vmm.id().to_string()).status().unwrap().success());
        let output = vmm.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(VmExit::Terminated as i32));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "flyrun-vmm: ended by SIGTERM\n");
    }
}

#[test]
fn a_failure_is_one_line_with_its_code_also_without_kvm() {
    for (arguments, code, word) in [
        (vec!["--frob"], 2, "--frob"),
        (vec!["--spec", "/no/such/spec"], 2, "/no/such/spec"),
        (vec!["--kernel", "/no/such/kernel", "--cpus", "99"], 2, "cpus is 99"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_flyrun-vmm")).args(&arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(
            text.starts_with("flyrun-vmm: ") && text.contains(word) && text.lines().count() == 1,
            "{text}"
        );
    }
}

#[test]
fn a_kernel_that_is_none_is_a_setup_error() {
    if kvm() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path(), &[&RESET], 1);
        std::fs::write(&spec.kernel, b"not a kernel at all").unwrap();
        let error = Vm::new(&spec, Arc::new(Trace::off())).unwrap_err();
        assert_eq!(error.exit(), VmExit::Setup);
        spec.kernel = "/no/such/kernel".into();
        assert!(Vm::new(&spec, Arc::new(Trace::off())).unwrap_err().to_string().contains("/no/such/kernel"));
    }
}
