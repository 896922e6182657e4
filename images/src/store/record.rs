//! Which image a name stands for: one small JSON file per name, enough to start a machine from.

use std::{fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::{Compression, Digest, Error, Image, ImageConfig, Layer, Result};

/// The version of [`Record`]. A record of another version is not read, and its image is pulled again.
const VERSION: u32 = 1;

/// What `refs/<sha256 of the name>.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// Canonical name.
    pub name: String,
    /// State of the local source when the image was read from it; a changed source makes the record stale.
    pub stamp: Option<String>,
    pub pulled_unix_s: u64,
    pub manifest_digest: Digest,
    pub config_digest: Digest,
    pub chain_id: Digest,
    /// Blobs beyond manifest, configuration and layers: the indexes on the way to the manifest.
    pub other_blobs: Vec<Digest>,
    pub config: ImageConfig,
    pub layers: Vec<LayerRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub digest: Digest,
    pub size: u64,
    pub compression: Compression,
    pub diff_id: Digest,
}

impl Record {
    pub(crate) fn new(
        image: &Image,
        other_blobs: Vec<Digest>,
        stamp: Option<String>,
        pulled_unix_s: u64,
    ) -> Self {
        let layer = |layer: &Layer| LayerRecord {
            digest: layer.digest,
            size: layer.size,
            compression: layer.compression,
            diff_id: layer.diff_id,
        };
        Self {
            version: VERSION,
            name: image.name.clone(),
            stamp,
            pulled_unix_s,
            manifest_digest: image.manifest_digest,
            config_digest: image.config_digest,
            chain_id: image.chain_id,
            other_blobs,
            config: image.config.clone(),
            layers: image.layers.iter().map(layer).collect(),
        }
    }

    pub(crate) fn into_image(self, store: &Store) -> Image {
        let layer = |layer: LayerRecord| Layer {
            path: store.blob_path(&layer.digest),
            digest: layer.digest,
            size: layer.size,
            compression: layer.compression,
            diff_id: layer.diff_id,
        };
        Image {
            name: self.name,
            manifest_digest: self.manifest_digest,
            config_digest: self.config_digest,
            chain_id: self.chain_id,
            config: self.config,
            layers: self.layers.into_iter().map(layer).collect(),
        }
    }

    /// Every blob that this image needs.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = Digest> + '_ {
        let documents = [self.manifest_digest, self.config_digest];
        documents
            .into_iter()
            .chain(self.other_blobs.iter().copied())
            .chain(self.layers.iter().map(|l| l.digest))
    }
}

impl Store {
    pub(crate) fn record_path(&self, name: &str) -> PathBuf {
        self.root.join("refs").join(format!("{}.json", Digest::of(name.as_bytes()).hex()))
    }

    /// The record of a name. A damaged one, or another version's, is none: the next pull writes it anew.
    pub(crate) fn read_record(&self, name: &str) -> Result<Option<Record>> {
        let path = self.record_path(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(parse(&bytes).filter(|record| record.name == name)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path, error)),
        }
    }

    pub(crate) fn write_record(&self, record: &Record) -> Result<()> {
        let path = self.record_path(&record.name);
        let draft = self.root.join("tmp").join(format!("ref-{}", Digest::of(record.name.as_bytes()).hex()));
        let Some(file) = files::open_draft(&draft, &|| false, &mut || {})? else { return Ok(()) };
        let fail = |error| Error::io("write", &draft, error);
        let bytes = serde_json::to_vec(record).map_err(|error| fail(error.into()))?;
        file.set_len(0).and_then(|()| io::Write::write_all(&mut &file, &bytes)).map_err(fail)?;
        files::publish(&file, &draft, &path)
    }

    /// All records with their files, by name; damaged ones are left out.
    pub(crate) fn records(&self) -> Result<Vec<(PathBuf, Record)>> {
        let mut records = Vec::new();
        for (path, _) in files::list(&self.root.join("refs"))? {
            match fs::read(&path) {
                Ok(bytes) => records.extend(parse(&bytes).map(|record| (path, record))),
                // Removed by another process since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("read", path, error)),
            }
        }
        records.sort_by(|(_, left), (_, right)| left.name.cmp(&right.name));
        Ok(records)
    }
}

fn parse(bytes: &[u8]) -> Option<Record> {
    serde_json::from_slice::<Record>(bytes).ok().filter(|record| record.version == VERSION)
}

/// Whether a record can be read by no version of flyrun: it is no JSON with a version in it.
pub(crate) fn is_damaged(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    match serde_json::from_slice::<Versioned>(bytes) {
        Ok(Versioned { version }) => version == VERSION && parse(bytes).is_none(),
        Err(_) => true,
    }
}

/// A record that is read is the same when it is written and read again, and is not damaged.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_record(bytes: &[u8]) {
    let Some(record) = parse(bytes) else {
        let _ = is_damaged(bytes);
        return;
    };
    assert!(!is_damaged(bytes));
    let written = serde_json::to_vec(&record).unwrap_or_default();
    assert_eq!(parse(&written).map(|again| format!("{again:?}")), Some(format!("{record:?}")));
    let image = record.into_image(&Store::open("/nowhere"));
    assert!(image.layers.iter().all(|layer| layer.path.starts_with("/nowhere/blobs/sha256")));
}
