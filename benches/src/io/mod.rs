//! Network and disk of a guest: iperf3 and fio in flyrun-vmm beside QEMU's microvm.
//!
//! Both run the same kernel and the same initramfs (`benches/guest/io`), with one vCPU, and the files of the disks are in RAM.
//! QEMU is set up as well as it can be: modern virtio, offloads on, vhost-net on and off, and for its disk the best of what
//! was tried (see [`QEMU_DISK`]).

mod busy;
mod link;
mod session;

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use self::{
    link::{Link, MAC, TAP},
    session::Costs,
};
use crate::{qemu::Qemu, report::Report};

/// Guest memory in MiB: the initramfs is large, because Debian's fio knows every storage there is.
const MEMORY_MIB: u32 = 512;
const DISK_BYTES: usize = 64 << 20;
const MIB: f64 = 1048576.0;
/// The fewest instructions of what QEMU 7.2 can do. A random read of 4 KiB took 20,800 so, 24,600 with its default cache and
/// io_uring, 33,700 with that and threads; an iothread added 2,000 to 4,000.
const QEMU_DISK: &str = "if=none,id=disk,format=raw,cache=none,aio=native";

/// The files of the benchmarks.
#[derive(Debug)]
pub struct Files {
    vmm: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    iperf3: PathBuf,
}

impl Files {
    /// Finds flyrun-vmm and the kernel in the library; both VMMs get the initramfs, and the host's end iperf3.
    pub fn new(library: &Path, initrd: &Path, iperf3: &Path) -> Result<Self> {
        let existing =
            |path: &Path| path.canonicalize().with_context(|| format!("there is no {}", path.display()));
        Ok(Self {
            vmm: existing(&library.join("flyrun-vmm"))?,
            kernel: existing(&library.join("vmlinux"))?,
            initrd: existing(initrd)?,
            iperf3: existing(iperf3)?,
        })
    }
}

/// What a guest is to do, and with what.
#[derive(Clone, Copy, Debug)]
enum Task<'a> {
    Net { vhost: bool },
    Disk(&'a Path),
}

impl Task<'_> {
    fn words(self, rounds: u32) -> String {
        match self {
            Task::Net { .. } => format!("io=net rounds={rounds}"),
            Task::Disk(_) => format!("io=blk rounds={rounds}"),
        }
    }
}

/// Measures flyrun and, if it is there, QEMU.
#[derive(Clone, Copy, Debug)]
pub struct Comparison<'a> {
    /// The files of both.
    pub files: &'a Files,
    /// QEMU.
    pub qemu: Option<&'a Qemu>,
    /// How often each figure is measured.
    pub rounds: u32,
}

impl Comparison<'_> {
    /// net.tx, from the guest to the host, and net.rx; with vhost-net they are net.tx.vhost and net.rx.vhost.
    pub fn network(self, report: &mut Report) -> Result<()> {
        for vhost in [false, true] {
            let _link = Link::new(&self.files.iperf3)?;
            let name = |what: &str| if vhost { format!("net.{what}.vhost") } else { format!("net.{what}") };
            for (vmm, costs) in self.follow(Task::Net { vhost })? {
                for (what, Costs { instructions, exits }) in costs {
                    let exits: Vec<f64> = exits.iter().map(|exits| exits * MIB).collect();
                    report.add(format!("{}.{vmm}", name(&what)), "instructions/byte", &instructions);
                    report.add(format!("{}.{vmm}.exits", name(&what)), "exits/MiB", &exits);
                }
            }
        }
        Ok(())
    }

    /// blk.*.
    pub fn disk(self, report: &mut Report) -> Result<()> {
        let ram = Ram::mount()?;
        let disk = ram.0.path().join("disk");
        write_disk(&disk)?;
        for (vmm, costs) in self.follow(Task::Disk(&disk))? {
            for (what, Costs { instructions, exits }) in costs {
                report.add(format!("blk.{what}.{vmm}"), "instructions/request", &instructions);
                report.add(format!("blk.{what}.{vmm}.exits"), "exits/request", &exits);
            }
        }
        Ok(())
    }

    /// Runs a guest in each VMM; the names of the VMMs, and the costs by the guest's own names.
    fn follow(self, task: Task<'_>) -> Result<Vec<(&'static str, BTreeMap<String, Costs>)>> {
        busy::without_halt_polling()?;
        let directory = tempfile::tempdir()?;
        let spec = directory.path().join("spec.json");
        let mut vmms = vec![("flyrun", flyrun(self.files, task, self.rounds, &spec)?)];
        if let Some(qemu) = self.qemu {
            vmms.push(("qemu", with_qemu(self.files, qemu, task, self.rounds)));
        }
        let follow = |(name, mut command): (_, Command)| {
            let costs = session::follow(&mut command).with_context(|| format!("{task:?} with {name}"))?;
            Ok((name, costs))
        };
        vmms.into_iter().map(follow).collect()
    }
}

fn flyrun(files: &Files, task: Task<'_>, rounds: u32, spec: &Path) -> Result<Command> {
    let mut text = json!({
        "cpus": 1, "memory_mib": MEMORY_MIB, "kernel": files.kernel, "initrd": [files.initrd],
        "command_line": task.words(rounds), "console": "stdio",
    });
    let (key, device): (_, Value) = match task {
        Task::Net { vhost } => {
            let backend = if vhost { "vhost" } else { "user" };
            ("nets", json!([{ "tap": TAP, "mac": MAC, "backend": backend }]))
        }
        Task::Disk(path) => ("disks", json!([{ "files": [path] }])),
    };
    text[key] = device;
    std::fs::write(spec, text.to_string())?;
    let mut command = Command::new(&files.vmm);
    command.arg("--spec").arg(spec);
    Ok(command)
}

fn with_qemu(files: &Files, qemu: &Qemu, task: Task<'_>, rounds: u32) -> Command {
    let mut command = qemu.command(&files.kernel, &files.initrd, MEMORY_MIB, &task.words(rounds));
    command.args(["-global", "virtio-mmio.force-legacy=false"]);
    match task {
        Task::Net { vhost } => {
            let on = if vhost { "on" } else { "off" };
            command.args(["-netdev", &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={on}")]);
            command.args(["-device", &format!("virtio-net-device,netdev=net,mac={}", colons(MAC))]);
        }
        Task::Disk(path) => {
            command.args(["-drive", &format!("{QEMU_DISK},file={}", path.display())]);
            command.args(["-device", "virtio-blk-device,drive=disk"]);
        }
    }
    command
}

/// A filesystem in the host's RAM. Its pages are huge ones: with small ones, Linux 6.12's generic_perform_write looks at all
/// the rest of a long write before it copies the next 4 KiB, and a MiB costs 2.5 million instructions.
struct Ram(tempfile::TempDir);

impl Ram {
    fn mount() -> Result<Self> {
        let this = Self(tempfile::tempdir()?);
        let options = ["-t", "tmpfs", "-o", "huge=always", "bench"];
        let status = Command::new("mount").args(options).arg(this.0.path()).status()?;
        anyhow::ensure!(status.success(), "mount ended with {status}");
        Ok(this)
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // What is left goes with the test host.
        let _left = Command::new("umount").arg(self.0.path()).status();
    }
}

/// Writes each block of the disk, so that there are no holes in it.
fn write_disk(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..1 << 20).map(|n| (n % 251) as u8).collect();
    for _ in 0..DISK_BYTES / block.len() {
        file.write_all(&block)?;
    }
    Ok(())
}

fn colons(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
