//! Numbers of the kernel's headers, for x86-64.

use super::Value;

macro_rules! values {
    ($($name:ident = $number:expr;)*) => {
        $(pub(super) const $name: Value = Value { name: stringify!($name), number: $number };)*
    };
}

/// asm-generic/ioctl.h.
const fn request(direction: u32, kind: u32, number: u32, bytes: u32) -> u32 {
    direction << 30 | bytes << 16 | kind << 8 | number
}
const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const KVM: u32 = 0xae;
const VHOST: u32 = 0xaf;
const TUN: u32 = b'T' as u32;

// linux/kvm.h.
values! {
    KVM_RUN = request(NONE, KVM, 0x80, 0);
    KVM_KVMCLOCK_CTRL = request(NONE, KVM, 0xad, 0);
    KVM_PRE_FAULT_MEMORY = request(READ | WRITE, KVM, 0xd5, 64);
    KVM_GET_MSR_INDEX_LIST = request(READ | WRITE, KVM, 0x02, 4);
    KVM_GET_VCPU_MMAP_SIZE = request(NONE, KVM, 0x04, 0);
    KVM_GET_IRQCHIP = request(READ | WRITE, KVM, 0x62, 520);
    KVM_GET_CLOCK = request(READ, KVM, 0x7c, 48);
    KVM_GET_REGS = request(READ, KVM, 0x81, 144);
    KVM_GET_SREGS = request(READ, KVM, 0x83, 312);
    KVM_GET_MSRS = request(READ | WRITE, KVM, 0x88, 8);
    KVM_GET_LAPIC = request(READ, KVM, 0x8e, 1024);
    KVM_GET_MP_STATE = request(READ, KVM, 0x98, 4);
    KVM_GET_VCPU_EVENTS = request(READ, KVM, 0x9f, 64);
    KVM_GET_DEBUGREGS = request(READ, KVM, 0xa1, 128);
    KVM_GET_TSC_KHZ = request(NONE, KVM, 0xa3, 0);
    KVM_GET_XSAVE = request(READ, KVM, 0xa4, 4096);
    KVM_GET_XCRS = request(READ, KVM, 0xa6, 392);
}

// linux/vhost.h.
values! {
    VHOST_SET_FEATURES = request(WRITE, VHOST, 0x00, 8);
    VHOST_SET_OWNER = request(NONE, VHOST, 0x01, 0);
    VHOST_RESET_OWNER = request(NONE, VHOST, 0x02, 0);
    VHOST_SET_MEM_TABLE = request(WRITE, VHOST, 0x03, 8);
    VHOST_SET_VRING_NUM = request(WRITE, VHOST, 0x10, 8);
    VHOST_SET_VRING_ADDR = request(WRITE, VHOST, 0x11, 40);
    VHOST_SET_VRING_BASE = request(WRITE, VHOST, 0x12, 8);
    VHOST_GET_VRING_BASE = request(READ | WRITE, VHOST, 0x12, 8);
    VHOST_SET_VRING_KICK = request(WRITE, VHOST, 0x20, 8);
    VHOST_SET_VRING_CALL = request(WRITE, VHOST, 0x21, 8);
    VHOST_SET_VRING_ERR = request(WRITE, VHOST, 0x22, 8);
    VHOST_NET_SET_BACKEND = request(WRITE, VHOST, 0x30, 8);
}

// linux/if_tun.h, linux/fs.h, asm-generic/ioctls.h.
values! {
    TUNSETOFFLOAD = request(WRITE, TUN, 0xd0, 4);
    TUNSETQUEUE = request(WRITE, TUN, 0xd9, 4);
    PAGEMAP_SCAN = request(READ | WRITE, b'f' as u32, 16, 96);
    FIONBIO = 0x5421;
}

// asm-generic/mman*.h.
values! {
    PROT_EXEC = 4;
    MADV_DONTNEED = 4;
    MADV_REMOVE = 9;
    MADV_HUGEPAGE = 14;
    MADV_POPULATE_READ = 22;
    MADV_POPULATE_WRITE = 23;
}

// asm-generic/fcntl.h, linux/socket.h, linux/net.h, asm/signal.h, linux/prctl.h.
values! {
    F_GETFD = 1;
    F_DUPFD_CLOEXEC = 1030;
    AF_UNIX = 1;
    SOCK_STREAM_NONBLOCK_CLOEXEC = 1 | 0o4000 | 0o2_000_000;
    SIGABRT = 6;
    SIGRTMIN = 34;
    PR_SET_PDEATHSIG = 1;
}
