//! Proofs that host names lead here, for certificate authorities that look: a document (RFC 8555, section 8.3) or a certificate
//! (RFC 8737). They are shown as long as whoever made them holds them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

/// Where an authority asks for documents.
const DOCUMENTS: &str = "/.well-known/acme-challenge/";
/// What an authority that wants to see a certificate calls its protocol (RFC 8737, section 6.2).
const PROTOCOL: &[u8] = b"acme-tls/1";

/// All proofs that are to be shown now.
#[derive(Default)]
pub struct Challenges {
    /// How many there are: requests take no lock while nobody looks.
    count: AtomicUsize,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    /// By their tokens.
    documents: HashMap<String, Bytes>,
    /// By host names.
    certificates: HashMap<String, Arc<ServerConfig>>,
}

/// A proof, which is shown until this is dropped.
#[must_use = "it is shown as long as this is held"]
pub struct Proof {
    challenges: Arc<Challenges>,
    kind: Kind,
}

enum Kind {
    Document(String),
    Certificate(String),
}

impl Challenges {
    /// Shows a document to whoever asks for this token, on ports with HTTP and without TLS.
    pub fn show_document(self: &Arc<Self>, token: &str, text: &str) -> Proof {
        self.lock().documents.insert(token.to_string(), Bytes::copy_from_slice(text.as_bytes()));
        self.hold(Kind::Document(token.to_string()))
    }

    /// Shows a certificate to authorities that ask for this host name, on ports with TLS. Both are DER; the key is ECDSA's, in PKCS #8.
    ///
    /// # Errors
    /// The key is none.
    pub fn show_certificate(
        self: &Arc<Self>,
        name: &str,
        certificate: Vec<u8>,
        key: Vec<u8>,
    ) -> Result<Proof, rustls::Error> {
        let key = ring::sign::any_ecdsa_type(&PrivatePkcs8KeyDer::from(key).into())?;
        // Not checked, as rustls would: what makes it a proof is an extension that no client may pass over.
        let pair = SingleCertAndKey::from(CertifiedKey::new(vec![CertificateDer::from(certificate)], key));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(pair));
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        self.lock().certificates.insert(name.to_ascii_lowercase(), Arc::new(config));
        Ok(self.hold(Kind::Certificate(name.to_ascii_lowercase())))
    }

    /// The document that is asked for with this path. Other tokens are an app's own matter.
    pub(crate) fn document(&self, path: &str) -> Option<Bytes> {
        let token = path.strip_prefix(DOCUMENTS).filter(|_| self.count.load(Relaxed) > 0)?;
        self.lock().documents.get(token).cloned()
    }

    /// What is shown to an authority that asks for this name.
    pub(crate) fn certificate(&self, name: &str) -> Option<Arc<ServerConfig>> {
        self.lock().certificates.get(&name.to_ascii_lowercase()).cloned()
    }

    fn hold(self: &Arc<Self>, kind: Kind) -> Proof {
        self.count.fetch_add(1, Relaxed);
        Proof { challenges: self.clone(), kind }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        self.challenges.count.fetch_sub(1, Relaxed);
        let mut shown = self.challenges.lock();
        match &self.kind {
            Kind::Document(token) => _ = shown.documents.remove(token),
            Kind::Certificate(name) => _ = shown.certificates.remove(name),
        }
    }
}

/// Whether a client is an authority that wants to see a proof: it speaks nothing else (RFC 8737, section 3).
pub(crate) fn is_authority<'p>(mut protocols: impl Iterator<Item = &'p [u8]>) -> bool {
    protocols.next() == Some(PROTOCOL) && protocols.next().is_none()
}

impl fmt::Debug for Challenges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Challenges").field("count", &self.count).finish_non_exhaustive()
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proof")
    }
}
