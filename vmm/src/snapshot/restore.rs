//! Reads a snapshot, and says whether this host and this spec can go on with it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use devices::virtio::Memory;

use super::{
    STATE,
    files::{Files, MemoryFiles, open_state},
    format::{self, MAX_FILE_BYTES, PRELUDE_BYTES},
    header::Header,
    identity::{self, OpenFiles},
    image::{Backing, checksum},
    pages::Still,
    refusal::Refusal,
    sections::State,
    text::SharedText,
    working_set::WorkingSet,
};
use crate::{
    memory::reserve,
    spec::{ConsoleSpec, VmSpec},
    validate::MAX_MEMORY_MIB,
};

/// A snapshot that was read and is whole.
#[derive(Debug)]
pub struct Snapshot {
    /// Where it is.
    pub dir: PathBuf,
    /// The files of its memory.
    pub files: MemoryFiles,
    working_set: Option<File>,
    /// Its header.
    pub header: Header,
    /// Everything else but guest memory.
    pub state: State,
}

/// Reads at most so many bytes.
fn read(file: &mut File, most: u64) -> Result<Vec<u8>, Refusal> {
    let length = file.metadata().map_or(0, |metadata| metadata.len()).min(most);
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    file.take(most).read_to_end(&mut bytes).map_err(|error| Refusal::Missing(format!("{STATE}: {error}")))?;
    Ok(bytes)
}

/// Reads a snapshot's header and nothing else.
///
/// # Errors
/// There is none, or it is not what was written.
pub fn header(dir: &Path) -> Result<Header, Refusal> {
    let mut file = open_state(dir)?;
    let bytes = read(&mut file, PRELUDE_BYTES as u64)?;
    let Ok(first) = <&[u8; PRELUDE_BYTES]>::try_from(bytes.as_slice()) else {
        let (wanted, found) = (PRELUDE_BYTES as u64, bytes.len() as u64);
        return Err(Refusal::Truncated { what: STATE.into(), wanted, found });
    };
    let prelude = format::prelude(first)?;
    let behind = read(&mut file, prelude.header_bytes as u64)?;
    format::header(&prelude, &behind)
}

impl Snapshot {
    /// Reads the snapshot in the directory, but for its memory.
    ///
    /// # Errors
    /// There is none, or it is not what was written.
    pub fn open(dir: &Path) -> Result<Self, Refusal> {
        Self::read(Files::open(dir)?)
    }

    /// Reads a snapshot whose files are open, but for its memory.
    ///
    /// # Errors
    /// It is not what was written.
    pub fn read(files: Files) -> Result<Self, Refusal> {
        let Files { dir, mut state, memory, working_set } = files;
        let bytes = read(&mut state, MAX_FILE_BYTES + 1)?;
        let (header, sections) = format::decode(&bytes)?;
        let state = State::decode(&sections)?;
        Ok(Self { dir, files: memory, working_set, header, state })
    }

    /// What to read ahead of its memory.
    pub fn working_set(&self) -> Option<WorkingSet> {
        WorkingSet::read_from(self.working_set.as_ref()?)
    }

    /// Guest memory of that size with the snapshot's content, mapped, and where it comes from. `verify`: all of it is read
    /// and compared with the checksum. `text`: what of it there is in a file that machines have in common.
    ///
    /// # Errors
    /// A file of the snapshot is not what was written, or nobody has asked for a checksum then.
    pub fn memory(
        &self,
        mib: u32,
        verify: bool,
        text: Option<&SharedText>,
    ) -> Result<(Memory, Backing), Refusal> {
        if mib > MAX_MEMORY_MIB {
            return Err(Refusal::Corrupted(format!("no machine has {mib} MiB of memory")));
        }
        let memory = reserve(mib).map_err(|error| Refusal::Host(error.to_string()))?;
        let mut state = self.state.memory.clone();
        if verify {
            // What is in the files and in no list counts too.
            state.data = None;
        }
        let mut backing = Backing::restore(&self.files, &memory, &state)?;
        if verify {
            // SAFETY: nobody else knows this memory yet.
            let still = unsafe { Still::new(&memory) };
            let Some(written) = self.header.memory.checksum else {
                return Err(Refusal::Missing("the snapshot has no checksum of its memory".into()));
            };
            let read = checksum(&backing, &still, &mut || false);
            if read.map_err(|error| Refusal::Host(format!("checksum of memory: {error}")))? != Some(written) {
                return Err(Refusal::Corrupted("the checksum of memory is wrong".into()));
            }
        }
        if let Some(text) = text {
            let shared = backing.share(text, &memory);
            shared.map_err(|error| Refusal::Host(format!("cannot map the kernel's text: {error}")))?;
        }
        Ok((memory, backing))
    }

