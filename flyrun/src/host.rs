//! Whether this host can run virtual machines at all.

use std::arch::x86_64::__cpuid;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::paths::{Library, Part};

/// What `flyrun-vmm --probe --json` found out by running a guest of a few instructions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Probe {
    /// Whether KVM runs a guest's kernel as it must.
    pub usable: bool,
    /// One sentence with what was found and, where it is not usable, what to do.
    pub message: String,
}

/// Refuses early, and with the reason, on a host whose KVM cannot run a guest's kernel.
///
/// A processor that shows its virtualization extensions is believed: running the probe there would cost each start a
/// virtual machine. One that shows none may still have a /dev/kvm (a paravirtual one, in a virtual machine itself),
/// which opens and creates machines that then never come up.
pub fn ensure_kvm(library: &Library) -> Result<()> {
    if cpu_shows_virtualization() {
        return Ok(());
    }
    let probe = probe(library)?;
    if probe.usable {
        return Ok(());
    }
    Err(Error::new(probe.message).advice("`flyrun doctor` checks all that a host needs."))
}

/// Runs the probe guest; takes at most a few seconds.
pub fn probe(library: &Library) -> Result<Probe> {
    let vmm = library.path(Part::Vmm);
    let output = Command::new(&vmm)
        .args(["--probe", "--json"])
        .stdin(Stdio::null())
        .output()
        .context(format!("cannot start {}", vmm.display()))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let told = String::from_utf8_lossy(&output.stderr);
        Error::new(format!("the KVM probe failed ({}): {}", output.status, told.trim()))
    })
}

/// CPUID.1:ECX.VMX, or CPUID.8000_0001h:ECX.SVM (Intel SDM vol. 2A; AMD APM vol. 3, appendix E).
pub fn cpu_shows_virtualization() -> bool {
    let vmx = __cpuid(1).ecx & (1 << 5) != 0;
    let svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & (1 << 2) != 0;
    vmx || svm
}
