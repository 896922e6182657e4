//! Manifests, indexes and configurations: parsed with bounds, and refused by name where flyrun cannot use them.
//!
//! The types are ours, not a crate's: docker's additions (health check), `null` for empty lists and the limits below are
//! needed, a tenth of the formats' other fields is not.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Compression, Digest, Error, Healthcheck, Image, ImageConfig, Layer, Platform, Result, Store};

/// Most bytes of a manifest or index (what registries themselves accept).
pub(crate) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Most bytes of a configuration.
pub(crate) const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Most layers of an image. docker stops at 127.
pub(crate) const MAX_LAYERS: usize = 512;
/// Most entries of an index.
const MAX_INDEX_ENTRIES: usize = 1024;
/// Most bytes of one layer blob.
const MAX_LAYER_BYTES: u64 = 64 << 30;
/// Most entries of a list or map in a configuration.
const MAX_CONFIG_ENTRIES: usize = 4096;

/// The media types that a manifest is asked for by, best first.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// A pointer to a blob (OCI image spec, descriptor.md).
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default, deserialize_with = "null_is_default")]
    pub media_type: String,
    digest: String,
    pub size: u64,
    #[serde(default, skip_serializing)]
    pub platform: Option<RawPlatform>,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing)]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct RawPlatform {
    #[serde(default, deserialize_with = "null_is_default")]
    os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

/// A document that a name may stand for.
#[derive(Debug)]
pub(crate) enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several, for several platforms.
    Index(Index),
}

/// An image manifest (OCI image spec, manifest.md; docker's schema 2 is the same for us).
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    schema_version: u32,
    media_type: String,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// An image index or docker's manifest list.
#[derive(Debug)]
pub(crate) struct Index {
    pub manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default, rename = "fsLayers")]
    fs_layers: Option<serde_json::Value>,
}

impl Descriptor {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest: digest.to_string(),
            size,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }

    pub(crate) fn digest(&self) -> Result<Digest> {
        self.digest.parse().map_err(|error| Error::Digest { what: "a descriptor of the image".into(), error })
    }

    /// Whether it points to a manifest or index and not to something else, as an index may.
    pub(crate) fn is_manifest(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "" | "application/vnd.oci.image.manifest.v1+json"
                | "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.v2+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }

    /// How the layer is compressed, by its media type.
    fn compression(&self, what: &str) -> Result<Compression> {
        let unsupported = |problem: String| Error::Unsupported { what: what.into(), problem };
        let media_type = self.media_type.as_str();
        if media_type.contains("foreign") || media_type.contains("nondistributable") {
            let problem = format!(
                "has a layer of type {media_type}, which is kept outside of registries: flyrun fetches no layers from foreign addresses"
            );
            return Err(unsupported(problem));
        }
        if media_type.ends_with("+encrypted") {
            return Err(unsupported(format!(
                "has an encrypted layer ({media_type}): decrypt the image first"
            )));
        }
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Ok(Compression::None)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Compression::Zstd),
            other => Err(unsupported(format!(
                "has a layer of type {:?}, which is no filesystem layer that flyrun knows (tar, tar+gzip, tar+zstd): \
                 is it a container image?",
                clip(other)
            ))),
        }
    }
}

/// The media type of a layer in the manifests that we write ourselves.
pub(crate) fn layer_media_type(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "application/vnd.oci.image.layer.v1.tar",
        Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
    }
}

impl Manifest {
    /// A manifest for an image that came without one.
    pub(crate) fn new(config: Descriptor, layers: Vec<Descriptor>) -> Self {
        let media_type = "application/vnd.oci.image.manifest.v1+json".into();
        Self { schema_version: 2, media_type, config, layers }
    }
}

/// Parses a manifest or index. `what` names it in errors.
pub(crate) fn parse_document(bytes: &[u8], what: &str) -> Result<Document> {
    check_size(what, bytes.len() as u64, MAX_MANIFEST_BYTES)?;
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| Error::Malformed {
        what: what.into(),
        problem: format!("the manifest does not parse: {error}"),
    })?;
    let media_type = raw.media_type.unwrap_or_default();
    if raw.schema_version == 1
        || raw.fs_layers.is_some()
        || media_type.contains("manifest.v1+") && media_type.contains("docker")
    {
        let problem = "has a manifest of docker's schema 1, which registries have given up: push the image again with a current tool".into();
        return Err(Error::Unsupported { what: what.into(), problem });
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => {
            check_count(what, "entries of an index", manifests.len(), MAX_INDEX_ENTRIES)?;
            Ok(Document::Index(Index { manifests }))
        }
        (None, Some(config), Some(layers)) => {
            check_count(what, "layers", layers.len(), MAX_LAYERS)?;
            Ok(Document::Manifest(Manifest { schema_version: 2, media_type, config, layers }))
        }
        _ => Err(Error::Malformed {
            what: what.into(),
            problem: "it is neither an image manifest nor an index".into(),
        }),
    }
}

