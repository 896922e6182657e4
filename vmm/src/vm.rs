//! The composition root: a machine from its spec, step by step.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::{legacy::ConsoleState, virtio::Memory};
use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::{
    attach::{Attach, GuestDevices, Transport},
    boot::{self, LoadedKernel, command_line, params, registers},
    bus::Buses,
    channel::{Channel, Owned},
    console::Console,
    cpuid::Template,
    ending::{End, Ending},
    error::SetupError,
    event_loop::EventLoop,
    exit::VmExit,
    machine::Machine,
    memory, mptable,
    owner::Owner,
    parts::{Devices, Parts, Purpose},
    seccomp::{self, Thread},
    snapshot::{
        apart::Apart,
        clock, cpu,
        identity::OpenFiles,
        image::Backing,
        refusal::Refusal,
        restore::Snapshot,
        sections::State,
        subject::{Kernel, Learning, Subject},
        text::{Text, Texts},
        working_set::Ahead,
    },
    spec::VmSpec,
    trace::Trace,
    vcpu::Vcpu,
    worker::Worker,
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
    subject: Arc<Subject>,
}

/// A machine that has no parts yet.
pub(crate) struct Frame {
    kvm: Kvm,
    fd: VmFd,
    event_loop: EventLoop,
    pub(crate) ending: Arc<Ending>,
    buses: Buses,
}

/// What only a machine from a snapshot or only one from a kernel brings.
struct Origin {
    kernel: Kernel,
    files: OpenFiles,
    backing: Backing,
    text: Text,
    cpuid: Template,
    learning: Learning,
}

impl Vm {
    /// Makes the machine; no guest instruction runs yet.
    ///
    /// # Errors
    /// The spec is not valid, or the host or one of the files refuses.
    pub fn new(spec: &VmSpec, trace: Arc<Trace>) -> Result<Self, SetupError> {
        Self::boot(Parts::open(spec, Purpose::Boot, &trace)?, trace)
    }

    /// The same, of parts that are open. From here on what is read is a stranger's.
    ///
    /// # Errors
    /// The host or one of the files refuses.
    pub fn boot(parts: Parts, trace: Arc<Trace>) -> Result<Self, SetupError> {
        let Parts { spec, mut frame, devices, files, kernel, boot, .. } = parts;
        let guest = reserve_memory(&spec)?;
        memory::register(&frame.fd, &guest)?;
        trace.step("memory ready");

        let backing = Backing::default();
        let (console, devices) = frame.attach(devices, spec.balloon, &guest, &backing, None, &trace)?;
        let boot = boot.map_or_else(|| boot::Files::open(&spec), Ok)?;
        let loaded = load_guest(&spec, boot, &guest, console.is_some(), &devices)?;
        trace.step("kernel loaded");

        let origin = Origin {
            kernel: kernel.map_or(Kernel::Unknown, Kernel::Booted),
            files,
            backing,
            text: loaded.text.clone().map_or(Text::Unknown, Text::Loaded),
            cpuid: frame.template(spec.cpus)?,
            learning: Learning::Watched { apart: None, first: None },
        };
        let buses = Arc::new(std::mem::take(&mut frame.buses));
        let vcpus = frame.vcpus(spec.cpus, &origin.cpuid, |fd, index, cpuid| {
            Vcpu::new(fd, index, cpuid, loaded.entry, Arc::clone(&buses))
                .map_err(|(call, source)| SetupError::Kvm { call, source })
        })?;
        trace.step("vcpus ready");
        frame.finish(spec, guest, console, devices, vcpus, origin, trace)
    }

    /// Makes the machine of a snapshot, with the host's files and interfaces of this spec; no guest instruction runs yet.
    ///
    /// # Errors
    /// As [`Vm::new`], and the snapshot is refused.
    pub fn restore(
        snapshot: Snapshot,
        spec: &VmSpec,
        verify: bool,
        trace: Arc<Trace>,
    ) -> Result<Self, SetupError> {
        Self::go_on(Parts::open(spec, Purpose::Restore, &trace)?, snapshot, Texts::default(), verify, trace)
    }

