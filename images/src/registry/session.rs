//! Requests to one registry: who asks, where redirects lead, what is tried again.

use std::{
    error::Error as _,
    fs,
    net::IpAddr,
    path::Path,
    sync::Arc,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::{
    Certificate, Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE},
    redirect,
};
use serde::Deserialize;

use super::{
    challenge::Challenge,
    credentials::Credentials,
    names::{Names, TooNear},
    pace::Pace,
};
use crate::{
    Error, Event, Progress, PullOptions, RegistryName, Result, oci, reference::DOCKER_HUB, store::files,
};

/// Most redirects that are followed from one request.
const MAX_REDIRECTS: usize = 5;
/// Most bytes of an answer that is an error, a token or a challenge.
const MAX_SMALL_BYTES: u64 = 1 << 20;
/// First and longest pause before a request is repeated.
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(20);

/// What all workers of one pull share.
pub(super) struct Shared<'a> {
    pub name: &'a RegistryName,
    pub options: &'a PullOptions,
    pub progress: &'a dyn Progress,
    /// Set by whoever fails, so that the others stop.
    pub cancelled: AtomicBool,
    /// `Authorization` for the registry, once it has asked for it.
    authorization: Mutex<Option<HeaderValue>>,
}

/// One worker's connections to a registry. It belongs to the worker's runtime.
pub(super) struct Session<'a> {
    pub shared: &'a Shared<'a>,
    client: Client,
    base: Url,
    names: Names,
}

/// Why a request failed, and whether it may succeed when repeated.
pub(super) struct Failure {
    pub error: Error,
    pub passing: bool,
    /// How long the registry wants to be left alone.
    pub after: Option<Duration>,
}

impl Failure {
    pub(super) fn passing(error: Error) -> Self {
        Self { error, passing: true, after: None }
    }
}

impl From<Error> for Failure {
    /// Whatever is not known to pass does not.
    fn from(error: Error) -> Self {
        Self { error, passing: false, after: None }
    }
}

