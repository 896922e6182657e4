//! Everything that can go wrong between a reference and a file to boot from.

use std::{io, net::IpAddr, path::PathBuf, time::Duration};

use thiserror::Error;

use crate::{Digest, DigestError, Platform, ReferenceError};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image could not be fetched, kept or made ready.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The reference does not parse.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A platform does not parse.
    #[error("{text:?} is not a platform: write os/architecture, such as linux/amd64")]
    Platform {
        /// The text.
        text: String,
    },
    /// The image is not in the store, and the policy forbids fetching it.
    #[error("the image {name} is not in the store: run `flyrun pull {name}`, or allow it to be pulled")]
    NotInStore {
        /// Its canonical name.
        name: String,
    },
    /// No image of the store has this name or digest.
    #[error("no image in the store is called {name}; `flyrun images` lists them")]
    NoSuchImage {
        /// What was asked for.
        name: String,
    },
    /// Several images of the store begin with this digest.
    #[error("{prefix} could be any of {names}: give more digits or the name", names = .names.join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// The images that match.
        names: Vec<String>,
    },
    /// A machine or a snapshot needs the image.
    #[error("the image {name} is in use by a machine or a snapshot: remove that first")]
    InUse {
        /// Its canonical name.
        name: String,
    },
    /// A file operation failed.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// The disk is full.
    #[error("no space left on the disk while trying to {action} {path}: free some (`flyrun prune` helps) and try again", path = .path.display())]
    NoSpace {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// A record of the store does not parse.
    #[error("the store's file {path} is damaged ({problem}): remove it and pull the image again", path = .path.display())]
    DamagedRecord {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A registry could not be reached or broke the connection.
    #[error("cannot reach the registry at {url}: {problem}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// How it failed.
        problem: String,
    },
    /// A registry stopped answering.
    #[error("{url} sent nothing for {after:?}: try again, or check the network and the registry")]
    Stalled {
        /// What was asked for.
        url: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// A registry sends next to nothing.
    #[error(
        "{url} sent fewer than {wanted} bytes per second for {span:?}: try again, or allow less with FLYRUN_PULL_MIN_RATE"
    )]
    TooSlow {
        /// What was asked for.
        url: String,
        /// For how long.
        span: Duration,
        /// What is wanted, in bytes per second.
        wanted: u64,
    },
    /// A registry sends us to somewhere that it could not reach itself.
    #[error(
        "the registry sends flyrun to {url}, and {address} is {what}: if that is meant, allow it with FLYRUN_PULL_REDIRECTS={host}"
    )]
    Inward {
        /// Where it sends us.
        url: String,
        /// The host in that.
        host: String,
        /// Its address.
        address: IpAddr,
        /// Who is reached there.
        what: &'static str,
    },
    /// A registry refused.
    #[error("{url} answered {status}{message}")]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the registry says to it, with a leading colon; may be empty.
        message: String,
    },
    /// The registry does not have the image, or does not tell us.
    #[error(
        "{registry} has no image {name}, or it is private: check the name, or log in with `docker login {registry}`"
    )]
    NotFound {
        /// The image.
        name: String,
        /// Its registry.
        registry: String,
    },
    /// The docker daemon does not have the image.
    #[error("the docker daemon has no image {name}; `docker images` lists what it has")]
    NotInDocker {
        /// The image.
        name: String,
    },
    /// The registry wants credentials, or better ones.
    #[error("{registry} refuses access to {name} {with}: log in with `docker login {registry}`")]
    Unauthorized {
        /// The image.
        name: String,
        /// Its registry.
        registry: String,
        /// Which credentials were tried.
        with: &'static str,
    },
    /// A credential helper failed.
    #[error("the credentials for {registry} cannot be read: {problem}")]
    Credentials {
        /// The registry.
        registry: String,
        /// What is wrong.
        problem: String,
    },
    /// A registry sent something that no registry should.
    #[error("{url}: {problem}")]
    Protocol {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// Bytes are not what their digest says.
    #[error("{what} is damaged or forged: wanted {wanted}, got {got}")]
    DigestMismatch {
        /// Whose bytes.
        what: String,
        /// The digest it should have.
        wanted: Digest,
        /// The digest it has.
        got: Digest,
    },
    /// There are more or fewer bytes than announced.
    #[error("{what} has {got} bytes where {wanted} were announced")]
    SizeMismatch {
        /// Whose bytes.
        what: String,
        /// How many were announced.
        wanted: u64,
        /// How many there are, as far as they were counted.
        got: u64,
    },
    /// Something is larger than a limit.
    #[error("{what} exceeds a limit: {got}, at most {limit} is allowed")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit, in bytes or in number.
        limit: u64,
        /// What it has.
        got: u64,
    },
    /// A digest is malformed or of another algorithm.
    #[error("{what}: {error}")]
    Digest {
        /// Where the digest stands.
        what: String,
        /// What is wrong with it.
        error: DigestError,
    },
    /// A manifest, index or configuration is malformed.
    #[error("{what}: {problem}")]
    Malformed {
        /// The document.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The image is made of something that flyrun does not take.
    #[error("{what} {problem}")]
    Unsupported {
        /// The image or its part.
        what: String,
        /// What is not supported, and what to do.
        problem: String,
    },
    /// The image does not exist for the wanted platform.
    #[error("{name} has no image for {wanted}; it has {available}", available = list(.available))]
    NoPlatform {
        /// The image.
        name: String,
        /// What was wanted.
        wanted: Platform,
        /// What is there.
        available: Vec<String>,
    },
    /// An archive or layout holds no such image.
    #[error("{path} has no image {wanted}; it has {available}", path = .path.display(), available = list(.available))]
    NoSuchTag {
        /// The archive or layout.
        path: PathBuf,
        /// What was wanted.
        wanted: String,
        /// What is there.
        available: Vec<String>,
    },
    /// An archive or layout holds several images.
    #[error("{path} has several images ({available}): add :TAG to choose one", path = .path.display(), available = list(.available))]
    TagNeeded {
        /// The archive or layout.
        path: PathBuf,
        /// What is there.
        available: Vec<String>,
    },
    /// A program is missing.
    #[error("{program} is not installed: install the package {package} (`apt install {package}`)")]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {stderr}")]
    Program {
        /// The program.
        program: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
}

impl Error {
    /// Wraps a failed file operation; a full disk becomes [`Error::NoSpace`].
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { action, path },
            _ => Self::Io { action, path, source },
        }
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "none".into() } else { items.join(", ") }
}
