//! Image references: what a user types to name an image.

use std::{
    fmt,
    path::{Path, PathBuf, absolute},
    str::FromStr,
};

use thiserror::Error;

use crate::{Digest, DigestError};

/// Longest reference that is parsed, in bytes.
const MAX_LENGTH: usize = 4096;
/// Longest `registry/repository`, in bytes (as docker has it).
const MAX_NAME_LENGTH: usize = 255;
/// Docker Hub under the name that users and canonical names have for it.
pub(crate) const DOCKER_HUB: &str = "docker.io";

/// A parsed image reference.
///
/// | written | is |
/// |---|---|
/// | `alpine`, `alpine:3.20`, `docker://alpine` | `docker.io/library/alpine` at a registry |
/// | `ghcr.io/a/b@sha256:…`, `localhost:5000/x` | an image at another registry |
/// | `oci:DIR[:TAG]` | an OCI image layout |
/// | `oci-archive:FILE[:TAG]` | a tar of one |
/// | `docker-archive:FILE[:TAG]` | what `docker save` writes |
/// | `docker-daemon:NAME` | an image of the local docker daemon |
/// | `/PATH`, `./PATH`, `../PATH`, `NAME.tar` | whichever of the above is at that path |
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Where the image comes from.
    pub source: Source,
}

/// Where an image comes from. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A registry that speaks the OCI distribution protocol.
    Registry(RegistryName),
    /// A directory in the OCI image layout.
    OciLayout {
        /// The directory.
        path: PathBuf,
        /// Which of its images: the annotation `org.opencontainers.image.ref.name`.
        tag: Option<String>,
    },
    /// A tar of an OCI image layout.
    OciArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// A tar as `docker save` writes it.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images, by one of its `RepoTags`.
        tag: Option<String>,
    },
    /// A tar of either kind; which one shows when it is read.
    Archive {
        /// The file.
        path: PathBuf,
    },
    /// The local docker daemon.
    DockerDaemon(RegistryName),
}

/// An image's name at a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryName {
    /// Host, with a port if one was given; `docker.io` when none was.
    pub registry: String,
    /// Path at the registry, with Docker Hub's `library/` in place.
    pub repository: String,
    /// The tag; `latest` when neither tag nor digest was given.
    pub tag: Option<String>,
    /// The digest, which decides when both are given.
    pub digest: Option<Digest>,
}

/// Why a reference was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// It is empty.
    #[error("the image reference is empty")]
    Empty,
    /// It is absurdly long.
    #[error("the image reference has {0} bytes, at most {MAX_LENGTH} are allowed")]
    TooLong(usize),
    /// It has a character that none may have.
    #[error("the image reference {text:?} contains {character:?}")]
    Character {
        /// The reference.
        text: String,
        /// The offending character.
        character: char,
    },
    /// It is a web address.
    #[error("{0:?} is a URL: write the image's name alone, such as ghcr.io/owner/image:tag")]
    Url(String),
    /// Another tool's transport.
    #[error(
        "{transport}: is not a source flyrun reads (it reads docker://, oci:, oci-archive:, docker-archive: and docker-daemon:)"
    )]
    Transport {
        /// The transport's name.
        transport: String,
    },
    /// The registry's host or port is malformed.
    #[error("{registry:?} in {text:?} is not a host name or host:port")]
    Registry {
        /// The reference.
        text: String,
        /// The offending part.
        registry: String,
    },
    /// Repositories are lower case.
    #[error("the repository name in {text:?} must be lower case; did you mean {suggestion:?}?")]
    UpperCase {
        /// The reference.
        text: String,
        /// The reference in lower case.
        suggestion: String,
    },
    /// The repository path is malformed.
    #[error(
        "{repository:?} in {text:?} is not a repository name (lower-case letters and digits, separated by one of . _ __ - /)"
    )]
    Repository {
        /// The reference.
        text: String,
        /// The offending part.
        repository: String,
    },
    /// The tag is malformed.
    #[error(
        "{tag:?} in {text:?} is not a tag (at most 128 letters, digits, _ . -, not starting with . or -)"
    )]
    Tag {
        /// The reference.
        text: String,
        /// The offending part.
        tag: String,
    },
    /// The digest is malformed.
    #[error("the image reference {text:?}: {error}")]
    Digest {
        /// The reference.
        text: String,
        /// What is wrong with the digest.
        error: DigestError,
    },
    /// There is nothing at a path, or not an image.
    #[error("{path}: {problem}", path = .path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What is at a path; asked for through a function so that the parser can be tested without files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtPath {
    Nothing,
    OciLayout,
    Directory,
    File,
}

fn look_at(path: &Path) -> AtPath {
    match std::fs::metadata(path) {
        Err(_) => AtPath::Nothing,
        Ok(metadata) if !metadata.is_dir() => AtPath::File,
        Ok(_) if path.join("oci-layout").exists() || path.join("index.json").exists() => AtPath::OciLayout,
        Ok(_) => AtPath::Directory,
    }
}

