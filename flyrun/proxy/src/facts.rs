//! What a certificate says of itself. Pure.

use std::time::{Duration, SystemTime};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// For whom a certificate is, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The host names, in lower case.
    pub names: Vec<String>,
    /// From when on it holds.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
}

impl Facts {
    /// Of a chain and its key, in one PEM.
    ///
    /// # Errors
    /// What is missing, or does not belong together.
    pub fn of_pair(pem: &[u8]) -> Result<Facts, String> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        let first = chain.first().cloned().ok_or("there is no certificate")?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| format!("the key: {error}"))?;
        CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|error| error.to_string())?;
        Facts::of_der(&first).ok_or_else(|| "the certificate cannot be read".to_string())
    }

    pub(crate) fn of_der(der: &[u8]) -> Option<Facts> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        });
        let validity = certificate.validity();
        let time = |timestamp: i64| {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(timestamp).ok()?))
        };
        Some(Facts {
            names: names.collect(),
            not_before: time(validity.not_before.timestamp())?,
            not_after: time(validity.not_after.timestamp())?,
        })
    }

    /// Seconds until it holds no more; below zero afterwards.
    pub fn seconds_left(&self, now: SystemTime) -> f64 {
        match self.not_after.duration_since(now) {
            Ok(left) => left.as_secs_f64(),
            Err(past) => -past.duration().as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_times_are_read() {
        let mut params =
            rcgen::CertificateParams::new(["A.example.com", "192.0.2.1", "b.example.com"].map(String::from))
                .unwrap();
        params.not_before = rcgen::date_time_ymd(2026, 1, 2);
        params.not_after = rcgen::date_time_ymd(2026, 4, 2);
        let key = rcgen::KeyPair::generate().unwrap();
        let made = params.self_signed(&key).unwrap();
        let pair = made.pem() + &key.serialize_pem();
        let facts = Facts::of_pair(pair.as_bytes()).unwrap();
        assert_eq!(facts.names, ["a.example.com", "b.example.com"]);
        assert_eq!(
            facts.not_after.duration_since(facts.not_before).unwrap(),
            Duration::from_secs(90 * 86_400)
        );
        assert_eq!(facts.seconds_left(facts.not_before), 90.0 * 86_400.0);
        assert_eq!(facts.seconds_left(facts.not_after + Duration::from_secs(1)), -1.0);
        assert_eq!(Facts::of_der(&made.der()[..100]), None);
        let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
        for bad in [String::new(), made.pem(), other.clone(), made.pem() + &other] {
            assert!(Facts::of_pair(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
