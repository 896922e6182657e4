//! A real registry on loopback: Debian's docker-registry, filled by skopeo.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{fs, thread};

use tempfile::TempDir;

use crate::flyrun::scratch;

/// A running docker-registry with an empty storage.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    port: u16,
    credentials: Option<(String, String)>,
    directory: TempDir,
}

impl Registry {
    /// Starts one that anybody may use.
    pub fn start() -> Registry {
        Registry::start_with(None)
    }

    /// Starts one that wants a user's name and password.
    pub fn start_private(user: &str, password: &str) -> Registry {
        Registry::start_with(Some((user.to_string(), password.to_string())))
    }

    fn start_with(credentials: Option<(String, String)>) -> Registry {
        let directory = scratch();
        let port = free_port();
        let storage = directory.path().join("storage");
        let mut configuration = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
             http: {{addr: '127.0.0.1:{port}', secret: e2e}}\n",
            storage.display()
        );
        if let Some((user, password)) = &credentials {
            let file = directory.path().join("htpasswd");
            fs::write(&file, format!("{user}:{}\n", bcrypt(password))).unwrap();
            configuration += &format!("auth: {{htpasswd: {{realm: e2e, path: {}}}}}\n", file.display());
        }
        let file = directory.path().join("config.yml");
        fs::write(&file, configuration).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is not installed: run tests/setup");
        let mut registry = Registry { process, port, credentials, directory };
        registry.await_port();
        registry
    }

    fn await_port(&mut self) {
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("docker-registry ended with {status}:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the registry logged: one line a request.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The name of an image in it.
    pub fn name(&self, image: &str) -> String {
        format!("127.0.0.1:{}/{image}", self.port)
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Pushes an image by skopeo, from a source in skopeo's notation.
    pub fn push(&self, source: &str, image: &str) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]);
        if let Some((user, password)) = &self.credentials {
            command.args(["--dest-creds", &format!("{user}:{password}")]);
        }
        let output = command.arg(source).arg(format!("docker://{}", self.name(image))).output().unwrap();
        assert!(
            output.status.success(),
            "skopeo: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
    }

    /// The file that holds a blob, by its digest in hexadecimal.
    pub fn blob(&self, digest: &str) -> std::path::PathBuf {
        self.directory
            .path()
            .join("storage/docker/registry/v2/blobs/sha256")
            .join(&digest[..2])
            .join(digest)
            .join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

fn bcrypt(password: &str) -> String {
    let script =
        "import crypt, sys; print(crypt.crypt(sys.argv[1], crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16)))";
    let output =
        Command::new("/usr/bin/python3").args(["-W", "ignore", "-c", script, password]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}
