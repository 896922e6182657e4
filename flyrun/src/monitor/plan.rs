//! What a life of a machine needs of the host's files, and what flyrun-vmm and guest-init are told.

use std::path::Path;

use images::TemplateKind;
use protocol::{BootConfig, VolumeConfig};
use vmm::spec::{DiskSpec, NetSpec};

use super::Monitor;
use crate::cgroup::Cgroup;
use crate::delivery::Parcel;
use crate::error::{Context, Error, Result, from_images};
use crate::machine::{DISK, Machines, State};
use crate::paths::Part;
use crate::secrets::Secrets;
use crate::share::Served;
use crate::vm::{NewDisk, Streams, VmPlan};
use crate::volume::{Attached, Volumes};
use crate::{network, share, trace, volume};

impl Monitor<'_> {
    /// Held as long as the machine runs, as the root filesystem is.
    pub(super) fn attach_volumes(&self) -> Result<Vec<Attached>> {
        let volumes = Volumes::new(self.host.paths.volumes());
        self.ensure_not_in_a_snapshot()?;
        self.machine.record().config.volumes.iter().map(|used| volumes.attach(used)).collect()
    }

    /// A suspended machine's filesystems are in its memory: what it may write nobody else touches, what it reads nobody writes.
    fn ensure_not_in_a_snapshot(&self) -> Result<()> {
        let own = self.machine.record();
        if own.config.volumes.is_empty() {
            return Ok(());
        }
        let others = Machines::new(self.host.paths.machines()).list()?;
        let suspended = others.iter().filter(|other| other.state == State::Suspended && other.id != own.id);
        for (other, theirs) in
            suspended.flat_map(|other| other.config.volumes.iter().map(move |used| (other, used)))
        {
            let clashes =
                |used: &&volume::Use| used.name == theirs.name && !(used.read_only && theirs.read_only);
            if let Some(used) = own.config.volumes.iter().find(clashes) {
                return Err(Error::new(format!(
                    "volume '{}' is in use by {}, which is suspended",
                    used.name, other.name
                ))
                .advice(
                    "Resume and stop that machine first; `flyrun stop` gives up what it has in memory.",
                ));
            }
        }
        Ok(())
    }

    /// Starts a virtiofsd for each directory of the host that the machine has.
    pub(super) fn serve_shares(&self) -> Result<Vec<Served>> {
        let shares = &self.machine.record().config.shares;
        let Some(daemon) = share::prepare(shares)? else { return Ok(vec![]) };
        let cgroup = self.cgroup.as_ref().map(Cgroup::of_vmm);
        let start = |(number, share)| {
            Served::start(self.host.library, &daemon, share, number, &self.run_dir, cgroup.as_deref())
        };
        shares.iter().enumerate().map(start).collect()
    }

    pub(super) fn plan(
        &self,
        rootfs: &Path,
        attached: &[Attached],
        served: &[Served],
        network: Option<&network::Attached>,
    ) -> Result<VmPlan> {
        let config = &self.machine.record().config;
        let (disk_rate, net_rate) = (config.limits.disk_rate(), config.limits.net_rate());
        let disk_of =
            |file: &Path, read_only| DiskSpec { files: vec![file.to_path_buf()], read_only, rate: disk_rate };
        let mut disks = vec![disk_of(rootfs, true)];
        let mut new_disk = None;
        if let Some(size) = config.disk {
            let file = self.machine.directory().join(DISK);
            disks.push(disk_of(&file, false));
            new_disk = (!file.exists()).then_some(NewDisk { file, bytes: size.0 });
        }
        let kernel = if config.cpus == 1 { Part::Kernel } else { Part::KernelSmp };
        let library = self.host.library;
        let mut run = config.run.clone();
        run.entropy = super::entropy()?;
        run.tty = config.tty.then_some(self.view.terminal);
        run.init_log = self.view.show_console;
        run.pids_limit = config.limits.pids;
        run.network = network.map(|network| network.config.clone());
        for (used, attached) in config.volumes.iter().zip(attached) {
            run.volumes.push(VolumeConfig {
                device: protocol::disk_name(disks.len()),
                path: used.path.clone(),
                read_only: used.read_only,
            });
            disks.push(disk_of(&attached.data, used.read_only));
        }
        run.shares = served.iter().map(Served::config).collect();
        // One that goes on from its snapshot has what it was given then.
        let delivery = match self.machine.record().snapshot {
            None => Parcel::prepare(config, &Secrets::new(self.host.paths))?,
            Some(_) => None,
        };
        run.delivery = delivery.as_ref().map(Parcel::config);
        Ok(VmPlan {
            vmm: library.path(Part::Vmm),
            kernel: config.kernel.clone().unwrap_or_else(|| library.path(kernel)),
            initramfs: library.path(Part::InitramfsRun),
            cpus: config.cpus,
            memory_mib: u32::try_from(config.memory.to_mib()).unwrap_or(u32::MAX),
            disks,
            new_disk,
            nets: network.iter().map(|network| NetSpec { rate: net_rate, ..network.card.clone() }).collect(),
            shares: served.iter().map(Served::spec).collect(),
            boot: BootConfig::Run(Box::new(run)),
            delivery,
            console: (!self.view.show_console).then(|| self.machine.directory().join("console.log")),
            cgroup: self.cgroup.as_ref().map(Cgroup::of_vmm),
            restore: self.machine.record().snapshot.as_ref().map(|_| self.snapshot_directory()),
            text: Some(self.host.paths.kernel_text()),
            lock: Some(self.machine.share_lock()?),
            streams: Some(Streams {
                outputs: self.outputs.clone(),
                input: self.input.clone(),
                terminal: config.tty,
            }),
        })
    }

    /// As the base has it, or empty. Under another name first: half a disk must not be taken for the machine's.
    pub(super) fn make_disk(&mut self, disk: &NewDisk) -> Result<()> {
        let draft = self.machine.directory().join("disk.new");
        let _ = std::fs::remove_file(&draft);
        if !self.copy_disk_of_base(&draft) {
            let made = self.host.store.copy_template(TemplateKind::Disk, disk.bytes, &draft);
            made.map_err(|error| from_images(&error))?;
        }
        std::fs::rename(&draft, &disk.file).context("cannot make the machine's disk")?;
        trace::step("disk made");
        Ok(())
    }
}