impl Index {
    /// The entry for a platform. Among variants the plainest wins: it runs everywhere.
    pub(crate) fn select(&self, wanted: &Platform, what: &str) -> Result<&Descriptor> {
        let mut matching: Vec<&Descriptor> = self
            .manifests
            .iter()
            .filter(|entry| entry.is_manifest() && entry.platform.as_ref().is_some_and(|p| p.matches(wanted)))
            .collect();
        matching.sort_by_key(|entry| entry.platform.as_ref().and_then(|platform| platform.variant.clone()));
        if let Some(entry) = matching.first() {
            return Ok(entry);
        }
        // A layout's index of a single image often says no platform; its configuration will.
        if let [only] = self.manifests.as_slice()
            && only.platform.is_none()
            && only.is_manifest()
        {
            return Ok(only);
        }
        let mut available: Vec<String> = self
            .manifests
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .filter_map(RawPlatform::display)
            .collect();
        available.dedup();
        Err(Error::NoPlatform { name: what.into(), wanted: wanted.clone(), available })
    }
}

impl RawPlatform {
    fn matches(&self, wanted: &Platform) -> bool {
        self.os == wanted.os
            && self.architecture == wanted.architecture
            && (wanted.variant.is_none() || wanted.variant == self.variant)
    }

    /// None for what is no platform: attestations are filed under unknown/unknown.
    fn display(&self) -> Option<String> {
        if self.os == "unknown" {
            return None;
        }
        let variant = self.variant.as_ref().filter(|variant| !variant.is_empty());
        Some(clip(&variant.map_or_else(
            || format!("{}/{}", self.os, self.architecture),
            |variant| format!("{}/{}/{variant}", self.os, self.architecture),
        )))
    }
}

/// What the configuration blob holds (OCI image spec, config.md; docker's image spec for the health check).
#[derive(Deserialize)]
struct RawImage {
    #[serde(default, deserialize_with = "null_is_default")]
    os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    architecture: String,
    #[serde(default)]
    created: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    config: RawConfig,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default, deserialize_with = "null_is_default")]
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct RawConfig {
    #[serde(deserialize_with = "null_is_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    user: String,
    #[serde(deserialize_with = "null_is_default")]
    working_dir: String,
    stop_signal: Option<String>,
    #[serde(deserialize_with = "null_is_default")]
    exposed_ports: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "null_is_default")]
    volumes: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "null_is_default")]
    labels: BTreeMap<String, String>,
    healthcheck: Option<RawHealthcheck>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct RawHealthcheck {
    #[serde(deserialize_with = "null_is_default")]
    test: Vec<String>,
    interval: i64,
    timeout: i64,
    start_period: i64,
    start_interval: i64,
    retries: i64,
}

/// Go writes an empty list or map as `null`.
fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A configuration, and the layers' digests in it.
pub(crate) struct Configuration {
    pub config: ImageConfig,
    pub diff_ids: Vec<Digest>,
}

/// Parses a configuration blob. `what` names the image in errors.
pub(crate) fn parse_config(bytes: &[u8], what: &str) -> Result<Configuration> {
    check_size(what, bytes.len() as u64, MAX_CONFIG_BYTES)?;
    let malformed = |problem: String| Error::Malformed { what: what.into(), problem };
    let raw: RawImage = serde_json::from_slice(bytes)
        .map_err(|error| malformed(format!("its configuration does not parse: {error}")))?;
    check_count(what, "layers", raw.rootfs.diff_ids.len(), MAX_LAYERS)?;
    let diff_ids = raw.rootfs.diff_ids.iter().map(|text| {
        text.parse().map_err(|error| Error::Digest { what: format!("{what}: a diff_id"), error })
    });
    let diff_ids = diff_ids.collect::<Result<Vec<Digest>>>()?;
    let inner = raw.config;
    for (name, count) in [
        ("words of its entrypoint", inner.entrypoint.len()),
        ("words of its command", inner.cmd.len()),
        ("environment variables", inner.env.len()),
        ("exposed ports", inner.exposed_ports.len()),
        ("volumes", inner.volumes.len()),
        ("labels", inner.labels.len()),
    ] {
        check_count(what, name, count, MAX_CONFIG_ENTRIES)?;
    }
    let words = inner.entrypoint.iter().chain(&inner.cmd).chain(&inner.env).chain(inner.volumes.keys());
    if words.chain([&inner.user, &inner.working_dir]).any(|word| word.contains('\0')) {
        return Err(malformed(
            "its configuration has a NUL character in a string that a process would get".into(),
        ));
    }
    let config = ImageConfig {
        os: raw.os,
        architecture: raw.architecture,
        created: raw.created,
        entrypoint: inner.entrypoint,
        cmd: inner.cmd,
        env: inner.env,
        user: inner.user,
        working_dir: inner.working_dir,
        stop_signal: inner.stop_signal.filter(|signal| !signal.is_empty()),
        exposed_ports: inner.exposed_ports.into_keys().collect(),
        volumes: inner.volumes.into_keys().collect(),
        labels: inner.labels,
        healthcheck: inner.healthcheck.map(healthcheck),
    };
    Ok(Configuration { config, diff_ids })
}

