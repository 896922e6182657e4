//! What the threads of this process may ask the host's kernel for: an allow-list for each kind of thread ([`lists`]), which
//! `build.rs` compiles to BPF, and which each thread installs for itself before it meets the first byte of the guest.
//!
//! | thread | begins | filtered from |
//! |---|---|---|
//! | main | the process | the machine is set up and its vCPUs are there; with `--inspect` before the snapshot is read |
//! | vcpu*N* | by main, before that | its first instruction |
//! | worker | by main, before that | its first instruction |
//! | fs-watchdog | by main, with the device | its first instruction |
//!
//! No thread begins later: no list has `clone`. Threads begin by [`spawn`] alone (clippy holds the crate to it), so that none
//! is without a filter, and none inherits another's. A filter is for ever.
//!
//! A call that is not listed is not made. Instead the kernel sends SIGSYS, and [`report`] ends the process with what it was.

pub mod lists;
pub mod names;
mod print;
mod report;

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    thread::JoinHandle,
};

use seccompiler::sock_filter;

pub use print::{json, table};

use crate::exit::VmExit;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// Whether threads install filters.
static ON: AtomicBool = AtomicBool::new(false);
/// Nothing on these threads is deep; the rest of a bigger stack would be reserved for nothing.
const VCPU_STACK_BYTES: usize = 128 << 10;
const STACK_BYTES: usize = 64 << 10;

/// The kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The process's first, the event loop.
    Main,
    /// A vCPU, by its number.
    Vcpu(u8),
    /// Does what the event loop cannot wait for.
    Worker,
    /// Hangs up on a virtiofsd; the device begins it, and calls [`enter`].
    Watchdog,
}

impl Thread {
    /// What its [list](lists::List) is called.
    pub fn kind(self) -> &'static str {
        match self {
            Thread::Main => "main",
            Thread::Vcpu(_) => "vcpu",
            Thread::Worker => "worker",
            Thread::Watchdog => "fs-watchdog",
        }
    }

    /// What the thread is called.
    pub fn name(self) -> String {
        match self {
            Thread::Vcpu(index) => format!("vcpu{index}"),
            other => other.kind().to_owned(),
        }
    }

    /// Its filter, as the kernel takes it.
    pub fn program(self) -> &'static [sock_filter] {
        let found = PROGRAMS.iter().find(|(kind, _)| *kind == self.kind());
        found.map_or(&[], |(_, program)| program)
    }
}

/// From now on threads that begin, and those that [`confine`] themselves, are filtered. Once, before the first of them.
///
/// # Errors
/// The host refuses a signal's handler.
pub fn enforce() -> io::Result<()> {
    report::install()?;
    one_heap()?;
    std::panic::set_hook(Box::new(|panic| {
        // The standard library's own hook may look for a backtrace, which takes calls that no list has.
        let thread = std::thread::current();
        eprintln!("flyrun-vmm: thread {}: {panic}", thread.name().unwrap_or("?"));
    }));
    ON.store(true, Ordering::Relaxed);
    Ok(())
}

/// A second heap of the C library would look into /proc/sys/vm when it shrinks, on whichever thread frees memory. And to make one for
/// each thread takes longer than all that it would ever hold.
fn one_heap() -> io::Result<()> {
    // SAFETY: it sets a number, before the first other thread.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        1 => Ok(()),
        _ => Err(io::Error::other("the C library does not take M_ARENA_MAX")),
    }
}

/// Installs the filter of the calling thread, if filters are on. What it does not list is over for this thread.
///
/// # Errors
/// The host's kernel has no seccomp.
pub fn confine(thread: Thread) -> io::Result<()> {
    if !ON.load(Ordering::Relaxed) {
        return Ok(());
    }
    report::name(&thread.name());
    seccompiler::apply_filter(thread.program()).map_err(|error| {
        io::Error::other(format!("{error}; the host's kernel must have CONFIG_SECCOMP_FILTER"))
    })
}

/// The first that a thread does. One that gets no filter ends the process.
pub fn enter(thread: Thread) {
    if let Err(error) = confine(thread) {
        eprintln!("flyrun-vmm: seccomp of thread {}: {error}", thread.name());
        std::process::exit(VmExit::Setup.code().into());
    }
}

