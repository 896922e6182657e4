//! The vCPUs of a machine as one: started, paused, resumed and stopped together, as [`crate::lifecycle`] allows.

use std::{io, sync::Arc};

use crate::{
    ending::Ending,
    lifecycle::{Refusal, VmRequest, VmState},
    snapshot::working_set::Ahead,
    vcpu::{Control, RunningVcpus, Vcpu},
};

/// The vCPUs, and where in its life the machine is.
#[derive(Debug)]
pub struct Machine {
    state: VmState,
    vcpus: Vec<Vcpu>,
    running: Option<RunningVcpus>,
    control: Arc<Control>,
}

/// That a machine's vCPUs stand, as long as this lives.
#[derive(Debug)]
pub struct Standing<'a>(std::marker::PhantomData<&'a Machine>);

impl Machine {
    /// A machine whose first instruction has not run.
    pub fn new(vcpus: Vec<Vcpu>, ending: Arc<Ending>) -> Self {
        let control = Arc::new(Control::new(ending));
        Self { state: VmState::Configured, vcpus, running: None, control }
    }

    /// Lets the guest's first instruction run.
    ///
    /// # Errors
    /// The machine was started before, or the host gives no thread.
    pub fn start(&mut self) -> io::Result<()> {
        self.ask(VmRequest::Start).map_err(io::Error::other)?;
        let vcpus = std::mem::take(&mut self.vcpus);
        self.running = Some(RunningVcpus::start(vcpus, Arc::clone(&self.control))?);
        Ok(())
    }

    /// Has the vCPUs there and paused, before the guest's first instruction.
    ///
    /// # Errors
    /// The machine was started before, or the host gives no thread.
    pub fn start_paused(&mut self) -> io::Result<()> {
        self.ask(VmRequest::Start).and_then(|()| self.ask(VmRequest::Pause)).map_err(io::Error::other)?;
        self.control.pause();
        let vcpus = std::mem::take(&mut self.vcpus);
        let running = RunningVcpus::start(vcpus, Arc::clone(&self.control))?;
        running.pause();
        self.running = Some(running);
        Ok(())
    }

    /// That no vCPU runs before this machine is asked for something else.
    ///
    /// # Errors
    /// It is not paused.
    pub fn standing(&mut self) -> Result<Standing<'_>, Refusal> {
        self.ask(VmRequest::Save)?;
        Ok(Standing(std::marker::PhantomData))
    }

    /// Stops all vCPUs between two instructions and keeps the machine as it is. Devices finish what they were asked for.
    ///
    /// # Errors
    /// It is not running.
    pub fn pause(&mut self) -> Result<(), Refusal> {
        self.ask(VmRequest::Pause)?;
        if let Some(running) = &self.running {
            running.pause();
        }
        Ok(())
    }

    /// Lets a paused machine run on.
    ///
    /// # Errors
    /// It is not paused.
    pub fn resume(&mut self) -> Result<(), Refusal> {
        self.ask(VmRequest::Resume)?;
        if let Some(running) = &self.running {
            running.resume();
        }
        Ok(())
    }

    /// Has a running machine's pages there before it touches them.
    pub fn read_ahead(&self, ahead: Ahead) {
        if let Some(running) = &self.running {
            running.read_ahead(ahead);
        }
    }

    /// Ends all vCPUs.
    pub fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop();
        }
    }

    fn ask(&mut self, request: VmRequest) -> Result<(), Refusal> {
        self.state = self.state.after(request)?;
        Ok(())
    }
}
