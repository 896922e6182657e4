//! What CPUID says to the guest: what KVM supports on this host, with the topology of the machine written into it.
//!
//! The topology is flat: one package, one die, every vCPU a core with one thread. APIC id and vCPU index are the same.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const EXTENDED_TOPOLOGY: u32 = 0xb;
const EXTENDED_TOPOLOGY_V2: u32 = 0x1f;
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;
const AMD_IDENTIFIERS: u32 = 0x8000_001e;
const AMD_PERFMON_V2: u32 = 0x8000_0022;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const EAX6_ARAT: u32 = 1 << 2;
const ECX80000001_CMP_LEGACY: u32 = 1 << 1;
const ECX80000001_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const ECX80000001_PERFCTR_CORE: u32 = 1 << 23;

/// The CPUID of all vCPUs, made once; [`Template::for_cpu`] fills in what differs.
#[derive(Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Template {
    /// From KVM's supported set, for a machine of `cpus` vCPUs. `tsc_deadline`: whether KVM has that timer mode,
    /// which older versions tell by a capability only.
    pub fn new(supported: &[kvm_cpuid_entry2], cpus: u8, tsc_deadline: bool) -> Self {
        let cpus = u32::from(cpus.max(1));
        let mut entries = Vec::with_capacity(supported.len() + 3);
        let dropped = [EXTENDED_TOPOLOGY, EXTENDED_TOPOLOGY_V2, AMD_EXTENDED_TOPOLOGY, AMD_PERFMON_V2];
        entries.extend(supported.iter().filter(|e| !dropped.contains(&e.function)).copied());
        for entry in &mut entries {
            match entry.function {
                0x0 => entry.eax = entry.eax.max(EXTENDED_TOPOLOGY),
                0x1 => leaf_1(entry, cpus, tsc_deadline),
                0x4 => leaf_4(entry, cpus),
                0x6 => entry.eax |= EAX6_ARAT,
                // No performance counters: guests would program each of them at boot, one VM exit at a time.
                0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
                0x8000_0001 => leaf_8000_0001(entry, cpus),
                0x8000_0008 => entry.ecx = (id_bits(cpus) << 12) | (cpus - 1),
                0x8000_001d => leaf_8000_001d(entry, cpus),
                _ => {}
            }
        }
        for (index, level, shift, count) in [(0, LEVEL_SMT, 0, 1), (1, LEVEL_CORE, id_bits(cpus), cpus)] {
            entries.push(kvm_cpuid_entry2 {
                function: EXTENDED_TOPOLOGY,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: (level << 8) | index,
                ..Default::default()
            });
        }
        // KVM answers for an entry that is not there with zeros, but for those that a vCPU fills in. It looks at all of them 256 times
        // where it is given them (Linux 6.12, `kvm_get_hypervisor_cpuid` for Xen's signature).
        let is_empty = |e: &kvm_cpuid_entry2| e.eax | e.ebx | e.ecx | e.edx == 0;
        entries.retain(|entry| !is_empty(entry) || entry.function == AMD_IDENTIFIERS);
        Self { entries }
    }

    /// From what [`Template::entries`] gave in another process.
    pub fn saved(entries: Vec<kvm_cpuid_entry2>) -> Self {
        Self { entries }
    }

    /// What all vCPUs have in common.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// The CPUID of one vCPU.
    ///
    /// # Errors
    /// KVM's list has more entries than its interface can take.
    pub fn for_cpu(&self, index: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let id = u32::from(index);
        let mut cpuid = CpuId::from_entries(&self.entries)?;
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                0x1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (id << 24),
                EXTENDED_TOPOLOGY => entry.edx = id,
                AMD_IDENTIFIERS => {
                    entry.eax = id;
                    entry.ebx = id & 0xff;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        Ok(cpuid)
    }
}

/// Bits that an APIC id needs for that many CPUs.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

fn leaf_1(entry: &mut kvm_cpuid_entry2, cpus: u32, tsc_deadline: bool) {
    let ids = 1u32 << id_bits(cpus);
    entry.ebx = (entry.ebx & 0x0000_ffff) | (ids << 16);
    entry.ecx |= ECX1_HYPERVISOR;
    if tsc_deadline {
        entry.ecx |= ECX1_TSC_DEADLINE;
    }
    if cpus > 1 {
        entry.edx |= EDX1_HTT;
    } else {
        entry.edx &= !EDX1_HTT;
    }
}

/// Intel's caches: the first two levels belong to a core, the others to the package.
fn leaf_4(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let ids = 1u32 << id_bits(cpus);
    let level = (entry.eax >> 5) & 7;
    let sharing = if level >= 3 { ids - 1 } else { 0 };
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((ids - 1) << 26);
}

