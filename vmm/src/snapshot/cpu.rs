//! Whether this host's CPU can go on as the one that the guest saw. Each feature bit that the guest saw must be there; what
//! is new here the guest does not learn of.

use kvm_bindings::kvm_cpuid_entry2;

use super::{header::CpuSummary, identity::sha256, refusal::Refusal};

/// The registers of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Where the feature bits are: leaf, subleaf, register, and the bits that are none.
const FEATURES: [(u32, u32, Register, u32); 20] = [
    // OSXSAVE tells what the guest does.
    (0x1, 0, Ecx, 1 << 27),
    (0x1, 0, Edx, 0),
    (0x6, 0, Eax, 0),
    (0x7, 0, Ebx, 0),
    // OSPKE does too.
    (0x7, 0, Ecx, 1 << 4),
    (0x7, 0, Edx, 0),
    (0x7, 1, Eax, 0),
    (0x7, 1, Edx, 0),
    (0x7, 2, Edx, 0),
    (0xd, 0, Eax, 0),
    (0xd, 0, Edx, 0),
    (0xd, 1, Eax, 0),
    (0xd, 1, Ecx, 0),
    (0x4000_0001, 0, Eax, 0),
    (0x8000_0001, 0, Ecx, 0),
    (0x8000_0001, 0, Edx, 0),
    (0x8000_0007, 0, Edx, 0),
    (0x8000_0008, 0, Ebx, 0),
    (0x8000_000a, 0, Edx, 0),
    (0x8000_0021, 0, Eax, 0),
];

fn register(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: Register) -> u32 {
    let found = entries.iter().find(|e| e.function == leaf && e.index == subleaf);
    found.map_or(0, |entry| match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    })
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let bytes = [Ebx, Edx, Ecx].map(|part| register(entries, 0, 0, part).to_le_bytes()).concat();
    bytes.iter().filter(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect()
}

/// What the header says of these entries.
pub fn summary(entries: &[kvm_cpuid_entry2]) -> CpuSummary {
    let signature = register(entries, 1, 0, Eax);
    let (base, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
    let mut features = Vec::with_capacity(FEATURES.len() * 4);
    for (leaf, subleaf, part, none) in FEATURES {
        features.extend((register(entries, leaf, subleaf, part) & !none).to_le_bytes());
    }
    CpuSummary {
        vendor: vendor(entries),
        family: if base == 0xf { base + extended } else { base },
        model: signature >> 4 & 0xf | signature >> 12 & 0xf0,
        stepping: signature & 0xf,
        features: sha256(&features),
    }
}

/// Refuses a guest that saw what is not here.
///
/// # Errors
/// [`Refusal::OtherCpu`], with the first register that lacks bits.
pub fn check(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), Refusal> {
    let (theirs, ours) = (vendor(saved), vendor(here));
    if theirs != ours {
        return Err(Refusal::OtherCpu(format!(
            "the guest runs on a CPU of {theirs}, and this one is of {ours}"
        )));
    }
    for (leaf, subleaf, part, none) in FEATURES {
        let missing = register(saved, leaf, subleaf, part) & !register(here, leaf, subleaf, part) & !none;
        if missing != 0 {
            return Err(Refusal::OtherCpu(format!(
                "this CPU lacks features that the guest uses: CPUID {leaf:#x}.{subleaf} {part:?} bits {missing:#x}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn cpu() -> Vec<kvm_cpuid_entry2> {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        vec![
            entry(0, 0xd, word(b"Auth"), word(b"cAMD"), word(b"enti")),
            entry(1, 0x0080_0f12, 0, 1 << 27 | 1, 0x7),
            entry(7, 0, 0x30, 0, 0),
        ]
    }

    #[test]
    fn a_cpu_is_named_as_its_maker_does() {
        let summary = summary(&cpu());
        assert_eq!((summary.vendor.as_str(), summary.family), ("AuthenticAMD", 0x17));
        assert_eq!((summary.model, summary.stepping, summary.features.len()), (1, 2, 64));
    }

    #[test]
    fn more_features_are_no_harm_and_fewer_are_refused() {
        let (saved, mut here) = (cpu(), cpu());
        assert_eq!(check(&saved, &here), Ok(()));
        here[1].ecx = 0xff;
        assert_eq!(check(&saved, &here), Ok(()), "OSXSAVE is no feature");
        here[2].ebx = 0x10;
        let refusal = check(&saved, &here).unwrap_err();
        assert!(
            refusal.name() == "other-cpu" && refusal.to_string().ends_with("0x7.0 Ebx bits 0x20"),
            "{refusal}"
        );
        here.truncate(1);
        assert!(check(&saved, &here).is_err());
    }

    #[test]
    fn another_maker_is_refused() {
        let mut here = cpu();
        here[0].ebx = 0;
        assert_eq!(check(&cpu(), &here).unwrap_err().name(), "other-cpu");
    }
}