/// Begins a thread, under its filter.
///
/// # Errors
/// The host gives no thread.
#[allow(clippy::disallowed_methods, reason = "the one place where threads begin")]
pub fn spawn<T: Send + 'static>(
    thread: Thread,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let stack = if matches!(thread, Thread::Vcpu(_)) { VCPU_STACK_BYTES } else { STACK_BYTES };
    std::thread::Builder::new().name(thread.name()).stack_size(stack).spawn(move || {
        enter(thread);
        work()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{lists::LISTS, *};

    const KINDS: [Thread; 4] = [Thread::Main, Thread::Vcpu(0), Thread::Worker, Thread::Watchdog];

    #[test]
    fn each_kind_of_thread_has_a_list_and_each_list_a_filter_that_the_kernel_takes() {
        assert_eq!(KINDS.map(Thread::kind), LISTS.map(|list| list.thread));
        for kind in KINDS {
            let length = kind.program().len();
            assert!((20..4096).contains(&length), "{kind:?}: {length}");
        }
    }

    #[test]
    fn no_list_is_longer_than_firecrackers() {
        for list in LISTS {
            assert!(list.calls.len() <= list.limit, "{}: {}", list.thread, list.calls.len());
            assert!(list.limit <= if list.thread == "main" { 50 } else { 27 });
        }
    }

    #[test]
    fn each_call_is_listed_once_by_a_name_that_is_one_and_says_why() {
        for list in LISTS {
            let mut seen = BTreeSet::new();
            for call in list.calls {
                assert!(names::number(call.name).is_some(), "{}", call.name);
                assert!(seen.insert(call.name), "{}: {} twice", list.thread, call.name);
                assert!(call.why.len() > 5, "{}: {}", list.thread, call.name);
                assert!(call.cases.iter().all(|case| !case.is_empty()), "{}", call.name);
            }
        }
    }

    /// What a program decides; `None` where it is none.
    fn decision(program: &[sock_filter], data: &[u32; 16]) -> Option<u32> {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program.get(at)?;
            let branch = |taken: bool| usize::from(if taken { *jt } else { *jf });
            at += 1 + match code {
                0x20 => {
                    accumulator = *data.get(*k as usize / 4)?;
                    0
                }
                0x54 => {
                    accumulator &= k;
                    0
                }
                0x05 => *k as usize,
                0x15 => branch(accumulator == *k),
                0x35 => branch(accumulator >= *k),
                0x06 => return Some(*k),
                _ => return None,
            };
        }
    }

    fn as_seccompiler_has_it(list: &lists::List) -> Vec<sock_filter> {
        use seccompiler::{
            SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition, SeccompFilter,
            SeccompRule, TargetArch,
        };
        let condition = |check: &lists::Check| {
            let number = u64::from(check.value.number);
            let (operator, value) = match check.test {
                lists::Test::Is => (SeccompCmpOp::Eq, number),
                lists::Test::Lacks => (SeccompCmpOp::MaskedEq(number), 0),
            };
            SeccompCondition::new(check.argument, Dword, operator, value).unwrap()
        };
        let rules = list.calls.iter().map(|call| {
            let rule = |case: &lists::Case| SeccompRule::new(case.iter().map(condition).collect()).unwrap();
            (names::number(call.name).unwrap().into(), call.cases.iter().map(rule).collect())
        });
        let (otherwise, listed) = (SeccompAction::Trap, SeccompAction::Allow);
        let filter = SeccompFilter::new(rules.collect(), otherwise, listed, TargetArch::x86_64);
        filter.unwrap().try_into().unwrap()
    }

    #[test]
    fn the_short_programs_decide_as_seccompilers_do() {
        const X86_64: u32 = 0xc000_003e;
        let mut values: Vec<u32> = vec![0, 1, 2, 3, 4, 5, 7, u32::MAX];
        let checks =
            LISTS.iter().flat_map(|list| list.calls).flat_map(|call| call.cases.iter().copied().flatten());
        checks.for_each(|check| values.extend([check.value.number, check.value.number + 1]));
        for (list, kind) in LISTS.iter().zip(KINDS) {
            let (short, long) = (kind.program(), as_seccompiler_has_it(list));
            assert!(short.len() < long.len() / 2, "{}: {} of {}", list.thread, short.len(), long.len());
            let mut allowed = 0;
            for number in (0..600).chain([1 << 31, 0x4000_0000, 0x4000_0010, u32::MAX]) {
                for (argument, value) in
                    (0..3).flat_map(|argument| values.iter().map(move |value| (argument, *value)))
                {
                    for other in [0, 1, 0o2_004_001] {
                        let mut data = [other; 16];
                        (data[0], data[1], data[4 + 2 * argument]) = (number, X86_64, value);
                        let decided = decision(short, &data);
                        assert_eq!(decided, decision(&long, &data), "{}: {data:x?}", list.thread);
                        allowed += u64::from(decided == Some(libc::SECCOMP_RET_ALLOW));
                    }
                }
            }
            assert!(allowed > 1000);
            let i386 = [0, 0x4000_0003, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            assert_eq!(decision(short, &i386), Some(libc::SECCOMP_RET_KILL_PROCESS));
        }
    }

    /// Whatever else a list may have.
    #[test]
    fn no_list_has_what_makes_processes_threads_code_or_another_identity() {
        let never = [
            "clone",
            "clone3",
            "fork",
            "vfork",
            "execve",
            "execveat",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "setuid",
            "setgid",
            "setresuid",
            "capset",
            "mount",
            "umount2",
            "pivot_root",
            "chroot",
            "unshare",
            "setns",
            "bpf",
            "perf_event_open",
            "init_module",
            "kexec_load",
            "seccomp",
            "rt_sigaction",
            "kill",
            "pidfd_send_signal",
            "io_uring_setup",
            "userfaultfd",
            "bind",
            "listen",
            "mknod",
            "open_by_handle_at",
            "pkey_mprotect",
            "memfd_create",
            "symlink",
            "link",
            "chmod",
            "fchmod",
            "chown",
        ];
        for list in LISTS {
            for call in list.calls {
                assert!(!never.contains(&call.name), "{}: {}", list.thread, call.name);
                let checked = ["ioctl", "mmap", "mprotect", "madvise", "fcntl", "prctl", "socket", "tgkill"];
                assert!(!checked.contains(&call.name) || !call.cases.is_empty(), "{}", call.name);
            }
        }
    }

    #[test]
    fn the_numbers_are_the_c_librarys() {
        let known = [
            ("read", libc::SYS_read),
            ("ioctl", libc::SYS_ioctl),
            ("futex", libc::SYS_futex),
            ("clone3", libc::SYS_clone3),
            ("epoll_wait", libc::SYS_epoll_wait),
            ("statx", libc::SYS_statx),
        ];
        for (name, number) in known {
            assert_eq!(names::number(name).map(i64::from), Some(number), "{name}");
        }
        assert!(names::all().is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(names::all().count(), 381);
    }
}
