//! Pulling from a registry (OCI distribution spec, pulling manifests and blobs).
//!
//! A few requests of our own on reqwest, because what is needed is in the details: answers of bounded size, blobs that
//! continue where they broke off, credentials that stay with the registry when it redirects.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use reqwest::Url;
use tokio::runtime::{self, Runtime};

use crate::{
    Digest, Error, Event, Image, Layer, Progress, PullOptions, RegistryName, Result, Store,
    oci::{self, Document, Manifest},
};

mod blob;
mod challenge;
mod credentials;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod names;
mod pace;
mod reach;
mod session;

use self::session::{Session, Shared};

/// Most indexes above a manifest.
const MAX_DEPTH: usize = 4;
/// How long something on loopback may take to show whether it speaks TLS.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Most workers, whatever the options say.
const MAX_WORKERS: usize = 16;

/// Pulls the image of this platform into the store and gives it its name.
pub(crate) fn pull(
    store: &Store,
    name: &RegistryName,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Image> {
    // Only the first in a process succeeds, and any provider will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let canonical_name = name.canonical_name();
    let _adding = store.lock_for_adding()?;
    progress.event(Event::Resolving { name: &canonical_name });
    let shared = Shared::new(name, options, progress);
    let runtime = new_runtime()?;
    let (base, found) = runtime.block_on(resolve(store, &shared, &canonical_name))?;
    let Found { image, other_blobs } = found;
    let (manifest_digest, layers, bytes) = (image.manifest_digest, image.layers.len(), image.layer_bytes());
    progress.event(Event::Resolved { manifest_digest, layers, bytes });
    fetch_layers(store, &shared, &base, &image)?;
    store.admit(&image, other_blobs, None)?;
    Ok(image)
}

fn new_runtime() -> Result<Runtime> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::io("start", "an event loop", error))
}

/// An image whose documents are in the store, and the indexes on the way to it.
struct Found {
    image: Image,
    other_blobs: Vec<Digest>,
}

/// Finds the address at which the registry answers, and the image there.
async fn resolve(store: &Store, shared: &Shared<'_>, image: &str) -> Result<(Url, Found)> {
    let mut addresses = session::addresses(shared.name, shared.options.plain_http)?.into_iter().peekable();
    loop {
        let Some(base) = addresses.next() else {
            return Err(Error::NotFound { name: image.into(), registry: shared.name.registry.clone() });
        };
        if addresses.peek().is_some() && !speaks_tls(shared, &base).await {
            continue;
        }
        let session = Session::new(shared, base.clone())?;
        return Ok((base, resolve_at(store, &session, image).await?));
    }
}

/// Whether something at this address on loopback speaks TLS, trusted or not: if it does, nothing else is spoken to it.
async fn speaks_tls(shared: &Shared<'_>, base: &Url) -> bool {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        time::timeout,
    };
    let probe = async {
        let host = base.host_str()?.trim_start_matches('[').trim_end_matches(']');
        let mut stream = TcpStream::connect((host, base.port_or_known_default()?)).await.ok()?;
        // A TLS record with a handshake that is none: TLS answers with an alert record (RFC 8446, 5.1). HTTP sees a
        // line and an empty line, and answers with text.
        stream.write_all(b"\x16\x03\x01\x00\x04\r\n\r\n").await.ok()?;
        let mut first = [0];
        stream.read_exact(&mut first).await.ok()?;
        Some(matches!(first, [20..=23]))
    };
    timeout(shared.options.connect_timeout.min(PROBE_TIMEOUT), probe).await.ok().flatten().unwrap_or(false)
}

async fn resolve_at(store: &Store, session: &Session<'_>, image: &str) -> Result<Found> {
    let name = session.shared.name;
    let mut other_blobs = Vec::new();
    let mut wanted = name.digest;
    for _ in 0..MAX_DEPTH {
        let (digest, bytes) = manifest(store, session, wanted, image).await?;
        match oci::parse_document(&bytes, image)? {
            Document::Manifest(manifest) => {
                store.put_blob(&digest, &bytes)?;
                let image = configure(store, session, image, digest, &manifest).await?;
                return Ok(Found { image, other_blobs });
            }
            Document::Index(index) => {
                wanted = Some(index.select(&session.shared.options.platform, image)?.digest()?);
                store.put_blob(&digest, &bytes)?;
                other_blobs.push(digest);
            }
        }
    }
    Err(Error::Malformed { what: image.into(), problem: "its indexes are nested too deeply".into() })
}

