//! System calls for which rustix has no safe form. The only file of this crate with `unsafe`.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use rustix::{io::Errno, process::Pid};

fn check(result: libc::c_int) -> rustix::io::Result<libc::c_int> {
    if result < 0 { Err(last_errno()) } else { Ok(result) }
}

fn last_errno() -> Errno {
    io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// Starts a non-blocking vsock connection to a port of the host.
///
/// # Errors
/// The kernel's reason; `EINPROGRESS` is success.
pub fn vsock_connect(port: u32) -> rustix::io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers; a non-negative result is a new descriptor that nobody else owns.
    let socket = unsafe {
        let fd = check(libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        ))?;
        OwnedFd::from_raw_fd(fd)
    };
    let address = vsock_address(libc::VMADDR_CID_HOST, port);
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is a live sockaddr_vm of exactly the length given; connect(2) only reads it.
    match check(unsafe { libc::connect(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) }) {
        Ok(_) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// Listens on a vsock port.
///
/// # Errors
/// The kernel's reason.
pub fn vsock_listen(port: u32, backlog: i32) -> rustix::io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: socket(2) and listen(2) take no pointers, and a non-negative result of the former is a new descriptor
    // that nobody else owns; the address is a live sockaddr_vm of exactly the length given, which bind(2) only reads.
    unsafe {
        let socket = OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?);
        check(libc::bind(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length))?;
        check(libc::listen(socket.as_raw_fd(), backlog))?;
        Ok(socket)
    }
}

/// Takes the next connection, and tells whether it comes from the host.
///
/// # Errors
/// `EAGAIN` when there is none.
pub fn vsock_accept(listener: BorrowedFd<'_>) -> rustix::io::Result<(OwnedFd, bool)> {
    let mut address = vsock_address(libc::VMADDR_CID_ANY, 0);
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the address is a live sockaddr_vm of exactly the length given, and valid whatever bytes are written to
    // it; a non-negative result is a new descriptor that nobody else owns.
    let socket = unsafe {
        let address = ptr::from_mut(&mut address).cast();
        OwnedFd::from_raw_fd(check(libc::accept4(listener.as_raw_fd(), address, &mut length, flags))?)
    };
    Ok((socket, address.svm_cid == libc::VMADDR_CID_HOST))
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

/// Closes every descriptor but standard input, output and error and these, and gives these back.
/// Only for a child that will neither return nor use any other descriptor it has inherited.
///
/// # Errors
/// The kernel's reason.
pub fn keep_only<const N: usize>(fds: [BorrowedFd<'_>; N]) -> rustix::io::Result<[OwnedFd; N]> {
    /// Above every descriptor that guest-init has.
    const FLOOR: i32 = 900;
    let mut kept = Vec::with_capacity(N);
    for fd in fds {
        kept.push(rustix::io::fcntl_dupfd_cloexec(fd, FLOOR)?);
    }
    let top = kept.iter().map(AsRawFd::as_raw_fd).max().unwrap_or(FLOOR);
    // SAFETY: close_range(2) takes no pointers; the caller promises not to use what is closed.
    unsafe {
        check(libc::syscall(libc::SYS_close_range, 3, FLOOR - 1, 0) as libc::c_int)?;
        check(libc::syscall(libc::SYS_close_range, top + 1, libc::c_int::MAX, 0) as libc::c_int)?;
    }
    kept.try_into().map_err(|_| Errno::MFILE)
}

/// Blocks SIGCHLD for this process and gives a descriptor that is readable when one is pending.
///
/// # Errors
/// The kernel's reason.
pub fn child_signal_fd() -> rustix::io::Result<OwnedFd> {
    // SAFETY: the set is initialized by sigemptyset before use and outlives the calls, which only read it; a
    // non-negative result of signalfd is a new descriptor that nobody else owns.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        check(libc::sigemptyset(&mut set))?;
        check(libc::sigaddset(&mut set, libc::SIGCHLD))?;
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Gives every signal its default action and unblocks all, as a program expects to be started. What has a handler gets it from execve(2),
/// and all that guest-init ignores is what Rust has programs ignore.
pub fn reset_signals() {
    // SAFETY: the set is initialized before use; SIG_DFL is a valid disposition for a signal.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut());
    }
}

/// Adds bytes to the kernel's random generator and credits all of their bits.
///
/// # Errors
/// The kernel's reason; `EPERM` without CAP_SYS_ADMIN.
pub fn add_entropy(random_device: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<()> {
    const RNDADDENTROPY: u32 = 0x4008_5203;
    // struct rand_pool_info of linux/random.h: two ints, then the bytes.
    let bytes = bytes.get(..bytes.len().min(4096)).unwrap_or_default();
    let mut info = Vec::with_capacity(8 + bytes.len());
    info.extend_from_slice(&(bytes.len() as u32 * 8).to_ne_bytes());
    info.extend_from_slice(&(bytes.len() as u32).to_ne_bytes());
    info.extend_from_slice(bytes);
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose buf_size bytes follow it; `info` holds exactly these.
    // The kernel copies it byte by byte, so its alignment does not matter.
    check(unsafe { libc::ioctl(random_device.as_raw_fd(), RNDADDENTROPY as _, info.as_ptr()) }).map(drop)
}

/// Makes the kernel's random generator use what was added to it from the next byte on.
///
/// # Errors
/// The kernel's reason; `EPERM` without CAP_SYS_ADMIN.
pub fn reseed_random(random_device: BorrowedFd<'_>) -> rustix::io::Result<()> {
    const RNDRESEEDCRNG: u32 = 0x5207;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(random_device.as_raw_fd(), RNDRESEEDCRNG as _, 0) }).map(drop)
}

/// Takes so many bytes of new memory, page by page, and leaves them to the kernel for when it needs them: the next that it
/// hands out are others.
///
/// # Errors
/// The kernel's reason; `ENOMEM` when there is not so much.
pub fn set_memory_aside(bytes: usize) -> rustix::io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
    let start = unsafe { libc::mmap(ptr::null_mut(), bytes, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(last_errno());
    }
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTFORK, libc::MADV_POPULATE_WRITE, libc::MADV_FREE] {
        // SAFETY: the range is the mapping made above, which nobody has a pointer to.
        check(unsafe { libc::madvise(start, bytes, advice) })?;
    }
    Ok(())
}