fn healthcheck(raw: RawHealthcheck) -> Healthcheck {
    let positive = |value: i64| u64::try_from(value).unwrap_or(0);
    Healthcheck {
        test: raw.test,
        interval_ns: positive(raw.interval),
        timeout_ns: positive(raw.timeout),
        start_period_ns: positive(raw.start_period),
        start_interval_ns: positive(raw.start_interval),
        retries: u32::try_from(raw.retries).unwrap_or(0),
    }
}

/// Puts together what manifest and configuration say, where they agree and this machine can run it.
pub(crate) fn assemble(
    store: &Store,
    name: &str,
    manifest_digest: Digest,
    manifest: &Manifest,
    configuration: Configuration,
    wanted: &Platform,
) -> Result<Image> {
    let malformed = |problem: String| Error::Malformed { what: name.into(), problem };
    let Configuration { config, diff_ids } = configuration;
    // Images from scratch tools leave these out.
    let runs = (config.os.is_empty() || config.os == wanted.os)
        && (config.architecture.is_empty() || config.architecture == wanted.architecture);
    if !runs {
        let available = vec![clip(&format!("{}/{}", config.os, config.architecture))];
        return Err(Error::NoPlatform { name: name.into(), wanted: wanted.clone(), available });
    }
    if manifest.layers.is_empty() {
        return Err(malformed("it has no layers, so there is nothing to run".into()));
    }
    if manifest.layers.len() != diff_ids.len() {
        let (layers, ids) = (manifest.layers.len(), diff_ids.len());
        return Err(malformed(format!("its manifest has {layers} layers, its configuration {ids}")));
    }
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (descriptor, &diff_id) in manifest.layers.iter().zip(&diff_ids) {
        let digest = descriptor.digest()?;
        let compression = descriptor.compression(name)?;
        check_size(&format!("{name}: the layer {digest}"), descriptor.size, MAX_LAYER_BYTES)?;
        if compression == Compression::None && digest != diff_id {
            let problem = format!("the layer {digest} is not compressed, yet its diff_id is {diff_id}");
            return Err(malformed(problem));
        }
        layers.push(Layer {
            path: store.blob_path(&digest),
            digest,
            size: descriptor.size,
            compression,
            diff_id,
        });
    }
    let chain_id = chain_id(&diff_ids).ok_or_else(|| malformed("it has no layers".into()))?;
    let config_digest = manifest.config.digest()?;
    Ok(Image { name: name.into(), manifest_digest, config_digest, config, layers, chain_id })
}

/// The chain id of layers, lowest first (OCI image spec, config.md, Layer ChainID).
pub(crate) fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(*first, |chain, diff_id| Digest::of(format!("{chain} {diff_id}").as_bytes())))
}

pub(crate) fn check_size(what: &str, got: u64, limit: u64) -> Result<()> {
    if got <= limit { Ok(()) } else { Err(Error::TooLarge { what: format!("{what} (bytes)"), limit, got }) }
}

fn check_count(what: &str, items: &str, got: usize, limit: usize) -> Result<()> {
    if got <= limit {
        return Ok(());
    }
    Err(Error::TooLarge { what: format!("{what} (number of {items})"), limit: limit as u64, got: got as u64 })
}

/// Foreign text in a message: not endless, and without control characters.
pub(crate) fn clip(text: &str) -> String {
    text.chars().take(120).map(|character| if character.is_control() { '?' } else { character }).collect()
}

#[cfg(test)]
mod tests;
