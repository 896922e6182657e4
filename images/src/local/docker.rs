//! The local docker daemon, asked through its Unix socket.
//!
//! HTTP/1.0 on purpose: the answer then ends with the connection and is not chunked, so that a few lines read it.

use std::{
    env,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use serde::Deserialize;

use super::{Import, Imported, TarIndex, docker_archive};
use crate::{Digest, Error, RegistryName, Result, oci, store::files};

/// Most bytes of the head of an answer, and of an answer that is a document.
const MAX_ANSWER_BYTES: u64 = 8 << 20;
const MAX_HEAD_LINES: usize = 100;
/// How long the daemon may be silent. It prepares an archive before its first byte.
const SILENCE: Duration = Duration::from_secs(120);

/// The daemon's id of an image, which changes when the name is given to another one.
pub(super) fn image_id(name: &RegistryName) -> Result<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Inspected {
        id: String,
    }
    let target = format!("/images/{}/json", name.familiar_name());
    let mut answer = Vec::new();
    let fail = |error| Error::io("read from", "docker's socket", error);
    get(&target, name)?.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).map_err(fail)?;
    let inspected: Inspected = serde_json::from_slice(&answer).map_err(|error| Error::Protocol {
        url: format!("docker{target}"),
        problem: format!("the answer does not parse: {error}"),
    })?;
    Ok(inspected.id)
}

/// Has the daemon save the image and imports that.
pub(super) fn import(import: &Import<'_>, name: &RegistryName) -> Result<Imported> {
    let key = Digest::of(import.name.as_bytes()).hex();
    let draft = import.store.root().join("tmp").join(format!("docker-{key}"));
    let Some(mut file) = files::open_draft(&draft, &|| false, &mut || {})? else {
        return Err(Error::NotInStore { name: import.name.into() });
    };
    let saved = save(name, &mut file, &draft);
    let imported = saved.and_then(|()| docker_archive::import(import, &TarIndex::open(&draft)?, None));
    files::remove(&draft)?;
    imported
}

fn save(name: &RegistryName, file: &mut File, path: &std::path::Path) -> Result<()> {
    let mut answer = get(&format!("/images/{}/get", name.familiar_name()), name)?;
    let copied = file.set_len(0).and_then(|()| io::copy(&mut answer, file));
    copied.map(drop).map_err(|error| Error::io("write", path, error))
}

/// The body of the daemon's answer.
fn get(target: &str, name: &RegistryName) -> Result<BufReader<UnixStream>> {
    let socket = socket()?;
    let fail = |error| Error::io("talk to the docker daemon at", &socket, error);
    let mut stream = UnixStream::connect(&socket).map_err(fail)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(fail)?;
    stream.set_write_timeout(Some(SILENCE)).map_err(fail)?;
    write!(stream, "GET {target} HTTP/1.0\r\nHost: docker\r\nConnection: close\r\n\r\n").map_err(fail)?;
    let mut reader = BufReader::new(stream);
    let status = read_head(&mut reader).map_err(fail)?;
    match status {
        Some(200) => Ok(reader),
        Some(404) => Err(Error::NotInDocker { name: name.familiar_name() }),
        Some(status) => {
            let mut body = Vec::new();
            reader.take(2000).read_to_end(&mut body).map_err(fail)?;
            let message = format!(": {}", oci::clip(&String::from_utf8_lossy(&body)));
            Err(Error::Status { url: format!("docker{target}"), status, message })
        }
        None => {
            Err(Error::Protocol { url: format!("docker{target}"), problem: "the answer is not HTTP".into() })
        }
    }
}

/// Reads status line and headers; the status, if it is HTTP.
pub(super) fn read_head(reader: &mut impl BufRead) -> io::Result<Option<u16>> {
    let mut status = None;
    for number in 0..MAX_HEAD_LINES {
        let mut line = Vec::new();
        reader.by_ref().take(8192).read_until(b'\n', &mut line)?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if number == 0 {
            let code = text.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1));
            status = code.and_then(|code| code.parse().ok());
        }
        if text.is_empty() || status.is_none() {
            return Ok(status);
        }
    }
    Ok(None)
}

fn socket() -> Result<PathBuf> {
    match env::var("DOCKER_HOST") {
        Err(_) => Ok("/var/run/docker.sock".into()),
        Ok(host) if host.is_empty() => Ok("/var/run/docker.sock".into()),
        Ok(host) => match host.strip_prefix("unix://") {
            Some(path) => Ok(path.into()),
            None => Err(Error::Unsupported {
                what: format!("DOCKER_HOST={host}"),
                problem: "is not a Unix socket: use `docker save -o FILE IMAGE` and docker-archive:FILE"
                    .into(),
            }),
        },
    }
}
