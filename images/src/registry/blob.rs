//! One blob from a registry: streamed into the store, continued where it broke off.

use std::time::Instant;

use reqwest::{Response, StatusCode, Url, header::CONTENT_RANGE};
use tokio::runtime::Runtime;

use super::session::{Failure, Session, protocol, show};
use crate::{Digest, Error, Event, Layer, Result, Store, store::BlobWriter};

/// An attempt that brings this many bytes does not count as one: a large blob on a bad line arrives in pieces.
const GOOD_ATTEMPT_BYTES: u64 = 1 << 20;

/// Fetches a layer into the store.
pub(super) fn fetch(store: &Store, session: &Session<'_>, runtime: &Runtime, layer: &Layer) -> Result<()> {
    let &Layer { digest, size, .. } = layer;
    let progress = session.shared.progress;
    // What a dead process left may be wrong: then everything is fetched once more, and only once.
    let mut may_start_over = true;
    loop {
        let mut on_wait = || progress.event(Event::Waiting { digest });
        let Some(mut writer) = store.begin_blob(&digest, size, &mut on_wait)? else {
            progress.event(Event::LayerExists { digest, size });
            return Ok(());
        };
        let resumed_from = writer.written();
        progress.event(Event::LayerStarted { digest, size, resumed_from });
        runtime.block_on(fill(session, digest, size, &mut writer))?;
        match writer.finish() {
            Ok(()) => {
                progress.event(Event::LayerDone { digest, size });
                return Ok(());
            }
            Err(Error::DigestMismatch { .. }) if resumed_from > 0 && may_start_over => may_start_over = false,
            Err(error) => return Err(error),
        }
    }
}

/// Asks until all bytes are there.
async fn fill(session: &Session<'_>, digest: Digest, size: u64, writer: &mut BlobWriter) -> Result<()> {
    let url = session.url("blobs", &digest.to_string())?;
    let mut attempt = 1;
    while writer.written() < size {
        let before = writer.written();
        let Err(failure) = fetch_rest(session, &url, digest, size, writer).await else { continue };
        if session.shared.is_cancelled() {
            return Err(failure.error);
        }
        if writer.written() >= before.saturating_add(GOOD_ATTEMPT_BYTES) {
            attempt = 1;
        }
        match session.shared.delay(attempt, &failure) {
            Some(delay) => tokio::time::sleep(delay).await,
            None => return Err(failure.error),
        }
        attempt += 1;
    }
    Ok(())
}

async fn fetch_rest(
    session: &Session<'_>,
    url: &Url,
    digest: Digest,
    size: u64,
    writer: &mut BlobWriter,
) -> Result<(), Failure> {
    let from = writer.written();
    let mut response = match session.get_blob(url, from).await {
        // The range is not to its liking; the whole may be.
        Err(Failure { error: Error::Status { status: 416, .. }, .. }) if from > 0 => {
            writer.restart()?;
            session.get_blob(url, 0).await?
        }
        result => result?,
    };
    place(&response, url, writer)?;
    let wanted = size.saturating_sub(writer.written());
    if let Some(got) = response.content_length().filter(|&got| got != wanted) {
        let what = format!("the blob {digest} at {}", show(url));
        return Err(Error::SizeMismatch { what, wanted, got }.into());
    }
    let mut pace = session.pace();
    while let Some(chunk) = response.chunk().await.map_err(|error| session.transport(url, &error))? {
        if session.shared.is_cancelled() {
            return Err(Error::Unreachable { url: show(url), problem: "the pull was given up".into() }.into());
        }
        writer.write(&chunk)?;
        session.shared.progress.event(Event::LayerProgress { digest, bytes: writer.written() });
        if writer.written() < size && !pace.holds(chunk.len() as u64, Instant::now()) {
            return Err(session.too_slow(url));
        }
    }
    if writer.written() < size {
        let problem = format!("the connection ended after {} of {size} bytes", writer.written());
        return Err(Failure::passing(Error::Unreachable { url: show(url), problem }));
    }
    Ok(())
}

/// Makes the writer stand where the answer begins (RFC 9110, section 14.4).
fn place(response: &Response, url: &Url, writer: &mut BlobWriter) -> Result<()> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return if writer.written() > 0 { writer.restart() } else { Ok(()) };
    }
    let header = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    if header.and_then(range_start) == Some(writer.written()) {
        return Ok(());
    }
    writer.restart()?;
    Err(protocol(url, "it answers with another range than was asked for".into()))
}

/// The first byte that a `Content-Range` tells of.
pub(super) fn range_start(header: &str) -> Option<u64> {
    header.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}
