//! Gets a vCPU out of the guest: a signal to its thread, whose handler makes KVM_RUN return at once, also if it
//! arrives just before.

use std::{
    cell::Cell,
    io, ptr,
    sync::atomic::{AtomicU8, Ordering},
    thread::JoinHandle,
};

use std::os::{
    fd::{AsRawFd, BorrowedFd},
    unix::thread::JoinHandleExt,
};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set by `Kickable`, whose `Drop` on this same thread clears it before the page it
        // points into can go.
        unsafe { (*flag).store(1, Ordering::Relaxed) };
    }
}

/// Installs the signal's handler, once for the process, before the first vCPU thread starts.
///
/// # Errors
/// The host refuses the handler.
pub fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as *const () as usize;
    // SAFETY: the handler only reads a thread local without destructor and stores to an atomic: both are safe in a
    // signal handler.
    match unsafe { libc::sigaction(signal(), &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A vCPU that is run by this thread and can be kicked while this value lives.
#[derive(Debug)]
pub struct Kickable<'a> {
    /// The vCPU.
    pub fd: &'a mut VcpuFd,
    immediate_exit: *const AtomicU8,
}

impl<'a> Kickable<'a> {
    /// Binds the vCPU to this thread.
    pub fn new(fd: &'a mut VcpuFd) -> Self {
        let run: *mut kvm_run = fd.get_kvm_run();
        // SAFETY: `run` points to the shared page of this vCPU, which stays mapped while `fd` is borrowed; no
        // reference is made, only the field's address. An AtomicU8 has the layout of a u8.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit }.cast::<AtomicU8>().cast_const();
        IMMEDIATE_EXIT.set(immediate_exit);
        Self { fd, immediate_exit }
    }

    /// Forgets kicks so far. What they were for must be looked up after this.
    pub fn clear(&self) {
        // SAFETY: as in `new`, the page is mapped as long as this value lives.
        unsafe { (*self.immediate_exit).store(0, Ordering::SeqCst) };
    }

    /// Makes the next entry return before the guest runs.
    pub fn stay_out(&self) {
        // SAFETY: as in `new`, the page is mapped as long as this value lives.
        unsafe { (*self.immediate_exit).store(1, Ordering::SeqCst) };
    }

    /// The vCPU's descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        descriptor(self.fd)
    }

    /// The first word of what KVM says about an internal error.
    pub fn internal_suberror(&mut self) -> u32 {
        // SAFETY: every bit pattern is a valid u32; KVM fills this member of the union before an internal error.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// A vCPU's descriptor.
pub fn descriptor(vcpu: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is this vCPU's, which stays open during the borrow.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }
}

/// Kicks the vCPU that the thread runs, if it still does.
pub fn kick<T>(thread: &JoinHandle<T>) {
    if !thread.is_finished() {
        // SAFETY: the handle is not joined, so the thread's id is valid even if it ends meanwhile.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
    }
}