impl Reference {
    /// Parses what a user typed. Looks at the file system only where the text may be a path.
    ///
    /// # Errors
    /// [`ReferenceError`] names the offending part.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        Self::parse_with(text, &look_at)
    }

    fn parse_with(text: &str, look: &dyn Fn(&Path) -> AtPath) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.len() > MAX_LENGTH {
            return Err(ReferenceError::TooLong(text.len()));
        }
        if let Some(character) = text.chars().find(|character| character.is_control()) {
            return Err(ReferenceError::Character { text: text.into(), character });
        }
        let source = match split_transport(text) {
            Some(("docker", name)) => Source::Registry(parse_name(name.strip_prefix("//").unwrap_or(name))?),
            Some(("docker-daemon", name)) => Source::DockerDaemon(parse_name(name)?),
            Some(("oci", rest)) => {
                let (path, tag) = split_path(rest, look)?;
                Source::OciLayout { path, tag }
            }
            Some(("oci-archive", rest)) => {
                let (path, tag) = split_path(rest, look)?;
                Source::OciArchive { path, tag }
            }
            Some(("docker-archive", rest)) => {
                let (path, tag) = split_path(rest, look)?;
                Source::DockerArchive { path, tag }
            }
            Some(("http" | "https", _)) => return Err(ReferenceError::Url(text.into())),
            Some((transport, _)) => return Err(ReferenceError::Transport { transport: transport.into() }),
            None if is_path(text, look) => detect(text, look)?,
            None => Source::Registry(parse_name(text)?),
        };
        Ok(Self { source })
    }

    /// The one name of this image in the store and in messages: `docker.io/library/alpine:3.20`, `oci:/dir:tag`.
    /// Parsing it gives the same reference.
    pub fn canonical_name(&self) -> String {
        let with_tag = |transport: &str, path: &Path, tag: &Option<String>| match tag {
            Some(tag) => format!("{transport}:{}:{tag}", path.display()),
            None => format!("{transport}:{}", path.display()),
        };
        match &self.source {
            Source::Registry(name) => name.canonical_name(),
            Source::OciLayout { path, tag } => with_tag("oci", path, tag),
            Source::OciArchive { path, tag } => with_tag("oci-archive", path, tag),
            Source::DockerArchive { path, tag } => with_tag("docker-archive", path, tag),
            Source::Archive { path } => path.display().to_string(),
            Source::DockerDaemon(name) => format!("docker-daemon:{}", name.canonical_name()),
        }
    }

    /// Whether the image comes from this machine and not over the network.
    pub fn is_local(&self) -> bool {
        !matches!(self.source, Source::Registry(_))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.canonical_name())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

impl RegistryName {
    /// `registry/repository:tag`, or `registry/repository@digest` where there is a digest.
    pub fn canonical_name(&self) -> String {
        let name = format!("{}/{}", self.registry, self.repository);
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{name}@{digest}"),
            (None, Some(tag)) => format!("{name}:{tag}"),
            (None, None) => name,
        }
    }

    /// The name without what docker leaves out: `alpine:3.20`.
    pub fn familiar_name(&self) -> String {
        let name = self.canonical_name();
        let short = name.strip_prefix("docker.io/").map(|rest| rest.strip_prefix("library/").unwrap_or(rest));
        short.map_or_else(|| name.clone(), String::from)
    }
}

/// Transports of containers-transports(5). `docker` counts only as `docker://`, so that an image called docker is one.
fn split_transport(text: &str) -> Option<(&str, &str)> {
    let (transport, rest) = text.split_once(':')?;
    match transport {
        "oci" | "oci-archive" | "docker-archive" | "docker-daemon" | "containers-storage" | "dir"
        | "ostree" | "sif" => Some((transport, rest)),
        _ if rest.starts_with("//") => Some((transport, rest)),
        _ => None,
    }
}

fn is_path(text: &str, look: &dyn Fn(&Path) -> AtPath) -> bool {
    let spelled =
        ["/", "./", "../"].iter().any(|prefix| text.starts_with(prefix)) || text == "." || text == "..";
    spelled || (text.ends_with(".tar") && look(Path::new(text)) == AtPath::File)
}

fn detect(text: &str, look: &dyn Fn(&Path) -> AtPath) -> Result<Source, ReferenceError> {
    let (path, tag) = split_path(text, look)?;
    let problem = match (look(&path), tag) {
        (AtPath::OciLayout, tag) => return Ok(Source::OciLayout { path, tag }),
        (AtPath::File, None) => return Ok(Source::Archive { path }),
        (AtPath::File, Some(_)) => {
            "to choose an image by tag write oci-archive:FILE:TAG or docker-archive:FILE:TAG"
        }
        (AtPath::Directory, _) => "this directory is not an OCI image layout (it has no oci-layout file)",
        (AtPath::Nothing, _) => "there is no such file or directory",
    };
    Err(ReferenceError::Path { path, problem })
}

