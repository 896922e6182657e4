//! Machines that run: tiny guests of a few instructions, on a real KVM.
//!
//! Where KVM cannot run guests each test says so and is skipped, unless FLYRUN_REQUIRE_KVM=1 makes that a failure.
//! `make test` runs them through tests/host/run.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod tiny;

use std::{
    process::{Command, Stdio},
    sync::Arc,
};

use tiny::{CRASH, RESET, SPIN, WAIT, kvm, say, spec};
use vmm::{ending::End, exit::VmExit, spec::ConsoleSpec, trace::Trace, vm::Vm};

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

/// A flyrun-vmm whose guest has said `up` and does nothing else.
fn spinning(dir: &std::path::Path, more: &[&str]) -> std::process::Child {
    let mut spec = spec(dir, &[&say("up\n"), &SPIN], 1);
    spec.console = ConsoleSpec::Stdio;
    let file = dir.join("spec.json");
    std::fs::write(&file, serde_json::to_vec(&spec).unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_flyrun-vmm"));
    command.arg("--spec").arg(&file).args(more).stdin(Stdio::null());
    let mut vmm = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(vmm.stdout.as_mut().unwrap()), &mut line)
        .unwrap();
    assert_eq!(line, "up\n");
    vmm
}

/// Ends it; what it has said on standard error.
fn terminate(vmm: std::process::Child) -> String {
    assert!(Command::new("kill").arg(vmm.id().to_string()).status().unwrap().success());
    let output = vmm.wait_with_output().unwrap();
    assert_eq!(
        (String::from_utf8_lossy(&output.stdout).as_ref(), output.status.code()),
        ("", Some(7)),
        "{output:?}"
    );
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn sigterm_ends_a_guest_that_never_does() {
    if kvm() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(terminate(spinning(dir.path(), &[])), "flyrun-vmm: ended by SIGTERM\n");
    }
}

/// How the threads of a process are filtered: by `Seccomp` of proc(5), 0 or 2. Of the kernel's own threads some are listed too.
fn filters(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok());
    let value = |text: &str, name: &str| {
        text.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned())).unwrap_or_default()
    };
    let texts = texts.filter(|text| !value(text, "Name:").starts_with("kvm-"));
    texts.map(|text| value(&text, "Seccomp:")).collect()
}

#[test]
fn all_threads_are_filtered_unless_that_is_switched_off_which_is_said() {
    if kvm() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = spinning(dir.path(), &[]);
        // The guest may speak before the event loop begins.
        while filters(vmm.id()) != ["2", "2", "2"] {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        terminate(vmm);
        let vmm = spinning(dir.path(), &["--no-seccomp"]);
        while filters(vmm.id()).len() < 3 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(filters(vmm.id()), ["0", "0", "0"]);
        let told = terminate(vmm);
        assert!(told.starts_with("flyrun-vmm: --no-seccomp: threads may make any system call"), "{told}");
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
