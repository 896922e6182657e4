//! The MMIO transport, version 2 (virtio 1.2, section 4.2.2): registers in, device life cycle out.
//!
//! Nothing that a guest writes here makes the host fail: an access of the wrong width or at an unknown offset reads as
//! zero and writes nothing, and a write that the section does not allow in the present status is ignored.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Activation, ActiveQueue, Interrupt, InterruptReason, Memory, VirtioDevice, irq::IrqLine,
    state::QueueState,
};

mod saved;

/// Size of the register window in bytes; the configuration space begins at [`CONFIG_SPACE`].
pub const MMIO_SIZE: u64 = 0x1000;
/// Offset of the device's configuration space.
pub const CONFIG_SPACE: u64 = 0x100;
/// Offset of QueueNotify: register the events of [`MmioTransport::queue_notify_events`] here, with the queue's index
/// as a 32-bit datamatch.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "flyr", little endian.
const VENDOR: u32 = 0x7279_6c66;

/// Names of the registers (virtio 1.2, table 4.1).
mod reg {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
}

/// Bits of the device status (virtio 1.2, section 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest knows how to drive the device.
    pub const DRIVER: u32 = 2;
    /// The driver is ready; the device is live.
    pub const DRIVER_OK: u32 = 4;
    /// Device and driver agree on the features.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on until it is reset.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver has given up on the device.
    pub const FAILED: u32 = 128;
}

/// VIRTIO_F_INDIRECT_DESC (section 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// What the driver has written about the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    /// Nothing is checked before DRIVER_OK.
    queues: Vec<QueueState>,
}

/// A virtio device's registers and the device behind them.
pub struct MmioTransport {
    memory: Memory,
    device: Arc<Mutex<dyn VirtioDevice>>,
    device_type: u32,
    device_features: u64,
    queue_max_sizes: Vec<u16>,
    irq: Arc<IrqLine>,
    notify: Vec<EventFd>,
    registers: Registers,
    active: bool,
}

impl MmioTransport {
    /// Puts a transport before `device`, whose interrupts go to `irq`.
    ///
    /// # Errors
    /// When the host grants no more eventfds.
    pub fn new(memory: Memory, device: Arc<Mutex<dyn VirtioDevice>>, irq: EventFd) -> io::Result<Self> {
        let (device_type, features, queue_max_sizes) = {
            let device = lock(&device);
            (device.device_type(), device.features(), device.queue_max_sizes().to_vec())
        };
        let notify =
            queue_max_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        let registers =
            Registers { queues: vec![QueueState::default(); queue_max_sizes.len()], ..Registers::default() };
        Ok(MmioTransport {
            memory,
            device,
            device_type,
            device_features: features | TRANSPORT_FEATURES,
            queue_max_sizes,
            irq: Arc::new(IrqLine::new(irq)),
            notify,
            registers,
            active: false,
        })
    }

    /// The event of each queue's notification, for KVM's ioeventfd at [`QUEUE_NOTIFY`]. They live as long as the
    /// transport. Without an ioeventfd the transport fires them itself.
    pub fn queue_notify_events(&self) -> &[EventFd] {
        &self.notify
    }

    /// The event to register as the irqfd of the device's line.
    pub fn irq_event(&self) -> &EventFd {
        self.irq.event()
    }

    /// The device, for adding it to the event loop (it is an `EventSubscriber` behind its lock).
    pub fn device(&self) -> &Arc<Mutex<dyn VirtioDevice>> {
        &self.device
    }

    /// Whether the device runs: activated, not failed, not reset since.
    pub fn is_active(&self) -> bool {
        self.active && !self.irq.failed()
    }

