//! OCI image layouts (OCI image spec, image-layout.md), in a directory or in a tar.

use std::{
    collections::BTreeSet,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Files, Import, Imported};
use crate::{
    Digest, Error, Event, Reference, Result, Source,
    oci::{self, Descriptor, Document, Index, Manifest},
};

/// The file that names a layout's images.
pub(super) const INDEX: &str = "index.json";
/// Most indexes on the way from the layout's own to a manifest.
const MAX_DEPTH: usize = 4;

/// A layout's directory.
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.into() }
    }
}

impl Files for Directory {
    /// `name` is one of ours or made of a digest, never foreign text.
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        let path = self.path.join(name);
        match super::open_regular(&path) {
            Ok(file) => {
                let size = file.metadata().map_err(|error| Error::io("stat", path, error))?.len();
                Ok(Some((Box::new(file), size)))
            }
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Imports the image of this tag, or the only one.
pub(super) fn import(import: &Import<'_>, files: &dyn Files, tag: Option<&str>) -> Result<Imported> {
    let index = files.read(INDEX, oci::MAX_MANIFEST_BYTES)?.ok_or_else(|| Error::Unsupported {
        what: files.path().display().to_string(),
        problem: "is not an OCI image layout: it has no index.json".into(),
    })?;
    let Document::Index(index) =
        oci::parse_document(&index, &format!("{}: {INDEX}", files.path().display()))?
    else {
        let problem = "its index.json is not an index".into();
        return Err(Error::Malformed { what: files.path().display().to_string(), problem });
    };
    let chosen = choose(&index, tag, files.path())?;
    let mut other_blobs = Vec::new();
    let (manifest_digest, manifest, bytes) = descend(import, files, chosen, &mut other_blobs)?;
    let config_digest = manifest.config.digest()?;
    let config = blob(files, config_digest, oci::MAX_CONFIG_BYTES, import.name)?;
    let configuration = oci::parse_config(&config, import.name)?;
    let image =
        oci::assemble(import.store, import.name, manifest_digest, &manifest, configuration, import.platform)?;
    let (layers, bytes_total) = (image.layers.len(), image.layer_bytes());
    import.progress.event(Event::Resolved { manifest_digest, layers, bytes: bytes_total });
    let mut seen = BTreeSet::new();
    for layer in image.layers.iter().filter(|layer| seen.insert(layer.digest)) {
        copy_layer(import, files, layer.digest, layer.size)?;
    }
    import.store.put_blob(&config_digest, &config)?;
    import.store.put_blob(&manifest_digest, &bytes)?;
    Ok(Imported { image, other_blobs })
}

/// The entry of the layout's index that the user means.
fn choose(index: &Index, tag: Option<&str>, path: &Path) -> Result<Vec<Descriptor>> {
    let images: Vec<&Descriptor> = index.manifests.iter().filter(|entry| entry.is_manifest()).collect();
    let names: BTreeSet<String> =
        images.iter().filter_map(|entry| name_of(entry)).map(|name| oci::clip(&name)).collect();
    let available = || names.iter().cloned().collect::<Vec<_>>();
    let chosen: Vec<Descriptor> = match tag {
        Some(tag) => images.into_iter().filter(|entry| is_called(entry, tag)).cloned().collect(),
        // Several entries of one name, or without any, differ in their platform.
        None if names.len() > 1 => {
            return Err(Error::TagNeeded { path: path.into(), available: available() });
        }
        None => images.into_iter().cloned().collect(),
    };
    if chosen.is_empty() {
        let wanted = tag.unwrap_or("at all").into();
        return Err(Error::NoSuchTag { path: path.into(), wanted, available: available() });
    }
    Ok(chosen)
}

fn name_of(entry: &Descriptor) -> Option<String> {
    let full = entry.annotations.get("io.containerd.image.name");
    full.or_else(|| entry.annotations.get("org.opencontainers.image.ref.name")).cloned()
}

fn is_called(entry: &Descriptor, tag: &str) -> bool {
    let short = entry.annotations.get("org.opencontainers.image.ref.name").is_some_and(|name| name == tag);
    short || name_of(entry).is_some_and(|name| same_image(&name, tag))
}

/// Whether two names mean the same image: `busybox` is `docker.io/library/busybox:latest`.
pub(super) fn same_image(left: &str, right: &str) -> bool {
    let registry =
        |text| Reference::parse(text).ok().filter(|name| matches!(name.source, Source::Registry(_)));
    left == right || registry(left).is_some_and(|left| registry(right) == Some(left))
}

/// Follows indexes down to the manifest of the wanted platform.
fn descend(
    import: &Import<'_>,
    files: &dyn Files,
    entries: Vec<Descriptor>,
    other_blobs: &mut Vec<Digest>,
) -> Result<(Digest, Manifest, Vec<u8>)> {
    let mut index = Index { manifests: entries };
    for _ in 0..MAX_DEPTH {
        let digest = index.select(import.platform, import.name)?.digest()?;
        let bytes = blob(files, digest, oci::MAX_MANIFEST_BYTES, import.name)?;
        match oci::parse_document(&bytes, import.name)? {
            Document::Manifest(manifest) => return Ok((digest, manifest, bytes)),
            Document::Index(below) => {
                import.store.put_blob(&digest, &bytes)?;
                other_blobs.push(digest);
                index = below;
            }
        }
    }
    Err(Error::Malformed { what: import.name.into(), problem: "its indexes are nested too deeply".into() })
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// A document among the blobs, with its digest checked.
fn blob(files: &dyn Files, digest: Digest, limit: u64, image: &str) -> Result<Vec<u8>> {
    let bytes = files.read(&blob_name(digest), limit)?.ok_or_else(|| missing(files, digest, image))?;
    let got = Digest::of(&bytes);
    if got == digest {
        return Ok(bytes);
    }
    let what = format!("the blob {} in {}", digest.short(), files.path().display());
    Err(Error::DigestMismatch { what, wanted: digest, got })
}

fn copy_layer(import: &Import<'_>, files: &dyn Files, digest: Digest, size: u64) -> Result<()> {
    if import.store.has_blob(&digest, size) {
        import.progress.event(Event::LayerExists { digest, size });
        return Ok(());
    }
    let (mut reader, got) =
        files.open(&blob_name(digest))?.ok_or_else(|| missing(files, digest, import.name))?;
    if got != size {
        let what = format!("the layer {digest} in {}", files.path().display());
        return Err(Error::SizeMismatch { what, wanted: size, got });
    }
    import.progress.event(Event::LayerStarted { digest, size, resumed_from: 0 });
    let mut on_bytes = |bytes| import.progress.event(Event::LayerProgress { digest, bytes });
    import.store.copy_blob(&digest, size, &mut reader, files.path(), &mut on_bytes)?;
    import.progress.event(Event::LayerDone { digest, size });
    Ok(())
}

fn missing(files: &dyn Files, digest: Digest, image: &str) -> Error {
    let problem = format!("the blob {digest} is not in {}", files.path().display());
    Error::Malformed { what: image.into(), problem }
}