    /// The same, of parts that are open, with the kernel's text from one of these files if it is in there.
    ///
    /// # Errors
    /// The host refuses, or the snapshot is refused.
    pub fn go_on(
        parts: Parts,
        snapshot: Snapshot,
        texts: Texts,
        verify: bool,
        trace: Arc<Trace>,
    ) -> Result<Self, SetupError> {
        let Parts { spec, mut frame, devices, files, .. } = parts;
        // The guest's alone: no part of the host's side.
        let spec = VmSpec { balloon: snapshot.header.spec.balloon, ..spec };
        snapshot.check(&spec, &files)?;
        cpu::check(&snapshot.state.machine.cpuid, frame.template(spec.cpus)?.entries())?;
        let text = snapshot.header.text.as_ref();
        let text = text.and_then(|id| texts.find(id, u64::from(spec.memory_mib) << 20));
        let (guest, backing) = snapshot.memory(spec.memory_mib, verify, text.as_ref())?;
        // A base's guest has all its work before it.
        let is_base = snapshot.header.disks.is_none();
        let (first, learning) = match snapshot.working_set() {
            Some(list) => {
                let list = if is_base { list.all_first() } else { list };
                let (first, rest) = list.ahead(&guest, &backing.mapped());
                (Some(first.with_text(backing.text())), Learning::Known { list, rest: Some(rest) })
            }
            // A host that cannot do that has a list with neighbours, which costs a little time.
            None => {
                (None, Learning::Watched { apart: Apart::new(&guest, &backing.mapped()).ok(), first: None })
            }
        };
        first.iter().for_each(Ahead::make);
        memory::register(&frame.fd, &guest)?;
        let Snapshot { header, state, .. } = snapshot;
        trace.step("memory ready");

        let (console, devices) =
            frame.attach(devices, spec.balloon, &guest, &backing, state.console.as_ref(), &trace)?;
        let cpuid = Template::saved(state.machine.cpuid.clone());
        let buses = Arc::new(std::mem::take(&mut frame.buses));
        let mut saved = state.vcpus.iter();
        let mut vcpus = frame.vcpus(spec.cpus, &cpuid, |fd, index, cpuid| {
            let state =
                saved.next().ok_or_else(|| Refusal::Corrupted(format!("state has no vCPU {index}")))?;
            Ok(Vcpu::restore(fd, index, cpuid, state, Arc::clone(&buses))?)
        })?;
        trace.step("vcpus ready");

        // Behind the vCPUs, which the interrupts of both go to.
        clock::restore(&frame.fd, &state.machine)?;
        vcpus.iter().for_each(Vcpu::tell_of_pause);
        continue_devices(&devices, &state)?;
        if header.disks.is_none() {
            // They are others than those that the driver has seen.
            devices.transports.iter().take(spec.disks.len()).for_each(announce);
        }
        if let Some(first) = vcpus.first_mut() {
            first.tell_first(devices.transports.clone());
        }
        if let Some(console) = &console {
            console.remind();
        }
        trace.step("state restored");
        if let (Some(first), Some(vcpu)) = (first, vcpus.first()) {
            first.give(vcpu.as_fd());
            trace.step("pages read ahead");
        }
        crate::hold::at("vmm has restored");
        let kernel = header.kernel.map_or(Kernel::Unknown, Kernel::Resumed);
        let text = header.text.map_or(Text::Unknown, Text::Resumed);
        let origin = Origin { kernel, files, backing, text, cpuid, learning };
        frame.finish(spec, guest, console, devices, vcpus, origin, trace)
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

    /// Has the machine there, paused before its first instruction.
    ///
    /// # Errors
    /// The machine was started before, or the host gives no thread.
    pub fn start_paused(&mut self) -> Result<(), SetupError> {
        self.machine().start_paused().map_err(SetupError::io("vCPU threads"))?;
        self.trace.step("paused");
        Ok(())
    }

    /// Leaves the calling thread with what the event loop needs. Behind [`Vm::start`], on the thread that is to [`Vm::serve`];
    /// it has met nothing of the guest yet.
    ///
    /// # Errors
    /// The host gives no thread, or has no seccomp. The machine is not to be served.
    pub fn confine(&self) -> Result<(), SetupError> {
        self.subject.worker.start().map_err(SetupError::io("worker thread"))?;
        seccomp::confine(Thread::Main).map_err(SetupError::io("seccomp"))
    }

    /// The machine's parts, for those who save it.
    pub fn subject(&self) -> &Arc<Subject> {
        &self.subject
    }

    /// The machine's vCPUs, for those who pause it.
    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what the machine's owner asks for on this stream.
    pub fn serve_owner(&mut self, stream: UnixStream, owner: Option<Owner>) {
        let owned =
            Owned { subject: Some(Arc::clone(&self.subject)), owner, ending: Arc::clone(&self.ending) };
        let channel = Channel::new(stream, Arc::clone(&self.machine), owned);
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

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Frame")
    }
}

impl Frame {
    pub(crate) fn new(trace: &Trace) -> Result<Self, SetupError> {
        let ending = Arc::new(Ending::new().map_err(SetupError::io("eventfd"))?);
        let mut event_loop = EventLoop::new(Arc::clone(&ending)).map_err(SetupError::io("epoll"))?;
        event_loop.serve_signals().map_err(SetupError::io("signalfd"))?;
        let kvm = Kvm::new().map_err(SetupError::NoKvm)?;
        let fd = create_vm(&kvm)?;
        trace.step("vm created");
        Ok(Self { kvm, fd, event_loop, ending, buses: Buses::default() })
    }

