//! Two tenants on one host: machines of different networks. One attacks, with root in its guest and with a kernel of its own; the other
//! is not reached, read or named, and goes on answering. By how much it is slowed down, `make bench` measures (`tenants.*`).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use tests::flyrun::scratch;
use tests::hostile::Attack;
use tests::image::layout;
use tests::lab::{HOST, Lab, OUTSIDE, OUTSIDE6};
use tests::suspended::Machine;

/// Answers by HTTP, and tells of each request and datagram that reaches it.
const VICTIM: &str = r#"
import http.server, socket, threading
def datagrams():
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.bind(("::", 7000))
    while True:
        data, client = server.recvfrom(4096)
        print("datagram", data, client[0], flush=True)
threading.Thread(target=datagrams, daemon=True).start()
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("request", self.client_address[0], flush=True)
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"served")
    def log_message(self, *words): pass
print("listening", flush=True)
Server(("::", 80), Handler).serve_forever()
"#;

/// What a root of its guest tries on the first machine's addresses, from the second's. It tells what it got, a line each.
const ATTACKER: &str = r#"
import fcntl, select, socket, struct, sys, time
OWN, VICTIM, VICTIM_GATE, GATE = "10.91.0.5", "10.91.0.3", "10.91.0.2", "10.91.0.4"
VICTIM6, VICTIM_GATE6, GATE6 = "fd66:6c79:7200::3", "fd66:6c79:7200::2", "fd66:6c79:7200::4"
NOBODY, NOBODY6 = "10.91.9.9", "fd66:6c79:7200::909"
OUTSIDE = sys.argv[1]
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("eth0", 0))
mac = wire.getsockname()[4]
gate_mac = bytes([6, 0x66, 0x6c, 0x79, 0, 2])
victim_mac, victim_gate_mac = bytes([2, 0x66, 0x6c, 0x79, 0, 1]), bytes([6, 0x66, 0x6c, 0x79, 0, 1])
def connect(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as stream:
        stream.settimeout(20)
        try: stream.connect((address, port)); return "reached"
        except ConnectionRefusedError: return "refused"
        except OSError as error: return type(error).__name__
def ask(server, name):
    question = b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + bytes([len(name)]) + name.encode() + b"\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(3)
        try:
            asking.connect((server, 53)); asking.send(question)
            answer = asking.recv(4096)
            return "found" if answer[7] > 0 else "unknown"
        except ConnectionRefusedError: return "refused"
        except OSError as error: return type(error).__name__
def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def datagram(source, to, data, eth_source=None, eth_to=None):
    packed = [socket.inet_aton(source), socket.inet_aton(to)]
    udp = struct.pack(">HHHH", 7777, 7000, 8 + len(data), 0) + data
    head = lambda sum: struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, sum) + b"".join(packed)
    wire.send((eth_to or gate_mac) + (eth_source or mac) + b"\x08\0" + head(checksum(head(0))) + udp)
def claim(address, hardware):
    who = socket.inet_aton(address)
    for operation in (1, 2):
        body = struct.pack(">HHBBH", 1, 0x800, 6, 4, operation) + hardware + who + b"\xff" * 6 + who
        wire.send(b"\xff" * 6 + hardware + b"\x08\x06" + body)
    wire.send(gate_mac + hardware + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + hardware + who + gate_mac + socket.inet_aton(GATE))
print("attacking", flush=True)
told = {}
for address in (VICTIM, VICTIM6): told["connect " + address] = connect(address, 80)
for address in (NOBODY, NOBODY6): told["connect " + address] = connect(address, 80)
for address in (VICTIM_GATE, VICTIM_GATE6): told["connect " + address + " 53"] = connect(address, 53)
told["the other's name server"] = ask(VICTIM_GATE, "tenant-victim")
told["a name server of nobody's"] = ask("10.91.9.8", "tenant-victim")
told["its name"] = ask(GATE, "tenant-victim")
told["the own name"] = ask(GATE, "tenant-attacker")
wire.setblocking(False)
# The host's refusals of what was tried before come in the name of whom it was meant for.
while select.select([wire], [], [], 0.5)[0]: wire.recv(65536)
heard, end = set(), time.monotonic() + 12
while time.monotonic() < end:
    datagram(OWN, OUTSIDE, b"honest")
    for source in (VICTIM, VICTIM_GATE, "127.0.0.1", "192.0.2.2", "8.8.8.8"):
        for ends in ((None, None), (victim_mac, victim_gate_mac), (victim_mac, None)):
            datagram(source, OUTSIDE, b"forged " + source.encode(), *ends)
            datagram(source, VICTIM, b"forged " + source.encode(), *ends)
    datagram(OWN, VICTIM, b"direct", None, victim_mac)
    datagram(OWN, VICTIM, b"direct")
    claim(VICTIM, mac); claim(VICTIM_GATE, mac); claim(GATE, victim_mac)
    while select.select([wire], [], [], 0.05)[0]:
        try: frame, (_, _, kind, _, _) = wire.recvfrom(65536)
        except BlockingIOError: break
        if kind == 4: continue
        if b"the-others-secret" in frame: heard.add("secret")
        if frame[12:14] == b"\x08\0" and socket.inet_aton(VICTIM) in frame[26:34]: heard.add("packet")
