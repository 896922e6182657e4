//! What other flyruns ask of a machine that this process owns.

use std::time::Duration;

use super::life::Life;
use super::snapshot::Wanted;
use super::{Conversation, Monitor, Reply, Request, control};
use crate::error::{Error, Result};
use crate::interrupt::SIGKILL;
use crate::machine::{Action, Changes, Machines, State, Verdict, decide};

impl Monitor<'_> {
    /// Does what another flyrun asks for.
    pub(super) fn answer(&mut self, conversation: Conversation, life: Option<&mut Life>) {
        let Some(mut conversation) = self.defer(conversation) else { return };
        let config = &self.machine.record().config;
        match conversation.request.clone() {
            Request::Stop { timeout_s } => {
                let patience = Duration::from_secs(timeout_s.unwrap_or(config.stop_timeout_s).into());
                let signal = config.stop_signal;
                self.is_stopped = true;
                self.waiting.push(conversation);
                if let Some(life) = life {
                    if self.cancel_suspend(None, Some((signal, patience)), life)
                        || self.cancel_snapshot((signal, patience), life)
                    {
                        return;
                    }
                    let is_paused = self.machine.record().state == State::Paused;
                    if is_paused && let Err(error) = life.vm.resume() {
                        eprintln!("flyrun: {error}");
                    }
                    life.stop(signal, patience);
                    if is_paused || self.machine.record().state == State::Started {
                        self.try_become(State::Stopping, |_| {});
                    }
                }
            }
            Request::Signal { signal } => {
                let Some(life) = life.filter(|_| (1..=64).contains(&signal)) else {
                    return conversation.reply(&reply(Err(not_running())));
                };
                if self.suspending.is_some() && signal != SIGKILL {
                    let refusal = decide(self.machine.record(), Action::Signal).map(drop);
                    return conversation.reply(&reply(refusal));
                }
                // Whoever ends a machine so does not want it started again.
                self.is_stopped |= signal == SIGKILL || signal == config.stop_signal;
                life.signal(signal);
                conversation.reply(&Reply::Done);
            }
            Request::Wait => self.waiting.push(conversation),
            Request::Follow => {
                conversation.impatient();
                conversation.reply(&self.lease_now());
                self.waiting.push(conversation);
            }
            Request::Attach => {
                conversation.reply(&Reply::Attached { terminal: config.tty });
                self.attach(conversation);
            }
            Request::Pause => conversation.reply(&reply(self.pause(life.as_deref()))),
            Request::Suspend { force } => self.suspend(conversation, force, life),
            Request::Snapshot { id, name, force } => {
                self.take_snapshot(conversation, Wanted { id, name, force }, life);
            }
            Request::Resume if self.suspending.is_some() => {
                if let Some(life) = life {
                    self.cancel_suspend(Some(conversation), None, life);
                }
            }
            Request::Resume | Request::Unpause => conversation.reply(&reply(match life {
                Some(life) => self.unpause(life),
                None => Err(not_running()),
            })),
            Request::Update(changes) => {
                conversation.reply(&match self.update(&changes, life.as_deref()) {
                    Ok(later) => Reply::Updated { later },
                    Err(error) => Reply::Failed { message: error.to_string() },
                });
            }
            Request::Rename { name } => {
                let machines = Machines::new(self.host.paths.machines());
                conversation.reply(&reply(self.machine.rename(&machines, &name)));
            }
        }
    }

    fn pause(&mut self, life: Option<&Life>) -> Result<()> {
        let life = life.filter(|life| !life.has_exited()).ok_or_else(not_running)?;
        if decide(self.machine.record(), Action::Pause)? == Verdict::Already {
            return Ok(());
        }
        life.vm.pause()?;
        // What cannot be written down is not done: nobody would know.
        self.machine.settle_in_state(State::Paused, |_| {}).inspect_err(|_| _ = life.vm.resume())
    }

    pub(super) fn unpause(&mut self, life: &Life) -> Result<()> {
        if decide(self.machine.record(), Action::Unpause)? == Verdict::Go {
            life.vm.resume()?;
            self.try_become(State::Started, |_| {});
        }
        Ok(())
    }

    /// Changes how the machine is run; what could not take effect yet is returned.
    fn update(&mut self, changes: &Changes, life: Option<&Life>) -> Result<Vec<String>> {
        let before = self.machine.record().config.clone();
        let mut config = before.clone();
        let later = changes.apply(&mut config).map_err(Error::new)?;
        self.machine.update(|record| record.config = config)?;
        if let Err(error) = self.limit(life.map(|life| life.vm.pid())) {
            self.machine.update(|record| record.config = before)?;
            return Err(error);
        }
        let config = &self.machine.record().config;
        self.view.front.stop_with(config.stop_signal, Duration::from_secs(config.stop_timeout_s.into()));
        Ok(if life.is_some() { later } else { vec![] })
    }

    fn attach(&self, conversation: Conversation) {
        let (outputs, input) = (self.outputs.clone(), self.input.clone());
        if let Err(error) = control::attach(conversation.into_stream(), outputs, input, self.mailbox.post()) {
            eprintln!("flyrun: a client could not attach: {error}");
        }
    }
}

fn reply(result: Result<()>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Failed { message: error.to_string() },
    }
}

fn not_running() -> Error {
    Error::new("its process does not run now").advice("`flyrun ps` shows when it has started.")
}