impl<'a> Shared<'a> {
    pub(super) fn new(name: &'a RegistryName, options: &'a PullOptions, progress: &'a dyn Progress) -> Self {
        let (cancelled, authorization) = (AtomicBool::new(false), Mutex::new(None));
        Self { name, options, progress, cancelled, authorization }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn authorization(&self) -> Option<HeaderValue> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_authorization(&self, value: HeaderValue) {
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    /// Tells that a request is repeated and how long to wait before. None when it has been repeated often enough.
    pub(super) fn delay(&self, attempt: u32, failure: &Failure) -> Option<Duration> {
        if !failure.passing || attempt > self.options.retries || self.is_cancelled() {
            return None;
        }
        let delay = FIRST_DELAY.saturating_mul(1 << attempt.saturating_sub(1).min(10));
        let delay = failure.after.unwrap_or(delay).min(LONGEST_DELAY);
        let error = failure.error.to_string();
        self.progress.event(Event::Retrying { attempt: attempt + 1, delay, error: &error });
        Some(delay)
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, base: Url) -> Result<Self> {
        let names = Names::new(&base);
        let client = Client::builder()
            .dns_resolver(Arc::new(names.clone()))
            .user_agent(concat!("flyrun/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(shared.options.connect_timeout)
            .read_timeout(shared.options.stall_timeout)
            // Redirects are followed here, for credentials must not.
            .redirect(redirect::Policy::none());
        let client = if is_loopback(&base) { client.no_proxy() } else { client };
        let client = client.tls_certs_merge(extra_certificates(&shared.name.registry)?);
        let client = client.build().map_err(|error| unreachable(&base, &error))?;
        Ok(Self { shared, client, base, names })
    }

    /// The address of something of this image's repository.
    pub(super) fn url(&self, kind: &str, name: &str) -> Result<Url> {
        let path = format!("/v2/{}/{kind}/{name}", self.shared.name.repository);
        self.base.join(&path).map_err(|error| protocol(&self.base, format!("{path}: {error}")))
    }

    /// A small document: the bytes, and the headers that came with them.
    pub(super) async fn get_document(
        &self,
        url: Url,
        accept: &'static str,
        limit: u64,
    ) -> Result<(Vec<u8>, HeaderMap)> {
        let mut attempt = 1;
        loop {
            match self.try_get_document(&url, accept, limit).await {
                Ok(document) => return Ok(document),
                Err(failure) => match self.shared.delay(attempt, &failure) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    None => return Err(failure.error),
                },
            }
            attempt += 1;
        }
    }

    async fn try_get_document(
        &self,
        url: &Url,
        accept: &'static str,
        limit: u64,
    ) -> Result<(Vec<u8>, HeaderMap), Failure> {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
        let response = self.get(url, headers).await?;
        let headers = response.headers().clone();
        Ok((self.read_all(response, url, limit).await?, headers))
    }

    /// A blob's answer, from this byte on.
    pub(super) async fn get_blob(&self, url: &Url, from: u64) -> Result<Response, Failure> {
        let mut headers = HeaderMap::new();
        if from > 0
            && let Ok(range) = HeaderValue::try_from(format!("bytes={from}-"))
        {
            headers.insert(RANGE, range);
        }
        self.get(url, headers).await
    }

    /// Asks, proves who asks if the registry wants that, and follows where it sends us.
    async fn get(&self, url: &Url, headers: HeaderMap) -> Result<Response, Failure> {
        let response = self.follow(url, &headers).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.check(response).await;
        }
        self.authenticate(&response).await?;
        let response = self.follow(url, &headers).await?;
        self.check(response).await
    }

    async fn follow(&self, url: &Url, headers: &HeaderMap) -> Result<Response, Failure> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = headers.clone();
            if url.origin() == self.base.origin()
                && let Some(authorization) = self.shared.authorization()
            {
                headers.insert(AUTHORIZATION, authorization);
            }
            let response = self.send(self.client.get(url.clone()).headers(headers), &url).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let next = next.ok_or_else(|| protocol(&url, "it redirects to nowhere".into()))?;
            let secure = next.scheme() == "https" || next.scheme() == "http" && url.scheme() == "http";
            if !secure {
                let problem = format!("it redirects to {}, which is not secure", show(&next));
                return Err(protocol(&url, problem).into());
            }
            self.admit(&next)?;
            url = next;
        }
        Err(protocol(&url, format!("it redirects more than {MAX_REDIRECTS} times")).into())
    }

    /// Whether the registry may send us there. A name that stands for nothing it may is found out when it is connected to.
    fn admit(&self, next: &Url) -> Result<()> {
        let host = next.host_str().unwrap_or_default();
        if self.shared.options.inward_hosts.iter().any(|allowed| allowed == host) {
            return Ok(());
        }
        self.names.admit(next).map_err(|near| inward(next, near))
    }

    /// Watches how quickly a body comes.
    pub(super) fn pace(&self) -> Pace {
        let options = self.shared.options;
        Pace::new(options.stall_timeout, options.min_bytes_per_second, Instant::now())
    }

    pub(super) fn too_slow(&self, url: &Url) -> Failure {
        let PullOptions { stall_timeout: span, min_bytes_per_second: wanted, .. } = *self.shared.options;
        Failure::passing(Error::TooSlow { url: show(url), span, wanted })
    }

    async fn send(&self, request: reqwest::RequestBuilder, url: &Url) -> Result<Response, Failure> {
        request.send().await.map_err(|error| self.transport(url, &error))
    }

    /// Everything on the way to an answer may pass, but for a certificate that is not trusted.
    pub(super) fn transport(&self, url: &Url, error: &reqwest::Error) -> Failure {
        let options = self.shared.options;
        if error.is_timeout() && !error.is_connect() {
            return Failure::passing(Error::Stalled { url: show(url), after: options.stall_timeout });
        }
        if let Some(near) = cause_of::<TooNear>(error) {
            return inward(url, *near).into();
        }
        let failure = Failure::passing(unreachable(url, error));
        let text = failure.error.to_string();
        Failure { passing: !(text.contains("certificate") || error.is_builder()), ..failure }
    }

