//! Takes in a snapshot that was written elsewhere.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use images::{Digest, RootfsLease, Store};
use tar::{Archive, Entries, EntryType};
use vmm::snapshot::header::Header;
use vmm::snapshot::identity::FileId;
use vmm::snapshot::restore::Snapshot;
use vmm::snapshot::{BASE, MEMORY, STATE};

use super::bounded::{Bounded, Budget};
use super::digest::digest;
use super::{Described, MANIFEST, MAX_MANIFEST_BYTES, Manifest, ROOTFS, judge};
use crate::error::{Context, Error, Result, from_images};
use crate::machine::{DISK, new_id};
use crate::network::Mode;
use crate::snapshot::{Draft, Record, Snapshots};

/// What zstd's frames begin with (RFC 8878, 3.1.1).
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// What an entry may have of heads, and what may be behind the last, in bytes.
const SLACK: u64 = 1 << 20;
/// A file whose every second page is a hole has a head for each 8 KiB, of 24 bytes and a bit.
const BYTES_PER_HEAD: u64 = 256;

/// Makes a snapshot of what `input` reads, and tells what is other than it was.
///
/// # Errors
/// It is damaged or not of flyrun's making, its name is taken, or the disk is full. Nothing is left then.
pub fn import(
    snapshots: &Snapshots,
    store: &Store,
    input: impl Read,
    name: Option<&str>,
) -> Result<(Record, Option<String>)> {
    let draft = snapshots.begin(&new_id()?)?;
    let known = |record: &Record| snapshots.check_name(name.unwrap_or(&record.name));
    let (manifest, header) = unpack(&draft, input, known)?;
    let lease = take_rootfs(&draft, store, &manifest, &header)?;
    let mut record = manifest.record;
    record.id = draft.id().to_string();
    if let Some(name) = name {
        record.name = name.to_string();
    }
    record.machine.chain_id = lease.0.to_string();
    let left = match &record.machine.config.network.mode {
        Mode::Named(network) => {
            Some(format!("its machines do not join the network '{network}' by themselves"))
        }
        Mode::Default | Mode::None => None,
    };
    if left.is_some() {
        record.machine.config.network.mode = Mode::Default;
    }
    draft.publish(&record)?;
    Ok((record, left))
}

/// Everything but the root filesystem, at its place in the draft and as it must be.
fn unpack(
    draft: &Draft,
    input: impl Read,
    check_name: impl FnOnce(&Record) -> Result<()>,
) -> Result<(Manifest, Header)> {
    let budget = Budget::default();
    let reader = Bounded::new(decompressed(input).map_err(|error| unreadable(&error))?, budget.clone());
    let mut archive = Archive::new(reader);
    archive.set_preserve_mtime(false);
    let mut entries = archive.entries().map_err(|error| unreadable(&error))?;
    let manifest = read_manifest(&mut entries, &budget)?;
    judge::manifest(&manifest).map_err(refused)?;
    check_name(&manifest.record)?;
    let mut header = None;
    for file in &manifest.files {
        let path = place(draft, &file.name);
        unpack_one(&mut entries, &budget, file, &path)?;
        if file.name == STATE {
            header = Some(read_state(&draft.snapshot(), &manifest)?);
        }
    }
    budget.set(SLACK);
    if entries.next().is_some() {
        return Err(refused("there is more in it than it tells of".into()));
    }
    // The end of a compressed file has its checksum.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(|error| unreadable(&error))?;
    let header = header.ok_or_else(|| refused("it has no state".into()))?;
    for file in &manifest.files {
        check(&place(draft, &file.name), file, &header)?;
    }
    Ok((manifest, header))
}

/// Exports are compressed; a tar that somebody has decompressed is as good.
fn decompressed<'a>(mut input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut first = Vec::new();
    input.by_ref().take(ZSTD.len() as u64).read_to_end(&mut first)?;
    let is_compressed = first == ZSTD;
    let whole = Cursor::new(first).chain(input);
    if is_compressed { Ok(Box::new(zstd::Decoder::new(whole)?.single_frame())) } else { Ok(Box::new(whole)) }
}

fn place(draft: &Draft, name: &str) -> PathBuf {
    match name {
        STATE | MEMORY | BASE => draft.snapshot().join(name),
        _ => draft.path().join(name),
    }
}

fn read_manifest<R: Read>(entries: &mut Entries<'_, R>, budget: &Budget) -> Result<Manifest> {
    budget.set(MAX_MANIFEST_BYTES + SLACK);
    let no_export = || refused("it is no snapshot that flyrun has exported".into());
    let entry = entries.next().ok_or_else(no_export)?;
    let entry = entry.map_err(|error| unreadable(&error))?;
    let is_manifest = entry.path_bytes().as_ref() == MANIFEST.as_bytes()
        && entry.header().entry_type() == EntryType::Regular
        && entry.size() <= MAX_MANIFEST_BYTES;
    if !is_manifest {
        return Err(no_export());
    }
    let mut text = Vec::new();
    entry.take(MAX_MANIFEST_BYTES).read_to_end(&mut text).map_err(|error| unreadable(&error))?;
    // A newer one need not be readable but for its version.
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    match serde_json::from_slice(&text) {
        Ok(manifest) => Ok(manifest),
        Err(error) => match serde_json::from_slice::<Versioned>(&text) {
            Ok(Versioned { version }) if version > super::VERSION => Err(refused(format!(
                "it has version {version}, and those up to {} are known here",
                super::VERSION
            ))),
            _ => Err(refused(format!("{MANIFEST}: {error}"))),
        },
    }
}

