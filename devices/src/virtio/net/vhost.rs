//! The network device served by the host's kernel, vhost-net.
//!
//! vhost gets the rings, the event that the guest's notification fires and the one that interrupts the guest, so that
//! packets pass without this process. It is opened at each activation and closed at reset: closing ends it for certain.

use std::{io, sync::Arc};

use ::vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData, net::VhostNet as _,
    vhost_kern::net::Net as Kernel,
};
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Backend, NetConfig, Tap, both_queues,
    config::{self, CARD_FEATURES, DEVICE_TYPE, F_MRG_RXBUF, QUEUE_SIZES},
};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    mmio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1},
    state::{DeviceState, SaveError},
};

type Handle = Kernel<Arc<Memory>>;

/// A network card for the guest, served by the host's kernel.
pub struct VhostNet {
    pub(super) tap: Tap,
    config: NetConfig,
    /// What this kernel's vhost can do, of what concerns it.
    features: u64,
    events: QueueEvents,
    pub(super) active: Option<Active>,
}

pub(super) struct Active {
    interrupt: Arc<dyn Interrupt>,
    pub(super) handle: Handle,
    pub(super) queues: [ActiveQueue; 2],
}

impl VhostNet {
    /// Makes a card whose cable is `tap`.
    ///
    /// # Errors
    /// /dev/vhost-net does not open or lacks what every kernel's has; `tap` is given back.
    pub fn new(tap: Tap, config: NetConfig) -> Result<Self, (Tap, io::Error)> {
        let opened = Handle::new(Arc::new(Memory::default())).and_then(|handle| handle.get_features());
        let (features, events) = match (opened.map_err(io::Error::other), QueueEvents::new()) {
            (Ok(features), Ok(events)) => (features, events),
            (Err(error), _) | (_, Err(error)) => return Err((tap, error)),
        };
        if features & F_VERSION_1 == 0 {
            return Err((tap, io::ErrorKind::Unsupported.into()));
        }
        Ok(VhostNet { tap, config, features, events, active: None })
    }
}

fn start(
    memory: Memory,
    queues: &[ActiveQueue; 2],
    features: u64,
    tap: &Tap,
    call: &EventFd,
    failed: &EventFd,
) -> Result<Handle, ::vhost::Error> {
    let memory = Arc::new(memory);
    let handle = Handle::new(Arc::clone(&memory))?;
    handle.set_owner()?;
    handle.set_features(features)?;
    // vhost-kern reads the first three; a file is only for another process.
    let regions: Vec<_> = memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        })
        .collect();
    handle.set_mem_table(&regions)?;
    for (index, ActiveQueue { queue, notify }) in queues.iter().enumerate() {
        handle.set_vring_num(index, queue.size())?;
        let addresses = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        handle.set_vring_addr(index, &addresses)?;
        handle.set_vring_base(index, queue.next_avail())?;
        handle.set_vring_call(index, call)?;
        handle.set_vring_kick(index, notify)?;
        handle.set_vring_err(index, failed)?;
    }
    for index in 0..queues.len() {
        handle.set_backend(index, Some(tap.as_file()))?;
    }
    Ok(handle)
}

impl MutEventSubscriber for VhostNet {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.events.control(events, ops) || !self.events.acknowledge(events) {
            return;
        }
        // The one event watched is the one by which vhost tells of a broken ring.
        if let Some(active) = &self.active {
            log::warn!("net: vhost-net found the driver's rings broken");
            let interrupt = Arc::clone(&active.interrupt);
            self.reset();
            interrupt.raise(InterruptReason::DeviceFailed);
        }
    }
}

impl VirtioDevice for VhostNet {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        CARD_FEATURES | self.features & F_MRG_RXBUF
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = both_queues(activation.queues)?;
        self.tap.set_offload(config::offload(activation.features))?;
        let ring_features = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_MRG_RXBUF;
        let features = activation.features & self.features & ring_features;
        let call = activation.interrupt.used_ring_event()?;
        let failed = EventFd::new(EFD_NONBLOCK)?;
        let handle = start(activation.memory, &queues, features, &self.tap, &call, &failed);
        let handle = handle.map_err(|error| io::Error::other(format!("vhost-net: {error}")))?;
        self.events.watch(vec![(0, failed)]);
        self.active = Some(Active { interrupt: activation.interrupt, handle, queues });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.events.forget();
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        self.stop_and_save()
    }

    fn go_on(&mut self) {
        self.start_again();
    }
}
