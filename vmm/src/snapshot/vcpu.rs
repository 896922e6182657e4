//! A vCPU's state out of KVM and into it again. The order matters, and each place that needs one says why.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{refusal::Refusal, sections::VcpuState};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Memory types by range, which KVM keeps and does not list: variable ranges, and fixed ones.
const MTRR_VARIABLE: std::ops::Range<u32> = 0x200..0x210;
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// KVM takes no more in one call.
const MAX_MSRS: usize = 256;
/// More than any KVM lists.
const MAX_SAVED_MSRS: usize = 4096;
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;
/// What the kernel's own TSC code takes for the same frequency, in parts per million.
const TSC_TOLERANCE_PPM: u64 = 250;

/// All registers worth saving, in the order of restoring: the deadline means a time of the counter, which is set first.
pub fn msrs_to_save(listed: &[u32]) -> Vec<u32> {
    let mut indexes = vec![MSR_TSC];
    indexes.extend(MTRR_VARIABLE.chain(MTRR_FIXED).chain([MSR_MTRR_DEF_TYPE]));
    for index in listed {
        if *index != MSR_TSC_DEADLINE && !indexes.contains(index) {
            indexes.push(*index);
        }
    }
    indexes.push(MSR_TSC_DEADLINE);
    indexes
}

/// Reads the state of a vCPU that does not run.
///
/// # Errors
/// The KVM call that failed, or why this guest cannot be saved.
pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, String> {
    let failed = |call: &'static str| move |error: kvm_ioctls::Error| format!("{call}: {error}");
    // First: it has KVM settle what the local APIC has pending, which the others then show.
    let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    // Before what shows it: a fault that waits to be delivered (an asynchronous page fault's) has its address in CR2 from now on.
    let events = fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
        return Err("the guest runs virtual machines of its own, which cannot be suspended".into());
    }
    Ok(VcpuState {
        mp_state,
        regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
        sregs,
        xcrs: fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
        xsave: fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
        debugregs: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
        tsc_khz: fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?,
        msrs: read_msrs(fd, msrs).map_err(failed("KVM_GET_MSRS"))?,
        events,
    })
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// KVM stops at a register that this vCPU does not have: it is left out.
fn read_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut read = Vec::with_capacity(indexes.len());
    let mut done = 0;
    while let Some(now) = indexes.get(done..).filter(|rest| !rest.is_empty()) {
        let entries: Vec<_> = now.iter().take(MAX_MSRS).map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        let count = fd.get_msrs(&mut msrs)?;
        read.extend(msrs.as_slice().iter().take(count).map(|msr| (msr.index, msr.data)));
        done += if count < entries.len() { count + 1 } else { count };
    }
    Ok(read)
}

/// Gives a new vCPU, which has its CPUID, a saved state.
///
/// # Errors
/// KVM does not take it.
pub fn restore(fd: &VcpuFd, state: &VcpuState) -> Result<(), Refusal> {
    let refused =
        |call: &'static str| move |error: kvm_ioctls::Error| Refusal::Host(format!("{call}: {error}"));
    set_tsc_frequency(fd, state.tsc_khz)?;
    // Before the local APIC: its base and its mode are in there.
    fd.set_sregs(&state.sregs).map_err(refused("KVM_SET_SREGS"))?;
    fd.set_regs(&state.regs).map_err(refused("KVM_SET_REGS"))?;
    // Before what they allow to be there.
    fd.set_xcrs(&state.xcrs).map_err(refused("KVM_SET_XCRS"))?;
    // SAFETY: KVM reads more than the 4096 bytes only for a process that has asked for AMX (arch_prctl,
    // ARCH_REQ_XCOMP_GUEST_PERM), which this one never does.
    unsafe { fd.set_xsave(&state.xsave) }.map_err(refused("KVM_SET_XSAVE"))?;
    fd.set_debug_regs(&state.debugregs).map_err(refused("KVM_SET_DEBUGREGS"))?;
    // Before the deadline, which the timer takes only in its mode.
    fd.set_lapic(&state.lapic).map_err(refused("KVM_SET_LAPIC"))?;
    write_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events).map_err(refused("KVM_SET_VCPU_EVENTS"))?;
    // Last: the others may wake a halted vCPU.
    fd.set_mp_state(state.mp_state).map_err(refused("KVM_SET_MP_STATE"))
}

fn set_tsc_frequency(fd: &VcpuFd, khz: u32) -> Result<(), Refusal> {
    let here = fd.get_tsc_khz().map_err(|error| Refusal::Host(format!("KVM_GET_TSC_KHZ: {error}")))?;
    let tolerated = u64::from(here) * TSC_TOLERANCE_PPM / 1_000_000;
    if u64::from(here.abs_diff(khz)) <= tolerated {
        return Ok(());
    }
    fd.set_tsc_khz(khz).map_err(|_| {
        Refusal::OtherCpu(format!(
            "the guest's clock counts {khz} kHz, this CPU's {here} kHz, and it cannot be scaled"
        ))
    })
}

/// KVM stops at a register that it does not let be written. One that has the value anyway is passed over.
fn write_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), Refusal> {
    let refused = |error: kvm_ioctls::Error| Refusal::Host(format!("KVM_SET_MSRS: {error}"));
    if msrs.len() > MAX_SAVED_MSRS {
        return Err(Refusal::Corrupted(format!("a vCPU has {} model-specific registers", msrs.len())));
    }
    let mut done = 0;
    while let Some(now) = msrs.get(done..).filter(|rest| !rest.is_empty()) {
        let entries: Vec<_> = now.iter().take(MAX_MSRS).map(|(index, data)| entry(*index, *data)).collect();
        let list = Msrs::from_entries(&entries).map_err(|_| refused(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let count = fd.set_msrs(&list).map_err(refused)?;
        done += count;
        if let Some(kvm_msr_entry { index, data, .. }) = entries.get(count).copied() {
            if read_msrs(fd, &[index]).map_err(refused)? != [(index, data)] {
                return Err(Refusal::Host(format!("KVM does not take {data:#x} for the MSR {index:#x}")));
            }
            done += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_comes_first_its_deadline_last_and_none_twice() {
        let saved = msrs_to_save(&[0x174, MSR_TSC_DEADLINE, MSR_TSC, 0x277, MSR_MTRR_DEF_TYPE, 0x174]);
        assert_eq!((saved.first(), saved.last()), (Some(&MSR_TSC), Some(&MSR_TSC_DEADLINE)));
        let mut sorted = saved.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), saved.len());
        assert!(saved.contains(&0x277));
    }
}
