//! What a machine is given by the host, opened: all that a path leads to. Made with the rights of whoever starts the machine and of
//! what the spec says alone; nothing in the files is read yet.

use std::{
    fs::{File, OpenOptions},
    io::{stdin, stdout},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
};

use devices::virtio::{
    block::{Backend, BackendFault, Block},
    net::{Net, NetConfig, Tap, VhostNet},
    rng::Rng,
    throttle::Throttle,
    vsock::Vsock,
};

use crate::{
    boot,
    ending::Ending,
    error::SetupError,
    exit::VmExit,
    jail::{Jail, limits::Limits},
    snapshot::{
        identity::{FileId, OpenFiles},
        pages,
    },
    spec::{ConsoleSpec, DiskSpec, NetBackend, NetSpec, RateSpec, VmSpec},
    trace::Trace,
    validate::validate,
    vm::Frame,
};

const NO_VHOST: &str = "/dev/vhost-net cannot be used (load vhost_net, or choose the backend \"user\")";

/// A machine's parts on the host's side.
#[derive(Debug)]
pub struct Parts {
    pub(crate) spec: VmSpec,
    pub(crate) frame: Frame,
    pub(crate) devices: Devices,
    /// What the machine's disks and its kernel are known by.
    pub(crate) files: OpenFiles,
    /// The kernel as it was when it was opened.
    pub(crate) kernel: Option<FileId>,
    /// What a boot reads.
    pub(crate) boot: Option<boot::Files>,
    limits: Limits,
}

/// Devices that are connected to the host, and not to a guest.
pub struct Devices {
    /// The serial port's output and input.
    pub console: Option<(File, Option<File>)>,
    /// In the spec's order, as are all.
    pub disks: Vec<Block>,
    /// Network cards.
    pub nets: Vec<Card>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// Directories of the host: their tags, and the connections to their virtiofsds, which need a thread each as soon as more is
    /// said. There must be none before the jail.
    pub shares: Vec<(String, UnixStream)>,
    /// The host's randomness.
    pub rng: Rng,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Devices")
    }
}

/// A network card, by who moves its packets.
pub enum Card {
    /// The host's kernel.
    Kernel(Box<VhostNet>),
    /// This process.
    User(Box<Net>),
}

/// Whether the machine is booted, or goes on from a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Kernel and initramfs must be there.
    Boot,
    /// The kernel may be gone.
    Restore,
}

impl Parts {
    /// Opens all that the spec names.
    ///
    /// # Errors
    /// The spec is not valid, or the host or one of the files refuses.
    pub fn open(spec: &VmSpec, purpose: Purpose, trace: &Trace) -> Result<Self, SetupError> {
        validate(spec)?;
        let boot = match purpose {
            Purpose::Boot => Some(boot::Files::open(spec)?),
            Purpose::Restore => None,
        };
        let frame = Frame::new(trace)?;
        // For what a snapshot is to hold, as there is no /proc later.
        pages::pagemap().map_err(SetupError::io("/proc/self/pagemap"))?;
        let (devices, files, disk_bytes) = Devices::open(spec, &frame.ending)?;
        let limits = Limits { disk_bytes, memory_bytes: u64::from(spec.memory_mib) << 20 };
        let kernel = files.kernel.as_ref().and_then(|kernel| FileId::of_open(kernel).ok());
        trace.step("parts opened");
        Ok(Self { spec: spec.clone(), frame, devices, files, kernel, boot, limits })
    }

    /// Goes to the jail with all of it. On the process's only thread.
    ///
    /// # Errors
    /// The host does not grant a part of the jail; the process has to end.
    pub fn lock_up(mut self, jail: &Jail, trace: &Trace) -> Result<Self, SetupError> {
        jail.enter(&self.limits)?;
        if let (Some(vsock), Some(spec)) = (self.devices.vsock.take(), &self.spec.vsock) {
            // The directory of its sockets is the root.
            let name = spec.socket.file_name().unwrap_or_default();
            self.devices.vsock = Some(vsock.found_at(&Path::new("/").join(name)));
        }
        trace.step("jailed");
        Ok(self)
    }
}

