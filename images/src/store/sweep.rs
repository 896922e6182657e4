//! Taking away: an image by name, and everything that nobody needs.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    thread,
    time::Duration,
};

use serde::Serialize;

use super::{Record, Store, files, rootfs::Removal};
use crate::{Digest, Error, Reference, Result};

/// Fewest hexadecimal digits that name an image.
const MIN_PREFIX: usize = 6;

/// What [`Store::prune`] shall take away beyond the leftovers of dead processes and what no image refers to.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Also remove every image that no machine uses.
    pub all: bool,
    /// Root filesystems to keep although no image refers to them: those of stopped machines.
    pub keep: Vec<Digest>,
}

/// What [`Store::prune`] took away. The field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Canonical names of removed images.
    pub images: Vec<String>,
    /// Digests of removed blobs.
    pub blobs: Vec<Digest>,
    /// Chain ids of removed root filesystems.
    pub rootfs: Vec<Digest>,
    /// How many leftovers of dead processes were removed.
    pub leftovers: usize,
    /// Bytes given back to the disk.
    pub freed_bytes: u64,
    /// Whether a pull under way kept unreferenced blobs from being removed.
    pub busy: bool,
}

/// What [`Store::remove`] took away. The field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RemoveReport {
    /// Canonical names of removed images.
    pub images: Vec<String>,
    /// Digests of removed blobs.
    pub blobs: Vec<Digest>,
    /// Chain ids of removed root filesystems.
    pub rootfs: Vec<Digest>,
    /// Bytes given back to the disk.
    pub freed_bytes: u64,
    /// Whether a pull under way kept blobs from being removed; [`Store::prune`] will.
    pub busy: bool,
}

impl Store {
    /// Removes one image, by any form of its name or the first digits (6 or more, `sha256:` is optional) of its
    /// manifest's or configuration's digest. Its blobs and root filesystem go with it unless another image, a machine
    /// or `keep` (chain ids of stopped machines) needs them.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::Ambiguous`], [`Error::InUse`], and what goes wrong with files.
    pub fn remove(&self, name: &str, keep: &[Digest]) -> Result<RemoveReport> {
        let record = self.look_up(name)?;
        let mut report = RemoveReport::default();
        let shared = self
            .records()?
            .iter()
            .any(|(_, other)| other.chain_id == record.chain_id && other.name != record.name);
        if !shared {
            if keep.contains(&record.chain_id) {
                return Err(Error::InUse { name: record.name });
            }
            match self.remove_rootfs_patiently(&record.chain_id)? {
                Removal::Held => return Err(Error::InUse { name: record.name }),
                Removal::Absent => {}
                Removal::Removed { bytes } => {
                    report.rootfs.push(record.chain_id);
                    report.freed_bytes += bytes;
                }
            }
        }
        self.remove_record(&record)?;
        report.images.push(record.name.clone());
        match self.lock_for_removing()? {
            None => report.busy = true,
            Some(_lock) => {
                let needed = self.needed_blobs()?;
                let orphans = record.blobs().filter(|digest| !needed.contains(digest)).collect();
                report.freed_bytes += self.remove_blobs(orphans, &mut report.blobs)?;
            }
        }
        Ok(report)
    }