told["heard"] = ",".join(sorted(heard)) or "nothing"
for what, value in told.items(): print(f"{what}: {value}")
"#;

/// Writes down each datagram that arrives outside.
const SINK: &str = r#"
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 7000))
while True:
    data, client = server.recvfrom(4096)
    open(sys.argv[2], "a").write(data.decode() + " from " + client[0] + "\n")
"#;

/// A machine of the lab's that is removed at the end.
struct Tenant<'a>(&'a Lab, &'a str);

impl Drop for Tenant<'_> {
    fn drop(&mut self) {
        let _gone = self.0.command(&["rm", "-f", self.1]);
    }
}

#[test]
fn a_machine_of_one_network_neither_reaches_nor_hears_nor_names_one_of_another() {
    let lab = Lab::new("");
    // As hosts have it: what is for nobody would leave there.
    lab.host(&format!("ip route add default via {OUTSIDE}; ip -6 route add default via {OUTSIDE6}"));
    let python = layout("python");
    let directory = scratch();
    let path = |name: &str| directory.path().join(name).display().to_string();
    fs::write(path("sink.py"), SINK).unwrap();
    let _sink = lab.on_outside(&["python3", &path("sink.py"), OUTSIDE, &path("sink.log")]);
    let victim = ["run", "-d", "--name", "tenant-victim", "--network", "tenant-one"];
    lab.command(&[&victim[..], &[&python, "python3", "-uc", VICTIM]].concat()).code(0);
    let _victim = Tenant(&lab, "tenant-victim");
    let served = || lab.host("curl -s -m 60 -H x:the-others-secret http://10.91.0.3/");
    lab.wait_for("curl -s -m 5 http://10.91.0.3/");
    let over = AtomicBool::new(false);
    let told = std::thread::scope(|scope| {
        // A kernel that attacks its VMM is a third machine, without a network that leads anywhere.
        scope.spawn(|| {
            let names = ["exits", "frames", "flood", "connections"];
            Attack { names: &names, seed: 7, percent: 10, cpus: 1, net: "vhost", console_file: false }.run();
        });
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                assert_eq!(served(), "served", "the other does not answer while it is attacked");
            }
        });
        let attacker = ["--name", "tenant-attacker", "--network", "tenant-two", &python];
        let outcome = lab.run(&[&attacker[..], &["python3", "-uc", ATTACKER, OUTSIDE]].concat());
        over.store(true, Ordering::SeqCst);
        outcome.code(0).text()
    });
    let expected = [
        // As an address that nobody has: it is not even told that there is somebody.
        "connect 10.91.0.3: refused",
        "connect fd66:6c79:7200::3: refused",
        "connect 10.91.9.9: refused",
        "connect fd66:6c79:7200::909: refused",
        "connect 10.91.0.2 53: refused",
        "connect fd66:6c79:7200::2 53: refused",
        "the other's name server: refused",
        "a name server of nobody's: refused",
        "the own name: found",
        "heard: nothing",
    ];
    assert!(!told.contains("its name: found"), "{told}");
    for line in expected {
        assert!(told.lines().any(|told| told == line), "{line:?} is missing in\n{told}");
    }
    // What it sends in its own name leaves the host, in the host's; nothing it has forged does.
    let arrived = fs::read_to_string(path("sink.log")).unwrap_or_default();
    assert!(arrived.contains(&format!("honest from {HOST}")), "{arrived}");
    assert!(!arrived.contains("forged"), "{arrived}");
    // The victim saw the host's requests, and nothing else.
    let log = lab.command(&["logs", "tenant-victim"]).code(0).text();
    assert!(!log.contains("datagram"), "{log}");
    let requests = log.lines().filter_map(|line| line.strip_prefix("request "));
    let strangers: Vec<_> = requests.filter(|from| *from != "::ffff:10.91.0.2").collect();
    assert!(strangers.is_empty(), "{strangers:?}");
    assert_eq!(served(), "served", "after all claims to its address");
}

