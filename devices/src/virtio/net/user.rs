//! The network device served by this process, on the thread of the event loop.

use std::{io, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{
    Backend, NetConfig,
    config::{self, DEVICE_TYPE, F_MRG_RXBUF},
    control::{self, Control},
    forget_pairs,
    queues::{Pair, Queues},
    receive::Receiver,
    switch_pairs,
    transmit::Transmitter,
};
use crate::virtio::{
    ActivateError, Activation, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    ring::{Ring, RingError},
    state::{DeviceState, SaveError},
    throttle::Throttle,
    transfer::Transfer,
};

/// Data of the rate limits' events, one for each direction; the queues' are their indexes.
const RX_ALARM: u32 = 0x100;
const TX_ALARM: u32 = 0x101;
/// The same for commands.
const COMMAND_ALARM: u32 = 0x102;
/// Data of the control queue's events, whichever index it has.
const CONTROL: u32 = 0x103;
/// Data of the events of the backend's first file; the others' follow.
const BACKEND: u32 = 0x200;

/// A network card for the guest, served by this process.
pub struct Net {
    backend: Box<dyn Backend>,
    pub(super) config: NetConfig,
    mover: Mover,
    commands: Throttle,
    events: QueueEvents,
    pub(super) active: Option<Active>,
}

/// What moves packets and outlives the driver.
#[derive(Default)]
struct Mover {
    transfer: Transfer,
    receive: Throttle,
    transmit: Throttle,
}

pub(super) struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    pub(super) pairs: Vec<(Receiver, Transmitter)>,
    /// How many of them the driver uses.
    pub(super) used: usize,
    /// The pair that comes first when all are served, so that none starves behind a rate limit.
    first: usize,
    /// And the queue's index.
    pub(super) control: Option<(Control, usize)>,
}

/// For which pairs there may be something to do.
#[derive(Clone, Copy)]
enum Which {
    None,
    One(usize),
    All,
}

impl Which {
    fn has(self, pair: usize) -> bool {
        match self {
            Which::None => false,
            Which::One(one) => one == pair,
            Which::All => true,
        }
    }
}

impl Net {
    /// Makes a card whose cable is `backend`, which has a file for each of the card's pairs of queues.
    ///
    /// # Errors
    /// When the host grants no more eventfds or timers.
    pub fn new(backend: Box<dyn Backend>, config: NetConfig) -> io::Result<Self> {
        let (commands, events) = (control::throttle(config)?, QueueEvents::new()?);
        Ok(Net { backend, config, mover: Mover::default(), commands, events, active: None })
    }

    /// Has the driver's commands wait for this throttle instead of the card's own. Before the device is added to an event
    /// loop.
    #[must_use]
    pub fn with_command_throttle(mut self, commands: Throttle) -> Self {
        self.commands = commands;
        self
    }

    /// Has the packets of each direction wait for its throttle. Before the device is added to an event loop.
    #[must_use]
    pub fn with_throttles(mut self, receive: Throttle, transmit: Throttle) -> Self {
        self.mover = Mover { receive, transmit, ..self.mover };
        self
    }

    fn move_packets(&mut self, receive: Which, transmit: Which) {
        let Some(active) = &mut self.active else { return };
        let moved = active.move_packets(&*self.backend, &mut self.mover, receive, transmit);
        self.go_on(moved);
    }

    /// Carries out what the driver commands, and begins with the pairs that it uses then.
    fn obey(&mut self) {
        let Some(active) = &mut self.active else { return };
        let more = active.obey(&mut *self.backend, &mut self.commands);
        self.go_on(more);
        self.move_packets(Which::All, Which::All);
    }

    fn go_on(&mut self, served: Result<bool, RingError>) {
        match served {
            Ok(false) => {}
            // More is left than one round may take; let other devices have the thread first.
            Ok(true) => self.events.fire(),
            Err(error) => {
                log::warn!("net: {error}");
                let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
                self.reset();
                if let Some(interrupt) = interrupt {
                    interrupt.raise(InterruptReason::DeviceFailed);
                }
            }
        }
    }
}

