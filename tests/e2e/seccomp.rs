//! Every thread of flyrun-vmm is under its filter, at every time; and one that is made to ask for more ends its machine, which
//! flyrun tells by name. The forbidden call is put into a thread of the very flyrun-vmm that is shipped, by ptrace: what an
//! attacker who has taken the thread over would do.

use std::collections::BTreeMap;
use std::time::Duration;

use tests::flyrun::scratch;
use tests::hold::Hold;
use tests::suspended::{COUNTER, Machine, wait_until};

/// Threads of the host's kernel that are listed with the process, and run none of its code.
const KERNEL: [&str; 2] = ["vhost-", "kvm-nx-lpage"];

/// The threads of a process by name.
fn threads(pid: i32) -> BTreeMap<String, i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let tids = tasks.filter_map(|task| task.file_name().to_str()?.parse::<i32>().ok());
    let named = tids.filter_map(|tid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).ok()?;
        Some((name.trim().to_string(), tid))
    });
    named.filter(|(name, _)| !KERNEL.iter().any(|kernel| name.starts_with(kernel))).collect()
}

/// Checks that these are all threads, and each filtered.
#[track_caller]
fn check(machine: &Machine, wanted: &[&str]) {
    let pid = machine.vmm();
    let wanted: Vec<_> = wanted.iter().map(|name| (name.to_string(), "2 1".to_string())).collect();
    let mut found = Vec::new();
    // One that has just begun has neither its name nor its filter.
    for _ in 0..100 {
        found = threads(pid).into_iter().map(|(name, tid)| (name, status(pid, tid))).collect();
        if found == wanted {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(found, wanted);
}

/// `Seccomp` and `NoNewPrivs` of a thread.
fn status(pid: i32, tid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    let value = |name| text.lines().find_map(|line: &str| line.strip_prefix(name)).unwrap_or_default().trim();
    format!("{} {}", value("Seccomp:"), value("NoNewPrivs:"))
}

const ALONE: [&str; 3] = ["flyrun-vmm", "vcpu0", "worker"];

#[test]
fn seccomp_filters_every_thread_from_the_first_instruction_through_suspend_and_resume() {
    let hold = Hold::at("vmm writes");
    let machine = Machine("filtered".into());
    hold.on(Machine::invocation("filtered", &[], COUNTER)).end().code(0);
    check(&machine, &ALONE);
    machine.wait_for_lines(2);
    check(&machine, &ALONE);
    let mut suspend = machine.invoke(&["suspend"]).build(&[]);
    let mut suspend =
        suspend.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).spawn().unwrap();
    let held = hold.reached();
    check(&machine, &ALONE);
    hold.release(held);
    assert!(suspend.wait().unwrap().success());
    for _ in 0..2 {
        machine.call(&["resume"]).code(0);
        check(&machine, &ALONE);
        machine.wait_for_lines(2);
        check(&machine, &ALONE);
        assert_eq!(machine.last_start(), "resumed");
        machine.call(&["suspend"]).code(0);
    }
    machine.call(&["resume"]).code(0);
    machine.check_count();
}

#[test]
fn seccomp_filters_a_machine_of_several_cpus_with_a_network_and_a_directory_of_the_host() {
    let directory = scratch();
    let share = format!("{}:/data", directory.path().display());
    let machine = Machine::start("filtered-all", &["--cpus", "3", "-v", &share], COUNTER);
    let all = ["flyrun-vmm", "fs-watchdog", "vcpu0", "vcpu1", "vcpu2", "worker"];
    check(&machine, &all);
    machine.exec("echo 1 > /data/file; ls -R /data; cat /proc/net/dev; dd if=/dev/zero of=/big bs=1M count=8; sync; rm /big; fstrim / || true");
    machine.call(&["pause"]).code(0);
    machine.call(&["unpause"]).code(0);
    check(&machine, &all);
    machine.wait_for_lines(2);
}

/// A call that no list has, for each kind of thread.
const FORBIDDEN: [(&str, &str, i64); 4] = [
    ("flyrun-vmm", "main", libc::SYS_execve),
    ("vcpu0", "vcpu0", libc::SYS_ptrace),
    ("worker", "worker", libc::SYS_socket),
    ("fs-watchdog", "fs-watchdog", libc::SYS_clone),
];

fn name(call: i64) -> &'static str {
    match call {
        libc::SYS_execve => "execve",
        libc::SYS_ptrace => "ptrace",
        libc::SYS_socket => "socket",
        _ => "clone",
    }
}