/// Sets how much of a block device is read ahead, in sectors of 512 bytes (block/ioctl.c, BLKRASET).
///
/// # Errors
/// The kernel's reason.
pub fn set_read_ahead(device: BorrowedFd<'_>, sectors: usize) -> rustix::io::Result<()> {
    const BLKRASET: u32 = 0x1262;
    // SAFETY: BLKRASET takes its argument by value.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKRASET as _, sectors) }).map(drop)
}

/// Sends a signal, by number, to one process.
///
/// # Errors
/// `EINVAL` for a number that is none, `ESRCH` for a process that is gone.
pub fn kill(pid: Pid, signal: i32) -> rustix::io::Result<()> {
    // SAFETY: kill(2) takes no pointers.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }).map(drop)
}

/// Kills every process but this one. Does nothing unless this one is PID 1: elsewhere it would be the user's machine.
pub fn kill_all_others() {
    if std::process::id() != 1 {
        return;
    }
    // SAFETY: kill(2) takes no pointers; -1 means every process but PID 1 and the caller.
    unsafe { libc::kill(-1, libc::SIGKILL) };
}

/// Sends SIGINT, SIGQUIT or SIGTSTP to the foreground group of a terminal, given its master.
///
/// # Errors
/// `EINVAL` for any other signal.
pub fn signal_terminal(master: BorrowedFd<'_>, signal: i32) -> rustix::io::Result<()> {
    const TIOCSIG: u32 = 0x4004_5436;
    // SAFETY: TIOCSIG takes its argument by value.
    check(unsafe { libc::ioctl(master.as_raw_fd(), TIOCSIG as _, signal as libc::c_ulong) }).map(drop)
}

/// Sets the loopback interface up.
///
/// # Errors
/// The kernel's reason; `ENODEV` without one.
pub fn loopback_up() -> rustix::io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: ifreq is a plain C struct for which all zeros is valid; SIOCSIFFLAGS reads one, and `request` is one
    // with the union's flags set.
    unsafe {
        let mut request = std::mem::zeroed::<libc::ifreq>();
        for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
            *slot = *byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request)).map(drop)
    }
}

/// Brings the filesystem into a clean state on its device (journal empty) and keeps it there: nothing can be
/// written to it any more.
///
/// # Errors
/// `EOPNOTSUPP` for filesystems that cannot.
pub fn freeze_filesystem(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    const FIFREEZE: u32 = 0xC004_5877;
    // SAFETY: FIFREEZE ignores its argument.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FIFREEZE as _, 0) }).map(drop)
}