    /// Handles a guest's read of `data.len()` bytes at `offset` in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            return lock(&self.device).read_config(offset, data);
        }
        if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    /// Handles a guest's write of `data` at `offset` in the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            // Section 2.1.1: the configuration belongs to a driver, and there is none yet.
            if self.registers.status & status::DRIVER != 0 {
                lock(&self.device).write_config(offset, data);
            }
        } else if let Ok(value) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device_type,
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => half(self.device_features, self.registers.device_features_select),
            reg::QUEUE_NUM_MAX => self.selected_max_size().into(),
            reg::QUEUE_READY => self.selected_queue().is_some_and(|queue| queue.ready).into(),
            reg::INTERRUPT_STATUS => self.irq.status(),
            reg::STATUS => self.status(),
            // Section 4.2.2: a shared memory region that does not exist has the length -1 (and, here, the base).
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => self.irq.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            reg::DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            reg::DRIVER_FEATURES => self.write_driver_features(value),
            reg::QUEUE_SEL => self.registers.queue_select = value,
            reg::QUEUE_READY => self.write_queue_ready(value),
            QUEUE_NOTIFY => self.notify(value),
            reg::INTERRUPT_ACK => self.irq.acknowledge(value),
            reg::STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.irq.failed() { status::NEEDS_RESET } else { 0 };
        self.registers.status | needs_reset
    }

    fn selected_max_size(&self) -> u16 {
        index(self.registers.queue_select).and_then(|i| self.queue_max_sizes.get(i)).copied().unwrap_or(0)
    }

    fn selected_queue(&self) -> Option<&QueueState> {
        index(self.registers.queue_select).and_then(|i| self.registers.queues.get(i))
    }

    /// Section 3.1.1: features are negotiated after DRIVER and settled by FEATURES_OK.
    fn write_driver_features(&mut self, value: u32) {
        let negotiating = status::ACKNOWLEDGE | status::DRIVER;
        if self.registers.status == negotiating {
            set_half(&mut self.registers.driver_features, self.registers.driver_features_select, value);
        }
    }

    /// Section 4.2.2.2: the queue's registers are written after FEATURES_OK and while the queue is not ready.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        if !self.configuring_queues() {
            return;
        }
        let Some(queue) = index(self.registers.queue_select).and_then(|i| self.registers.queues.get_mut(i))
        else {
            return;
        };
        if queue.ready {
            return;
        }
        match offset {
            reg::QUEUE_NUM => queue.size = value,
            reg::QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            reg::QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            reg::QUEUE_DRIVER_LOW => set_half(&mut queue.driver_area, 0, value),
            reg::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver_area, 1, value),
            reg::QUEUE_DEVICE_LOW => set_half(&mut queue.device_area, 0, value),
            reg::QUEUE_DEVICE_HIGH => set_half(&mut queue.device_area, 1, value),
            _ => {}
        }
    }

    fn configuring_queues(&self) -> bool {
        self.registers.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED)
            == status::FEATURES_OK
    }

    fn write_queue_ready(&mut self, value: u32) {
        let configuring = self.configuring_queues();
        let Some(queue) = index(self.registers.queue_select).and_then(|i| self.registers.queues.get_mut(i))
        else {
            return;
        };
        let ready = value & 1 != 0;
        if configuring {
            queue.ready = ready;
        } else if !ready && queue.ready {
            // The driver takes back the memory of a queue in use. A device here cannot lose a single queue, so
            // all of it stops.
            queue.ready = false;
            self.fail("a queue was taken from the running device");
        }
    }

    fn notify(&self, queue: u32) {
        if !self.is_active() {
            return;
        }
        if let Some(event) = index(queue).and_then(|i| self.notify.get(i)) {
            // The only error is a full counter, and then the notification is pending already.
            let _ = event.write(1);
        }
    }

    /// Section 2.1.1: the driver sets bits one after another and clears them only all at once, which is a reset.
    fn write_status(&mut self, value: u32) {
        let old = self.registers.status;
        if value == 0 {
            return self.reset();
        }
        if value & status::FAILED != 0 {
            self.registers.status |= status::FAILED;
            return self.stop();
        }
        let set = value & !status::NEEDS_RESET;
        if old & status::FAILED != 0 || old & !set != 0 || !in_order(set) {
            return;
        }
        for bit in ORDER {
            if set & !self.registers.status & bit == 0 {
                continue;
            }
            if bit == status::FEATURES_OK && !self.features_acceptable() {
                return;
            }
            self.registers.status |= bit;
            if bit == status::DRIVER_OK {
                self.activate();
            }
        }
    }

    fn features_acceptable(&self) -> bool {
        let wanted = self.registers.driver_features;
        wanted & !self.device_features == 0 && wanted & F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let queues = match self.build_queues() {
            Ok(queues) => queues,
            Err(reason) => return self.fail(&reason),
        };
        let activation = Activation {
            memory: self.memory.clone(),
            interrupt: Arc::clone(&self.irq) as Arc<dyn Interrupt>,
            queues,
            features: self.registers.driver_features,
        };
        let activated = lock(&self.device).activate(activation);
        match activated {
            Ok(()) => self.active = true,
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn build_queues(&self) -> Result<Vec<Option<ActiveQueue>>, String> {
        let event_idx = self.registers.driver_features & F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.notify.len());
        for ((registers, max_size), notify) in
            self.registers.queues.iter().zip(&self.queue_max_sizes).zip(&self.notify)
        {
            if !registers.ready {
                queues.push(None);
                continue;
            }
            let n = queues.len();
            let queue = build_queue(&self.memory, registers, *max_size, event_idx)
                .map_err(|reason| format!("queue {n}: {reason}"))?;
            let notify = notify.try_clone().map_err(|error| format!("queue {n}: {error}"))?;
            queues.push(Some(ActiveQueue { queue, notify }));
        }
        Ok(queues)
    }

    /// Section 2.1.2: NEEDS_RESET, and a configuration interrupt if the driver is live.
    fn fail(&mut self, reason: &str) {
        log::warn!("virtio device of type {} needs a reset: {reason}", self.device_type);
        self.stop();
        self.irq.raise(InterruptReason::DeviceFailed);
    }

    fn stop(&mut self) {
        self.active = false;
        lock(&self.device).reset();
    }

    fn reset(&mut self) {
        self.stop();
        self.irq.reset();
        for notify in &self.notify {
            // A kick from before the reset means nothing to the next driver; EAGAIN says there was none.
            let _ = notify.read();
        }
        self.registers = Registers {
            queues: vec![QueueState::default(); self.queue_max_sizes.len()],
            ..Registers::default()
        };
    }
}

