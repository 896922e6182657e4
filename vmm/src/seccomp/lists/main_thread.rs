//! The process's first thread, once the machine is set up.

use super::{List, any, is, lacks, only, request, values::*};

pub(super) const LIST: List = List {
    thread: "main",
    does: "the event loop: serves the devices and the owner's requests, writes snapshots",
    limit: 50,
    hot: "epoll_wait",
    calls: &[
        // The loop.
        any("epoll_wait", "waits for what the devices watch"),
        any("epoll_ctl", "devices watch other files when a driver begins and ends, and with each connection"),
        any("futex", "locks, and waiting for vCPUs and the worker"),
        any("sched_yield", "the standard library's channels and the other end, where both are at it at once"),
        any("clock_gettime", "rates and time limits; the vDSO asks the kernel where there is no stable TSC"),
        any("restart_syscall", "a wait with a time limit goes on after SIGSTOP and SIGCONT, or a freezer"),
        any("timerfd_settime", "a device with a rate is called when it may go on"),
        any("getrandom", "the guest's random numbers"),
        // Files that are open.
        any("read", "eventfds, timers, signals, requests, the console's input, packets"),
        any("write", "eventfds, answers, the console, the trace, standard error"),
        any("readv", "vsock and packets into guest memory"),
        any("writev", "packets out of guest memory"),
        any("preadv", "disks into guest memory"),
        any("pwritev", "guest memory to disks"),
        any("pread64", "page tables and a kernel's notes when a snapshot is written"),
        any("pwrite64", "guest memory to a snapshot; zeros to disks that cannot punch holes"),
        any("fallocate", "the guest discards parts of a disk; zeros of a snapshot are holes"),
        any("fdatasync", "the guest flushes a disk"),
        any("lseek", "finds the holes of a snapshot's file"),
        any("close", "connections, queues, a snapshot's files"),
        only(
            "fcntl",
            &[&[is(1, F_DUPFD_CLOEXEC)], &[is(1, F_GETFD)]],
            "a second handle of a vCPU or an event; a debug build, before close",
        ),
        // Snapshots, in a directory that is open.
        any(
            "openat",
            "a snapshot's files and directory, the list of touched pages, /proc/self/pagemap, the kernel's file",
        ),
        any("statx", "whether a file is still the one that it was"),
        any("ftruncate", "a snapshot's memory has its length before its content"),
        any("fsync", "a snapshot's directory"),
        any("renameat", "a snapshot takes its place"),
        any("unlinkat", "the state that no longer goes with its memory, half a snapshot that was given up"),
        // vsock.
        only(
            "socket",
            &[&[is(0, AF_UNIX), is(1, SOCK_STREAM_NONBLOCK_CLOEXEC)]],
            "a connection of the guest",
        ),
        any("connect", "a connection of the guest, to the socket of its port"),
        any("accept4", "a connection of the host"),
        any("recvfrom", "a client's greeting, and its data; whether the owner has ended meanwhile"),
        any("recvmsg", "the owner's requests, with the directory of a snapshot"),
        any("sendto", "data that a client has not taken at once"),
        any("sendmsg", "vsock out of guest memory"),
        any("shutdown", "an end of a connection, or of one half"),
        only(
            "ioctl",
            &[
                &[request(FIONBIO)],
                // A snapshot.
                &[request(KVM_GET_MP_STATE)],
                &[request(KVM_GET_SREGS)],
                &[request(KVM_GET_REGS)],
                &[request(KVM_GET_XCRS)],
                &[request(KVM_GET_XSAVE)],
                &[request(KVM_GET_DEBUGREGS)],
                &[request(KVM_GET_LAPIC)],
                &[request(KVM_GET_TSC_KHZ)],
                &[request(KVM_GET_MSRS)],
                &[request(KVM_GET_VCPU_EVENTS)],
                &[request(KVM_GET_IRQCHIP)],
                &[request(KVM_GET_CLOCK)],
                &[request(KVM_GET_MSR_INDEX_LIST)],
                &[request(KVM_GET_VCPU_MMAP_SIZE)],
                &[request(PAGEMAP_SCAN)],
                &[request(VHOST_NET_SET_BACKEND)],
                &[request(VHOST_GET_VRING_BASE)],
                &[request(VHOST_RESET_OWNER)],
                // The number of a card's queues.
                &[request(TUNSETQUEUE)],
            ],
            "a client's socket that does not block; the state of vCPUs, KVM and vhost for a snapshot; a card's queues",
        ),
        // The process and its threads.
        only(
            "tgkill",
            &[&[is(2, SIGRTMIN)], &[is(2, SIGABRT)]],
            "gets a vCPU out of the guest; ends the process after a panic",
        ),
        any("getpid", "the C library's, for tgkill; a draft's name"),
        any("gettid", "the C library's, for the end after a panic"),
        any("rt_sigprocmask", "the C library's, around tgkill"),
        any("rt_sigpending", "whether SIGTERM waits while a snapshot is written"),
        any("getppid", "whether the owner has ended meanwhile"),
        only("prctl", &[&[is(0, PR_SET_PDEATHSIG)]], "a snapshot is finished though its owner ends"),
        // The C library's memory.
        any("brk", "malloc"),
        only("mmap", &[&[lacks(2, PROT_EXEC)]], "malloc; a vCPU's page; memory that the guest gave back"),
        any("munmap", "malloc; a vCPU's page"),
        any("mremap", "malloc"),
        only(
            "madvise",
            &[&[is(2, MADV_DONTNEED)], &[is(2, MADV_REMOVE)], &[is(2, MADV_HUGEPAGE)]],
            "memory that the guest gave back; malloc; guest memory of a snapshot that is verified",
        ),
        any("sigaltstack", "the standard library's, at the end"),
        any("exit_group", "the end"),
    ],
};
