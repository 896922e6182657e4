//! Certificates from files, and what clients are shown.
//!
//! A file that changes is read again; one that is wrong changes nothing but a line of the log.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use app::config::model::{App, Tls, TlsVersion};
use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::client::verify_server_name;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::facts::Facts;

/// What a port of an app shows.
#[derive(Debug)]
pub(crate) struct Offer {
    pub config: Arc<ServerConfig>,
}

/// All certificates that are in use, each once.
#[derive(Debug, Default)]
pub(crate) struct Certificates {
    pairs: Mutex<HashMap<(PathBuf, PathBuf), Arc<Pair>>>,
}

/// A certificate's chain and its key.
#[derive(Debug)]
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
    /// `None` until the files could be read once.
    current: ArcSwapOption<CertifiedKey>,
    /// What the current one says of itself.
    facts: ArcSwapOption<Facts>,
    /// The files that were last looked at.
    seen: Mutex<Option<[Stamp; 2]>>,
}

/// What changes when a file is written or replaced.
type Stamp = Option<(u64, u64, i64, i64, u64)>;

impl Certificates {
    /// What an app's port shows. Its certificates are read now if they are new.
    pub fn offer(
        &self,
        app: &App,
        directory: &Path,
        tls: &Tls,
        problems: &mut Vec<String>,
    ) -> Option<Arc<Offer>> {
        let pairs = app
            .certificates
            .iter()
            .map(|one| self.pair(directory.join(&one.certificate), directory.join(&one.key), problems))
            .collect();
        match config(Chooser { pairs }, tls) {
            Ok(config) => Some(Arc::new(Offer { config })),
            Err(error) => {
                problems.push(format!("app {}: TLS cannot be offered: {error}", app.name));
                None
            }
        }
    }

    fn pair(&self, certificate: PathBuf, key: PathBuf, problems: &mut Vec<String>) -> Arc<Pair> {
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || {
            let pair = Pair {
                certificate: certificate.clone(),
                key: key.clone(),
                current: ArcSwapOption::empty(),
                facts: ArcSwapOption::empty(),
                seen: Mutex::new(None),
            };
            problems.extend(pair.refresh());
            Arc::new(pair)
        };
        pairs.entry((certificate.clone(), key.clone())).or_insert_with(fresh).clone()
    }

    /// How many seconds each of those that are shown holds, by its file.
    pub fn left(&self, now: SystemTime) -> Vec<(PathBuf, f64)> {
        let pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let left = |pair: &Arc<Pair>| {
            let facts = pair.facts.load_full().filter(|_| Arc::strong_count(pair) > 1)?;
            Some((pair.certificate.clone(), facts.seconds_left(now)))
        };
        let mut all: Vec<_> = pairs.values().filter_map(left).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Reads what has changed, and forgets what no app uses. Blocks on the filesystem.
    pub fn refresh(&self) -> Vec<String> {
        let pairs: Vec<_> = {
            let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
            pairs.retain(|_, pair| Arc::strong_count(pair) > 1);
            pairs.values().cloned().collect()
        };
        pairs.iter().filter_map(|pair| pair.refresh()).collect()
    }
}

impl Pair {
    /// Reads the files if they have changed. What is wrong with them is told once.
    fn refresh(&self) -> Option<String> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = [stamp(&self.certificate), stamp(&self.key)];
        if *seen == Some(stamps) {
            return None;
        }
        let is_first = seen.replace(stamps).is_none();
        match self.read() {
            Ok(pair) => {
                self.facts.store(pair.cert.first().and_then(|first| Facts::of_der(first)).map(Arc::new));
                self.current.store(Some(Arc::new(pair)));
                None
            }
            Err(why) => {
                let so = match (is_first, self.current.load().is_some()) {
                    (_, true) => "The one that was read before is shown on.",
                    (true, false) | (false, false) => "Clients cannot connect until it can be read.",
                };
                Some(format!("the certificate {} is not used: {why}. {so}", self.certificate.display()))
            }
        }
    }

    fn read(&self) -> Result<CertifiedKey, String> {
        let chain: Vec<_> = CertificateDer::pem_file_iter(&self.certificate)
            .and_then(Iterator::collect)
            .map_err(|error| error.to_string())?;
        if chain.is_empty() {
            return Err("the file has no certificate in PEM".into());
        }
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| format!("its key {}: {error}", self.key.display()))?;
        CertifiedKey::from_der(chain, key, &ring::default_provider())
            .map_err(|error| format!("with the key {}: {error}", self.key.display()))
    }

    fn is_for(&self, name: &ServerName<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.load_full()?;
        let parsed = ParsedCertificate::try_from(current.cert.first()?).ok()?;
        verify_server_name(&parsed, name).ok().map(|()| current)
    }
}

fn stamp(path: &Path) -> Stamp {
    let data = fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.mtime(), data.mtime_nsec(), data.len()))
}

/// Selects among an app's certificates.
#[derive(Debug)]
struct Chooser {
    pairs: Vec<Arc<Pair>>,
}

impl ResolvesServerCert for Chooser {
    /// The first that has the name; if none has, the first, which the client may like or not.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let first = || self.pairs.iter().find_map(|pair| pair.current.load_full());
        if self.pairs.len() == 1 {
            return first();
        }
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        name.and_then(|name| self.pairs.iter().find_map(|pair| pair.is_for(&name))).or_else(first)
    }
}

fn config(chooser: Chooser, tls: &Tls) -> Result<Arc<ServerConfig>, rustls::Error> {
    let versions: Vec<_> = tls
        .versions
        .iter()
        .map(|version| match version {
            TlsVersion::V1_2 => &rustls::version::TLS12,
            TlsVersion::V1_3 => &rustls::version::TLS13,
        })
        .collect();
    let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(chooser));
    config.alpn_protocols = tls.alpn.iter().map(|name| name.clone().into_bytes()).collect();
    config.ticketer = ring::Ticketer::new()?;
    Ok(Arc::new(config))
}
