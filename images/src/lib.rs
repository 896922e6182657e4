//! What a machine boots from: image references, where images come from, and the store that keeps them.
#![forbid(unsafe_code)]

mod config;
mod digest;
mod error;
mod image;
mod local;
mod oci;
mod progress;
mod pull;
mod reference;
mod registry;
mod store;
mod template;

pub use config::{Healthcheck, ImageConfig};
pub use digest::{Digest, DigestError};
pub use error::{Error, Result};
pub use image::{Compression, Image, Layer, Platform};
pub use progress::{Event, NoProgress, Progress};
pub use pull::{Auth, PullOptions, PullPolicy, pull};
pub use reference::{Reference, ReferenceError, RegistryName, Source};
pub use store::{
    ImageSummary, PruneOptions, PruneReport, RemoveReport, RootfsDraft, RootfsLease, RootfsSlot, Store,
};
pub use template::{DISK_DEFAULT_BYTES, MAX_BYTES, MIN_BYTES, ROOTFS_BYTES, TemplateKind};
