//! The vCPUs of a machine as one: started, paused, resumed and stopped together, as [`crate::lifecycle`] allows.

use std::{io, sync::Arc};

use crate::{
    ending::Ending,
    lifecycle::{Refusal, VmRequest, VmState},
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