/// A manifest or index by digest (from the store, if it is there), or by the reference's tag.
async fn manifest(
    store: &Store,
    session: &Session<'_>,
    wanted: Option<Digest>,
    image: &str,
) -> Result<(Digest, Vec<u8>)> {
    if let Some(digest) = wanted
        && let Ok(bytes) = store.read_blob(&digest, oci::MAX_MANIFEST_BYTES)
    {
        return Ok((digest, bytes));
    }
    let tag = session.shared.name.tag.clone().unwrap_or_else(|| "latest".into());
    let url = session.url("manifests", &wanted.map_or(tag, |digest| digest.to_string()))?;
    let (bytes, headers) = session.get_document(url, oci::ACCEPT, oci::MAX_MANIFEST_BYTES).await?;
    let got = Digest::of(&bytes);
    // Without a digest to check against, the registry's own word is at least a check of the transfer.
    let header = headers.get("docker-content-digest").and_then(|value| value.to_str().ok());
    let announced = header.and_then(|text| text.parse().ok());
    match wanted.or(announced) {
        Some(wanted) if wanted != got => {
            Err(Error::DigestMismatch { what: format!("the manifest of {image}"), wanted, got })
        }
        _ => Ok((got, bytes)),
    }
}

/// Fetches the configuration and puts the image together.
async fn configure(
    store: &Store,
    session: &Session<'_>,
    image: &str,
    manifest_digest: Digest,
    manifest: &Manifest,
) -> Result<Image> {
    let digest = manifest.config.digest()?;
    let size = manifest.config.size;
    oci::check_size(&format!("{image}: its configuration"), size, oci::MAX_CONFIG_BYTES)?;
    let bytes = match store.read_blob(&digest, oci::MAX_CONFIG_BYTES) {
        Ok(bytes) => bytes,
        Err(_) => {
            let url = session.url("blobs", &digest.to_string())?;
            let (bytes, _) = session.get_document(url, "*/*", oci::MAX_CONFIG_BYTES).await?;
            let got = Digest::of(&bytes);
            if got != digest {
                let what = format!("the configuration of {image}");
                return Err(Error::DigestMismatch { what, wanted: digest, got });
            }
            bytes
        }
    };
    let configuration = oci::parse_config(&bytes, image)?;
    let options = session.shared.options;
    let image = oci::assemble(store, image, manifest_digest, manifest, configuration, &options.platform)?;
    store.put_blob(&digest, &bytes)?;
    Ok(image)
}

/// Fetches the layers that the store lacks, several at a time. The first failure stops all.
fn fetch_layers(store: &Store, shared: &Shared<'_>, base: &Url, image: &Image) -> Result<()> {
    let mut seen = BTreeSet::new();
    let mut missing: Vec<&Layer> = Vec::new();
    for layer in image.layers.iter().filter(|layer| seen.insert(layer.digest)) {
        let &Layer { digest, size, .. } = layer;
        if store.has_blob(&digest, size) {
            shared.progress.event(Event::LayerExists { digest, size });
        } else {
            missing.push(layer);
        }
    }
    let next = AtomicUsize::new(0);
    let first_error = Mutex::new(None);
    let work = || {
        let result = new_runtime().and_then(|runtime| {
            let session = Session::new(shared, base.clone())?;
            while let Some(layer) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                if shared.is_cancelled() {
                    break;
                }
                blob::fetch(store, &session, &runtime, layer)?;
            }
            Ok(())
        });
        if let Err(error) = result {
            shared.cancelled.store(true, Ordering::Relaxed);
            first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    let workers = shared.options.parallelism.clamp(1, MAX_WORKERS).min(missing.len());
    // One thread a worker: hashing and writing take a core each, and neither is asynchronous.
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    let first_error = first_error.into_inner().unwrap_or_else(PoisonError::into_inner);
    first_error.map_or(Ok(()), Err)
}
