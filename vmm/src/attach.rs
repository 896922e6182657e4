//! Puts devices where the guest finds them: a window of registers, an interrupt line, a place in the event loop.

use std::{
    fs::{File, OpenOptions},
    io::{stdin, stdout},
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex},
};

use devices::{
    legacy::{ConsoleState, ResetController},
    virtio::{
        Memory, VirtioDevice,
        balloon::Balloon,
        block::{Backend, Block},
        fs::{ANSWER_LIMIT, Fs},
        mmio::{MMIO_SIZE, MmioTransport, QUEUE_NOTIFY},
        net::{Net, NetConfig, Tap, VhostNet},
        rng::Rng,
        throttle::Throttle,
        vsock::Vsock,
    },
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    boot::command_line::MmioWindow,
    bus::{BusDevice, Buses},
    console::Console,
    ending::Ending,
    error::SetupError,
    event_loop::EventLoop,
    exit::VmExit,
    memory::LOW_END,
    mptable::IRQ_LINES,
    reclaim::{GivenBack, Reclaimer},
    spec::{ConsoleSpec, DiskSpec, NetBackend, NetSpec, RateSpec, VmSpec},
    trace::Trace,
};

const SERIAL_PORT: u64 = 0x3f8;
const SERIAL_PORTS: u64 = 8;
const SERIAL_IRQ: u8 = 4;
const I8042_PORT: u64 = 0x60;
const I8042_PORTS: u64 = 5;
/// virtio's windows and lines are counted from here on; below are the lines of a PC's timer, keyboard and serial ports.
const FIRST_WINDOW: u64 = LOW_END;
const FIRST_IRQ: u8 = 5;

const NO_VHOST: &str = "/dev/vhost-net cannot be used (load vhost_net, or choose the backend \"user\")";

/// All that devices are attached to.
#[derive(Debug)]
pub struct Attach<'a> {
    /// The machine's KVM.
    pub fd: &'a VmFd,
    /// Its memory.
    pub memory: &'a Memory,
    /// Its ports and registers.
    pub buses: &'a mut Buses,
    /// The loop that serves it.
    pub event_loop: &'a mut EventLoop,
    /// Its end.
    pub ending: &'a Arc<Ending>,
    /// What was attached so far.
    pub guest_devices: GuestDevices,
}

/// What the guest must be told of its devices.
#[derive(Debug, Default)]
pub struct GuestDevices {
    /// virtio devices, in the order of their attachment.
    pub windows: Vec<MmioWindow>,
    /// All interrupt lines that a device uses.
    pub irqs: Vec<u8>,
    /// The virtio devices themselves, in that order.
    pub transports: Vec<Transport>,
}

/// A virtio device's registers, which a vCPU's thread and the event loop's reach.
pub type Transport = Arc<Mutex<Registers>>;

