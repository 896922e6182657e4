//! Doing what the pool says, under the group's lock.

use std::sync::Arc;
use std::time::Duration;

use app::pool::{Action, Life, Refusal, Request};
use page::What;
use tokio::sync::{Notify, mpsc, watch};

use super::{Answer, Ending, Grant, Group, Inner, Slot};
use crate::serve::log::Line;
use crate::serve::worker::{Order, Start, Worker};

impl Group {
    /// Does what the pool says, in order.
    pub(super) fn follow(self: &Arc<Self>, inner: &mut Inner, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Forward { request, life } => Self::grant(inner, request, life),
                Action::Refuse { request, why, retry_after } => {
                    let id = match why {
                        Refusal::StartFailed { life } => {
                            inner.slots.get(life.slot).and_then(Slot::failure_id)
                        }
                        _ => None,
                    };
                    Self::answer(inner, request, Answer::Refused { why, retry_after, id });
                }
                Action::Start { life, .. } => self.order_start(inner, life, false),
                Action::GiveUp(life) => Self::give_up(inner, life),
                Action::Suspend(life) => Self::end(inner, life, Order::Suspend(life)),
                Action::Stop(life) => Self::end(inner, life, Order::Stop(life)),
                Action::Kill(life) => {
                    self.tell_given_up(inner, life);
                    Self::end(inner, life, Order::Kill);
                }
                // What leaves may come back.
                Action::Discard(_) if inner.ending == Ending::Stays => {}
                Action::Discard(life) => Self::end(inner, life, Order::Discard),
            }
        }
        if inner.pool.next_tick().is_some_and(|due| due < inner.timer) {
            self.sooner.notify_one();
        }
        if inner.ending == Ending::Goes && inner.pool.alive() == 0 {
            self.sooner.notify_one();
        }
        self.changed.send_replace(());
    }

    fn answer(inner: &mut Inner, request: Request, answer: Answer) {
        if let Some(sender) = inner.waiting.remove(&request) {
            // Its receiver is there as long as it waits: it takes itself from those who do before it goes.
            let _ = sender.send(answer);
        }
    }

    fn grant(inner: &mut Inner, request: Request, life: Life) {
        let slot = inner.slots.get(life.slot);
        let Some((slot, machine)) = slot.and_then(|slot| Some((slot, slot.machine.clone()?))) else {
            // No machine is ready before it has an address, so this does not happen; if it did, somebody would wait for ever.
            let (why, retry_after) = (Refusal::TimedOut, Duration::ZERO);
            return Self::answer(inner, request, Answer::Refused { why, retry_after, id: None });
        };
        let grant = Grant {
            life,
            epoch: slot.epoch,
            id: machine.id.clone(),
            address: machine.address,
            opened: machine.opened.clone(),
            over: slot.over.subscribe(),
        };
        Self::answer(inner, request, Answer::Granted(grant));
    }

    /// Ends a life that has not begun.
    fn give_up(inner: &mut Inner, life: Life) {
        if let Some(slot) = inner.slots.get_mut(life.slot) {
            slot.is_ending = true;
            slot.trouble = None;
            slot.over.send_replace(true);
        }
    }

    /// Orders what ends a life. What is connected to it ends now.
    fn end(inner: &mut Inner, life: Life, order: Order) {
        if let Some(slot) = inner.slots.get_mut(life.slot) {
            slot.is_ending = true;
            slot.over.send_replace(true);
            let _ = slot.orders.send(order);
        }
    }

    pub(super) fn order_start(self: &Arc<Self>, inner: &mut Inner, life: Life, runs: bool) {
        while inner.slots.len() <= life.slot {
            let slot = self.new_slot(inner.slots.len(), None);
            inner.slots.push(slot);
        }
        let (template, probes) = (inner.wishes.template.clone(), inner.wishes.probes.clone());
        let is_trial = inner.trial.is_some();
        let Some(slot) = inner.slots.get_mut(life.slot) else { return };
        slot.begin(life.number);
        let over = slot.over.subscribe();
        let _ =
            slot.orders.send(Order::Start(Box::new(Start { life, over, runs, is_trial, template, probes })));
    }

    /// A slot with its worker.
    pub(super) fn new_slot(self: &Arc<Self>, number: usize, known: Option<Arc<str>>) -> Slot {
        let (orders, receiver) = mpsc::unbounded_channel();
        self.shared.runtime.spawn(Worker::new(self.clone(), number, known.clone(), receiver).work());
        Slot {
            orders,
            life: 0,
            id: known,
            is_ending: false,
            over: watch::Sender::new(true),
            epoch: 0,
            machine: None,
            last_start: None,
            busy_until: None,
            trouble: None,
            failure: None,
            recheck: Arc::new(Notify::new()),
            named: Vec::new(),
        }
    }

    fn tell_given_up(&self, inner: &mut Inner, life: Life) {
        self.shows(inner, life, What::Failed, None);
        let Some(slot) = inner.slots.get_mut(life.slot) else { return };
        let line = self.line_of("start given up", life).with_some("why", slot.trouble.clone());
        slot.failure = Some((life.number, line.end_with_id()));
        let why = slot.trouble.clone().unwrap_or_else(|| "it is not ready in time".to_string());
        inner.fails_trial(life, why);
    }

    /// A line of the log about this group.
    pub fn line(&self, event: &'static str) -> Line {
        self.shared.log.line(event).with("app", &*self.app).with("group", &*self.name)
    }

    /// About a slot of it.
    pub fn line_of(&self, event: &'static str, life: Life) -> Line {
        self.line(event).with("slot", self.first + life.slot)
    }
}

impl Slot {
    /// A life begins: nothing of the last one is used any more.
    fn begin(&mut self, number: u64) {
        self.life = number;
        self.is_ending = false;
        self.machine = None;
        self.trouble = None;
        self.busy_until = None;
        self.named.clear();
        self.renew();
    }

    /// What is connected from now on is told of another end.
    pub(super) fn renew(&mut self) {
        self.over.send_replace(true);
        self.over = watch::Sender::new(false);
        self.epoch += 1;
    }

    /// Its machine has ended by itself.
    pub(super) fn forget(&self, life: Life) {
        let _ = self.orders.send(Order::Gone(life));
    }

    fn failure_id(&self) -> Option<String> {
        self.failure.as_ref().map(|(_, id)| id.clone())
    }
}