/// The status bits, one behind another as a driver sets them (section 3.1.1).
const ORDER: [u32; 4] = [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];

/// Whether these are the first so many bits of [`ORDER`].
fn in_order(set: u32) -> bool {
    (0..=ORDER.len()).any(|n| set == ORDER.iter().take(n).fold(0, |bits, bit| bits | bit))
}

/// A device's own lock. A thread that panicked while holding it has aborted the process (release) or failed its test.
fn lock<'a>(
    device: &'a Arc<Mutex<dyn VirtioDevice + 'static>>,
) -> MutexGuard<'a, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn index(register: u32) -> Option<usize> {
    usize::try_from(register).ok()
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    let half = u64::from(half);
    match select {
        0 => *value = *value & !0xffff_ffff | half,
        1 => *value = *value & 0xffff_ffff | half << 32,
        _ => {}
    }
}

fn build_queue(
    memory: &Memory,
    registers: &QueueState,
    max_size: u16,
    event_idx: bool,
) -> Result<Queue, String> {
    let mut queue = Queue::new(max_size).map_err(|error| error.to_string())?;
    let size = u16::try_from(registers.size).map_err(|_| format!("size {} is too large", registers.size))?;
    queue.try_set_size(size).map_err(|error| format!("size {size}: {error}"))?;
    let addresses = [registers.descriptors, registers.driver_area, registers.device_area];
    if addresses.contains(&0) {
        return Err("a part of the ring is at address 0".to_string());
    }
    queue.try_set_desc_table_address(GuestAddress(registers.descriptors)).map_err(|e| e.to_string())?;
    queue.try_set_avail_ring_address(GuestAddress(registers.driver_area)).map_err(|e| e.to_string())?;
    queue.try_set_used_ring_address(GuestAddress(registers.device_area)).map_err(|e| e.to_string())?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if queue.is_valid(memory) {
        Ok(queue)
    } else {
        Err(format!("the ring does not lie in guest memory: {registers:x?}"))
    }
}

#[cfg(test)]
mod tests;
