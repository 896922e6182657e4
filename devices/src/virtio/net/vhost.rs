//! The network device served by the host's kernel, vhost-net.
//!
//! vhost gets the rings, the event that the guest's notification fires and the one that interrupts the guest, so that
//! packets pass without this process. It is opened once for each pair of queues, before this process gives up the right to open
//! anything, and disowned at reset: that ends it for certain, as closing would. The control queue is served here.

use std::{
    fs::File,
    io,
    sync::{Arc, PoisonError},
};

use ::vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    net::VhostNet as _,
    vhost_kern::{VhostKernBackend as _, net::Net as Kernel},
};
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Backend, NetConfig, Tap,
    config::{self, DEVICE_TYPE, F_MRG_RXBUF},
    control::{self, Control},
    forget_pairs,
    queues::{Pair, Queues},
    switch_pairs,
};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    mmio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1},
    ring::{Ring, RingError},
    state::{DeviceState, SaveError},
    throttle::Throttle,
};

/// Data of the event by which vhost tells of a broken ring.
const FAILED: u32 = 0;
/// Data of the control queue's events.
const CONTROL: u32 = 1;
/// Data of the events of the commands' rate limit.
const COMMAND_ALARM: u32 = 2;

/// The memory is the guest's from its activation on.
type Handle = Kernel<GuestMemoryAtomic<Memory>>;

/// A network card for the guest, served by the host's kernel.
pub struct VhostNet {
    pub(super) tap: Tap,
    pub(super) config: NetConfig,
    /// What this kernel's vhost can do, of what concerns it.
    features: u64,
    /// Open, and used for nothing now.
    spare: Vec<Handle>,
    commands: Throttle,
    events: QueueEvents,
    pub(super) active: Option<Active>,
}

pub(super) struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// With the events that they wait for.
    pub(super) handles: Vec<(Handle, Pair)>,
    /// How many pairs the driver uses.
    pub(super) used: usize,
    /// And the queue's index.
    pub(super) control: Option<(Control, usize)>,
}

impl VhostNet {
    /// Makes a card whose cable is `tap`.
    ///
    /// # Errors
    /// /dev/vhost-net does not open or lacks what every kernel's has; `tap` is given back.
    pub fn new(tap: Tap, config: NetConfig) -> Result<Self, (Tap, io::Error)> {
        let prepared = open_all(config.pairs)
            .map_err(io::Error::other)
            .and_then(|opened| Ok((opened, control::throttle(config)?, QueueEvents::new()?)));
        match prepared {
            Ok(((features, _), ..)) if features & F_VERSION_1 == 0 => {
                Err((tap, io::ErrorKind::Unsupported.into()))
            }
            Ok(((features, spare), commands, events)) => {
                Ok(VhostNet { tap, config, features, spare, commands, events, active: None })
            }
            Err(error) => Err((tap, error)),
        }
    }

    fn obey(&mut self) {
        let Some(active) = &mut self.active else { return };
        match active.obey(&mut self.tap, &mut self.commands) {
            Ok(false) => {}
            Ok(true) => self.events.fire(),
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn fail(&mut self, reason: &str) {
        let Some(active) = &self.active else { return };
        log::warn!("net: {reason}");
        let interrupt = Arc::clone(&active.interrupt);
        self.reset();
        interrupt.raise(InterruptReason::DeviceFailed);
    }
}

impl Active {
    /// Carries out the driver's commands; true when there may be more at once.
    fn obey(&mut self, tap: &mut Tap, commands: &mut Throttle) -> Result<bool, RingError> {
        let Some((control, _)) = &mut self.control else { return Ok(false) };
        let (used, available) = (&mut self.used, self.handles.len());
        let more =
            control.process(&self.memory, commands, |wanted| switch_pairs(tap, used, available, wanted))?;
        if control.needs_interrupt(&self.memory)? {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more)
    }
}

/// One for each pair of queues, and what they can do.
fn open_all(pairs: u16) -> Result<(u64, Vec<Handle>), ::vhost::Error> {
    let handles = (0..pairs).map(|_| open(Memory::default())).collect::<Result<Vec<_>, _>>()?;
    let features = handles.first().ok_or(::vhost::Error::InvalidOperation)?.get_features()?;
    Ok((features, handles))
}

fn open(memory: Memory) -> Result<Handle, ::vhost::Error> {
    Handle::new(GuestMemoryAtomic::new(memory))
}

fn start(
    spare: Option<Handle>,
    memory: Memory,
    pair: &Pair,
    features: u64,
    tap: &File,
    call: &EventFd,
    failed: &EventFd,
) -> Result<Handle, ::vhost::Error> {
    let handle = match spare {
        Some(handle) => {
            // Whoever panicked with this lock held was not here.
            let lock = handle.mem().lock().unwrap_or_else(PoisonError::into_inner);
            lock.replace(memory.clone());
            handle
        }
        None => open(memory.clone())?,
    };
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
    let queues = [&pair.receive, &pair.transmit];
    for (index, ActiveQueue { queue, notify }) in queues.into_iter().enumerate() {
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
        handle.set_backend(index, Some(tap))?;
    }
    Ok(handle)
}

impl MutEventSubscriber for VhostNet {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        self.commands.init(COMMAND_ALARM, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == COMMAND_ALARM {
            self.commands.acknowledge();
            self.obey();
        } else if self.events.control(events, ops) {
            self.obey();
        } else if self.events.acknowledge(events) {
            match events.data() {
                CONTROL => self.obey(),
                _ => self.fail("vhost-net found the driver's rings broken"),
            }
        }
    }
}

impl VirtioDevice for VhostNet {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.config.features() | self.features & F_MRG_RXBUF
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.config.queue_max_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, interrupt, queues, features } = activation;
        let Queues { pairs, control } = Queues::arrange(queues, features, self.config)?;
        self.tap.set_offload(config::offload(features))?;
        let ring_features = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_MRG_RXBUF;
        let ring_features = features & self.features & ring_features;
        let call = interrupt.used_ring_event()?;
        let failed = EventFd::new(EFD_NONBLOCK)?;
        let mut handles = Vec::with_capacity(pairs.len());
        for (index, pair) in pairs.into_iter().enumerate() {
            let file = self.tap.as_file(index).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
            let handle = start(self.spare.pop(), memory.clone(), &pair, ring_features, file, &call, &failed);
            let handle = handle.map_err(|error| io::Error::other(format!("vhost-net: {error}")))?;
            handles.push((handle, pair));
        }
        let mut watched = vec![(FAILED, failed)];
        let control = control.map(|ActiveQueue { queue, notify }| {
            watched.push((CONTROL, notify));
            (Control::new(Ring::new(queue)), Queues::control_index(features, self.config))
        });
        self.events.watch(watched);
        self.active = Some(Active { memory, interrupt, handles, used: 1, control });
        Ok(())
    }

    fn reset(&mut self) {
        let handles = self.active.take().map(|active| active.handles).unwrap_or_default();
        // One that the kernel does not disown is closed.
        let disowned = handles.into_iter().filter(|(handle, _)| handle.reset_owner().is_ok());
        self.spare.extend(disowned.map(|(handle, _)| handle));
        forget_pairs(&mut self.tap);
        self.events.forget();
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        self.stop_and_save()
    }

    fn go_on(&mut self) {
        self.start_again();
    }

    fn restored(&mut self, state: &DeviceState) {
        let Some(active) = &mut self.active else { return };
        super::state::use_pairs(&mut self.tap, &mut active.used, active.handles.len(), state);
    }
}
