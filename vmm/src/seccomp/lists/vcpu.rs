//! A vCPU's thread: what the guest's accesses to registers lead to happens here, the activation of a device included.

use super::{List, any, is, lacks, only, request, values::*};

pub(super) const LIST: List = List {
    thread: "vcpu",
    does: "runs the guest, and answers its accesses to ports and registers",
    limit: 27,
    hot: "ioctl",
    calls: &[
        only(
            "ioctl",
            &[
                &[request(KVM_RUN)],
                &[request(KVM_KVMCLOCK_CTRL)],
                &[request(KVM_PRE_FAULT_MEMORY)],
                &[request(TUNSETOFFLOAD)],
                &[request(TUNSETQUEUE)],
                &[request(VHOST_SET_OWNER)],
                &[request(VHOST_RESET_OWNER)],
                &[request(VHOST_SET_FEATURES)],
                &[request(VHOST_SET_MEM_TABLE)],
                &[request(VHOST_SET_VRING_NUM)],
                &[request(VHOST_SET_VRING_ADDR)],
                &[request(VHOST_SET_VRING_BASE)],
                &[request(VHOST_SET_VRING_CALL)],
                &[request(VHOST_SET_VRING_KICK)],
                &[request(VHOST_SET_VRING_ERR)],
                &[request(VHOST_NET_SET_BACKEND)],
            ],
            "runs the guest; its clock after a pause; pages it will touch; a driver begins with a network card",
        ),
        any("futex", "locks, and waiting while the machine is paused"),
        any("rt_sigreturn", "the end of the handler of the signal that gets it out of the guest"),
        any("read", "an event that the guest's reset has fired"),
        any("write", "events for the loop and for KVM; the console; standard error"),
        any("sched_yield", "the standard library's channels and the other end, where both are at it at once"),
        any("ftruncate", "the console's file stays small"),
        any("clock_gettime", "the trace; the vDSO asks the kernel where there is no stable TSC"),
        // A driver begins or ends.
        any("eventfd2", "tells of a ring that vhost finds broken"),
        only(
            "fcntl",
            &[&[is(1, F_DUPFD_CLOEXEC)], &[is(1, F_GETFD)]],
            "a queue's events are the device's and the transport's; a debug build, before close",
        ),
        any("close", "events and vhost of a driver that ends"),
        any("sendmsg", "hands queues to virtiofsd"),
        any("recvmsg", "virtiofsd's answers"),
        any("shutdown", "gives up a virtiofsd that does not answer"),
        // The C library's memory.
        any("brk", "malloc"),
        only("mmap", &[&[lacks(2, PROT_EXEC)]], "malloc"),
        any("munmap", "malloc; its signal stack at the end"),
        any("mremap", "malloc"),
        only(
            "madvise",
            &[&[is(2, MADV_POPULATE_READ)], &[is(2, MADV_POPULATE_WRITE)], &[is(2, MADV_DONTNEED)]],
            "pages that a resumed guest will touch; malloc; its stack at the end",
        ),
        // The end.
        any("sigaltstack", "the standard library's, at the end of a thread"),
        any("rt_sigprocmask", "the C library's, at the end of a thread and before tgkill"),
        any("restart_syscall", "a wait with a time limit goes on after SIGSTOP and SIGCONT, or a freezer"),
        only("tgkill", &[&[is(2, SIGABRT)]], "ends the process after a panic"),
        any("getpid", "the C library's, for tgkill"),
        any("gettid", "the C library's, for tgkill"),
        any("exit", "the end of the thread"),
        any("exit_group", "the end of the process, where a filter is violated"),
    ],
};
