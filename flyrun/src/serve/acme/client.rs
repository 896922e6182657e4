//! How authorities are asked: over HTTPS alone, with answers of bounded size.

use std::error::Error as _;
use std::future::Future;
use std::net::IpAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use instant_acme::{BodyWrapper, BytesResponse, Error as AcmeError, HttpClient};
use reqwest::{Body, Certificate, redirect};

use crate::error::{Context as _, Error, Result};

/// Bytes of an answer; a chain of certificates is the longest.
const MAX_ANSWER: usize = 1 << 20;
/// For a request and its answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks one authority.
pub struct Client(reqwest::Client);

impl Client {
    /// For the directory at `url`. What is signed by one of the roots in the file is believed too.
    ///
    /// # Errors
    /// The file holds no certificate, or the host's own cannot be read.
    pub fn new(url: &str, ca: Option<&Path>) -> Result<Client> {
        // The first one counts, and all are the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("flyrun/", env!("CARGO_PKG_VERSION")))
            .https_only(true)
            .redirect(redirect::Policy::none())
            .timeout(PATIENCE);
        if is_loopback(url) {
            builder = builder.no_proxy();
        }
        if let Some(path) = ca {
            builder = builder.tls_certs_merge(roots(path)?);
        }
        Ok(Client(builder.build().context("cannot make HTTPS requests")?))
    }
}

fn roots(path: &Path) -> Result<Vec<Certificate>> {
    let told = || format!("ca: cannot read {}", path.display());
    let pem = std::fs::read(path).context(told())?;
    let roots = Certificate::from_pem_bundle(&pem).context(told())?;
    if roots.is_empty() {
        return Err(Error::new(format!("ca: {} has no certificate in PEM", path.display())));
    }
    Ok(roots)
}

/// Whether nobody but this host can be listening, so that no proxy leads there.
fn is_loopback(url: &str) -> bool {
    let host =
        url.parse::<http::Uri>().ok().and_then(|uri| uri.host().map(str::to_string)).unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

type Answer = Pin<Box<dyn Future<Output = std::result::Result<BytesResponse, AcmeError>> + Send>>;

impl HttpClient for Client {
    fn request(&self, request: Request<BodyWrapper<Bytes>>) -> Answer {
        let client = self.0.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let request = client.request(parts.method, parts.uri.to_string()).headers(parts.headers);
            let request = request.body(Body::wrap(body));
            let mut answer = request.send().await.map_err(told)?;
            let mut bytes = Vec::new();
            while let Some(piece) = answer.chunk().await.map_err(told)? {
                if bytes.len() + piece.len() > MAX_ANSWER {
                    return Err(AcmeError::Other("the authority's answer does not end".into()));
                }
                bytes.extend_from_slice(&piece);
            }
            let mut response = Response::new(());
            *response.status_mut() = answer.status();
            *response.headers_mut() = std::mem::take(answer.headers_mut());
            Ok(BytesResponse { parts: response.into_parts().0, body: Box::new(Bytes::from(bytes)) })
        })
    }
}

/// reqwest leaves the reason to the errors behind its own.
fn told(error: reqwest::Error) -> AcmeError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    AcmeError::Other(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_certificates() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        let error = |path: &Path| Client::new("https://a", Some(path)).err().unwrap().to_string();
        assert!(error(&path).starts_with("ca: cannot read "));
        std::fs::write(&path, "nothing").unwrap();
        assert!(error(&path).contains("ca.pem has no certificate in PEM"));
        assert!(Client::new("https://a", None).is_ok());
    }

    #[test]
    fn no_proxy_leads_to_this_host() {
        for url in ["https://localhost:14000/dir", "https://127.0.0.1/", "https://[::1]:1/"] {
            assert!(is_loopback(url), "{url}");
        }
        for url in ["https://localhost.example.com/", "https://192.0.2.1/", "https://example.com", ""] {
            assert!(!is_loopback(url), "{url}");
        }
    }
}