/// Lets a frozen filesystem be written again.
///
/// # Errors
/// `EINVAL` for one that is not frozen.
pub fn thaw_filesystem(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    const FITHAW: u32 = 0xC004_5878;
    // SAFETY: FITHAW ignores its argument.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FITHAW as _, 0) }).map(drop)
}

/// Writes what an ext4's journal holds to its place, and gives the journal's blocks back to the device (fs/ext4/ioctl.c,
/// EXT4_IOC_CHECKPOINT).
///
/// # Errors
/// The kernel's reason; `EOPNOTSUPP` for a device that takes nothing back.
pub fn empty_journal(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    const EXT4_IOC_CHECKPOINT: u32 = 0x4004_662b;
    let discard: u32 = 1;
    // SAFETY: the request reads one u32 from the address, which is that of a local.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_CHECKPOINT as _, &raw const discard) })
        .map(drop)
}

/// Grows an ext4 to the size of its device, if that has become larger (fs/ext4/ioctl.c, EXT4_IOC_RESIZE_FS).
///
/// # Errors
/// The kernel's reason.
pub fn grow_filesystem(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    const EXT4_IOC_RESIZE_FS: u32 = 0x4008_6610;
    let stat = rustix::fs::fstat(directory)?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    // In sectors of 512 bytes. A filesystem that is on no block device has nothing to grow to.
    let Ok(sectors) = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")) else {
        return Ok(());
    };
    let block = rustix::fs::fstatvfs(directory)?.f_bsize.max(512);
    let blocks: u64 = sectors.trim().parse::<u64>().map_err(|_| rustix::io::Errno::INVAL)? / (block / 512);
    // SAFETY: the request reads one u64 from the address, which is that of a local.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &raw const blocks) }).map(drop)
}

/// Makes the current cgroup the root of what this process sees.
///
/// # Errors
/// The kernel's reason.
pub fn unshare_cgroup_namespace() -> rustix::io::Result<()> {
    // SAFETY: unshare(2) takes no pointers, and a cgroup namespace changes nothing that Rust relies on.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }).map(drop)
}

/// Which side of [`fork`] this is.
#[derive(Debug)]
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, with the new one's id.
    Parent(Pid),
}

/// Starts a new process. Only for a process with one thread, where the child may go on as any program.
///
/// # Errors
/// The kernel's reason.
pub fn fork() -> rustix::io::Result<Fork> {
    // SAFETY: guest-init has one thread when it forks, so no lock can be held by a thread that the child lacks.
    let pid = check(unsafe { libc::fork() })?;
    Ok(Pid::from_raw(pid).map_or(Fork::Child, Fork::Parent))
}

/// Has a new process run `body` in this one's memory, on a stack of its own; this one stands still until that has become another program
/// or ended, as it does with 127 when `body` returns. A [`fork`] that ends in a program would copy the page tables for it, and then
/// each page that either of the two writes to. What is not memory, such as descriptors and the working directory, each has for itself.
///
/// # Errors
/// The kernel's reason.
pub fn spawn(body: &mut dyn FnMut()) -> rustix::io::Result<Pid> {
    /// Many times what is needed; only what is touched becomes memory.
    const STACK_BYTES: usize = 64 << 10;
    extern "C" fn begin(body: *mut libc::c_void) -> libc::c_int {
        // SAFETY: it is the pointer given to clone(2) below, to what outlives the child's use of it.
        let body = unsafe { &mut *body.cast::<&mut dyn FnMut()>() };
        body();
        127
    }
    let mut body = body;
    let mut stack = Vec::<u128>::with_capacity(STACK_BYTES / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: this process has one thread, which the kernel holds until the child has left its memory: `stack` and `body` outlive
    // that, nobody else uses them, and no lock is held that the child could wait for. The stack is aligned, and grows from its top.
    let pid = check(unsafe { libc::clone(begin, top.cast(), flags, ptr::from_mut(&mut body).cast()) })?;
    Pid::from_raw(pid).ok_or(Errno::CHILD)
}

/// Replaces this process by a program; returns only the error.
pub fn exec(path: &CStr, argv: &[CString], env: &[CString]) -> Errno {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end in a null pointer and point to C strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    last_errno()
}

/// Ends this process at once, without running anything registered for its end.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) does not return and touches no memory of this process.
    unsafe { libc::_exit(code) }
}

/// Puts three descriptors in the place of standard input, output and error.
///
/// # Errors
/// The kernel's reason.
pub fn set_stdio(stdin: impl AsFd, stdout: impl AsFd, stderr: impl AsFd) -> rustix::io::Result<()> {
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)
}
