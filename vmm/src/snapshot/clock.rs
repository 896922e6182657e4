//! What a machine has beside its vCPUs inside KVM: interrupt controllers and the clock. There is no PIT.
//!
//! Time stands still for the guest while it is suspended: kvm-clock and the time stamp counters go on from where they were.
//! Only the wall clock has to be set, by guest-init.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_cpuid_entry2,
    kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::{refusal::Refusal, sections::MachineState};

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Reads the state of a machine whose vCPUs do not run.
///
/// # Errors
/// The KVM call that failed.
pub fn save(fd: &VmFd, cpuid: &[kvm_cpuid_entry2]) -> Result<MachineState, String> {
    let mut irqchips = [kvm_irqchip::default(); 3];
    for (irqchip, chip_id) in irqchips.iter_mut().zip(IRQCHIPS) {
        irqchip.chip_id = chip_id;
        fd.get_irqchip(irqchip).map_err(|error| format!("KVM_GET_IRQCHIP: {error}"))?;
    }
    let clock = fd.get_clock().map_err(|error| format!("KVM_GET_CLOCK: {error}"))?;
    Ok(MachineState { cpuid: cpuid.to_vec(), irqchips, clock_ns: clock.clock })
}

/// Gives a machine whose vCPUs have their state a saved one. Interrupts that are pending go to them.
///
/// # Errors
/// KVM does not take it.
pub fn restore(fd: &VmFd, state: &MachineState) -> Result<(), Refusal> {
    for (irqchip, chip_id) in state.irqchips.iter().zip(IRQCHIPS) {
        let irqchip = kvm_irqchip { chip_id, ..*irqchip };
        fd.set_irqchip(&irqchip).map_err(|error| Refusal::Host(format!("KVM_SET_IRQCHIP: {error}")))?;
    }
    let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
    fd.set_clock(&clock).map_err(|error| Refusal::Host(format!("KVM_SET_CLOCK: {error}")))
}
