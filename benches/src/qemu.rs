//! QEMU's microvm, as lean as it gets.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// QEMU gets the words that flyrun-vmm gives its own guests.
const COMMAND_LINE: &str =
    "console=ttyS0 loglevel=3 8250.nr_uarts=1 reboot=k panic=-1 tsc=reliable no_timer_check swiotlb=noforce";

/// A directory with qemu-system-x86_64, all its libraries and firmware.
#[derive(Clone, Debug)]
pub struct Qemu(PathBuf);

impl Qemu {
    /// The directory.
    pub fn new(directory: &Path) -> Self {
        Self(directory.to_path_buf())
    }

    /// A machine with one vCPU and no devices but a serial port, which is standard output. `words` go to the kernel.
    pub fn command(&self, kernel: &Path, initrd: &Path, memory_mib: u32, words: &str) -> Command {
        let mut command = Command::new(self.0.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&self.0).arg(self.0.join("qemu-system-x86_64"));
        command.arg("-L").arg(&self.0);
        command.args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off", "-accel", "kvm", "-cpu", "host"]);
        command.args(["-smp", "1", "-m", &memory_mib.to_string(), "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-no-reboot", "-serial", "stdio"]);
        command.arg("-append").arg(format!("{COMMAND_LINE} {words}").trim_end());
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).stderr(Stdio::inherit());
        command
    }
}
