//! How a virtual machine ends, and the exit code of `flyrun-vmm` that says so.

/// The end of a virtual machine. The numbers are the exit codes of `flyrun-vmm` and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum VmExit {
    /// The guest asked for a reset through the i8042 controller, which is how Linux reboots here.
    Reset = 0,
    /// The machine could not be set up: a file is missing, the host refused a resource, a kernel does not load.
    Setup = 1,
    /// The command line or the VmSpec is not valid.
    Usage = 2,
    /// There is no /dev/kvm, it may not be opened, or it lacks what is needed.
    NoKvm = 3,
    /// The guest's vCPU triple-faulted.
    TripleFault = 4,
    /// The guest's kernel panicked: its last words on the console said so before the reset.
    Panic = 5,
    /// KVM could not go on: an internal error, such as an instruction that it cannot emulate, or a failed entry.
    KvmInternal = 6,
    /// SIGTERM or SIGINT asked flyrun-vmm to end.
    Terminated = 7,
    /// The host's disk failed or is full while the guest was writing.
    HostIo = 8,
    /// The snapshot cannot be resumed here; the line says why, by name. The machine can be booted instead.
    Refused = 9,
    /// A thread has made a system call that its seccomp filter does not allow; the line says which. An attack, or an error in
    /// flyrun-vmm or its lists.
    Forbidden = 10,
}

impl VmExit {
    /// Every way to end, in the order of the codes.
    pub const ALL: [VmExit; 11] = [
        VmExit::Reset,
        VmExit::Setup,
        VmExit::Usage,
        VmExit::NoKvm,
        VmExit::TripleFault,
        VmExit::Panic,
        VmExit::KvmInternal,
        VmExit::Terminated,
        VmExit::HostIo,
        VmExit::Refused,
        VmExit::Forbidden,
    ];

    /// The exit code of the process.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// What an exit code of `flyrun-vmm` means; `None` for one that it never returns.
    pub fn from_code(code: i32) -> Option<VmExit> {
        VmExit::ALL.into_iter().find(|exit| i32::from(exit.code()) == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_understood_again() {
        for exit in VmExit::ALL {
            assert_eq!(VmExit::from_code(i32::from(exit.code())), Some(exit));
        }
        assert_eq!(VmExit::from_code(101), None);
    }
}
