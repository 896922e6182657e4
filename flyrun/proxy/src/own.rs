//! Answers that no machine gave.

use std::borrow::Cow;
use std::future::poll_fn;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, DATE, LOCATION, RETRY_AFTER, SERVER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use crate::machines::Refusal;
use crate::watch::Watch;
use crate::wire::{Broken, Frame, Respond, Size};

const FLY_REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");

/// What a client is told, and the log.
#[derive(Debug)]
pub(crate) struct Own {
    pub status: StatusCode,
    /// One sentence, for the client.
    pub why: Cow<'static, str>,
    /// What the log has besides.
    pub detail: Option<String>,
    retry_after: Duration,
    gives: Gives,
    /// Nothing more is read from this client.
    closes: bool,
}

#[derive(Debug)]
enum Gives {
    Reason,
    /// The reason, and where to go.
    Location(HeaderValue),
    /// What was asked for.
    Document(Bytes),
}

impl Own {
    pub fn new(status: StatusCode, why: impl Into<Cow<'static, str>>) -> Own {
        Own {
            status,
            why: why.into(),
            detail: None,
            retry_after: Duration::ZERO,
            gives: Gives::Reason,
            closes: false,
        }
    }

    pub fn refused(refusal: &Refusal) -> Own {
        let status = if refusal.not_found { StatusCode::NOT_FOUND } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut own = Own::new(status, sentence(&refusal.why));
        own.detail = Some(format!("{} (id {})", refusal.why, refusal.id));
        own.retry_after = refusal.retry_after;
        own
    }

    pub fn redirect(to: &str) -> Own {
        let mut own = Own::new(StatusCode::MOVED_PERMANENTLY, "This is served over https.");
        if let Ok(location) = HeaderValue::from_str(to) {
            own.gives = Gives::Location(location);
        }
        own
    }

    /// What an authority has asked for.
    pub fn document(document: Bytes) -> Own {
        Own { gives: Gives::Document(document), ..Own::new(StatusCode::OK, "") }
    }

    /// Why a machine did not answer, if one was to.
    pub fn error(&self) -> Option<String> {
        let detail = self.detail.as_deref().map(|detail| format!(": {detail}")).unwrap_or_default();
        (!matches!(self.gives, Gives::Document(_))).then(|| format!("{}{detail}", self.why))
    }

    pub fn after(mut self, retry_after: Duration) -> Own {
        self.retry_after = retry_after;
        self
    }

    pub fn detailed(mut self, detail: impl Into<String>) -> Own {
        self.detail = Some(detail.into());
        self
    }

    pub fn closing(mut self) -> Own {
        self.closes = true;
        self
    }

    /// Writes it; the bytes of its body are returned.
    pub async fn send(
        &self,
        respond: &mut impl Respond,
        method: &Method,
        id: &HeaderValue,
        watch: &mut Watch,
        limit: Duration,
    ) -> Result<u64, Broken> {
        let id_text = id.to_str().unwrap_or_default();
        let body = match &self.gives {
            Gives::Document(document) => document.clone(),
            Gives::Reason | Gives::Location(_) => Bytes::from(format!("{} (id {id_text})\n", self.why)),
        };
        let mut fields = HeaderMap::with_capacity(8);
        fields.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        fields.insert(SERVER, HeaderValue::from_static("flyrun"));
        fields.insert(DATE, crate::date::value(SystemTime::now()));
        fields.insert(FLY_REQUEST_ID, id.clone());
        if !self.retry_after.is_zero() {
            // Whole seconds, and not before the time.
            let seconds = self.retry_after.as_secs() + u64::from(self.retry_after.subsec_nanos() > 0);
            fields.insert(RETRY_AFTER, seconds.into());
        }
        if let Gives::Location(location) = &self.gives {
            fields.insert(LOCATION, location.clone());
            fields.remove(CACHE_CONTROL);
        }
        if self.closes {
            respond.close();
        }
        let sent = body.len() as u64;
        watch.set(limit);
        if method == Method::HEAD {
            fields.insert(CONTENT_LENGTH, sent.into());
            respond.head(self.status, fields, Size::None)?;
        } else {
            respond.head(self.status, fields, Size::Known(sent))?;
            respond.push(Frame::Data(body))?;
        }
        respond.end()?;
        poll_fn(|cx| {
            if watch.poll(cx).is_ready() {
                return std::task::Poll::Ready(Err(Broken::Closed));
            }
            respond.poll_flush(cx)
        })
        .await?;
        Ok(sent)
    }
}

/// With a full stop.
fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.ends_with(['.', '!', '?']) { text.to_string() } else { format!("{text}.") }
}