    /// Makes an error of an answer that is one.
    async fn check(&self, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let name = self.shared.name;
        let (image, registry) = (name.canonical_name(), name.registry.clone());
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let with = Credentials::find(&self.shared.options.auth, name)?.describe();
                return Err(Error::Unauthorized { name: image, registry, with }.into());
            }
            StatusCode::NOT_FOUND => return Err(Error::NotFound { name: image, registry }.into()),
            _ => {}
        }
        let passing = status.is_server_error()
            || status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT;
        let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let url = response.url().clone();
        let body = self.read_all(response, &url, MAX_SMALL_BYTES).await.unwrap_or_default();
        let message = registry_message(&body).map(|text| format!(": {text}")).unwrap_or_default();
        let error = Error::Status { url: show(&url), status: status.as_u16(), message };
        Err(Failure { error, passing, after: after.map(Duration::from_secs) })
    }

    async fn read_all(&self, mut response: Response, url: &Url, limit: u64) -> Result<Vec<u8>, Failure> {
        oci::check_size(&show(url), response.content_length().unwrap_or(0), limit)?;
        let (mut bytes, mut pace) = (Vec::new(), self.pace());
        while let Some(chunk) = response.chunk().await.map_err(|error| self.transport(url, &error))? {
            oci::check_size(&show(url), bytes.len() as u64 + chunk.len() as u64, limit)?;
            bytes.extend_from_slice(&chunk);
            if !pace.holds(chunk.len() as u64, Instant::now()) {
                return Err(self.too_slow(url));
            }
        }
        Ok(bytes)
    }

    /// Gets the registry's next answer to be one, by the challenge in this one.
    async fn authenticate(&self, response: &Response) -> Result<(), Failure> {
        let name = self.shared.name;
        let credentials = Credentials::find(&self.shared.options.auth, name)?;
        let refused = || Error::Unauthorized {
            name: name.canonical_name(),
            registry: name.registry.clone(),
            with: credentials.describe(),
        };
        // Credentials are for the registry; a host that it sent us to has no business asking for them.
        if response.url().origin() != self.base.origin() {
            return Err(refused().into());
        }
        let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let header = headers.filter_map(|value| value.to_str().ok()).collect::<Vec<_>>().join(", ");
        match (Challenge::parse(&header), &credentials) {
            (Some(Challenge::Basic), Credentials::Password { username, password }) => {
                let request = self.client.get(self.base.clone()).basic_auth(username, Some(password)).build();
                let request = request.map_err(|error| self.transport(&self.base, &error))?;
                let value = request.headers().get(AUTHORIZATION).cloned().ok_or_else(refused)?;
                self.shared.set_authorization(value);
                Ok(())
            }
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                let token = self.token(&realm, service.as_deref(), scope.as_deref(), &credentials).await?;
                let value = HeaderValue::try_from(format!("Bearer {token}"));
                let value = value.map_err(|_| protocol(&self.base, "its token is not one".into()))?;
                self.shared.set_authorization(value);
                Ok(())
            }
            _ => Err(refused().into()),
        }
    }

    /// Asks the realm for a token (distribution's token specification; with a refresh token, its OAuth2 variant).
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        credentials: &Credentials,
    ) -> Result<String, Failure> {
        let malformed = |problem: String| protocol(&self.base, problem);
        let mut url = Url::parse(realm)
            .map_err(|_| malformed(format!("its realm {:?} is no address", oci::clip(realm))))?;
        if url.scheme() != "https" && !(url.scheme() == "http" && self.base.scheme() == "http") {
            return Err(malformed(format!("its realm {} is not secure", show(&url))).into());
        }
        self.admit(&url)?;
        let scope =
            scope.map_or_else(|| format!("repository:{}:pull", self.shared.name.repository), String::from);
        let mut fields = vec![("scope", scope.as_str())];
        fields.extend(service.map(|service| ("service", service)));
        let request = match credentials {
            Credentials::Nobody => self.client.get(with_query(&mut url, &fields)),
            Credentials::Password { username, password } => {
                self.client.get(with_query(&mut url, &fields)).basic_auth(username, Some(password))
            }
            Credentials::RefreshToken(token) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "flyrun"),
                    ("refresh_token", token),
                ]);
                let mut form = url.clone();
                form.set_query(None);
                let body = with_query(&mut form, &fields).query().unwrap_or_default().to_owned();
                let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
                self.client.post(url.clone()).header(reqwest::header::CONTENT_TYPE, form_type).body(body)
            }
        };
        let response = self.send(request, &url).await?;
        let response = self.check(response).await?;
        let body = self.read_all(response, &url, MAX_SMALL_BYTES).await?;
        let token = token_of(&body)
            .map_err(|error| malformed(format!("the token of {} does not parse: {error}", show(&url))))?;
        token.ok_or_else(|| malformed(format!("{} gave no token", show(&url))).into())
    }
}