fn leaf_8000_0001(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    entry.ecx &= !ECX80000001_PERFCTR_CORE;
    if entry.ecx & ECX80000001_TOPOLOGY_EXTENSIONS != 0 && cpus > 1 {
        entry.ecx |= ECX80000001_CMP_LEGACY;
    }
}

/// AMD's caches, as leaf 4.
fn leaf_8000_001d(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    let level = (entry.eax >> 5) & 7;
    let sharing = if level >= 3 { cpus - 1 } else { 0 };
    entry.eax = (entry.eax & !(0xfff << 14)) | (sharing << 14);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, edx: EDX1_HTT, ebx: 0x0a0b_0800, ..Default::default() }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, 0xd),
            entry(1, 0, 0x306a9),
            entry(4, 0, 0xfc00_4121),
            entry(4, 3, 0xfc00_4163),
            entry(4, 4, 0),
            entry(6, 0, 0),
            entry(0xa, 0, 0x0730_0404),
            entry(0xb, 0, 99),
            entry(0x1f, 0, 99),
            entry(0x8000_0001, 0, 0),
            entry(0x8000_0008, 0, 0x3030),
            entry(0x8000_001d, 3, 0x163 | (7 << 14)),
            entry(0x8000_001e, 0, 99),
            entry(0x4000_0001, 0, 0x0100_007f),
        ]
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_leaf_with_an_apic_id_names_the_cpu() {
        let template = Template::new(&host(), 6, true);
        for id in 0..6u8 {
            let cpuid = template.for_cpu(id).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!(find(&cpuid, 0xb, 0).edx, u32::from(id));
            assert_eq!(find(&cpuid, 0xb, 1).edx, u32::from(id));
            assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, u32::from(id));
        }
    }

    #[test]
    fn the_extended_topology_is_one_package_of_single_threaded_cores() {
        let cpuid = Template::new(&host(), 6, true).for_cpu(3).unwrap();
        let (smt, core) = (find(&cpuid, 0xb, 0), find(&cpuid, 0xb, 1));
        assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, LEVEL_SMT << 8));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, (LEVEL_CORE << 8) | 1));
        assert!(!cpuid.as_slice().iter().any(|e| e.function == 0x1f));
    }

    #[test]
    fn caches_are_shared_from_the_third_level_on() {
        let cpuid = Template::new(&host(), 4, true).for_cpu(0).unwrap();
        assert_eq!((find(&cpuid, 4, 0).eax >> 14) & 0xfff, 0);
        assert_eq!((find(&cpuid, 4, 3).eax >> 14) & 0xfff, 3);
        assert_eq!(find(&cpuid, 4, 3).eax >> 26, 3);
        assert_eq!(find(&cpuid, 4, 4).eax, 0);
        assert_eq!((find(&cpuid, 0x8000_001d, 3).eax >> 14) & 0xfff, 3);
    }

    #[test]
    fn what_is_all_zeros_is_left_out_but_where_a_vcpu_has_its_number() {
        let zeros = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let mut host = host();
        host.retain(|entry| entry.function != AMD_IDENTIFIERS);
        host.extend([AMD_IDENTIFIERS, 3, 0x8000_0003].map(zeros));
        let cpuid = Template::new(&host, 2, true).for_cpu(1).unwrap();
        assert!(cpuid.as_slice().iter().all(|e| e.function != 3 && e.function != 0x8000_0003));
        assert_eq!(find(&cpuid, AMD_IDENTIFIERS, 0).eax, 1);
    }

    #[test]
    fn a_single_cpu_has_no_hyperthreading_bit_and_a_hypervisor() {
        let one = Template::new(&host(), 1, false).for_cpu(0).unwrap();
        assert_eq!(find(&one, 1, 0).edx & EDX1_HTT, 0);
        assert_ne!(find(&one, 1, 0).ecx & ECX1_HYPERVISOR, 0);
        assert_eq!(find(&one, 1, 0).ecx & ECX1_TSC_DEADLINE, 0);
        let two = Template::new(&host(), 2, true).for_cpu(0).unwrap();
        assert_ne!(find(&two, 1, 0).edx & EDX1_HTT, 0);
        assert_ne!(find(&two, 1, 0).ecx & ECX1_TSC_DEADLINE, 0);
    }

    #[test]
    fn counters_are_hidden_and_paravirtual_features_kept() {
        let cpuid = Template::new(&host(), 1, true).for_cpu(0).unwrap();
        // What is not there, KVM answers for with zeros.
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0xa));
        assert_eq!(find(&cpuid, 0x4000_0001, 0).eax, 0x0100_007f);
        assert_ne!(find(&cpuid, 6, 0).eax & EAX6_ARAT, 0);
    }

    #[test]
    fn core_count_of_amd_fits_the_id_bits() {
        let cpuid = Template::new(&host(), 5, true).for_cpu(0).unwrap();
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, (3 << 12) | 4);
    }
}
