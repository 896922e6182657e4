//! How a pull tells what it does.

use std::time::Duration;

use crate::Digest;

/// Receives what happens in a pull. Called from several threads, and often: it must be quick.
pub trait Progress: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _event: Event<'_>) {}
}

/// What happened in a pull.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The source is asked for the image.
    Resolving {
        /// The image's canonical name.
        name: &'a str,
    },
    /// The manifest is known.
    Resolved {
        /// Digest of the manifest.
        manifest_digest: Digest,
        /// Number of layers.
        layers: usize,
        /// Bytes of all layers.
        bytes: u64,
    },
    /// A layer is in the store already.
    LayerExists {
        /// The layer.
        digest: Digest,
        /// Its bytes.
        size: u64,
    },
    /// Another process is fetching or unpacking the same thing; this one waits for it.
    Waiting {
        /// The layer, or the chain id of the root filesystem.
        digest: Digest,
    },
    /// A layer begins to arrive, or continues after an interruption.
    LayerStarted {
        /// The layer.
        digest: Digest,
        /// Its bytes.
        size: u64,
        /// Bytes that an earlier attempt has left.
        resumed_from: u64,
    },
    /// More of a layer is here.
    LayerProgress {
        /// The layer.
        digest: Digest,
        /// Bytes there so far.
        bytes: u64,
    },
    /// A layer is whole and its digest is right.
    LayerDone {
        /// The layer.
        digest: Digest,
        /// Its bytes.
        size: u64,
    },
    /// A request failed in a way that may pass, and is repeated.
    Retrying {
        /// Which attempt follows; the first repetition is 2.
        attempt: u32,
        /// How long it waits before.
        delay: Duration,
        /// What failed.
        error: &'a str,
    },
}