impl Attach<'_> {
    /// What the guest must be told.
    pub fn finish(self) -> GuestDevices {
        self.guest_devices
    }

    /// The first serial port, unless the console is off. A saved one goes on where it was.
    ///
    /// # Errors
    /// The console's file does not open, or the host refuses.
    pub fn console(
        &mut self,
        spec: &VmSpec,
        saved: Option<&ConsoleState>,
        trace: &Arc<Trace>,
    ) -> Result<Option<Console>, SetupError> {
        let (output, input) = match &spec.console {
            ConsoleSpec::Off => return Ok(None),
            ConsoleSpec::File(path) => {
                let opened = OpenOptions::new().read(true).append(true).create(true).open(path);
                (opened.map_err(SetupError::io(format!("console {}", path.display())))?, None)
            }
            ConsoleSpec::Stdio => (duplicate(stdout().as_fd())?, Some(duplicate(stdin().as_fd())?)),
        };
        let irq = event()?;
        self.fd.register_irqfd(&irq, SERIAL_IRQ.into()).map_err(SetupError::kvm("KVM_IRQFD"))?;
        let (console, input) =
            Console::new(saved, irq, output, input, Arc::clone(trace)).map_err(SetupError::io("console"))?;
        self.ports(SERIAL_PORT, SERIAL_PORTS, console.clone())?;
        self.event_loop.serve(Arc::new(Mutex::new(input)));
        self.guest_devices.irqs.push(SERIAL_IRQ);
        Ok(Some(console))
    }

    /// The keyboard controller, whose reset line ends the machine.
    ///
    /// # Errors
    /// The host gives no event.
    pub fn reset_controller(&mut self) -> Result<(), SetupError> {
        let reset = event()?;
        let device = ResetController::new(reset.try_clone().map_err(SetupError::io("eventfd"))?);
        self.ports(I8042_PORT, I8042_PORTS, Reset { device, reset, ending: Arc::clone(self.ending) })
    }

    /// All virtio devices, in the spec's order. `given_back` is told what the balloon gives to the host.
    ///
    /// # Errors
    /// A disk's file or a TAP does not open, a virtiofsd does not answer, or the host refuses.
    pub fn virtio(&mut self, spec: &VmSpec, given_back: &Arc<GivenBack>) -> Result<(), SetupError> {
        for (index, disk) in spec.disks.iter().enumerate() {
            let block = self.block(disk, &format!("disk{index}"))?;
            self.mmio(block)?;
        }
        for net in &spec.nets {
            self.net(net)?;
        }
        if let Some(vsock) = &spec.vsock {
            let what = format!("vsock socket {}", vsock.socket.display());
            let device = Vsock::new(vsock.guest_cid, &vsock.socket).map_err(SetupError::io(what))?;
            self.mmio(device)?;
        }
        for share in &spec.shares {
            let what = format!("shared directory {}", share.tag);
            let device = Fs::new(&share.tag, &share.socket, ANSWER_LIMIT).map_err(SetupError::io(what))?;
            self.mmio(device)?;
        }
        let rng = Rng::new().map_err(SetupError::io("rng"))?;
        self.mmio(rng)?;
        if spec.balloon {
            let reclaimer = Reclaimer::new(self.memory.clone(), Arc::clone(given_back));
            self.mmio(Balloon::new(Box::new(reclaimer)).map_err(SetupError::io("balloon"))?)?;
        }
        Ok(())
    }

    fn block(&self, disk: &DiskSpec, id: &str) -> Result<Block, SetupError> {
        let backend =
            Backend::open(&disk.files, disk.read_only).map_err(|e| SetupError::Disk(e.to_string()))?;
        let ending = Arc::clone(self.ending);
        let on_fault = move |fault: devices::virtio::block::BackendFault| {
            ending.end(VmExit::HostIo, format!("the host's disk failed the guest: {fault}"));
        };
        let device = Block::new(backend, id, Box::new(on_fault)).map_err(SetupError::io("disk"))?;
        Ok(device.with_throttle(throttle(disk.rate)?))
    }

    fn net(&mut self, net: &NetSpec) -> Result<(), SetupError> {
        let mut tap = Tap::open(&net.tap, net.queue_pairs)
            .map_err(SetupError::io(format!("TAP interface {}", net.tap)))?;
        let config = NetConfig { mac: net.mac, mtu: net.mtu, pairs: net.queue_pairs };
        // validate() refuses a rate with Vhost.
        if net.backend != NetBackend::User && net.rate.is_none() {
            tap = match VhostNet::new(tap, config) {
                Ok(device) => return self.mmio(device),
                Err((_, error)) if net.backend == NetBackend::Vhost => {
                    return Err(SetupError::Io { what: NO_VHOST.into(), source: error });
                }
                Err((tap, _)) => tap,
            };
        }
        let device = Net::new(Box::new(tap), config).map_err(SetupError::io("network device"))?;
        self.mmio(device.with_throttles(throttle(net.rate)?, throttle(net.rate)?))
    }

    fn mmio(&mut self, device: impl VirtioDevice + 'static) -> Result<(), SetupError> {
        let index = self.guest_devices.windows.len();
        let irq = u8::try_from(index).unwrap_or(u8::MAX).saturating_add(FIRST_IRQ);
        if irq >= IRQ_LINES {
            return Err(SetupError::TooManyDevices(IRQ_LINES - FIRST_IRQ));
        }
        let window = MmioWindow { address: FIRST_WINDOW + index as u64 * MMIO_SIZE, irq: irq.into() };
        let device = Arc::new(Mutex::new(device));
        let transport = MmioTransport::new(self.memory.clone(), device.clone(), event()?)
            .map_err(SetupError::io("virtio device"))?;
        self.fd.register_irqfd(transport.irq_event(), window.irq).map_err(SetupError::kvm("KVM_IRQFD"))?;
        let notify = IoEventAddress::Mmio(window.address + QUEUE_NOTIFY);
        for (queue, event) in (0u32..).zip(transport.queue_notify_events()) {
            self.fd.register_ioevent(event, &notify, queue).map_err(SetupError::kvm("KVM_IOEVENTFD"))?;
        }
        let transport = Arc::new(Mutex::new(Registers(transport)));
        if !self.buses.registers.insert(window.address, MMIO_SIZE, Arc::<Mutex<Registers>>::clone(&transport))
        {
            return Err(SetupError::Overlap(window.address));
        }
        self.event_loop.serve(device);
        self.guest_devices.transports.push(transport);
        self.guest_devices.windows.push(window);
        self.guest_devices.irqs.push(irq);
        Ok(())
    }

    fn ports(&mut self, first: u64, count: u64, device: impl BusDevice + 'static) -> Result<(), SetupError> {
        match self.buses.ports.insert(first, count, Arc::new(Mutex::new(device))) {
            true => Ok(()),
            false => Err(SetupError::Overlap(first)),
        }
    }
}

/// The virtio transport as a bus device.
pub struct Registers(pub(crate) MmioTransport);

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Registers")
    }
}

impl BusDevice for Registers {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// The keyboard controller as a bus device. It ends the machine on the writing vCPU, which must not run on: Linux
/// would go on to a triple fault.
struct Reset {
    device: ResetController,
    reset: EventFd,
    ending: Arc<Ending>,
}

impl BusDevice for Reset {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset).map_or(0, |offset| self.device.read(offset)));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Some(byte)) = (u8::try_from(offset), data.first()) {
            self.device.write(offset, *byte);
            if self.reset.read().is_ok() {
                self.ending.end(VmExit::Reset, "");
            }
        }
    }
}

fn throttle(rate: Option<RateSpec>) -> Result<Throttle, SetupError> {
    let new = |rate: RateSpec| Throttle::new(rate.into()).map_err(SetupError::io("timerfd"));
    rate.map_or(Ok(Throttle::default()), new)
}

fn event() -> Result<EventFd, SetupError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(SetupError::io("eventfd"))
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<File, SetupError> {
    Ok(fd.try_clone_to_owned().map_err(SetupError::io("standard streams"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_ends_the_machine_at_once_and_others_do_not() {
        let ending = Arc::new(Ending::new().unwrap());
        let reset = event().unwrap();
        let device = ResetController::new(reset.try_clone().unwrap());
        let mut device = Reset { device, reset, ending: Arc::clone(&ending) };
        device.write(4, &[0xd1]);
        device.write(0, &[0xfe]);
        assert_eq!(ending.get(), None);
        device.write(4, &[0xfe]);
        assert_eq!(ending.get().unwrap().exit, VmExit::Reset);
    }
}
