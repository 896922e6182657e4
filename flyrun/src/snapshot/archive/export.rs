//! Writes a snapshot as one file.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use images::Store;
use tar::{Builder, Header, HeaderMode};
use vmm::snapshot::files::open_to_read;
use vmm::snapshot::{BASE, MEMORY, STATE};

use super::{Described, MANIFEST, Manifest, NAMES, ROOTFS, VERSION, digest::digest};
use crate::error::{Context, Error, Result, from_images};
use crate::machine::SNAPSHOT;
use crate::snapshot::Record;

/// Quick, and it takes most of what can be had of memory.
const LEVEL: i32 = 1;

/// Writes the snapshot in a directory to `output`.
///
/// # Errors
/// It needs what is not in it, its root filesystem is gone, or a file cannot be read or written.
pub fn export(
    record: &Record,
    directory: &Path,
    store: &Store,
    rootfs: bool,
    output: impl Write,
) -> Result<()> {
    check(record)?;
    let chain_id = record.machine.chain_id.parse().context("the snapshot's record is damaged")?;
    let lease = store
        .hold_rootfs(&chain_id)
        .map_err(|error| from_images(&error))?
        .ok_or_else(|| Error::new(format!("the root filesystem of snapshot '{}' is gone", record.name)))?;
    let mut parts = parts(directory)?;
    let whole = Part::open(ROOTFS, lease.path().to_path_buf())?;
    let described = whole.described.clone();
    parts.extend(rootfs.then_some(whole));
    let manifest = Manifest {
        version: VERSION,
        record: record.clone(),
        files: parts.iter().map(|part| part.described.clone()).collect(),
        rootfs: described,
    };
    write(&manifest, &mut parts, output).map_err(|error| Error::caused("cannot write the snapshot", &error))
}

/// A file that is exported.
struct Part {
    described: Described,
    file: File,
}

impl Part {
    fn open(name: &str, path: PathBuf) -> Result<Part> {
        let told = || format!("cannot read {}", path.display());
        // The names were a machine's, which may have been in its guest's hands when it was killed.
        let file = open_to_read(&path).context(told())?;
        let bytes = file.metadata().context(told())?.len();
        let described = Described { name: name.to_string(), bytes, digest: digest(&file).context(told())? };
        Ok(Part { described, file })
    }
}

/// All but the root filesystem, in the archive's order. All are opened before anything is read of them: the snapshot may be removed
/// meanwhile.
fn parts(directory: &Path) -> Result<Vec<Part>> {
    let path = |name: &str| match name {
        STATE | MEMORY | BASE => directory.join(SNAPSHOT).join(name),
        _ => directory.join(name),
    };
    let is_there = |name: &&str| matches!(*name, STATE | MEMORY) || path(name).exists();
    NAMES
        .into_iter()
        .filter(|name| *name != ROOTFS)
        .filter(is_there)
        .map(|name| Part::open(name, path(name)))
        .collect()
}

/// What another host cannot have.
fn check(record: &Record) -> Result<()> {
    let config = &record.machine.config;
    if let Some(used) = config.volumes.first() {
        return Err(Error::new(format!(
            "snapshot '{}' reads volume '{}', which is not in it and would be missed",
            record.name, used.name
        ))
        .advice("Export snapshots of machines that have all they need on their own disks."));
    }
    if let Some(app) = &config.secrets {
        return Err(Error::new(format!(
            "snapshot '{}' holds the secrets of app '{app}' in its memory, and an export is not encrypted",
            record.name
        ))
        .advice("Export snapshots of machines that were made without --secrets."));
    }
    if let Some(kernel) = &config.kernel {
        return Err(Error::new(format!(
            "snapshot '{}' runs a kernel of its own, {}, which is not in it",
            record.name,
            kernel.display()
        ))
        .advice("Export snapshots of machines that run flyrun's kernel."));
    }
    Ok(())
}

fn write(manifest: &Manifest, parts: &mut [Part], output: impl Write) -> io::Result<()> {
    let mut compressed = zstd::Encoder::new(output, LEVEL)?;
    compressed.include_checksum(true)?;
    let mut tar = Builder::new(compressed);
    tar.mode(HeaderMode::Deterministic);
    let text = serde_json::to_vec_pretty(manifest)?;
    let mut header = Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o600);
    tar.append_data(&mut header, MANIFEST, text.as_slice())?;
    for part in parts {
        tar.append_file(&part.described.name, &mut part.file)?;
    }
    tar.into_inner()?.finish()?.flush()
}
