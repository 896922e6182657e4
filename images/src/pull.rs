//! Getting an image into the store.

use std::time::Duration;

use crate::{Error, Image, Platform, Progress, Reference, Result, Source, Store, local, registry};

/// When to ask the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// Only if the store does not have the image.
    #[default]
    Missing,
    /// Always: a tag may have moved.
    Always,
    /// Never: an image that is not there is an error.
    Never,
}

/// Who to be at a registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Auth {
    /// Whatever docker's and podman's credential files and helpers say for the registry; without any, nobody.
    #[default]
    Stored,
    /// Nobody.
    Anonymous,
    /// A user with a password or token.
    Basic {
        /// The user.
        username: String,
        /// The password or token.
        password: String,
    },
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stored => formatter.write_str("Stored"),
            Self::Anonymous => formatter.write_str("Anonymous"),
            Self::Basic { username, .. } => write!(formatter, "Basic {{ username: {username:?} }}"),
        }
    }
}

/// How to pull. [`Default`] is what `flyrun run` does without flags.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// Which image of a multi-platform index.
    pub platform: Platform,
    /// Credentials.
    pub auth: Auth,
    /// Whether to speak HTTP without TLS to any registry. Registries on loopback are spoken to so if they have no TLS.
    pub plain_http: bool,
    /// Layers fetched at the same time, at least 1.
    pub parallelism: usize,
    /// When to ask the source.
    pub policy: PullPolicy,
    /// How long a connection may take to come up.
    pub connect_timeout: Duration,
    /// How long a registry may be silent.
    pub stall_timeout: Duration,
    /// Bytes per second that it has to send at least, on an average over each `stall_timeout`.
    pub min_bytes_per_second: u64,
    /// Hosts that a registry may send us to wherever they are: names or addresses. Others only if they are no nearer to this host
    /// than the registry is: not on loopback or in a private network if it is not there itself, and never on the link.
    pub inward_hosts: Vec<String>,
    /// How often a request that failed for a passing reason is repeated.
    pub retries: u32,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            platform: Platform::default(),
            auth: Auth::default(),
            plain_http: false,
            parallelism: 3,
            policy: PullPolicy::default(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            min_bytes_per_second: 1 << 10,
            inward_hosts: Vec::new(),
            retries: 4,
        }
    }
}

/// Makes sure that the image is in the store and returns it. Blocks; must not be called from an async task.
///
/// A cached image costs no request (policy [`PullPolicy::Missing`]). Interrupted at any point, it leaves a usable
/// store, and the next pull continues where this one was.
///
/// # Errors
/// [`Error`](crate::Error) says which step failed and what to do.
pub fn pull(
    store: &Store,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Image> {
    if options.policy != PullPolicy::Always
        && let Some(image) = store.find(reference)?
        && is_for(&image, &options.platform)
    {
        return Ok(image);
    }
    let name = reference.canonical_name();
    match &reference.source {
        _ if options.policy == PullPolicy::Never => Err(Error::NotInStore { name }),
        Source::Registry(name) => registry::pull(store, name, options, progress),
        _ => local::import(store, reference, &options.platform, progress),
    }
}

/// Whether a cached image is for the wanted platform; images that do not say count as it.
fn is_for(image: &Image, platform: &Platform) -> bool {
    let fits = |has: &str, wanted: &str| has.is_empty() || has == wanted;
    fits(&image.config.os, &platform.os) && fits(&image.config.architecture, &platform.architecture)
}