    /// Refuses to go on as the machine of that spec: with other parts, another kernel, or disks that have changed. Those were opened
    /// and locked before, so that nobody else writes to them any more.
    ///
    /// # Errors
    /// The first that is not as it was.
    pub fn check(&self, spec: &VmSpec, open: &OpenFiles) -> Result<(), Refusal> {
        check(&self.header, &self.state, spec, open)
    }
}

/// [`Snapshot::check`] of what was read.
///
/// # Errors
/// As there.
pub fn check(header: &Header, state: &State, spec: &VmSpec, open: &OpenFiles) -> Result<(), Refusal> {
    same_parts(&header.spec, spec).map_err(Refusal::OtherMachine)?;
    let disks = header.disks.as_ref().map_or(spec.disks.len(), Vec::len);
    if disks != spec.disks.len() || state.vcpus.len() != usize::from(spec.cpus) {
        return Err(Refusal::Corrupted("the header and the state tell of different machines".into()));
    }
    if let Some(kernel) = &header.kernel {
        kernel.check(&spec.kernel, open.kernel.as_ref())?;
    }
    identity::check_disks(header.disks.as_deref(), spec, &open.disks)
}

/// What the guest knows must be as it was. Its host's side, and addresses that guest-init can change, may be others.
fn same_parts(then: &VmSpec, now: &VmSpec) -> Result<(), String> {
    let same = |what: &str, then: usize, now: usize| match then == now {
        true => Ok(()),
        false => Err(format!("the machine has {now} {what}, and was suspended with {then}")),
    };
    same("vCPUs", then.cpus.into(), now.cpus.into())?;
    same("MiB of memory", then.memory_mib as usize, now.memory_mib as usize)?;
    same("disks", then.disks.len(), now.disks.len())?;
    same("network cards", then.nets.len(), now.nets.len())?;
    same("directories of the host", then.shares.len(), now.shares.len())?;
    same("vsock devices", then.vsock.iter().count(), now.vsock.iter().count())?;
    let consoles = |spec: &VmSpec| usize::from(spec.console != ConsoleSpec::Off);
    same("consoles", consoles(then), consoles(now))?;
    for (index, (then, now)) in then.disks.iter().zip(&now.disks).enumerate() {
        if then.read_only != now.read_only {
            let writable = if now.read_only { "read-only" } else { "writable" };
            return Err(format!("disk {index} is {writable} now and was not when the machine was suspended"));
        }
    }
    for (index, (then, now)) in then.nets.iter().zip(&now.nets).enumerate() {
        same(&format!("bytes of MTU on network card {index}"), then.mtu.into(), now.mtu.into())?;
        let pairs = format!("pairs of queues on network card {index}");
        same(&pairs, then.queue_pairs.into(), now.queue_pairs.into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        serde_json::from_value(serde_json::json!({
            "cpus": 1, "memory_mib": 128, "kernel": "/k", "console": "stdio",
            "disks": [{"files": ["/a"], "read_only": true}],
            "nets": [{"tap": "t0", "mac": [2, 0, 0, 0, 0, 1]}],
            "vsock": {"guest_cid": 3, "socket": "/s"},
        }))
        .unwrap()
    }

    #[test]
    fn the_hosts_side_may_be_another() {
        let mut now = spec();
        now.nets[0].tap = "t9".into();
        now.nets[0].mac[5] = 9;
        now.disks[0].files = vec!["/b".into(), "/c".into()];
        now.vsock.as_mut().unwrap().socket = "/other".into();
        now.console = ConsoleSpec::File("/log".into());
        assert_eq!(same_parts(&spec(), &now), Ok(()));
    }

    #[test]
    fn the_guests_side_may_not() {
        let refused = |change: fn(&mut VmSpec)| {
            let mut now = spec();
            change(&mut now);
            same_parts(&spec(), &now).unwrap_err()
        };
        assert_eq!(refused(|s| s.cpus = 2), "the machine has 2 vCPUs, and was suspended with 1");
        assert!(refused(|s| s.memory_mib = 64).contains("64 MiB"));
        assert!(refused(|s| s.disks.clear()).contains("0 disks"));
        assert!(refused(|s| s.disks[0].read_only = false).contains("disk 0 is writable"));
        assert!(refused(|s| s.nets.clear()).contains("0 network cards"));
        assert!(refused(|s| s.nets[0].mtu = 9000).contains("9000"));
        assert!(refused(|s| s.nets[0].queue_pairs = 2).contains("2 pairs of queues"));
        assert!(refused(|s| s.vsock = None).contains("vsock"));
        assert!(refused(|s| s.console = ConsoleSpec::Off).contains("consoles"));
    }
}