/// The token in a realm's answer, if there is one.
pub(super) fn token_of(body: &[u8]) -> serde_json::Result<Option<String>> {
    #[derive(Deserialize)]
    struct Token {
        #[serde(default)]
        token: Option<String>,
        #[serde(default)]
        access_token: Option<String>,
    }
    let answer: Token = serde_json::from_slice(body)?;
    Ok(answer.token.or(answer.access_token).filter(|token| !token.is_empty()))
}

fn with_query(url: &mut Url, fields: &[(&str, &str)]) -> Url {
    url.query_pairs_mut().extend_pairs(fields);
    url.clone()
}

/// The addresses at which a registry may be, best first.
pub(super) fn addresses(name: &RegistryName, plain_http: bool) -> Result<Vec<Url>> {
    let host = if name.registry == DOCKER_HUB { "registry-1.docker.io" } else { &name.registry };
    let parse = |scheme: &str| {
        let text = format!("{scheme}://{host}/");
        Url::parse(&text).map_err(|error| Error::Unreachable { url: text, problem: error.to_string() })
    };
    match (plain_http, parse("https")?) {
        (true, _) => Ok(vec![parse("http")?]),
        (false, secure) if is_loopback(&secure) => Ok(vec![secure, parse("http")?]),
        (false, secure) => Ok(vec![secure]),
    }
}

/// The authorities that docker and podman trust for a registry beyond the system's (`certs.d/<host>/*.crt`).
fn extra_certificates(registry: &str) -> Result<Vec<Certificate>> {
    let mut certificates = Vec::new();
    for directory in ["/etc/docker/certs.d", "/etc/containers/certs.d"] {
        for (path, name) in files::list(&Path::new(directory).join(registry))? {
            if !name.ends_with(".crt") {
                continue;
            }
            let pem = fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
            let bundle = Certificate::from_pem_bundle(&pem).map_err(|error| Error::Malformed {
                what: path.display().to_string(),
                problem: format!("it is not a PEM certificate: {error}"),
            })?;
            certificates.extend(bundle);
        }
    }
    Ok(certificates)
}

/// Whether nobody but this machine can be listening.
fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The first of the errors that a registry tells (distribution spec, error codes).
pub(super) fn registry_message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        errors: Vec<Told>,
    }
    #[derive(Deserialize)]
    struct Told {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let first = answer.errors.first()?;
    let text = if first.message.is_empty() { &first.code } else { &first.message };
    Some(oci::clip(text))
}

pub(super) fn protocol(url: &Url, problem: String) -> Error {
    Error::Protocol { url: show(url), problem }
}

fn inward(url: &Url, near: TooNear) -> Error {
    Error::Inward {
        url: show(url),
        host: url.host_str().unwrap_or_default().into(),
        address: near.address,
        what: near.reach.name(),
    }
}

/// The first of an error's causes that is of this kind.
fn cause_of<E: std::error::Error + 'static>(error: &reqwest::Error) -> Option<&E> {
    std::iter::successors(error.source(), |&error| error.source()).find_map(|error| error.downcast_ref())
}

fn unreachable(url: &Url, error: &reqwest::Error) -> Error {
    // The crate's own words repeat the address; the causes below say what happened.
    let mut problem = String::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !problem.contains(&text) {
            problem = if problem.is_empty() { text } else { format!("{problem}: {text}") };
        }
        cause = error.source();
    }
    if problem.is_empty() {
        problem = if error.is_timeout() { "timed out".into() } else { "the connection broke".into() };
    }
    Error::Unreachable { url: show(url), problem }
}

/// An address without what may be secret in it: queries of storage services are signed.
pub(super) fn show(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for addresses that cannot have them.
    let _ = url.set_password(None).and_then(|()| url.set_username(""));
    oci::clip(url.as_str())
}
