//! Linux with [`guest`] as its PID 1, in a `flyrun-vmm` of its own that is driven as a machine's owner does.

mod guest;

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use vmm::spec::VmSpec;

/// How long anything may take before a test is stuck; an emulated host is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// The kernel of `make build`: that of FLYRUN_BIN, or of this checkout.
pub fn kernel(name: &str) -> Option<PathBuf> {
    let beside = |bin: PathBuf| Some(bin.parent()?.parent()?.join("lib/flyrun").join(name));
    let built = || Path::new(env!("CARGO_BIN_EXE_flyrun-vmm")).ancestors().nth(2);
    let here = || built().map(|target| target.join("dist/lib/flyrun").join(name));
    let path = std::env::var_os("FLYRUN_BIN").map(PathBuf::from).map_or_else(here, beside)?;
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("FLYRUN_REQUIRE_KVM").is_none_or(|it| it != "1"),
        "FLYRUN_REQUIRE_KVM=1, but there is no kernel {}: make build",
        path.display()
    );
    eprintln!("SKIPPED, nothing was tested: there is no kernel {}", path.display());
    None
}

/// An initramfs with the guest and its libraries, in the cpio format "newc".
fn initramfs() -> &'static Path {
    static FILE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FILE.get_or_init(|| {
        let program = std::env::current_exe().unwrap();
        let listed = Command::new("ldd").arg(&program).output().unwrap().stdout;
        let mut archive = Vec::new();
        entry(&mut archive, "dev", 0o40755, &[]);
        entry(&mut archive, "dev/console", 0o20600, &[]);
        entry(&mut archive, "init", 0o100755, &stripped(&program));
        let mut made = vec![String::new()];
        for path in String::from_utf8(listed).unwrap().split_whitespace().filter(|word| word.starts_with('/'))
        {
            let name = path.trim_start_matches('/');
            for (at, _) in name.match_indices('/') {
                let dir = &name[..at];
                if !made.iter().any(|it| it == dir) {
                    entry(&mut archive, dir, 0o40755, &[]);
                    made.push(dir.to_owned());
                }
            }
            entry(&mut archive, name, 0o100755, &std::fs::read(path).unwrap());
        }
        entry(&mut archive, "TRAILER!!!", 0, &[]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initramfs");
        std::fs::write(&path, archive).unwrap();
        (dir, path)
    });
    path
}

/// Without its debugging information, which would fill the guest.
fn stripped(program: &Path) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    match Command::new("strip").arg("-o").arg(file.path()).arg(program).status() {
        Ok(status) if status.success() => std::fs::read(file.path()).unwrap(),
        _ => std::fs::read(program).unwrap(),
    }
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let number = archive.len() as u32 + 1;
    // The one device is the console: 5, 1.
    let device = u32::from(mode & 0o170_000 == 0o20_000);
    let fields = [number, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 5 * device, device];
    archive.extend(b"070701");
    fields
        .iter()
        .chain(&[name.len() as u32 + 1, 0])
        .for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A machine's directory and spec.
pub struct Machine {
    pub dir: TempDir,
    pub spec: VmSpec,
}

/// A life of it.
pub struct Life {
    pub vmm: Child,
    requests: BufReader<UnixStream>,
    socket: PathBuf,
    console: PathBuf,
}

impl Machine {
    /// One vCPU, 128 MiB, a console and a vsock device.
    pub fn new(kernel: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = serde_json::from_value(serde_json::json!({
            "cpus": 1, "memory_mib": 128, "kernel": kernel, "initrd": [initramfs()],
            "command_line": "-- linux::guest::pid_1 --exact --ignored --nocapture --test-threads=1",
            "vsock": {"guest_cid": 3, "socket": dir.path().join("v")},
            "console": {"file": dir.path().join("console")},
        }));
        Self { spec: spec.unwrap(), dir }
    }

