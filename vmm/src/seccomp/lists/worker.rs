//! The thread that does what the event loop cannot wait for.

use super::{List, any, is, lacks, only, values::*};

pub(super) const LIST: List = List {
    thread: "worker",
    does: "syncs a snapshot's files, and reads ahead what a resumed guest will touch",
    limit: 27,
    hot: "futex",
    calls: &[
        any("futex", "locks, and waiting for work"),
        any("sched_yield", "the standard library's channel, where both ends are at it at once"),
        any("fsync", "a snapshot's files"),
        any("close", "a snapshot's files"),
        only(
            "madvise",
            &[&[is(2, MADV_POPULATE_READ)], &[is(2, MADV_DONTNEED)]],
            "pages of a snapshot's memory; malloc; its stack at the end",
        ),
        only("fcntl", &[&[is(1, F_GETFD)]], "a debug build, before close"),
        any("write", "standard error"),
        any("clock_gettime", "the vDSO asks the kernel where there is no stable TSC"),
        any("restart_syscall", "a wait goes on after SIGSTOP and SIGCONT, or a freezer"),
        // The C library's memory.
        any("brk", "malloc"),
        only("mmap", &[&[lacks(2, PROT_EXEC)]], "malloc"),
        any("munmap", "malloc; its signal stack at the end"),
        any("mremap", "malloc"),
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
