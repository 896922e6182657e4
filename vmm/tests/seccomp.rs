//! The filters under a real kernel: what is not listed is not made and ends the process by name, and what is listed only with
//! some arguments ends it with others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{PipeReader, Read, pipe},
    os::fd::AsRawFd,
};

use vmm::{
    exit::VmExit,
    seccomp::{
        self, Thread,
        lists::{LISTS, List},
        names,
    },
};

const KINDS: [Thread; 4] = [Thread::Main, Thread::Vcpu(3), Thread::Worker, Thread::Watchdog];
/// Beyond every number that a kernel has.
const BEYOND: i64 = 600;
/// What the calls of the x32 ABI have beside their number.
const X32: i64 = 0x4000_0000;

fn list(thread: Thread) -> List {
    LISTS.into_iter().find(|list| list.thread == thread.kind()).unwrap()
}

/// What a process ends with whose one thread is confined and makes the call, and what it says.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// The call came back.
    Made,
    Exited(i32),
    Killed(i32),
}

fn fate(thread: Thread, work: impl FnOnce()) -> (Fate, String) {
    let (mut said, stderr) = pipe().unwrap();
    // SAFETY: the child makes system calls and allocates, which the C library allows it; it ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the descriptors are open, and the process ends here.
        unsafe {
            libc::dup2(stderr.as_raw_fd(), 2);
            if seccomp::confine(thread).is_err() {
                libc::_exit(99);
            }
            work();
            libc::_exit(0);
        }
    }
    assert!(child > 0);
    drop(stderr);
    (ended(child), text(&mut said))
}

fn ended(child: libc::pid_t) -> Fate {
    let mut status = 0;
    // SAFETY: the pointer is to a number of our own.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    match (libc::WIFSIGNALED(status), libc::WEXITSTATUS(status)) {
        (true, _) => Fate::Killed(libc::WTERMSIG(status)),
        (false, 0) => Fate::Made,
        (false, code) => Fate::Exited(code),
    }
}

fn text(said: &mut PipeReader) -> String {
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    text
}

fn call(thread: Thread, number: i64, arguments: [u64; 3]) -> (Fate, String) {
    fate(thread, move || {
        // SAFETY: a call that the filter refuses is not made; those that are made here do no harm to a process that ends.
        unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2], 0, 0, 0) };
    })
}

fn number(name: &str) -> i64 {
    names::number(name).unwrap().into()
}

const FORBIDDEN: Fate = Fate::Exited(VmExit::Forbidden as i32);

#[test]
fn every_call_that_is_not_listed_ends_the_process_by_name() {
    seccomp::enforce().unwrap();
    for thread in KINDS {
        let listed: Vec<_> = list(thread).calls.iter().map(|call| number(call.name)).collect();
        for unlisted in (0..BEYOND).filter(|number| !listed.contains(number)) {
            let (fate, said) = call(thread, unlisted, [0; 3]);
            let name = names::name(unlisted as u32).map_or(format!("{unlisted:#x}"), str::to_owned);
            // Only the kernel's own trampolines can make them, and Linux asks no filter about them.
            if ["uretprobe", "uprobe"].contains(&name.as_str()) {
                continue;
            }
            assert_eq!(fate, FORBIDDEN, "{thread:?}: {name}");
            let told = format!(
                "flyrun-vmm: thread {} made the system call {name}(0x0, 0x0, 0x0, ...)",
                thread.name()
            );
            assert!(said.starts_with(&told) && said.ends_with("does not allow\n"), "{said}");
        }
    }
}

#[test]
fn other_interfaces_of_the_kernel_are_no_way_round() {
    seccomp::enforce().unwrap();
    for thread in KINDS {
        for bits in [X32, 1 << 31] {
            let name = list(thread).hot;
            let other = number(name) | bits;
            assert_eq!(call(thread, other, [0; 3]).0, FORBIDDEN, "{thread:?}: {other:#x}");
        }
        let (fate, _) = fate(thread, || {
            // SAFETY: getpid of the i386 ABI, if it were made.
            unsafe { std::arch::asm!("int 0x80", inout("eax") 20 => _, options(nostack)) };
        });
        // A kernel without that ABI has SIGSEGV for it.
        assert!(matches!(fate, Fate::Killed(libc::SIGSYS | libc::SIGSEGV)), "{thread:?}: {fate:?}");
    }
}

