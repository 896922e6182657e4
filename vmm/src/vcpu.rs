//! One vCPU: its setup, and the loop that runs it until the machine pauses or ends.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread::JoinHandle,
};

use kvm_bindings::{Msrs, kvm_mp_state, kvm_msr_entry, kvm_xcrs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestAddress;

use crate::{
    attach::Transport,
    boot::registers,
    bus::Buses,
    ending::Ending,
    exit::VmExit,
    kick::{self, Kickable},
    seccomp::{self, Thread},
    snapshot::{self, refusal::Refusal, sections::VcpuState, working_set::Ahead},
};

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
const XCR0_X87_SSE_AVX: u64 = 0b111;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

/// What the vCPUs of a machine are to do, and how many are doing it.
#[derive(Debug)]
pub struct Control {
    wanted: AtomicU8,
    paused: Mutex<usize>,
    changed: Condvar,
    ending: Arc<Ending>,
    /// What the first vCPU is to have read ahead before it enters the guest again.
    ahead: Mutex<Option<Ahead>>,
}

impl Control {
    /// vCPUs are to run.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self {
            wanted: AtomicU8::new(RUN),
            paused: Mutex::new(0),
            changed: Condvar::new(),
            ending,
            ahead: Mutex::new(None),
        }
    }

    fn want(&self, wanted: u8) {
        let _paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(wanted, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// vCPUs that start are not to run yet.
    pub fn pause(&self) {
        self.want(PAUSE);
    }

    fn order_ahead(&self, ahead: Ahead) {
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some(ahead);
    }

    /// Has what was ordered read ahead, as long as the machine is to run.
    fn read_ahead(&self, vcpu: BorrowedFd<'_>) {
        let ordered = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ahead) = ordered {
            ahead.give_meanwhile(vcpu, &|| self.wanted.load(Ordering::SeqCst) == RUN);
        }
    }

    /// Waits while the machine is paused; returns whether the vCPU is to run. If it has to wait, `settle` is called before
    /// and `woken` after.
    fn may_run<T>(&self, vcpu: &mut T, settle: impl FnOnce(&mut T), woken: impl FnOnce(&mut T)) -> bool {
        if self.ending.get().is_some() {
            return false;
        }
        match self.wanted.load(Ordering::SeqCst) {
            RUN => return true,
            STOP => return false,
            _ => settle(vcpu),
        }
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        *paused += 1;
        self.changed.notify_all();
        while self.wanted.load(Ordering::SeqCst) == PAUSE {
            paused = self.changed.wait(paused).unwrap_or_else(PoisonError::into_inner);
        }
        *paused -= 1;
        woken(vcpu);
        self.wanted.load(Ordering::SeqCst) == RUN
    }

    fn wait_until_paused(&self, vcpus: &[JoinHandle<()>]) {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        while *paused < vcpus.iter().filter(|v| !v.is_finished()).count() {
            // The timeout is for a vCPU that ends its machine instead of pausing: it does not notify.
            let wait = std::time::Duration::from_millis(10);
            paused = self.changed.wait_timeout(paused, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// All vCPU threads of a machine.
#[derive(Debug)]
pub struct RunningVcpus {
    threads: Vec<JoinHandle<()>>,
    control: Arc<Control>,
}

impl RunningVcpus {
    /// Starts one thread for each vCPU.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(vcpus: Vec<Vcpu>, control: Arc<Control>) -> io::Result<Self> {
        kick::install()?;
        let mut running = Self { threads: Vec::with_capacity(vcpus.len()), control };
        for vcpu in vcpus {
            let control = Arc::clone(&running.control);
            match seccomp::spawn(Thread::Vcpu(vcpu.index), move || vcpu.run(&control)) {
                Ok(thread) => running.threads.push(thread),
                Err(error) => {
                    running.stop();
                    return Err(error);
                }
            }
        }
        // Where there is one CPU, the guest is worth it first: a guest that sleeps is woken by the kernel's worker, and is then behind
        // this thread again.
        (0..2).for_each(|_| std::thread::yield_now());
        Ok(running)
    }

    /// Stops all vCPUs between two instructions; returns when they stand. The caller has asked
    /// [`crate::lifecycle`] and is no vCPU thread.
    pub fn pause(&self) {
        self.control.want(PAUSE);
        self.threads.iter().for_each(kick::kick);
        self.control.wait_until_paused(&self.threads);
    }

    /// Has the first vCPU stop for as long as it takes to have these pages there, which then costs no exit for each.
    pub fn read_ahead(&self, ahead: Ahead) {
        self.control.order_ahead(ahead);
        self.threads.first().into_iter().for_each(kick::kick);
    }

    /// Lets paused vCPUs run on.
    pub fn resume(&self) {
        self.control.want(RUN);
    }

    /// Ends all vCPU threads and waits for them. The caller is no vCPU thread.
    pub fn stop(self) {
        self.control.want(STOP);
        self.threads.iter().for_each(kick::kick);
        for thread in self.threads {
            // A vCPU thread that panicked is as gone as one that returned.
            let _gone = thread.join();
        }
    }
}

/// One vCPU, ready to run.
#[derive(Debug)]
pub struct Vcpu {
    /// KVM's number of it, also its APIC id.
    pub index: u8,
    fd: VcpuFd,
    buses: Arc<Buses>,
    /// Devices of a restored machine whose drivers are to learn something before this vCPU runs.
    news: Vec<Transport>,
}

impl Vcpu {
    /// Gives a new vCPU its CPUID and the state in which firmware would leave it: the boot CPU at the kernel's entry
    /// point in long mode, the others waiting for a startup interrupt.
    ///
    /// # Errors
    /// The KVM call that failed, by name.
    pub fn new(
        fd: VcpuFd,
        index: u8,
        cpuid: &kvm_bindings::CpuId,
        entry: GuestAddress,
        buses: Arc<Buses>,
    ) -> Result<Self, (&'static str, kvm_ioctls::Error)> {
        fd.set_cpuid2(cpuid).map_err(|e| ("KVM_SET_CPUID2", e))?;
        set_xcr0(&fd, cpuid).map_err(|e| ("KVM_SET_XCRS", e))?;
        set_msrs(&fd).map_err(|e| ("KVM_SET_MSRS", e))?;
        set_local_interrupts(&fd).map_err(|e| ("KVM_SET_LAPIC", e))?;
        if index == 0 {
            let mut sregs = fd.get_sregs().map_err(|e| ("KVM_GET_SREGS", e))?;
            registers::long_mode(&mut sregs);
            fd.set_sregs(&sregs).map_err(|e| ("KVM_SET_SREGS", e))?;
            fd.set_regs(&registers::general(entry)).map_err(|e| ("KVM_SET_REGS", e))?;
        } else {
            let waiting = kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_UNINITIALIZED };
            fd.set_mp_state(waiting).map_err(|e| ("KVM_SET_MP_STATE", e))?;
        }
        Ok(Self { index, fd, buses, news: Vec::new() })
    }

    /// Gives a new vCPU a saved one's state.
    ///
    /// # Errors
    /// KVM does not take it.
    pub fn restore(
        fd: VcpuFd,
        index: u8,
        cpuid: &kvm_bindings::CpuId,
        state: &VcpuState,
        buses: Arc<Buses>,
    ) -> Result<Self, Refusal> {
        fd.set_cpuid2(cpuid).map_err(|error| Refusal::Host(format!("KVM_SET_CPUID2: {error}")))?;
        snapshot::vcpu::restore(&fd, state)?;
        Ok(Self { index, fd, buses, news: Vec::new() })
    }

    /// Has these devices [begin](devices::virtio::mmio::MmioTransport::begin) by this vCPU's thread, which is confined and has the guest
    /// at once: the event loop comes later.
    pub fn tell_first(&mut self, devices: Vec<Transport>) {
        self.news = devices;
    }

    /// The vCPU's descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        kick::descriptor(&self.fd)
    }

    /// A second handle, for whoever asks for the vCPU's state while its thread stands.
    ///
    /// # Errors
    /// The host grants no more descriptors.
    pub fn handle(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }

    /// Has KVM tell the guest's clock that time went by without it. One that uses no kvm-clock cannot be told.
    pub fn tell_of_pause(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    fn run(mut self, control: &Control) {
        let Self { index, fd, buses, news } = &mut self;
        let mut vcpu = Kickable::new(fd);
        let settle = |vcpu: &mut Kickable<'_>| settle(vcpu, *index, buses, &control.ending);
        while control.may_run(&mut vcpu, settle, |vcpu| _ = vcpu.fd.kvmclock_ctrl()) {
            for device in news.drain(..) {
                device.lock().unwrap_or_else(PoisonError::into_inner).0.begin();
            }
            if *index == 0 {
                control.read_ahead(vcpu.as_fd());
            }
            enter(&mut vcpu, *index, buses, &control.ending);
        }
    }
}

/// Runs the guest until it wants something, and does that. Returns whether it was interrupted instead.
fn enter(vcpu: &mut Kickable<'_>, index: u8, buses: &Buses, ending: &Ending) -> bool {
    match vcpu.fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => buses.ports.write(port.into(), data),
        Ok(VcpuExit::IoIn(port, data)) => buses.ports.read(port.into(), data),
        Ok(VcpuExit::MmioWrite(address, data)) => buses.registers.write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => buses.registers.read(address, data),
        Ok(VcpuExit::Shutdown) => {
            ending.end(VmExit::TripleFault, format!("vCPU {index} triple-faulted"));
        }
        Ok(VcpuExit::InternalError) => {
            let suberror = vcpu.internal_suberror();
            ending.end(VmExit::KvmInternal, internal_error(index, suberror));
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => ending.end(
            VmExit::KvmInternal,
            format!("KVM cannot enter the guest on CPU {cpu}: hardware reason {reason:#x}"),
        ),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => {
            ending.end(VmExit::KvmInternal, format!("KVM cannot reach guest memory at {gpa:#x}"));
        }
        Ok(VcpuExit::Intr) => {
            vcpu.clear();
            return true;
        }
        Ok(other) => {
            ending.end(VmExit::KvmInternal, format!("KVM ended vCPU {index} with {other:?}"));
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            vcpu.clear();
            return true;
        }
        Err(error) => {
            ending.end(VmExit::KvmInternal, format!("KVM_RUN of vCPU {index} failed: {error}"));
        }
    }
    false
}

/// More accesses than one instruction makes, unless it is a string instruction: that one is interrupted.
const MAX_ACCESSES: usize = 4096;

/// Has KVM finish an access to a device, whose result it takes only at the next entry: the registers that a snapshot reads
/// would not have it.
fn settle(vcpu: &mut Kickable<'_>, index: u8, buses: &Buses, ending: &Ending) {
    for _ in 0..MAX_ACCESSES {
        vcpu.stay_out();
        if enter(vcpu, index, buses, ending) || ending.get().is_some() {
            return;
        }
    }
}

/// What KVM's internal error means for the user.
fn internal_error(vcpu: u8, suberror: u32) -> String {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => format!(
            "KVM internal error, suberror 1, on vCPU {vcpu}: it tried to emulate an instruction of the guest's kernel \
             and cannot. Where every kernel ends so, this KVM emulates guest kernels and cannot run them: see `flyrun doctor`"
        ),
        other => format!("KVM internal error, suberror {other}, on vCPU {vcpu}: see the host's kernel log"),
    }
}

/// Enables x87, SSE and AVX state, as the guest's kernel soon will. QEMU's emulation of SVM (7.2) does not tell KVM
/// when the guest does so itself, and KVM would then go back to x87 alone at the next entry.
fn set_xcr0(fd: &VcpuFd, cpuid: &kvm_bindings::CpuId) -> Result<(), kvm_ioctls::Error> {
    let leaf = cpuid.as_slice().iter().find(|e| e.function == 0xd && e.index == 0);
    let Some(supported) = leaf.map(|leaf| u64::from(leaf.eax)).filter(|eax| *eax != 0) else { return Ok(()) };
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    if let Some(xcr0) = xcrs.xcrs.first_mut() {
        xcr0.value = supported & XCR0_X87_SSE_AVX;
    }
    fd.set_xcrs(&xcrs)
}

/// Fast string instructions on, and memory write-back without a firmware's MTRRs.
fn set_msrs(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let wanted =
        [entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS), entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)];
    let msrs = Msrs::from_entries(&wanted).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
    match fd.set_msrs(&msrs)? {
        set if set == wanted.len() => Ok(()),
        _ => Err(kvm_ioctls::Error::new(libc::EINVAL)),
    }
}

/// LINT0 takes the PIC's interrupts and LINT1 NMIs, as the MP table says.
fn set_local_interrupts(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut lapic = fd.get_lapic()?;
    for (register, delivery) in [(LVT_LINT0, DELIVER_EXTINT), (LVT_LINT1, DELIVER_NMI)] {
        if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
            let mut value = 0u32;
            for (i, byte) in (0u32..).zip(bytes.iter()) {
                value |= u32::from(byte.cast_unsigned()) << (8 * i);
            }
            let value = (value & !DELIVERY_MASK) | delivery;
            for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *byte = new.cast_signed();
            }
        }
    }
    fd.set_lapic(&lapic)
}
