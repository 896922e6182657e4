//! What the peers of a machine that is suspended see.

use std::path::Path;

use tests::background::IDLE;
use tests::flyrun::scratch;
use tests::image::{busybox, layout};
use tests::lab::{HOST, HOST6, Lab, OUTSIDE};
use tests::suspended::Machine;

/// Sends back what it gets, on port 80.
const ECHO: &str = "import socket, socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1000): self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, address_family = True, socket.AF_INET6
Server((\"::\", 80), Echo).serve_forever()";

/// Connects, hears itself, and then waits without a word for what becomes of the connection.
const CLIENT: &str = "import socket, sys
def say(word): open(sys.argv[3], \"a\").write(word + \"\\n\")
try:
    peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
    peer.settimeout(None)
    peer.sendall(b\"hello\")
    say(peer.recv(100).decode())
    say(\"end\" if peer.recv(100) == b\"\" else \"more\")
except OSError as error: say(type(error).__name__)";

/// Takes one connection on port 9000, and then as the client.
const PEER: &str = "import socket, sys
def say(word): open(sys.argv[1], \"a\").write(word + \"\\n\")
peer = socket.create_server((\"\", 9000)).accept()[0]
try:
    say(peer.recv(100).decode())
    say(\"end\" if peer.recv(100) == b\"\" else \"more\")
except OSError as error: say(type(error).__name__)";

/// Connects to a peer outside, and goes on with it when there is a file.
const CALLER: &str = "import os, socket, time
peer = socket.create_connection((\"192.0.2.1\", 9000))
peer.sendall(b\"hello\")
open(\"/called\", \"w\").close()
while not os.path.exists(\"/go\"): time.sleep(0.1)
try:
    while True:
        peer.sendall(b\"again\")
        time.sleep(0.2)
except OSError as error: open(\"/told\", \"w\").write(type(error).__name__)";

fn told(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn wait_for(file: &Path, expected: &str) {
    tests::suspended::wait_until(&format!("{}: {expected}", file.display()), || {
        let told = told(file);
        assert!(expected.starts_with(&told), "{}: {told}", file.display());
        told == expected
    });
}

#[test]
fn the_peers_of_a_suspended_machine_are_reset_and_new_ones_refused() {
    let lab = Lab::new("");
    let directory = scratch();
    let script = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (client, peer) = (script("client.py", CLIENT), script("peer.py", PEER));
    let out = |name: String| directory.path().join(name);
    let word = |path: &Path| path.display().to_string();
    let python = layout("python");
    lab.command(&["run", "-d", "--name", "n-peers", "-p", "8090:80", &python, "python3", "-c", ECHO]).code(0);
    let machine = Machine("n-peers".into());
    // With the rules of another machine staying, and with none.
    for alone in [false, true] {
        let other = (!alone).then(|| lab.machine(&["--name", "n-other", &busybox(), "sh", "-c", IDLE]));
        if other.is_some() {
            lab.wait_for("ip -brief link | grep fly2");
        }
        let try_it = |space: &str, target: &str, name: &str| {
            let file = out(format!("{name}-{alone}"));
            let words = ["python3", &client, target, "8090", &word(&file)];
            let process = if space == "host" { lab.on_host(&words) } else { lab.on_outside(&words) };
            (process, file)
        };
        lab.wait_for("echo hello | timeout 20 busybox nc 127.0.0.1 8090 | head -n 1");
        let clients: Vec<_> = [
            ("host", "127.0.0.1", "loopback"),
            ("host", HOST, "host"),
            ("outside", HOST, "outside"),
            ("outside", HOST6, "outside6"),
        ]
        .into_iter()
        .map(|(space, target, name)| try_it(space, target, name))
        .collect();
        let called = out(format!("called-{alone}"));
        let _peer = lab.on_outside(&["python3", &peer, &word(&called)]);
        lab.outside("until ss -lnt | grep -q :9000; do sleep 0.2; done");
        machine.exec("rm -f /called /go /told");
        lab.command(&["exec", "-d", "n-peers", "python3", "-c", CALLER]).code(0);
        for (_, file) in &clients {
            wait_for(file, "hello");
        }
        wait_for(&called, "hello");

        lab.command(&["suspend", "n-peers"]).code(0);
        for (_, file) in &clients {
            wait_for(file, "hello ConnectionResetError");
        }
        wait_for(&called, "hello ConnectionResetError");
        for (space, target, name) in [("host", "127.0.0.1", "late"), ("outside", HOST, "late-outside")] {
            let (_process, file) = try_it(space, target, name);
            wait_for(&file, "ConnectionRefusedError");
        }

        lab.command(&["resume", "n-peers"]).code(0);
        for (space, target, name) in [("host", "127.0.0.1", "new"), ("outside", HOST, "new-outside")] {
            let (_process, file) = try_it(space, target, name);
            wait_for(&file, "hello");
        }
        // The machine has heard of it when it went on.
        machine.exec("touch /go; while [ ! -s /told ]; do sleep 0.1; done");
        assert_eq!(machine.exec("cat /told"), "ConnectionAbortedError");
        assert_eq!(OUTSIDE, "192.0.2.1");
    }
}