#[test]
fn a_listed_call_with_other_arguments_ends_the_process() {
    seccomp::enforce().unwrap();
    let executable = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
    let cases = [
        ("ioctl", [0, 0xae01, 0]),
        ("ioctl", [0, u64::from(libc::TIOCSTI as u32), 0]),
        ("ioctl", [0, 0xae81, 0]),
        ("mmap", [0, 4096, executable]),
        ("mprotect", [0, 0, executable]),
        ("mprotect", [0, 0, libc::PROT_EXEC as u64]),
        ("madvise", [0, 0, libc::MADV_MERGEABLE as u64]),
        ("fcntl", [0, libc::F_SETFL as u64, 0]),
        ("prctl", [libc::PR_SET_DUMPABLE as u64, 1, 0]),
        ("socket", [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0]),
        ("socket", [libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64, 0]),
        ("tgkill", [1, 1, libc::SIGKILL as u64]),
    ];
    for thread in KINDS {
        for (name, arguments) in cases {
            let (fate, said) = call(thread, number(name), arguments);
            assert_eq!(fate, FORBIDDEN, "{thread:?}: {name} {arguments:x?}");
            assert!(said.contains(&format!(" {name}({:#x}, {:#x},", arguments[0], arguments[1])), "{said}");
        }
    }
    let (fate, _) = call(Thread::Vcpu(0), number("openat"), [0, 0, libc::O_RDONLY as u64]);
    assert_eq!(fate, FORBIDDEN);
}

#[test]
fn listed_calls_are_made() {
    seccomp::enforce().unwrap();
    // Such as do nothing with these arguments, or fail.
    let harmless = ["futex", "clock_gettime", "close", "write", "brk", "munmap", "getpid", "gettid"];
    for thread in KINDS {
        for name in harmless {
            assert_eq!(
                call(thread, number(name), [u64::MAX >> 1, 0, 0]),
                (Fate::Made, String::new()),
                "{name}"
            );
        }
        for (name, cases) in list(thread).calls.iter().map(|call| (call.name, call.cases)) {
            for case in cases.iter().filter(|_| ["ioctl", "fcntl", "madvise", "mprotect"].contains(&name)) {
                let mut arguments = [u64::from(u32::MAX), 0, 0];
                for check in *case {
                    let is = check.test == seccomp::lists::Test::Is;
                    arguments[usize::from(check.argument)] = if is { check.value.number.into() } else { 3 };
                }
                assert_eq!(
                    call(thread, number(name), arguments).0,
                    Fate::Made,
                    "{thread:?}: {name} {case:?}"
                );
            }
        }
    }
}

#[test]
fn a_thread_that_keeps_the_signal_away_is_killed_all_the_same() {
    seccomp::enforce().unwrap();
    for thread in KINDS {
        let (fate, said) = fate(thread, || {
            // SAFETY: the mask is this process's own; getuid does nothing.
            unsafe {
                let mut all: libc::sigset_t = std::mem::zeroed();
                libc::sigfillset(&mut all);
                libc::sigprocmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
                libc::getuid();
            }
        });
        assert_eq!((fate, said.as_str()), (Fate::Killed(libc::SIGSYS), ""), "{thread:?}");
    }
}

#[test]
fn a_panic_is_told_and_ends_the_process_as_ever() {
    seccomp::enforce().unwrap();
    for thread in KINDS {
        let (fate, said) = fate(thread, || {
            eprintln!("one");
            std::process::abort();
        });
        assert_eq!((fate, said.as_str()), (Fate::Killed(libc::SIGABRT), "one\n"), "{thread:?}");
    }
}

/// In a process of its own, that has one heap from the beginning as flyrun-vmm has: the harness's threads have others.
#[test]
fn a_thread_that_is_begun_is_filtered_and_ends_in_peace() {
    const ONE_HEAP: &str = "MALLOC_ARENA_MAX";
    if std::env::var_os(ONE_HEAP).is_none() {
        let name = "a_thread_that_is_begun_is_filtered_and_ends_in_peace";
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let output = again.args(["--exact", name, "--nocapture"]).env(ONE_HEAP, "1").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    seccomp::enforce().unwrap();
    for thread in KINDS.into_iter().filter(|thread| *thread != Thread::Main) {
        let filtered = seccomp::spawn(thread, || {
            // Of all sizes, twice as large afterwards, and given back last come first.
            let mut grown: Vec<Vec<u8>> = (0..200).map(|size| vec![1; size * 500]).collect();
            grown.iter_mut().for_each(|bytes| bytes.extend(bytes.clone()));
            grown.iter().map(Vec::len).sum::<usize>()
        });
        assert_eq!(filtered.unwrap().join().unwrap(), 19_900_000);
    }
}

#[test]
fn the_program_prints_its_lists() {
    let print = |arguments: &[&str]| {
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_flyrun-vmm")).args(arguments).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let table = print(&["seccomp"]);
    assert!(table.starts_with("main (50 calls): the event loop"), "{table}");
    let lists: serde_json::Value = serde_json::from_str(&print(&["seccomp", "--json"])).unwrap();
    let counts: Vec<_> = lists["threads"].as_array().unwrap().iter().map(|list| &list["count"]).collect();
    // Firecracker's: 50 in the main thread, 27 in a vCPU's.
    assert!(
        counts[0].as_u64() <= Some(50) && counts.iter().skip(1).all(|count| count.as_u64() <= Some(27)),
        "{lists}"
    );
    let mistake =
        std::process::Command::new(env!("CARGO_BIN_EXE_flyrun-vmm")).args(["seccomp", "x"]).output().unwrap();
    assert_eq!(mistake.status.code(), Some(VmExit::Usage as i32));
}
