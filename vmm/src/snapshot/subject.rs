//! What a snapshot is taken of: a machine's parts, as [`crate::vm`] put them together.

use std::{
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use devices::virtio::{Memory, state::TransportState};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{
    apart::Apart,
    clock, cpu,
    header::{Header, MemorySummary},
    identity::{DiskId, FileId, KernelId, OpenFiles},
    image::{Backing, Plan},
    sections::{MemoryState, State},
    text::{Text, TextId},
    vcpu,
    working_set::{Later, Pages, WorkingSet},
};
use crate::{attach::Transport, console::Console, cpuid::Template, spec::VmSpec, worker::Worker};

/// What is known of the kernel that runs.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// Its file, when the machine was booted from it.
    Booted(FileId),
    /// What the snapshot said that the machine was resumed from.
    Resumed(KernelId),
    /// Its file does not tell.
    Unknown,
}

/// What was asked of the snapshot that a header is of.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Whether the guest knows nothing of its disks.
    pub any_disks: bool,
    /// That of its memory.
    pub checksum: Option<u32>,
    /// The text that is as it was.
    pub text: Option<TextId>,
}

/// A machine's parts.
pub struct Subject {
    /// Knows which registers there are.
    pub kvm: Kvm,
    /// Interrupt controllers and clock.
    pub fd: VmFd,
    /// Guest memory.
    pub memory: Memory,
    /// What the machine was made from.
    pub spec: VmSpec,
    /// The CPUID of its vCPUs.
    pub cpuid: Template,
    /// A second handle of each vCPU.
    pub vcpus: Vec<OwnedFd>,
    /// virtio devices, in the order of their windows.
    pub transports: Vec<Transport>,
    /// The serial port.
    pub console: Option<Console>,
    /// The kernel.
    pub kernel: Kernel,
    /// What kernel and disks are known by.
    pub files: OpenFiles,
    /// Where memory comes from.
    pub backing: Backing,
    /// What is known of its kernel's text.
    pub text: Text,
    /// What is known of the pages that it touches first.
    pub learning: Mutex<Learning>,
    /// Does what the event loop cannot wait for.
    pub worker: Worker,
}

/// What is known of the pages that a machine from a snapshot touches first.
#[derive(Debug)]
pub enum Learning {
    /// The list that came with the snapshot.
    Known {
        /// What is touched beside it is compared with this.
        list: WorkingSet,
        /// What of it is not read ahead yet.
        rest: Option<Later>,
    },
    /// Nothing, so that what is touched is noted.
    Watched {
        /// Has the page tables tell it exactly, where the host can do that.
        apart: Option<Apart>,
        /// What was touched before the guest's first process was heard of.
        first: Option<Pages>,
    },
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Subject")
    }
}

impl Subject {
    /// Has all devices stand still, until [`Subject::go_on`] also if it fails.
    ///
    /// # Errors
    /// A device that cannot be saved, by its place.
    pub fn stop_devices(&self) -> Result<Vec<TransportState>, String> {
        let save = |(index, transport): (usize, &Transport)| {
            let saved = transport.lock().unwrap_or_else(PoisonError::into_inner).0.save();
            saved.map_err(|error| format!("virtio device {index} cannot be suspended: {error}"))
        };
        self.transports.iter().enumerate().map(save).collect()
    }

    /// Has all devices go on.
    pub fn go_on(&self) {
        for transport in &self.transports {
            transport.lock().unwrap_or_else(PoisonError::into_inner).0.go_on();
        }
    }

    /// All but guest memory and its files.
    ///
    /// # Errors
    /// What cannot be saved.
    pub fn state(&self, devices: Vec<TransportState>) -> Result<State, String> {
        let listed = self.kvm.get_msr_index_list().map_err(|e| format!("KVM_GET_MSR_INDEX_LIST: {e}"))?;
        let msrs = vcpu::msrs_to_save(listed.as_slice());
        let save = |handle: &OwnedFd| vcpu::save(&self.vcpu(handle)?, &msrs);
        Ok(State {
            vcpus: self.vcpus.iter().map(save).collect::<Result<_, _>>()?,
            machine: clock::save(&self.fd, self.cpuid.entries())?,
            devices,
            console: self.console.as_ref().map(Console::save),
            memory: MemoryState::default(),
        })
    }

    /// What can be read without the rest. Disks have been written out.
    ///
    /// # Errors
    /// A disk's file is gone.
    pub fn header(&self, taken_unix_ms: u64, plan: &Plan, asked: Asked) -> Result<Header, String> {
        let kernel = match &self.kernel {
            Kernel::Booted(file) => Some(KernelId::of(self.files.kernel.as_ref(), file.clone())),
            Kernel::Resumed(id) => Some(id.clone()),
            Kernel::Unknown => None,
        };
        let disks = || {
            let disks = self.spec.disks.iter().zip(&self.files.disks);
            disks.map(|(disk, open)| DiskId::of(disk, open))
        };
        Ok(Header {
            flyrun: env!("CARGO_PKG_VERSION").to_owned(),
            taken_unix_ms,
            spec: self.spec.clone(),
            cpu: cpu::summary(self.cpuid.entries()),
            kernel,
            disks: match asked.any_disks {
                true => None,
                false => Some(disks().collect::<Result<_, _>>()?),
            },
            memory: MemorySummary {
                bytes: super::pages::image_bytes(&self.memory),
                base: plan.has_base(),
                checksum: asked.checksum,
            },
            text: asked.text,
        })
    }

    fn vcpu(&self, handle: &OwnedFd) -> Result<VcpuFd, String> {
        let handle = handle.try_clone().map_err(|error| format!("vCPU: {error}"))?;
        debug_assert!(handle.as_raw_fd() >= 0);
        // SAFETY: the descriptor is a vCPU's of this very machine, and its ownership goes to the `VcpuFd`.
        unsafe { self.fd.create_vcpu_from_rawfd(handle.into_raw_fd()) }
            .map_err(|error| format!("vCPU: {error}"))
    }
}