#[test]
fn seccomp_ends_a_machine_one_of_whose_threads_is_taken_over_and_flyrun_tells_by_name() {
    for (comm, thread, call) in FORBIDDEN {
        let directory = scratch();
        let share = format!("{}:/data", directory.path().display());
        let machine = Machine::start(&format!("taken-{thread}"), &["-v", &share], COUNTER);
        machine.wait_for_lines(1);
        let pid = machine.vmm();
        // One that has just begun has not got its name yet.
        wait_until("the thread is there", || threads(pid).contains_key(comm));
        make_call(threads(pid)[comm], call);
        machine.wait_for_state("failed");
        let told = machine.inspect("outcome")["error"].to_string();
        let wanted = format!("thread {thread} made the system call {}(", name(call));
        assert!(told.contains(&wanted) && told.contains("seccomp filter does not allow"), "{thread}: {told}");
        // The directory and the guest's disk are as good as after a power cut.
        machine.call(&["start"]).code(0);
        machine.wait_for_lines(2);
    }
}

#[test]
fn seccomp_kills_a_foreground_machine_with_flyruns_own_exit_code() {
    let machine = Machine("taken-here".into());
    let image = tests::image::busybox();
    let mut command =
        tests::suspended::command(&["run", "--name", "taken-here", &image, "sleep", "1000"]).build(&[]);
    let child =
        command.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    wait_until("it runs", || {
        let mut told = machine.call(&["inspect"]);
        told.code == 0 && told.json()[0]["state"] == "started"
    });
    make_call(threads(machine.vmm())["vcpu0"], libc::SYS_openat);
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{told}");
    assert!(told.contains("flyrun: thread vcpu0 made the system call openat("), "{told}");
}

/// Has a thread make a system call without arguments, instead of going on with the one it is in.
fn make_call(tid: libc::pid_t, call: i64) {
    while !try_to_make_call(tid, call) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// False if the thread was in none. This thread traces it meanwhile.
fn try_to_make_call(tid: libc::pid_t, call: i64) -> bool {
    const SYSCALL_BYTES: u64 = 2;
    const SYSCALL: u16 = u16::from_le_bytes([0x0f, 0x05]);
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: `registers` is plain data of the size that GETREGS and SETREGS move, waitpid writes one number, and the others
    // take no pointer of this process.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, tid, none, none), 0);
        assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, tid, none, none), 0);
        let mut status = 0;
        assert_eq!(libc::waitpid(tid, &mut status, libc::__WALL), tid);
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, tid, none, &raw mut registers), 0);
        let instruction = registers.rip - SYSCALL_BYTES;
        let word = libc::ptrace(libc::PTRACE_PEEKTEXT, tid, instruction, none) as u16;
        let is_in_call = word == SYSCALL && registers.orig_rax.cast_signed() >= 0;
        if is_in_call {
            registers.rip = instruction;
            registers.rax = call.cast_unsigned();
            // Nothing is to be begun again.
            registers.orig_rax = u64::MAX;
            (registers.rdi, registers.rsi, registers.rdx) = (0, 0, 0);
            assert_eq!(libc::ptrace(libc::PTRACE_SETREGS, tid, none, &raw const registers), 0);
        }
        assert_eq!(libc::ptrace(libc::PTRACE_DETACH, tid, none, none), 0);
        is_in_call
    }
}
