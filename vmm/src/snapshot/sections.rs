//! What the sections of `state` hold. A section's version says which form its bytes have: a new form gets a new version
//! and a new arm in [`State::decode`], and the old arms stay, so that older snapshots can be resumed.
//!
//! The bytes are postcard's. KVM's structures are byte strings with the kernel's own layout.

use devices::{
    legacy::ConsoleState,
    virtio::state::{Detail, TransportState},
};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{format::Section, image::Extent, refusal::Refusal};
use crate::mptable::MAX_CPUS;

const MACHINE: u32 = 1;
const VCPU: u32 = 2;
const DEVICE: u32 = 3;
const CONSOLE: u32 = 4;
const MEMORY: u32 = 5;
/// The newest version of every kind of section. They are counted one by one.
pub(super) const KNOWN: [(u32, &str, u32); 5] = [
    (MACHINE, "machine", 1),
    (VCPU, "vCPU", 1),
    (DEVICE, "device", 2),
    (CONSOLE, "console", 1),
    (MEMORY, "memory", 2),
];

/// What all vCPUs have in common.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// The CPUID that the guest sees, but for what differs from one vCPU to another.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The two PICs and the IOAPIC.
    pub irqchips: [kvm_irqchip; 3],
    /// kvm-clock in ns.
    pub clock_ns: u64,
}

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// Whether it runs, waits for a startup interrupt, or is halted.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, tables, control registers.
    pub sregs: kvm_sregs,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// x87, SSE, AVX and what else XSAVE saves.
    pub xsave: kvm_xsave,
    /// DR0 to DR7.
    pub debugregs: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Exceptions and interrupts that are under way.
    pub events: kvm_vcpu_events,
    /// Model-specific registers, as (index, value).
    pub msrs: Vec<(u32, u64)>,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
}

/// Guest memory's files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// With a base: the parts that `memory` holds, in order. All else is the base's.
    pub extents: Option<Vec<Extent>>,
    /// The parts of `memory`, or of the base if there is one, that are worth a mapping, in order: all else in there is zeros. `None`
    /// in version 1: the file's holes tell.
    pub data: Option<Vec<Extent>>,
}

/// Version 1 of it.
#[derive(Serialize, Deserialize)]
struct MemoryState1 {
    extents: Option<Vec<Extent>>,
}

/// All sections.
#[derive(Debug)]
pub struct State {
    /// What all vCPUs have in common.
    pub machine: MachineState,
    /// By index.
    pub vcpus: Vec<VcpuState>,
    /// virtio devices, in the order of their windows.
    pub devices: Vec<TransportState>,
    /// The serial port.
    pub console: Option<ConsoleState>,
    /// Guest memory's files.
    pub memory: MemoryState,
}

impl State {
    /// The file's sections, as (id, version, bytes).
    ///
    /// # Errors
    /// postcard's; there is none for these types.
    pub fn encode(&self) -> Result<Vec<(u32, u32, Vec<u8>)>, postcard::Error> {
        let mut sections = vec![(MACHINE, 1, postcard::to_allocvec(&self.machine)?)];
        for vcpu in &self.vcpus {
            sections.push((VCPU, 1, postcard::to_allocvec(vcpu)?));
        }
        for device in &self.devices {
            sections.push((DEVICE, device_version(device), postcard::to_allocvec(device)?));
        }
        if let Some(console) = &self.console {
            sections.push((CONSOLE, 1, postcard::to_allocvec(console)?));
        }
        sections.push(match &self.memory {
            MemoryState { extents, data: None } => {
                (MEMORY, 1, postcard::to_allocvec(&MemoryState1 { extents: extents.clone() })?)
            }
            memory => (MEMORY, 2, postcard::to_allocvec(memory)?),
        });
        Ok(sections)
    }

    /// Reads the sections of a file.
    ///
    /// # Errors
    /// One is of a newer flyrun, is not what its version says, or is missing or there twice.
    pub fn decode(sections: &[Section<'_>]) -> Result<Self, Refusal> {
        let (mut machine, mut console, mut memory) = (None, None, None);
        let (mut vcpus, mut devices) = (Vec::new(), Vec::new());
        for section in sections {
            match (section.id, section.version) {
                (MACHINE, 1) => once(&mut machine, section)?,
                (VCPU, 1) => vcpus.push(decode(section)?),
                (DEVICE, 1 | 2) => devices.push(decode(section)?),
                (CONSOLE, 1) => once(&mut console, section)?,
                (MEMORY, 1) => {
                    let mut old = memory.take().map(|MemoryState { extents, .. }| MemoryState1 { extents });
                    once(&mut old, section)?;
                    memory = old.map(|MemoryState1 { extents }| MemoryState { extents, data: None });
                }
                (MEMORY, 2) => once(&mut memory, section)?,
                _ => return Err(unknown(section)),
            }
        }
        if !(1..=usize::from(MAX_CPUS)).contains(&vcpus.len()) {
            return Err(Refusal::Corrupted(format!("state has {} vCPUs", vcpus.len())));
        }
        let missing = |name| move || Refusal::Corrupted(format!("state has no section {name}"));
        Ok(Self {
            machine: machine.ok_or_else(missing("machine"))?,
            vcpus,
            devices,
            console,
            memory: memory.ok_or_else(missing("memory"))?,
        })
    }
}

/// Version 2 knows a balloon. All others have not changed, so that older readers understand them.
fn device_version(device: &TransportState) -> u32 {
    let detail = device.active.as_ref().map(|active| &active.detail);
    if matches!(detail, Some(Detail::Balloon { .. })) { 2 } else { 1 }
}

fn name(id: u32) -> &'static str {
    KNOWN.iter().find(|known| known.0 == id).map_or("?", |known| known.1)
}

fn once<T: DeserializeOwned>(place: &mut Option<T>, section: &Section<'_>) -> Result<(), Refusal> {
    if place.is_some() {
        return Err(Refusal::Corrupted(format!("state has the section {} twice", name(section.id))));
    }
    *place = Some(decode(section)?);
    Ok(())
}

fn decode<T: DeserializeOwned>(section: &Section<'_>) -> Result<T, Refusal> {
    match postcard::take_from_bytes(section.payload) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(Refusal::Corrupted(format!(
            "the section {} is {} bytes longer than what it holds",
            name(section.id),
            rest.len()
        ))),
        Err(error) => Err(Refusal::Corrupted(format!("the section {}: {error}", name(section.id)))),
    }
}

fn unknown(section: &Section<'_>) -> Refusal {
    match KNOWN.iter().find(|known| known.0 == section.id) {
        Some((_, name, known)) if section.version > *known => {
            Refusal::version(&format!("the section {name}"), section.version, *known)
        }
        Some((_, name, _)) => {
            Refusal::Corrupted(format!("the section {name} has version {}", section.version))
        }
        None => Refusal::TooNew(format!("state has a section {} that is not known here", section.id)),
    }
}