    /// Removes what nobody needs.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn prune(&self, options: &PruneOptions) -> Result<PruneReport> {
        let mut report = PruneReport::default();
        self.remove_leftovers(&mut report)?;
        if options.all {
            self.remove_unused_images(options, &mut report)?;
        }
        let records = self.records()?;
        let chains: BTreeSet<Digest> = records.iter().map(|(_, record)| record.chain_id).collect();
        for (_, name) in files::list(&self.root.join("rootfs"))? {
            let Some(chain_id) = name.strip_suffix(".ext4").and_then(Digest::from_hex) else { continue };
            if chains.contains(&chain_id) || options.keep.contains(&chain_id) {
                continue;
            }
            if let Removal::Removed { bytes } = self.remove_rootfs_patiently(&chain_id)? {
                report.rootfs.push(chain_id);
                report.freed_bytes += bytes;
            }
        }
        match self.lock_for_removing()? {
            None => report.busy = true,
            Some(_lock) => {
                let needed = self.needed_blobs()?;
                let blobs = files::list(&self.root.join("blobs/sha256"))?;
                let blobs = blobs.iter().filter_map(|(_, name)| Digest::from_hex(name));
                let orphans = blobs.filter(|digest| !needed.contains(digest)).collect();
                report.freed_bytes += self.remove_blobs(orphans, &mut report.blobs)?;
            }
        }
        Ok(report)
    }

    /// The record that a name or the first digits of a digest stand for.
    fn look_up(&self, name: &str) -> Result<Record> {
        let reference = Reference::parse(name);
        if let Ok(reference) = &reference
            && let Some(record) = self.read_record(&reference.canonical_name())?
        {
            return Ok(record);
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        let is_prefix = prefix.len() >= MIN_PREFIX && prefix.bytes().all(|byte| byte.is_ascii_hexdigit());
        let matches = |record: &Record| {
            // An archive may be gone, and then its path does not parse any more.
            record.name == name
                || is_prefix
                    && [record.manifest_digest, record.config_digest]
                        .iter()
                        .any(|d| d.hex().starts_with(prefix))
        };
        let mut found: Vec<Record> =
            self.records()?.into_iter().map(|(_, record)| record).filter(matches).collect();
        match (found.pop(), found.is_empty()) {
            (Some(record), true) => Ok(record),
            (Some(record), false) => {
                found.push(record);
                let names = found.into_iter().map(|record| record.name).collect();
                Err(Error::Ambiguous { prefix: name.into(), names })
            }
            (None, _) => {
                let name = reference.map_or_else(|_| name.into(), |reference| reference.canonical_name());
                Err(Error::NoSuchImage { name })
            }
        }
    }

    fn remove_record(&self, record: &Record) -> Result<()> {
        let path = self.record_path(&record.name);
        files::remove(&path)?;
        files::sync_parent(&path)
    }

    /// As [`Store::remove_rootfs`]. Another process that lists images holds a lock for a moment: that is not a machine.
    fn remove_rootfs_patiently(&self, chain_id: &Digest) -> Result<Removal> {
        for _ in 0..3 {
            match self.remove_rootfs(chain_id)? {
                Removal::Held => thread::sleep(Duration::from_millis(5)),
                done => return Ok(done),
            }
        }
        self.remove_rootfs(chain_id)
    }

    fn remove_unused_images(&self, options: &PruneOptions, report: &mut PruneReport) -> Result<()> {
        for (_, record) in self.records()? {
            if options.keep.contains(&record.chain_id) {
                continue;
            }
            match self.remove_rootfs_patiently(&record.chain_id)? {
                Removal::Held => continue,
                Removal::Absent => {}
                Removal::Removed { bytes } => {
                    report.rootfs.push(record.chain_id);
                    report.freed_bytes += bytes;
                }
            }
            self.remove_record(&record)?;
            report.images.push(record.name);
        }
        Ok(())
    }

    fn needed_blobs(&self) -> Result<BTreeSet<Digest>> {
        Ok(self.records()?.iter().flat_map(|(_, record)| record.blobs().collect::<Vec<_>>()).collect())
    }

    fn remove_blobs(&self, orphans: BTreeSet<Digest>, removed: &mut Vec<Digest>) -> Result<u64> {
        let mut freed = 0;
        for digest in orphans {
            let path = self.blob_path(&digest);
            let bytes = fs::metadata(&path).map_or(0, |metadata| files::allocated_bytes(&metadata));
            if files::remove(&path)? {
                removed.push(digest);
                freed += bytes;
            }
        }
        Ok(freed)
    }

    /// Drafts whose owner has died have no lock; records that do not parse belong to no image.
    fn remove_leftovers(&self, report: &mut PruneReport) -> Result<()> {
        for (path, _) in files::list(&self.root.join("tmp"))? {
            remove_if_dead(&path, report)?;
        }
        let good: BTreeSet<_> = self.records()?.into_iter().map(|(path, _)| path).collect();
        for (path, _) in files::list(&self.root.join("refs"))? {
            if !good.contains(&path) && fs::read(&path).is_ok_and(|bytes| super::record::is_damaged(&bytes)) {
                report.leftovers += usize::from(files::remove(&path)?);
            }
        }
        Ok(())
    }
}

fn remove_if_dead(path: &Path, report: &mut PruneReport) -> Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    if file.try_lock().is_err() || !files::is_still_at(&file, path)? {
        return Ok(());
    }
    let bytes = file.metadata().map_or(0, |metadata| files::allocated_bytes(&metadata));
    if files::remove(path)? {
        report.leftovers += 1;
        report.freed_bytes += bytes;
    }
    Ok(())
}