/// Where the sockets of all machines are.
fn run_directory() -> PathBuf {
    tests::Flyrun::shared().root().with_file_name("run")
}

/// Files, sockets and processes of one machine that its neighbour's user id is tried on.
fn belongings(machine: &Machine) -> Vec<PathBuf> {
    fn add(directory: &Path, all: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            all.push(entry.path());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                add(&entry.path(), all);
            }
        }
    }
    let mut all = Vec::new();
    add(&machine.directory(), &mut all);
    let id = machine.inspect("id");
    add(&run_directory().join(id.as_str().unwrap()), &mut all);
    let process = PathBuf::from(format!("/proc/{}", machine.vmm()));
    all.extend(
        ["mem", "maps", "environ", "fd", "cwd", "root", "auxv", "stack"].map(|name| process.join(name)),
    );
    all
}

/// Tries to open, connect to, trace and end what its arguments name, and tells what succeeds.
const THIEF: &str = r#"
import ctypes, os, signal, socket, sys
pid, got = int(sys.argv[1]), []
for path in sys.argv[2:]:
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
        try: os.close(os.open(path, flags | os.O_NONBLOCK)); got.append(f"open {path} {flags}")
        except OSError: pass
    stream = socket.socket(socket.AF_UNIX)
    try: stream.connect(path); got.append(f"connect {path}")
    except OSError: pass
    try: os.listdir(path); got.append(f"list {path}")
    except OSError: pass
for number in (0, signal.SIGCONT, signal.SIGTERM):
    try: os.kill(pid, number); got.append(f"signal {number}")
    except OSError: pass
libc = ctypes.CDLL(None, use_errno=True)
for request in (16, 0x4206):
    if libc.ptrace(request, pid, 0, 0) == 0: got.append(f"ptrace {request}")
print("\n".join(got) or "nothing")
"#;

#[test]
fn a_vmm_that_is_taken_over_and_has_left_its_jail_gets_nothing_of_another_machine() {
    let machine = |name: &str| Machine::start(name, &["--network", "none"], "sleep 100000");
    let (attacker, victim) = (machine("tenant-thief"), machine("tenant-owner"));
    let uid = fs::metadata(format!("/proc/{}", attacker.vmm())).unwrap().uid();
    assert_ne!(uid, fs::metadata(format!("/proc/{}", victim.vmm())).unwrap().uid());
    victim.call(&["suspend"]).code(0);
    victim.call(&["resume"]).code(0);
    // With nothing but its user id: no namespace, no seccomp and no empty root is in its way.
    let try_all = |victim: &Machine| {
        let paths = belongings(victim);
        assert!(paths.len() > 15, "{paths:?}");
        let words = [
            "--reuid",
            &uid.to_string(),
            "--regid",
            &uid.to_string(),
            "--clear-groups",
            "--bounding-set=-all",
            "/usr/bin/python3",
            "-c",
            THIEF,
        ]
        .map(str::to_string);
        let output =
            Command::new("setpriv").args(words).arg(victim.vmm().to_string()).args(&paths).output().unwrap();
        (
            String::from_utf8_lossy(&output.stdout).trim().to_string(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    assert_eq!(try_all(&victim), ("nothing".into(), String::new()));
    assert_eq!(victim.state(), "started");
    // Nor does it find out who there is.
    let list = format!("{} ps -a", tests::program().display());
    let output = Command::new("setpriv")
        .args(["--reuid", &uid.to_string(), "--regid", &uid.to_string(), "--clear-groups", "sh", "-c", &list])
        .envs([("FLYRUN_ROOT", tests::Flyrun::shared().root()), ("FLYRUN_RUN", run_directory())])
        .output()
        .unwrap();
    let told =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !told.contains("tenant-owner"), "{told}");
}
