//! The thread that hangs up on a virtiofsd which does not answer.

use super::{List, any, is, lacks, only, values::*};

pub(super) const LIST: List = List {
    thread: "fs-watchdog",
    does: "hangs up on a virtiofsd that does not answer in time",
    limit: 27,
    hot: "futex",
    calls: &[
        any("futex", "waits for the next step, or its end"),
        any("clock_gettime", "the time limit; the vDSO asks the kernel where there is no stable TSC"),
        any("restart_syscall", "a wait with a time limit goes on after SIGSTOP and SIGCONT, or a freezer"),
        any("sched_yield", "the standard library's channel, where both ends are at it at once"),
        any("shutdown", "hangs up"),
        any("close", "the connection"),
        only("fcntl", &[&[is(1, F_GETFD)]], "a debug build, before close"),
        any("write", "standard error"),
        // The C library's memory.
        any("brk", "malloc"),
        only("mmap", &[&[lacks(2, PROT_EXEC)]], "malloc"),
        any("munmap", "malloc; its signal stack at the end"),
        any("mremap", "malloc"),
        only("madvise", &[&[is(2, MADV_DONTNEED)]], "malloc; its stack at the end"),
        // The end.
        any("sigaltstack", "the standard library's, at the end of a thread"),
        any("rt_sigprocmask", "the C library's, at the end of a thread and before tgkill"),
        only("tgkill", &[&[is(2, SIGABRT)]], "ends the process after a panic"),
        any("getpid", "the C library's, for tgkill"),
        any("gettid", "the C library's, for tgkill"),
        any("exit", "the end of the thread"),
        any("exit_group", "the end of the process, where a filter is violated"),
    ],
};