    fn attach(
        &mut self,
        mut parts: Devices,
        balloon: bool,
        guest: &Memory,
        backing: &Backing,
        saved: Option<&ConsoleState>,
        trace: &Arc<Trace>,
    ) -> Result<(Option<Console>, GuestDevices), SetupError> {
        let mut attach = Attach {
            fd: &self.fd,
            memory: guest,
            buses: &mut self.buses,
            event_loop: &mut self.event_loop,
            ending: &self.ending,
            guest_devices: GuestDevices::default(),
        };
        let console = attach.console(parts.console.take(), saved, trace)?;
        attach.reset_controller()?;
        attach.virtio(parts, balloon, backing.given_back())?;
        let devices = attach.finish();
        trace.step("devices ready");
        Ok((console, devices))
    }

    /// What a guest sees of this host's CPU.
    fn template(&self, cpus: u8) -> Result<Template, SetupError> {
        let supported = self.kvm.get_supported_cpuid(CPUID_ENTRIES);
        let supported = supported.map_err(SetupError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Template::new(supported.as_slice(), cpus, self.kvm.check_extension(Cap::TscDeadlineTimer)))
    }

    fn vcpus(
        &self,
        cpus: u8,
        template: &Template,
        mut set_up: impl FnMut(VcpuFd, u8, &CpuId) -> Result<Vcpu, SetupError>,
    ) -> Result<Vec<Vcpu>, SetupError> {
        let mut vcpus = Vec::with_capacity(cpus.into());
        for index in 0..cpus {
            let fd = self.fd.create_vcpu(index.into()).map_err(SetupError::kvm("KVM_CREATE_VCPU"))?;
            let cpuid = template
                .for_cpu(index)
                .map_err(|_| SetupError::kvm("KVM_SET_CPUID2")(kvm_ioctls::Error::new(libc::E2BIG)))?;
            vcpus.push(set_up(fd, index, &cpuid)?);
        }
        Ok(vcpus)
    }

    #[allow(clippy::too_many_arguments, reason = "each is a part of the machine, and there is no more to it")]
    fn finish(
        self,
        spec: VmSpec,
        memory: Memory,
        console: Option<Console>,
        devices: GuestDevices,
        vcpus: Vec<Vcpu>,
        origin: Origin,
        trace: Arc<Trace>,
    ) -> Result<Vm, SetupError> {
        let Self { kvm, fd, event_loop, ending, .. } = self;
        let handles = vcpus.iter().map(Vcpu::handle).collect::<Result<_, _>>();
        let subject = Arc::new(Subject {
            kvm,
            fd,
            memory,
            spec,
            cpuid: origin.cpuid,
            vcpus: handles.map_err(SetupError::io("vCPU"))?,
            transports: devices.transports,
            console: console.clone(),
            kernel: origin.kernel,
            files: origin.files,
            backing: origin.backing,
            text: origin.text,
            learning: Mutex::new(origin.learning),
            worker: Worker::default(),
        });
        let machine = Arc::new(Mutex::new(Machine::new(vcpus, Arc::clone(&ending))));
        Ok(Vm { machine, event_loop, console, ending, trace, subject })
    }
}

fn continue_devices(devices: &GuestDevices, state: &State) -> Result<(), Refusal> {
    let (here, saved) = (devices.transports.len(), state.devices.len());
    if here != saved {
        return Err(Refusal::OtherMachine(format!(
            "{saved} virtio devices were saved, and {here} are there"
        )));
    }
    for (index, (transport, state)) in devices.transports.iter().zip(&state.devices).enumerate() {
        let restored = transport.lock().unwrap_or_else(PoisonError::into_inner).0.restore(state);
        restored.map_err(|error| Refusal::Host(format!("virtio device {index}: {error}")))?;
    }
    Ok(())
}

/// Has the driver read the device's configuration again.
fn announce(transport: &Transport) {
    transport.lock().unwrap_or_else(PoisonError::into_inner).0.announce_configuration();
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
    files: boot::Files,
    guest: &Memory,
    console: bool,
    devices: &GuestDevices,
) -> Result<LoadedKernel, SetupError> {
    let bytes = u64::from(spec.memory_mib) << 20;
    let kernel = boot::load_kernel(guest, files.kernel)?;
    let initrd = boot::initrd::load(guest, bytes.min(memory::LOW_END), &kernel, files.initrd)?;
    let line = command_line::build(console, spec.balloon, &devices.windows, &spec.command_line);
    command_line::write(guest, &line)?;
    params::write(guest, bytes, &kernel, line.len(), initrd)?;
    mptable::write(guest, spec.cpus, &devices.irqs).map_err(boot::BootError::from)?;
    registers::write_tables(guest).map_err(boot::BootError::from)?;
    Ok(kernel)
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
