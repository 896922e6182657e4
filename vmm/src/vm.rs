//! The composition root: a machine from its spec, step by step.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::virtio::Memory;
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::{
    attach::{Attach, GuestDevices},
    boot::{self, LoadedKernel, command_line, params, registers},
    bus::Buses,
    channel::Channel,
    console::Console,
    cpuid::Template,
    ending::{End, Ending},
    error::SetupError,
    event_loop::EventLoop,
    exit::VmExit,
    machine::Machine,
    memory, mptable,
    spec::VmSpec,
    trace::Trace,
    validate::validate,
    vcpu::Vcpu,
};

/// Room for KVM's CPUID entries, so that one call is enough; today's hosts have 40 to 60.
const CPUID_ENTRIES: usize = 256;

/// A machine.
#[derive(Debug)]
pub struct Vm {
    machine: Arc<Mutex<Machine>>,
    event_loop: EventLoop,
    console: Option<Console>,
    ending: Arc<Ending>,
    trace: Arc<Trace>,
    /// Behind the vCPUs, so that it is closed after them.
    _fd: VmFd,
}

impl Vm {
    /// Makes the machine; no guest instruction runs yet.
    ///
    /// # Errors
    /// The spec is not valid, or the host or one of the files refuses.
    pub fn new(spec: &VmSpec, trace: Arc<Trace>) -> Result<Self, SetupError> {
        validate(spec)?;
        let ending = Arc::new(Ending::new().map_err(SetupError::io("eventfd"))?);
        let mut event_loop = EventLoop::new(Arc::clone(&ending)).map_err(SetupError::io("epoll"))?;
        event_loop.serve_signals().map_err(SetupError::io("signalfd"))?;

        let kvm = Kvm::new().map_err(SetupError::NoKvm)?;
        let fd = create_vm(&kvm)?;
        trace.step("vm created");

        let guest = reserve_memory(spec)?;
        memory::register(&fd, &guest)?;
        trace.step("memory ready");

        let mut buses = Buses::default();
        let mut attach = Attach {
            fd: &fd,
            memory: &guest,
            buses: &mut buses,
            event_loop: &mut event_loop,
            ending: &ending,
            guest_devices: GuestDevices::default(),
        };
        let console = attach.console(spec, &trace)?;
        attach.reset_controller()?;
        attach.virtio(spec)?;
        let guest_devices = attach.finish();
        trace.step("devices ready");

        let kernel = load_guest(spec, &guest, console.is_some(), &guest_devices)?;
        trace.step("kernel loaded");

        let vcpus = create_vcpus(spec.cpus, &kvm, &fd, &kernel, Arc::new(buses))?;
        trace.step("vcpus ready");

        let machine = Arc::new(Mutex::new(Machine::new(vcpus, Arc::clone(&ending))));
        Ok(Self { machine, event_loop, console, ending, trace, _fd: fd })
    }

    /// Lets the guest's first instruction run.
    ///
    /// # Errors
    /// The machine was started before, or the host gives no thread.
    pub fn start(&mut self) -> Result<(), SetupError> {
        self.machine().start().map_err(SetupError::io("vCPU threads"))?;
        self.trace.step("running");
        Ok(())
    }

    /// The machine's vCPUs, for those who pause it.
    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what the machine's owner asks for on this stream.
    pub fn serve_owner(&mut self, stream: UnixStream) {
        let channel = Channel::new(stream, Arc::clone(&self.machine));
        self.event_loop.serve(Arc::new(Mutex::new(channel)));
    }

    /// Serves the devices of a started machine until it ends, on the calling thread.
    pub fn serve(mut self) -> End {
        self.event_loop.run();
        self.trace.step("ended");
        self.machine().stop();
        if let Some(console) = &self.console {
            console.flush();
        }
        let end = self.ending.get().cloned();
        let end = end.unwrap_or_else(|| End { exit: VmExit::Setup, reason: "the event loop ended".into() });
        explain(end, self.console.as_ref().and_then(Console::panic_line))
    }
}

/// A kernel that panicked resets its machine, as one that shuts down does: its last words tell the difference.
fn explain(end: End, panic_line: Option<String>) -> End {
    match (end.exit, panic_line) {
        (VmExit::Reset | VmExit::TripleFault, Some(line)) => {
            End { exit: VmExit::Panic, reason: format!("the guest's kernel panicked: {line}") }
        }
        _ => end,
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, SetupError> {
    let fd = kvm.create_vm().map_err(SetupError::kvm("KVM_CREATE_VM"))?;
    fd.set_tss_address(memory::KVM_TSS as usize).map_err(SetupError::kvm("KVM_SET_TSS_ADDR"))?;
    fd.create_irq_chip().map_err(SetupError::kvm("KVM_CREATE_IRQCHIP"))?;
    Ok(fd)
}

/// Another process that serves a device must be able to map the guest's memory.
fn reserve_memory(spec: &VmSpec) -> Result<Memory, SetupError> {
    let reserve = if spec.shares.is_empty() { memory::reserve } else { memory::reserve_shared };
    Ok(reserve(spec.memory_mib)?)
}

fn load_guest(
    spec: &VmSpec,
    guest: &Memory,
    console: bool,
    devices: &GuestDevices,
) -> Result<LoadedKernel, SetupError> {
    let bytes = u64::from(spec.memory_mib) << 20;
    let kernel = boot::load_kernel(guest, &spec.kernel)?;
    let initrd = boot::initrd::load(guest, bytes.min(memory::LOW_END), &kernel, &spec.initrd)?;
    let line = command_line::build(console, &devices.windows, &spec.command_line);
    command_line::write(guest, &line)?;
    params::write(guest, bytes, &kernel, line.len(), initrd)?;
    mptable::write(guest, spec.cpus, &devices.irqs).map_err(boot::BootError::from)?;
    registers::write_tables(guest).map_err(boot::BootError::from)?;
    Ok(kernel)
}

fn create_vcpus(
    cpus: u8,
    kvm: &Kvm,
    fd: &VmFd,
    kernel: &LoadedKernel,
    buses: Arc<Buses>,
) -> Result<Vec<Vcpu>, SetupError> {
    let supported =
        kvm.get_supported_cpuid(CPUID_ENTRIES).map_err(SetupError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let template = Template::new(supported.as_slice(), cpus, kvm.check_extension(Cap::TscDeadlineTimer));
    let mut vcpus = Vec::with_capacity(cpus.into());
    for index in 0..cpus {
        let vcpu = fd.create_vcpu(index.into()).map_err(SetupError::kvm("KVM_CREATE_VCPU"))?;
        let cpuid = template
            .for_cpu(index)
            .map_err(|_| SetupError::kvm("KVM_SET_CPUID2")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let vcpu = Vcpu::new(vcpu, index, &cpuid, kernel.entry, Arc::clone(&buses));
        vcpus.push(vcpu.map_err(|(call, source)| SetupError::Kvm { call, source })?);
    }
    Ok(vcpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let reset = End { exit: VmExit::Reset, reason: String::new() };
        assert_eq!(explain(reset.clone(), None), reset);
        let end = explain(reset, Some("Kernel panic - not syncing: x".into()));
        assert_eq!(end.exit, VmExit::Panic);
        assert!(end.reason.ends_with("syncing: x"));
    }
}