/// Splits `PATH[:TAG]`. A path that exists wins over one with a tag; where none exists the first colon splits.
fn split_path(
    text: &str,
    look: &dyn Fn(&Path) -> AtPath,
) -> Result<(PathBuf, Option<String>), ReferenceError> {
    let make = |path: &str, tag: Option<&str>| {
        if path.is_empty() {
            return Err(ReferenceError::Path { path: text.into(), problem: "a path is missing" });
        }
        if let Some(tag) = tag.filter(|tag| tag.is_empty() || tag.contains(char::is_whitespace)) {
            return Err(ReferenceError::Tag { text: text.into(), tag: tag.into() });
        }
        let path = absolute(path).map_err(|_| ReferenceError::Path {
            path: path.into(),
            problem: "this path cannot be made absolute",
        })?;
        Ok((path, tag.map(String::from)))
    };
    if look(Path::new(text)) != AtPath::Nothing {
        return make(text, None);
    }
    let mut colons = text.match_indices(':').map(|(index, _)| text.split_at(index));
    let first = colons.clone().next();
    let existing = colons.find(|(path, _)| !path.is_empty() && look(Path::new(path)) != AtPath::Nothing);
    match existing.or(first) {
        Some((path, tag)) => make(path, tag.strip_prefix(':')),
        None => make(text, None),
    }
}

/// Parses `[registry/]repository[:tag][@digest]` (docker's reference grammar).
fn parse_name(text: &str) -> Result<RegistryName, ReferenceError> {
    if text.is_empty() {
        return Err(ReferenceError::Empty);
    }
    let (rest, digest) = match text.split_once('@') {
        None => (text, None),
        Some((rest, digest)) => {
            let digest =
                digest.parse().map_err(|error| ReferenceError::Digest { text: text.into(), error })?;
            (rest, Some(digest))
        }
    };
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if is_registry(first) => (first, path),
        _ => (DOCKER_HUB, name),
    };
    let registry = match registry {
        "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
        other => other,
    };
    check_registry(text, registry)?;
    check_repository(text, path)?;
    if let Some(tag) = tag {
        check_tag(text, tag)?;
    }
    let repository = match registry {
        DOCKER_HUB if !path.contains('/') => format!("library/{path}"),
        _ => path.into(),
    };
    if registry.len() + 1 + repository.len() > MAX_NAME_LENGTH {
        return Err(ReferenceError::Repository { text: text.into(), repository });
    }
    let tag = tag.map(String::from).or_else(|| digest.is_none().then(|| "latest".into()));
    // A digest says which image it is: a tag beside it would make two names for the same thing.
    let tag = if digest.is_some() { None } else { tag };
    Ok(RegistryName { registry: registry.into(), repository, tag, digest })
}

/// Docker's rule for telling `host/x` from Docker Hub's `user/x`.
fn is_registry(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':', '['])
        || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(text: &str, registry: &str) -> Result<(), ReferenceError> {
    let (host, port) = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            let valid = address.parse::<std::net::Ipv6Addr>().is_ok();
            (valid, rest.strip_prefix(':').or((!rest.is_empty()).then_some("?")))
        }
        None => {
            let (host, port) = match registry.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (registry, None),
            };
            (host.split('.').all(is_host_label), port)
        }
    };
    let port_valid = port.is_none_or(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if host && port_valid {
        return Ok(());
    }
    Err(ReferenceError::Registry { text: text.into(), registry: registry.into() })
}

fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && label.len() <= 63
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn check_repository(text: &str, path: &str) -> Result<(), ReferenceError> {
    if path.split('/').all(is_path_component) {
        return Ok(());
    }
    let suggestion = path.to_ascii_lowercase();
    if suggestion != path && suggestion.split('/').all(is_path_component) {
        return Err(ReferenceError::UpperCase {
            text: text.into(),
            suggestion: text.replace(path, &suggestion),
        });
    }
    Err(ReferenceError::Repository { text: text.into(), repository: path.into() })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` (OCI distribution spec, pulling manifests).
fn is_path_component(component: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut separators = component.split(|character: char| character.is_ascii() && word(character as u8));
    let edges_are_words =
        component.bytes().next().is_some_and(word) && component.bytes().next_back().is_some_and(word);
    edges_are_words
        && separators.all(|separator| {
            matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-')
        })
}

fn check_tag(text: &str, tag: &str) -> Result<(), ReferenceError> {
    let valid = tag.len() <= 128
        && tag.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
    if valid { Ok(()) } else { Err(ReferenceError::Tag { text: text.into(), tag: tag.into() }) }
}

#[cfg(test)]
mod tests;