fn unpack_one<R: Read>(
    entries: &mut Entries<'_, R>,
    budget: &Budget,
    file: &Described,
    path: &Path,
) -> Result<()> {
    budget.set(SLACK + file.bytes / BYTES_PER_HEAD);
    let entry = entries.next().ok_or_else(|| refused(format!("it ends before {}", file.name)))?;
    let mut entry = entry.map_err(|error| unreadable(&error))?;
    let is_file = matches!(entry.header().entry_type(), EntryType::Regular | EntryType::GNUSparse);
    if !is_file || entry.path_bytes().as_ref() != file.name.as_bytes() || entry.size() != file.bytes {
        return Err(refused(format!("{} is not what it tells of it", file.name)));
    }
    budget.set(SLACK + file.bytes);
    entry.unpack(path).map_err(|error| unreadable(&error))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .context(format!("cannot write {}", path.display()))
}

/// All of `state` is read, as it will be when a machine goes on from it.
fn read_state(directory: &Path, manifest: &Manifest) -> Result<Header> {
    let snapshot = Snapshot::open(directory)
        .map_err(|refusal| refused(format!("its state is {}: {refusal}", refusal.name())))?;
    judge::header(manifest, &snapshot.header).map_err(refused)?;
    if snapshot.state.memory.extents.is_some() != snapshot.header.memory.base {
        return Err(refused("its memory is not as long as its state tells".into()));
    }
    Ok(snapshot.header)
}

/// The file is what was exported, and gets the time that its guest knows it by. Synced: the disk and the root filesystem come later.
fn check(path: &Path, described: &Described, header: &Header) -> Result<()> {
    let told = || format!("cannot read {}", path.display());
    let file = File::options().read(true).write(true).open(path).context(told())?;
    let known = judge::disks(header);
    let disk = match described.name.as_str() {
        ROOTFS => known.first(),
        DISK => known.get(1),
        _ => None,
    };
    if let Some(Some(FileId { modified_ns: Some(at), .. })) = disk {
        let time = UNIX_EPOCH + Duration::from_nanos(u64::try_from(*at).unwrap_or(0));
        file.set_modified(time).context(told())?;
    }
    if file.metadata().context(told())?.len() != described.bytes
        || digest(&file).context(told())? != described.digest
    {
        return Err(refused(format!("{} is not what was exported", described.name)));
    }
    file.sync_all().context(format!("cannot write {}", path.display()))
}

/// The root filesystem that the guest knows: the image's own, if that is still the one that it was, or the one that came with the
/// snapshot. That is known by its content and time alone, as an image that was unpacked anew here has another under its chain id.
fn take_rootfs(
    draft: &Draft,
    store: &Store,
    manifest: &Manifest,
    header: &Header,
) -> Result<(Digest, RootfsLease)> {
    let described = &manifest.rootfs;
    let known = judge::disks(header).first().copied().flatten().cloned();
    let at = known.as_ref().and_then(|known| known.modified_ns).unwrap_or(0);
    let own = manifest.record.machine.chain_id.parse().context("the image's chain id is none")?;
    let arrived = Digest::of(format!("{} {} {at}", described.digest, described.bytes).as_bytes());
    let path = draft.path().join(ROOTFS);
    for id in [own, arrived] {
        let Some(lease) = store.hold_rootfs(&id).map_err(|error| from_images(&error))? else { continue };
        let is_same = FileId::of(lease.path()).ok() == known
            && digest(lease.file()).is_ok_and(|digest| digest == described.digest);
        if is_same {
            if path.exists() {
                fs::remove_file(&path).context(format!("cannot remove {}", path.display()))?;
            }
            return Ok((id, lease));
        }
    }
    if !path.exists() {
        let image = &manifest.record.machine.image;
        return Err(refused(format!(
            "it was exported without its root filesystem, and this host has not that one ({image})"
        )));
    }
    let lease = store.adopt_rootfs(&arrived, &path).map_err(|error| from_images(&error))?;
    Ok((arrived, lease))
}

fn refused(why: String) -> Error {
    Error::new(format!("cannot import the snapshot: {}", crate::session::printable(&why)))
        .advice("Export it again with `flyrun snapshot export`.")
}

/// What is read is no archive, or no more, or the disk it is written to is full.
fn unreadable(error: &io::Error) -> Error {
    if error.kind() == io::ErrorKind::StorageFull {
        return Error::caused("cannot import the snapshot", error)
            .advice("Make room, for instance with `flyrun prune`.");
    }
    let told = Error::caused("it is cut short or damaged", error).to_string();
    refused(told)
}