impl Devices {
    /// With the files that kernel and disks are known by, and the length of the longest disk.
    fn open(spec: &VmSpec, ending: &Arc<Ending>) -> Result<(Self, OpenFiles, u64), SetupError> {
        let console = console(&spec.console)?;
        let (mut disks, mut files, mut longest) = (Vec::new(), Vec::new(), 0);
        for (index, disk) in spec.disks.iter().enumerate() {
            let backend =
                Backend::open(&disk.files, disk.read_only).map_err(|e| SetupError::Disk(e.to_string()))?;
            files.push(backend.share().map_err(SetupError::io("disk"))?);
            longest = longest.max(backend.size());
            disks.push(block(backend, disk, &format!("disk{index}"), ending)?);
        }
        let nets = spec.nets.iter().map(net).collect::<Result<_, _>>()?;
        let vsock = spec.vsock.as_ref().map(|vsock| {
            let what = format!("vsock socket {}", vsock.socket.display());
            Vsock::new(vsock.guest_cid, &vsock.socket).map_err(SetupError::io(what))
        });
        let share = |share: &crate::spec::ShareSpec| {
            let what = format!("shared directory {}", share.tag);
            let stream = UnixStream::connect(&share.socket).map_err(SetupError::io(what))?;
            Ok((share.tag.clone(), stream))
        };
        let shares = spec.shares.iter().map(share).collect::<Result<_, SetupError>>()?;
        let rng = Rng::new().map_err(SetupError::io("rng"))?;
        let devices = Self { console, disks, nets, vsock: vsock.transpose()?, shares, rng };
        let kernel = File::open(&spec.kernel).ok();
        Ok((devices, OpenFiles { kernel, disks: files }, longest))
    }
}

fn console(spec: &ConsoleSpec) -> Result<Option<(File, Option<File>)>, SetupError> {
    match spec {
        ConsoleSpec::Off => Ok(None),
        ConsoleSpec::File(path) => {
            let opened = OpenOptions::new().append(true).create(true).open(path);
            let file = opened.map_err(SetupError::io(format!("console {}", path.display())))?;
            Ok(Some((file, None)))
        }
        ConsoleSpec::Stdio => Ok(Some((duplicate(stdout().as_fd())?, Some(duplicate(stdin().as_fd())?)))),
    }
}

fn block(backend: Backend, disk: &DiskSpec, id: &str, ending: &Arc<Ending>) -> Result<Block, SetupError> {
    let ending = Arc::clone(ending);
    let on_fault = move |fault: BackendFault| {
        ending.end(VmExit::HostIo, format!("the host's disk failed the guest: {fault}"));
    };
    let device = Block::new(backend, id, Box::new(on_fault)).map_err(SetupError::io("disk"))?;
    Ok(device.with_throttle(throttle(disk.rate)?))
}

fn net(net: &NetSpec) -> Result<Card, SetupError> {
    let mut tap =
        Tap::open(&net.tap, net.queue_pairs).map_err(SetupError::io(format!("TAP interface {}", net.tap)))?;
    let config = NetConfig { mac: net.mac, mtu: net.mtu, pairs: net.queue_pairs };
    // validate() refuses a rate with Vhost.
    if net.backend != NetBackend::User && net.rate.is_none() {
        tap = match VhostNet::new(tap, config) {
            Ok(device) => return Ok(Card::Kernel(Box::new(device))),
            Err((_, error)) if net.backend == NetBackend::Vhost => {
                return Err(SetupError::Io { what: NO_VHOST.into(), source: error });
            }
            Err((tap, _)) => tap,
        };
    }
    let device = Net::new(Box::new(tap), config).map_err(SetupError::io("network device"))?;
    Ok(Card::User(Box::new(device.with_throttles(throttle(net.rate)?, throttle(net.rate)?))))
}

fn throttle(rate: Option<RateSpec>) -> Result<Throttle, SetupError> {
    let new = |rate: RateSpec| Throttle::new(rate.into()).map_err(SetupError::io("timerfd"));
    rate.map_or(Ok(Throttle::default()), new)
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<File, SetupError> {
    Ok(fd.try_clone_to_owned().map_err(SetupError::io("standard streams"))?.into())
}
