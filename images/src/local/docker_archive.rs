//! What `docker save` writes (docker's image spec v1.2, and the layout of version 25 on that it also reads).

use std::{collections::BTreeSet, io::Read};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Files, Import, Imported, TarIndex, layout::same_image};
use crate::{
    Compression, Digest, Error, Event, Result,
    oci::{self, Descriptor, Manifest},
};

/// The file that names an archive's images.
pub(super) const MANIFEST: &str = "manifest.json";
/// Most images in one archive.
const MAX_IMAGES: usize = 1024;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// A layer of the archive, hashed.
struct SavedLayer<'a> {
    name: &'a str,
    digest: Digest,
    size: u64,
    compression: Compression,
}

/// Imports the image of this tag, or the only one.
pub(super) fn import(import: &Import<'_>, archive: &TarIndex, tag: Option<&str>) -> Result<Imported> {
    let malformed =
        |problem: String| Error::Malformed { what: archive.location().display().to_string(), problem };
    let bytes = archive.read(MANIFEST, oci::MAX_MANIFEST_BYTES)?.ok_or_else(|| Error::Unsupported {
        what: archive.location().display().to_string(),
        problem: "is not a docker archive: it has no manifest.json".into(),
    })?;
    let images: Vec<Saved> = serde_json::from_slice(&bytes)
        .map_err(|error| malformed(format!("its {MANIFEST} does not parse: {error}")))?;
    if images.len() > MAX_IMAGES {
        let what = format!("{} (number of images)", archive.location().display());
        return Err(Error::TooLarge { what, limit: MAX_IMAGES as u64, got: images.len() as u64 });
    }
    let saved = choose(&images, tag, archive)?;
    let config = archive
        .read(&saved.config, oci::MAX_CONFIG_BYTES)?
        .ok_or_else(|| malformed(format!("its configuration {:?} is missing", oci::clip(&saved.config))))?;
    let configuration = oci::parse_config(&config, import.name)?;
    let names = saved.layers.as_deref().unwrap_or_default();
    if names.len() > oci::MAX_LAYERS {
        let what = format!("{} (number of layers)", import.name);
        return Err(Error::TooLarge { what, limit: oci::MAX_LAYERS as u64, got: names.len() as u64 });
    }
    let layers = names.iter().map(|name| hash_layer(archive, name)).collect::<Result<Vec<_>>>()?;

    let config_digest = Digest::of(&config);
    let (manifest, manifest_bytes) = write_manifest(config_digest, config.len() as u64, &layers)?;
    let manifest_digest = Digest::of(&manifest_bytes);
    let image =
        oci::assemble(import.store, import.name, manifest_digest, &manifest, configuration, import.platform)?;
    import.progress.event(Event::Resolved {
        manifest_digest,
        layers: layers.len(),
        bytes: image.layer_bytes(),
    });
    let mut seen = BTreeSet::new();
    for layer in layers.iter().filter(|layer| seen.insert(layer.digest)) {
        copy_layer(import, archive, layer)?;
    }
    import.store.put_blob(&config_digest, &config)?;
    import.store.put_blob(&manifest_digest, &manifest_bytes)?;
    Ok(Imported { image, other_blobs: Vec::new() })
}

fn choose<'a>(images: &'a [Saved], tag: Option<&str>, archive: &TarIndex) -> Result<&'a Saved> {
    let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
    let path = archive.location();
    let available = || images.iter().flat_map(tags).map(|tag| oci::clip(&tag)).take(50).collect();
    match (images, tag) {
        ([only], None) => Ok(only),
        ([], None) => {
            Err(Error::NoSuchTag { path: path.into(), wanted: "at all".into(), available: Vec::new() })
        }
        (_, None) => Err(Error::TagNeeded { path: path.into(), available: available() }),
        (images, Some(wanted)) => {
            images.iter().find(|image| tags(image).iter().any(|tag| same_image(tag, wanted))).ok_or_else(
                || Error::NoSuchTag { path: path.into(), wanted: wanted.into(), available: available() },
            )
        }
    }
}

/// An archive says no digests of its layers' files, so they are read twice: once to name them, once to copy them.
fn hash_layer<'a>(archive: &TarIndex, name: &'a str) -> Result<SavedLayer<'a>> {
    let (mut reader, size) = archive.file(name).ok_or_else(|| missing(archive, name))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut compression = None;
    loop {
        let count = reader.read(&mut buffer).map_err(|error| Error::io("read", archive.location(), error))?;
        let chunk = buffer.get(..count).unwrap_or_default();
        compression.get_or_insert_with(|| compression_of(chunk));
        if chunk.is_empty() {
            break;
        }
        hasher.update(chunk);
    }
    let digest = Digest::from_bytes(hasher.finalize().into());
    Ok(SavedLayer { name, digest, size, compression: compression.unwrap_or(Compression::None) })
}

/// Archives of a docker with containerd's store keep layers as they were pulled; nothing beside them says how.
fn compression_of(start: &[u8]) -> Compression {
    match start {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// The store needs a manifest, the archive has none: the same image always gets the same one.
fn write_manifest(
    config: Digest,
    config_size: u64,
    layers: &[SavedLayer<'_>],
) -> Result<(Manifest, Vec<u8>)> {
    let config = Descriptor::new("application/vnd.oci.image.config.v1+json", config, config_size);
    let descriptor = |layer: &SavedLayer<'_>| {
        Descriptor::new(oci::layer_media_type(layer.compression), layer.digest, layer.size)
    };
    let manifest = Manifest::new(config, layers.iter().map(descriptor).collect());
    let bytes = serde_json::to_vec(&manifest).map_err(|error| Error::Malformed {
        what: "the manifest to be".into(),
        problem: error.to_string(),
    })?;
    Ok((manifest, bytes))
}

fn copy_layer(import: &Import<'_>, archive: &TarIndex, layer: &SavedLayer<'_>) -> Result<()> {
    let &SavedLayer { name, digest, size, .. } = layer;
    if import.store.has_blob(&digest, size) {
        import.progress.event(Event::LayerExists { digest, size });
        return Ok(());
    }
    let (mut reader, _) = archive.file(name).ok_or_else(|| missing(archive, name))?;
    import.progress.event(Event::LayerStarted { digest, size, resumed_from: 0 });
    let mut on_bytes = |bytes| import.progress.event(Event::LayerProgress { digest, bytes });
    import.store.copy_blob(&digest, size, &mut reader, archive.location(), &mut on_bytes)?;
    import.progress.event(Event::LayerDone { digest, size });
    Ok(())
}

fn missing(archive: &TarIndex, name: &str) -> Error {
    let problem = format!("its layer {:?} is missing", oci::clip(name));
    Error::Malformed { what: archive.location().display().to_string(), problem }
}
