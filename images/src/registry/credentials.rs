//! Who to be at a registry: the files and helpers that docker and podman keep.

use docker_credential::{
    CredentialRetrievalError as Retrieval, DockerCredential, get_credential, get_podman_credential,
};

use crate::{Auth, Error, RegistryName, Result, oci, reference::DOCKER_HUB};

/// The name under which docker's files keep the credentials for Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Proof of who is asking.
#[derive(Clone)]
pub(super) enum Credentials {
    Nobody,
    Password {
        username: String,
        password: String,
    },
    /// Exchanged for a token at the realm (docker's `identitytoken`).
    RefreshToken(String),
}

impl Credentials {
    /// For messages: `without credentials`.
    pub(super) fn describe(&self) -> &'static str {
        match self {
            Self::Nobody => "without credentials",
            Self::Password { .. } => "with the given user and password",
            Self::RefreshToken(_) => "with the stored token",
        }
    }

    /// Finds the credentials for the registry of an image.
    pub(super) fn find(auth: &Auth, name: &RegistryName) -> Result<Self> {
        match auth {
            Auth::Anonymous => Ok(Self::Nobody),
            Auth::Basic { username, password } => {
                Ok(Self::Password { username: username.clone(), password: password.clone() })
            }
            Auth::Stored => stored(&name.registry),
        }
    }
}

fn stored(registry: &str) -> Result<Credentials> {
    let keys: Vec<String> = match registry {
        DOCKER_HUB => vec![DOCKER_HUB_KEY.into(), DOCKER_HUB.into()],
        other => vec![other.into(), format!("https://{other}")],
    };
    for key in &keys {
        for look in [get_podman_credential, get_credential] {
            match look(key) {
                Ok(DockerCredential::UsernamePassword(username, password)) => {
                    return Ok(Credentials::Password { username, password });
                }
                Ok(DockerCredential::IdentityToken(token)) => return Ok(Credentials::RefreshToken(token)),
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    let problem = oci::clip(&error.to_string());
                    return Err(Error::Credentials { registry: registry.into(), problem });
                }
            }
        }
    }
    Ok(Credentials::Nobody)
}

/// Whether nothing is configured, in contrast to something that does not work.
fn is_absent(error: &Retrieval) -> bool {
    match error {
        Retrieval::NoCredentialConfigured | Retrieval::ConfigNotFound => true,
        // The crate says this of a missing file, too.
        Retrieval::ConfigReadError => true,
        // What helpers say is part of their protocol (docker-credential-helpers).
        Retrieval::HelperFailure { stdout, stderr, .. } => {
            [stdout, stderr].iter().any(|text| text.contains("credentials not found"))
        }
        _ => false,
    }
}
