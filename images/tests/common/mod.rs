//! What the tests share: programs, images, a registry.
#![allow(dead_code)]

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use images::{Digest, Event, Progress};
use serde_json::{Value, json};

/// Runs a program, which must succeed. A missing one is a failure that names its Debian package.
pub fn run(package: &str, program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program} ({error}): apt install {package}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}", output.status);
    output
}

pub fn skopeo(arguments: &[&str]) {
    run("skopeo", "skopeo", &[&["--insecure-policy"], arguments].concat());
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An image made by umoci of these files, a layer each, in the layout at `layout` under `tag`.
pub fn umoci_image(layout: &Path, tag: &str, layers: &[(&str, &[u8])]) {
    let umoci = |arguments: &[&str]| run("umoci", "umoci", arguments);
    if !layout.exists() {
        umoci(&["init", "--layout", text(layout)]);
    }
    let image = format!("{}:{tag}", layout.display());
    umoci(&["new", "--image", &image]);
    let scratch = tempfile::tempdir().unwrap();
    for (name, contents) in layers {
        let file = scratch.path().join(name);
        fs::write(&file, contents).unwrap();
        umoci(&["insert", "--image", &image, text(&file), &format!("/{name}")]);
    }
    let config =
        ["config", "--image", &image, "--config.entrypoint", "/bin/sh", "--config.cmd", "-c", "--config.env"];
    umoci(
        &[
            &config[..],
            &["GREETING=hello world", "--config.user", "nobody:nogroup", "--config.workingdir", "/srv"],
        ]
        .concat(),
    );
}

/// A layout written by hand, for what tools do not make.
pub struct Layout {
    pub path: PathBuf,
    entries: Vec<Value>,
}

impl Layout {
    pub fn new(path: PathBuf) -> Self {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { path, entries: Vec::new() }
    }

    pub fn blob(&self, bytes: &[u8]) -> (Digest, usize) {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        (digest, bytes.len())
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }

    /// An image of plain layers for an architecture; its descriptor.
    pub fn image(&self, architecture: &str, layers: &[Vec<u8>]) -> Value {
        let blobs: Vec<_> = layers.iter().map(|layer| self.blob(layer)).collect();
        let diff_ids: Vec<_> = blobs.iter().map(|(digest, _)| digest).collect();
        let config = json!({"os": "linux", "architecture": architecture, "config": {"Cmd": ["/init"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let (config, config_size) = self.blob(config.to_string().as_bytes());
        let layers: Vec<_> = blobs
            .iter()
            .map(|(digest, size)| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size}))
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
            "layers": layers});
        let (digest, size) = self.blob(manifest.to_string().as_bytes());
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": architecture}})
    }

    /// An index of descriptors; its own descriptor.
    pub fn index(&self, manifests: &[Value]) -> Value {
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
        let (digest, size) = self.blob(index.to_string().as_bytes());
        json!({"mediaType": media_type, "digest": digest, "size": size})
    }

    /// Gives a descriptor a tag.
    pub fn tag(&mut self, mut descriptor: Value, tag: &str) {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.entries.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        fs::write(self.path.join("index.json"), index.to_string()).unwrap();
    }
}

/// Bytes that no compression makes smaller and no other seed makes again. They stand for a layer's tar: nothing here looks
/// into one.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

pub fn digest_of(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}

/// Debian's docker-registry on a loopback port of its own.
pub struct Registry {
    child: Child,
    pub port: u16,
    pub directory: tempfile::TempDir,
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// A registry that wants a user `alice` with the password `secret`.
    pub fn start_with_password() -> Self {
        let auth = "auth:\n  htpasswd:\n    realm: flyrun tests\n    path: DIRECTORY/htpasswd\n";
        Self::start_with(auth)
    }

    /// A registry with TLS, and a certificate in `certificate.pem` of its directory that nobody trusts unless told to.
    pub fn start_with_tls() -> Self {
        Self::start_with("  tls:\n    certificate: DIRECTORY/certificate.pem\n    key: DIRECTORY/key.pem\n")
    }

    fn start_with(extra: &str) -> Self {
        // Another process may take the free port before the registry does.
        for _ in 0..5 {
            let mut registry = Self::spawn(extra);
            if registry.comes_up() {
                return registry;
            }
            let log = fs::read_to_string(registry.directory.path().join("log")).unwrap();
            assert!(log.contains("address already in use"), "docker-registry does not start:\n{log}");
        }
        panic!("no port stays free for docker-registry");
    }

    fn spawn(extra: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        fs::write(directory.path().join("htpasswd"), format!("alice:{BCRYPT_OF_SECRET}\n")).unwrap();
        if extra.contains("tls:") {
            let at = |name: &str| directory.path().join(name).display().to_string();
            let request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=flyrun-test \
                           -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
            let files = ["-keyout".into(), at("key.pem"), "-out".into(), at("certificate.pem")];
            let arguments: Vec<&str> = request
                .split(' ')
                .filter(|word| !word.is_empty())
                .chain(files.iter().map(String::as_str))
                .collect();
            run("openssl", "openssl", &arguments);
        }
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {0}/data\n\
             http:\n  addr: 127.0.0.1:{port}\n{1}",
            text(directory.path()),
            extra.replace("DIRECTORY", text(directory.path())),
        );
        let file = directory.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", text(&file)])
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.path().join("log")).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry ({error}): apt install docker-registry"));
        Self { child, port, directory }
    }

    fn comes_up(&mut self) -> bool {
        loop {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// `127.0.0.1:PORT/NAME`.
    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Pushes an image with skopeo.
    pub fn push(&self, from: &str, name: &str, arguments: &[&str]) {
        let to = format!("docker://{}", self.name(name));
        let copy = ["copy", "--quiet", "--dest-tls-verify=false"];
        skopeo(&[&copy, arguments, &[from, &to]].concat());
    }

    /// The file in which the registry keeps a blob.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let directory = self.directory.path().join("data/docker/registry/v2/blobs/sha256");
        directory.join(&hex[..2]).join(&hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// bcrypt of `secret`, as `htpasswd -B` writes it.
const BCRYPT_OF_SECRET: &str = "$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW";

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Remembers what happened, in words.
#[derive(Default)]
pub struct Log(Mutex<Vec<String>>);

impl Log {
    pub fn count(&self, word: &str) -> usize {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter(|line| line.starts_with(word))
            .count()
    }

    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Progress for Log {
    fn event(&self, event: Event<'_>) {
        if !matches!(event, Event::LayerProgress { .. }) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{event:?}"));
        }
    }
}

/// A tiny HTTP server that does what it is told. `answer` gets the request's head and writes the answer.
pub struct Server {
    pub port: u16,
}

impl Server {
    pub fn start(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = std::sync::Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let answer = std::sync::Arc::clone(&answer);
                thread::spawn(move || {
                    let Ok(mut stream) = stream else { return };
                    if let Some(head) = read_head(&mut stream) {
                        answer(&head, &mut stream);
                    }
                });
            }
        });
        Self { port }
    }

    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }
}

fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// Writes a whole answer. Errors are the client's business: it may have gone.
pub fn reply(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) {
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}
