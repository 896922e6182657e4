//! Machines that are suspended in one process and resumed in another, on a real KVM.
//!
//! Where KVM cannot run guests each test says so and is skipped, unless FLYRUN_REQUIRE_KVM=1 makes that a failure.
//! `make test` runs them through tests/host/run.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod tiny;

use std::{path::Path, sync::Arc};

use tiny::{RESET, WAIT, kvm, say, spec};
use vmm::{
    exit::VmExit,
    snapshot::{restore::Snapshot, save},
    trace::Trace,
    vm::Vm,
};

fn save_to(vm: &Vm, dir: &Path) -> Result<save::Report, save::NotSaved> {
    let mut machine = vm.machine();
    let standing = machine.standing().unwrap();
    save::save(vm.subject(), &standing, dir, &mut || false)
}

#[test]
fn a_guest_goes_on_where_it_was() {
    if kvm() {
        for cpus in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let spec = spec(dir.path(), &[&say("a\n"), &WAIT, &say("b"), &RESET], cpus);
            let mut vm = Vm::new(&spec, Arc::new(Trace::off())).unwrap();
            vm.start().unwrap();
            while std::fs::read(dir.path().join("console")).unwrap().is_empty() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            vm.machine().pause().unwrap();
            let saved = dir.path().join("snapshot");
            let report = save_to(&vm, &saved).unwrap();
            assert!(report.full && report.written.written_bytes > 4096, "{report:?}");
            drop(vm);
            let snapshot = Snapshot::open(&saved).unwrap();
            let mut vm = Vm::restore(snapshot, &spec, Arc::new(Trace::off())).unwrap();
            vm.start().unwrap();
            let end = vm.serve();
            let text = std::fs::read_to_string(dir.path().join("console")).unwrap();
            assert_eq!((end.exit, end.reason.as_str(), text.as_str()), (VmExit::Reset, "", "a\nb"));
        }
    }
}