    /// Adds a writable disk of zeros.
    pub fn with_disk(mut self) -> Self {
        let path = self.disk();
        File::create(&path).unwrap().set_len(4 << 20).unwrap();
        self.spec.disks.push(serde_json::from_value(serde_json::json!({"files": [path]})).unwrap());
        self
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn snapshot(&self) -> PathBuf {
        self.dir.path().join("snapshot")
    }

    /// `flyrun-vmm` with these arguments and the spec.
    pub fn vmm(&self, arguments: &[&str]) -> Command {
        let spec = self.dir.path().join("spec.json");
        std::fs::write(&spec, serde_json::to_vec(&self.spec).unwrap()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_flyrun-vmm"));
        command.args(arguments).arg("--spec").arg(spec).stdin(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn live(&self, arguments: &[&str]) -> Life {
        let (owner, stdin) = UnixStream::pair().unwrap();
        owner.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = self.vmm(arguments);
        let vmm = command.arg("--control").stdin(OwnedFd::from(stdin)).spawn().unwrap();
        let socket = self.spec.vsock.as_ref().unwrap().socket.clone();
        Life { vmm, requests: BufReader::new(owner), socket, console: self.dir.path().join("console") }
    }

    /// Boots it, and returns when its PID 1 is ready.
    pub fn boot(&self) -> Life {
        let mut life = self.live(&[]);
        life.wait_for_guest("ready");
        life
    }

    /// Resumes it from its snapshot.
    pub fn resume(&self) -> Life {
        self.live(&["--restore", self.snapshot().to_str().unwrap()])
    }

    /// The same, if its memory is what was written.
    pub fn resume_verified(&self) -> Life {
        self.live(&["--restore", self.snapshot().to_str().unwrap(), "--verify"])
    }

    /// The same, without letting it run.
    pub fn resume_paused(&self) -> Life {
        self.live(&["--restore", self.snapshot().to_str().unwrap(), "--paused"])
    }

    /// What is said when it cannot be resumed; the exit code must say so too.
    pub fn refusal(&self) -> String {
        let output = self.vmm(&["--restore", self.snapshot().to_str().unwrap()]).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), told.lines().count()), (Some(9), 1), "{told}");
        told
    }
}

impl Life {
    /// Asks `flyrun-vmm` for something.
    pub fn request(&mut self, line: &str) -> String {
        self.send(line);
        self.answer()
    }

    pub fn send(&mut self, line: &str) {
        self.requests.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub fn answer(&mut self) -> String {
        let mut answer = String::new();
        self.requests.read_line(&mut answer).unwrap();
        assert!(answer.ends_with('\n'), "flyrun-vmm has gone:\n{}", self.last_words());
        answer.trim_end().to_owned()
    }

    /// Has it written to the directory; the figures.
    pub fn suspend_to(&mut self, dir: &Path) -> serde_json::Value {
        std::fs::create_dir_all(dir).unwrap();
        assert_eq!(self.request("pause"), "ok");
        let answer = self.request(&format!("snapshot {}", dir.display()));
        let figures = answer.strip_prefix("ok ").unwrap_or_else(|| panic!("{answer}"));
        serde_json::from_str(figures).unwrap()
    }

    /// Asks the guest something.
    pub fn ask(&mut self, question: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(format!("{question}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        read.unwrap_or_else(|error| panic!("{question}: {error}\n{}", self.last_words()));
        answer
    }

    /// A connection to the guest's PID 1.
    pub fn connect(&mut self) -> UnixStream {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Ok(mut stream) = UnixStream::connect(&self.socket) {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(b"CONNECT 10\n").unwrap();
                let mut byte = [0];
                let mut line = Vec::new();
                while stream.read(&mut byte).is_ok_and(|count| count == 1) && byte != *b"\n" {
                    line.extend(byte);
                }
                if line.starts_with(b"OK ") {
                    return stream;
                }
            }
            assert!(Instant::now() < until && self.is_running(), "no connection:\n{}", self.last_words());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Bytes of the host's memory that are mapped in it.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.vmm.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    fn is_running(&mut self) -> bool {
        self.vmm.try_wait().unwrap().is_none()
    }

    fn wait_for_guest(&mut self, word: &str) {
        let until = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&self.console).unwrap_or_default().contains(word) {
            assert!(Instant::now() < until && self.is_running(), "the guest:\n{}", self.last_words());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The console and, once it has ended, what `flyrun-vmm` said.
    fn last_words(&mut self) -> String {
        let mut text = std::fs::read_to_string(&self.console).unwrap_or_default();
        if !self.is_running()
            && let Some(mut stderr) = self.vmm.stderr.take()
        {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }

    /// Ends it as an owner does that has its snapshot.
    pub fn kill(mut self) {
        self.vmm.kill().unwrap();
        self.vmm.wait().unwrap();
    }

    /// Has the guest end its machine.
    pub fn end(mut self) {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            // Asked more than once: a machine that does not end must fail its test, and not hang it.
            let _ = self.connect().write_all(b"end\n");
            if let Some(status) = self.ended_within(Duration::from_secs(10)) {
                break status;
            }
            assert!(Instant::now() < until, "the machine does not end: {}", self.last_words());
        };
        assert_eq!(status.code(), Some(0), "{}", self.last_words());
    }

    fn ended_within(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            match self.vmm.try_wait().unwrap() {
                None if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
                ended => return ended,
            }
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // Nothing is left behind by a test that failed.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}