impl Active {
    /// Moves at most a queue's size of packets for each pair each way; true when there may be more at once.
    fn move_packets(
        &mut self,
        backend: &dyn Backend,
        mover: &mut Mover,
        receive: Which,
        transmit: Which,
    ) -> Result<bool, RingError> {
        let Mover { transfer, receive: receive_throttle, transmit: transmit_throttle } = mover;
        let memory = &self.memory;
        let (mut more, mut interrupt) = (false, false);
        self.first = (self.first + 1) % self.used.max(1);
        for step in 0..self.used {
            let pair = (self.first + step) % self.used;
            let (Some((receiver, transmitter)), Some(file)) = (self.pairs.get_mut(pair), backend.file(pair))
            else {
                continue;
            };
            if transmit.has(pair) {
                more |= transmitter.process(memory, file, transfer, transmit_throttle)?;
                interrupt |= transmitter.needs_interrupt(memory)?;
            }
            if receive.has(pair) {
                more |= receiver.process(memory, file, transfer, receive_throttle)?;
                interrupt |= receiver.needs_interrupt(memory)?;
            }
        }
        if interrupt {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more)
    }

    /// True when there may be more commands at once.
    fn obey(&mut self, backend: &mut dyn Backend, commands: &mut Throttle) -> Result<bool, RingError> {
        let Some((control, _)) = &mut self.control else { return Ok(false) };
        let (used, available) = (&mut self.used, self.pairs.len());
        let more = control
            .process(&self.memory, commands, |wanted| switch_pairs(backend, used, available, wanted))?;
        if control.needs_interrupt(&self.memory)? {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more)
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        self.mover.receive.init(RX_ALARM, ops);
        self.mover.transmit.init(TX_ALARM, ops);
        self.commands.init(COMMAND_ALARM, ops);
        for pair in 0..self.config.pairs {
            let Some(file) = self.backend.file(pair.into()) else { return };
            // By edges: while the guest has no room, a waiting packet must not keep the loop busy.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::with_data(&file, BACKEND + u32::from(pair), events)) {
                log::error!("cannot watch a network device's TAP: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let data = events.data();
        if let Some(pair) = data.checked_sub(BACKEND).filter(|pair| *pair < self.config.pairs.into()) {
            self.move_packets(Which::One(pair as usize), Which::None);
        } else if data == RX_ALARM {
            self.mover.receive.acknowledge();
            self.move_packets(Which::All, Which::None);
        } else if data == TX_ALARM {
            self.mover.transmit.acknowledge();
            self.move_packets(Which::None, Which::All);
        } else if data == COMMAND_ALARM {
            self.commands.acknowledge();
            self.obey();
        } else if self.events.control(events, ops) {
            self.obey();
        } else if self.events.acknowledge(events) {
            let pair = Which::One(data as usize / 2);
            match data {
                CONTROL => self.obey(),
                _ if data.is_multiple_of(2) => self.move_packets(pair, Which::None),
                _ => self.move_packets(Which::None, pair),
            }
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.config.features() | F_MRG_RXBUF
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
        self.backend.set_offload(config::offload(features))?;
        let mut watched = Vec::with_capacity(2 * pairs.len() + 1);
        let mut active = Active {
            memory,
            interrupt,
            pairs: Vec::with_capacity(pairs.len()),
            used: 1,
            first: 0,
            control: None,
        };
        for (index, Pair { receive, transmit }) in pairs.into_iter().enumerate() {
            let receiver = Receiver::new(Ring::new(receive.queue), config::merges(features));
            active.pairs.push((receiver, Transmitter::new(Ring::new(transmit.queue))));
            watched.push((Queues::index(index), receive.notify));
            watched.push((Queues::index(index) + 1, transmit.notify));
        }
        if let Some(control) = control {
            let index = Queues::control_index(features, self.config);
            active.control = Some((Control::new(Ring::new(control.queue)), index));
            watched.push((CONTROL, control.notify));
        }
        self.active = Some(active);
        self.events.watch(watched);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        forget_pairs(&mut *self.backend);
        self.events.forget();
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        Ok(self.saved())
    }

    fn restored(&mut self, state: &DeviceState) {
        let Some(active) = &mut self.active else { return };
        super::state::use_pairs(&mut *self.backend, &mut active.used, active.pairs.len(), state);
    }
}
