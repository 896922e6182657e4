//! One order, from the account to the chain (RFC 8555, section 7).

use std::sync::Arc;
use std::time::Duration;

use app::config::model::AcmeWay;
use instant_acme::{
    Account, AuthorizationStatus, ChallengeHandle, ChallengeType, Error as AcmeError, Identifier, NewAccount,
    NewOrder, Order, OrderStatus, RetryPolicy,
};
use proxy::{Challenges, Proof};
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use tokio::sync::Mutex;

use super::Wish;
use super::client::Client;
use super::store::Store;
use crate::error::{Context as _, Error, Result};

/// An authority looks from several places, and may have others to serve first.
const LOOKS: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(120));
/// What an authority says of an account that it does not know (any more).
const UNKNOWN_ACCOUNT: &str = "urn:ietf:params:acme:error:accountDoesNotExist";

/// Where orders are made.
pub struct Desk {
    pub store: Store,
    challenges: Arc<Challenges>,
    /// Apps of one authority share an account: it is made once.
    accounts: Mutex<()>,
}

impl Desk {
    pub fn new(store: Store, challenges: Arc<Challenges>) -> Desk {
        Desk { store, challenges, accounts: Mutex::default() }
    }

    /// A new key and the certificate for it, in PEM.
    ///
    /// # Errors
    /// Whatever the authority says, or could not see.
    pub async fn order(&self, wish: &Wish, way: AcmeWay) -> Result<String> {
        let identifiers: Vec<_> = wish.names.iter().map(|name| Identifier::Dns(name.clone())).collect();
        let wanted = NewOrder::new(&identifiers);
        let mut order = match self.account(wish).await?.new_order(&wanted).await {
            Err(AcmeError::Api(problem)) if problem.r#type.as_deref() == Some(UNKNOWN_ACCOUNT) => {
                self.store.forget_account(&wish.acme.directory, wish.acme.email.as_deref());
                self.account(wish).await?.new_order(&wanted).await
            }
            other => other,
        }
        .map_err(|error| told("the authority takes no order", &error))?;
        // Held until it has looked.
        let proofs = self.prove(&mut order, way).await?;
        let looked = order.poll_ready(&LOOKS).await;
        if !matches!(looked, Ok(OrderStatus::Ready)) {
            return Err(not_proved(&mut order, way, looked.err()).await);
        }
        drop(proofs);
        let key = order.finalize().await.map_err(|error| told("the authority does not sign", &error))?;
        let chain = order.poll_certificate(&LOOKS).await;
        let chain = chain.map_err(|error| told("the authority gives no certificate", &error))?;
        Ok(format!("{key}{chain}"))
    }

    async fn account(&self, wish: &Wish) -> Result<Account> {
        let url = &wish.acme.directory;
        let email = wish.acme.email.as_deref();
        let ca = wish.acme.ca.as_ref().map(|ca| wish.directory.join(ca));
        let builder = Account::builder_with_http(Box::new(Client::new(url, ca.as_deref())?));
        let unreachable = |error: &AcmeError| told(&format!("no account at {url}"), error);
        let _one = self.accounts.lock().await;
        if let Some(known) = self.store.account(url, email) {
            return builder.from_credentials(known).await.map_err(|error| unreachable(&error));
        }
        let contact = email.map(|email| format!("mailto:{email}"));
        let contact: Vec<_> = contact.iter().map(String::as_str).collect();
        let new =
            NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
        let made = builder.create(&new, url.clone(), None).await;
        let (account, credentials) = made.map_err(|error| unreachable(&error))?;
        self.store.keep_account(url, email, &credentials)?;
        Ok(account)
    }

    /// Shows what proves each name that the authority does not know to be ours, and has it look.
    async fn prove(&self, order: &mut Order, way: AcmeWay) -> Result<Vec<Proof>> {
        let mut proofs = Vec::new();
        let refused = |error: &AcmeError| told("the authority does not look", error);
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization.map_err(|error| refused(&error))?;
            let (name, status) = (authorization.identifier().to_string(), authorization.status);
            match status {
                AuthorizationStatus::Valid => continue,
                AuthorizationStatus::Pending => {}
                status => return Err(Error::new(format!("the authority has {name} as {status:?}"))),
            }
            let Some(mut challenge) = authorization.challenge(kind(way)) else {
                return Err(Error::new(format!("the authority does not look at {name} by {}", word(way))));
            };
            proofs.push(self.show(&name, way, &challenge)?);
            challenge.set_ready().await.map_err(|error| refused(&error))?;
        }
        Ok(proofs)
    }

    fn show(&self, name: &str, way: AcmeWay, challenge: &ChallengeHandle<'_>) -> Result<Proof> {
        let answer = challenge.key_authorization();
        if way == AcmeWay::Http01 {
            return Ok(self.challenges.show_document(&challenge.token, answer.as_str()));
        }
        let told = || format!("cannot make a certificate for {name}");
        // RFC 8737, section 3.
        let mut params = CertificateParams::new([name.to_string()]).context(told())?;
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(answer.digest().as_ref())];
        let key = KeyPair::generate().context(told())?;
        let certificate = params.self_signed(&key).context(told())?.der().to_vec();
        self.challenges.show_certificate(name, certificate, key.serialize_der()).context(told())
    }
}

fn kind(way: AcmeWay) -> ChallengeType {
    match way {
        AcmeWay::Http01 => ChallengeType::Http01,
        AcmeWay::TlsAlpn01 => ChallengeType::TlsAlpn01,
    }
}

fn word(way: AcmeWay) -> &'static str {
    match way {
        AcmeWay::Http01 => "a request to port 80 (HTTP-01)",
        AcmeWay::TlsAlpn01 => "a connection to port 443 (TLS-ALPN-01)",
    }
}

/// What the authority has to say of each name that it did not see proved.
async fn not_proved(order: &mut Order, way: AcmeWay, error: Option<AcmeError>) -> Error {
    let mut reasons = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let name = authorization.identifier().to_string();
        let Ok(state) = authorization.refresh().await else { continue };
        let problems =
            state.challenges.iter().filter_map(|challenge| challenge.error.as_ref()?.detail.clone());
        reasons.extend(problems.map(|detail| format!("{name}: {detail}")));
    }
    let what = format!("the authority has not seen by {} that the names lead here", word(way));
    match error {
        _ if !reasons.is_empty() => Error::new(format!("{what}: {}", reasons.join("; "))),
        Some(error) => told(&what, &error),
        None => Error::new(what),
    }
}

/// What a client, or an authority, says goes to a log: one line, and not too long a one.
fn told(what: &str, error: &AcmeError) -> Error {
    let text: String = error.to_string().chars().filter(|c| !c.is_control()).take(1000).collect();
    Error::new(format!("{what}: {}", text.strip_prefix("API error: ").unwrap_or(&text)))
}
