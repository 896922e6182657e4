//! A machine's network, each test in a host of its own.

use rustix::process::Signal;
use tests::flyrun::scratch;
use tests::image::{busybox, layout};
use tests::lab::{HOST, HOST6, Lab, OUTSIDE, OUTSIDE6};

/// Serves /etc/hostname and what else there is, for as long as nobody ends it.
const SERVE: &str = "echo served > /tmp/index.html; exec httpd -f -p 80 -h /tmp";

/// A web server outside, which answers with the address that a request seems to come from.
const ECHO_ADDRESS: &str = r#"
import http.server, socket
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].replace("::ffff:", "").encode())
Server(("::", 8000), Handler).serve_forever()
"#;

/// A name server that knows one address, by UDP and, for names that start with "long", only by TCP.
const NAME_SERVER: &str = r#"
import socket, struct, threading
def answer(question, truncate):
    name = question[12:question.index(b"\0", 12)]
    head = question[:2] + (b"\x83\x80" if truncate else b"\x81\x80") + b"\0\1" + (b"\0\0" if truncate else b"\0\1") + b"\0\0\0\0"
    rest = question[12:question.index(b"\0", 12) + 5]
    kind = struct.unpack(">H", rest[-4:-2])[0]
    if kind != 1:
        return question[:2] + b"\x81\x80\0\1\0\0\0\0\0\0" + rest
    record = b"" if truncate else b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + bytes([203, 0, 113, 9])
    return head + rest + record
def tcp():
    server = socket.create_server(("127.0.0.1", 53))
    while True:
        client, _ = server.accept()
        length = struct.unpack(">H", client.recv(2))[0]
        reply = answer(client.recv(length), False)
        client.sendall(struct.pack(">H", len(reply)) + reply)
        client.close()
threading.Thread(target=tcp, daemon=True).start()
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
while True:
    question, client = server.recvfrom(4096)
    server.sendto(answer(question, question[13:17] == b"long"), client)
"#;

/// Fetches its arguments in a machine, one line each. Debian's static busybox has no name service to ask, and its wget
/// crashes for want of it.
const FETCH: &str = "
import sys, urllib.request
for url in sys.argv[1:]:
    try:
        print(urllib.request.urlopen(url, timeout=10).read().decode().strip())
    except OSError as error:
        print('apart')
";

#[test]
fn nginx_serves_ten_thousand_requests_and_leaves_nothing_behind() {
    let lab = Lab::new("");
    let machine = lab.machine(&["-p", "8080:80", &layout("nginx")]);
    let page = lab.wait_for("curl -s -m 5 http://127.0.0.1:8080/");
    assert!(page.contains("nginx in a microVM"), "{page}");
    assert_eq!(lab.outside(&format!("curl -sS -m 20 http://{HOST}:8080/")), page);
    assert_eq!(lab.outside(&format!("curl -sS -m 20 -g http://[{HOST6}]:8080/")), page);
    // IPv6's loopback is refused at once, so that who asks for localhost comes to the other one.
    assert_eq!(lab.host("curl -s -m 20 -g http://[::1]:8080/ || echo $?"), "7");
    let mut requests = 0;
    while requests < 10_000 {
        let told = lab.host("wrk -t 1 -c 16 -d 10 --timeout 30 http://127.0.0.1:8080/");
        assert!(!told.contains("Socket errors") && !told.contains("Non-2xx"), "{told}");
        let line = told.lines().find(|line| line.contains("requests in")).unwrap();
        let more: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
        assert!(more > 0, "{told}");
        requests += more;
    }
    machine.end(Signal::TERM);
    assert_eq!(lab.traces(), "");
}

#[test]
fn a_machine_reaches_the_outside_by_the_hosts_address() {
    let lab = Lab::new("");
    let _server = lab.on_outside(&["python3", "-c", ECHO_ADDRESS]);
    for (address, seen) in [(OUTSIDE.to_string(), HOST), (format!("[{OUTSIDE6}]"), HOST6)] {
        lab.wait_for(&format!("curl -s -g http://{address}:8000/"));
        let url = format!("http://{address}:8000/");
        lab.run(&[&layout("python"), "python3", "-c", FETCH, &url]).code(0).prints(seen);
    }
    lab.run(&[&busybox(), "ping", "-c", "1", "-w", "20", OUTSIDE]).code(0);
    // The outside cannot come in where nothing is published.
    let machine = lab.machine(&[&busybox(), "sh", "-c", SERVE]);
    lab.wait_for("curl -s -m 5 http://10.91.0.3/");
    lab.outside(&format!("ip route add 10.91.0.0/16 via {HOST}"));
    assert_eq!(lab.outside("curl -s -m 3 http://10.91.0.3/ || echo $?"), "28");
    drop(machine);
}

#[test]
fn both_backends_move_packets_of_all_sizes_both_ways() {
    let lab = Lab::new("");
    let directory = scratch();
    let file = directory.path().join("data");
    let script =
        format!("dd if=/dev/urandom of={0} bs=1M count=8 status=none; sha256sum < {0}", file.display());
    let sum = lab.host(&script);
    let served = directory.path().display().to_string();
    let _server = lab.on_outside(&["busybox", "httpd", "-f", "-p", "8000", "-h", &served]);
    lab.wait_for(&format!("curl -s -m 20 -o /dev/null -w %{{http_code}} http://{OUTSIDE}:8000/data"));
    for backend in ["user", "vhost", "auto"] {
        let fetch = format!("wget -q -O /tmp/data http://{OUTSIDE}:8000/data; sha256sum < /tmp/data");
        let script = format!("{fetch}; exec httpd -f -p 80 -h /tmp");
        let told = lab.run(&["--net-backend", backend, &busybox(), "sh", "-c", &fetch]).code(0);
        assert_eq!(told.text(), sum, "{backend}");
        let machine =
            lab.machine(&["--net-backend", backend, "-p", "8081:80", &busybox(), "sh", "-c", &script]);
        let back = "curl -sf -m 60 http://127.0.0.1:8081/data | sha256sum";
        lab.wait_for("curl -sf -m 5 -o /dev/null -w %{http_code} http://127.0.0.1:8081/data");
        assert_eq!(lab.host(back), sum, "{backend}");
        machine.end(Signal::TERM);
    }
}

#[test]
fn a_card_has_a_pair_of_queues_for_each_vcpu_and_all_of_them_carry_packets() {
    let lab = Lab::new("");
    let directory = scratch();
    let file = directory.path().join("data");
    let script =
        format!("dd if=/dev/urandom of={0} bs=1M count=2 status=none; sha256sum < {0}", file.display());
    let sum = lab.host(&script);
    let served = directory.path().display().to_string();
    let _server = lab.on_outside(&["busybox", "httpd", "-f", "-p", "8000", "-h", &served]);
    lab.wait_for(&format!("curl -s -m 20 -o /dev/null -w %{{http_code}} http://{OUTSIDE}:8000/data"));
    // The guest's driver sends by the queue of the processor that the sender is on.
    let fetch = format!(
        "ls /sys/class/net/eth0/queues | tr \"\\n\" \" \"; nproc
         for i in 1 2 3 4; do taskset $((1 + i % 2)) wget -q -O /tmp/$i http://{OUTSIDE}:8000/data & done; wait
         sha256sum < /tmp/1; cd /tmp; cmp 1 2 && cmp 1 3 && cmp 1 4 && mv 1 data; exec httpd -f -p 80 -h /tmp"
    );
    for backend in ["user", "vhost"] {
        let flags = ["--name", "pairs-net", "--cpus", "2", "--net-backend", backend, "-p", "8084:80"];
        let machine = lab.machine(&[&flags[..], &[&busybox(), "sh", "-c", &fetch]].concat());
        lab.wait_for("curl -sf -m 5 -o /dev/null -r 0-0 -w %{http_code} http://127.0.0.1:8084/data");
        let told = lab.command(&["logs", "pairs-net"]).code(0).text();
        assert_eq!(told, format!("rx-0 rx-1 tx-0 tx-1 2\n{sum}"), "{backend}");
        assert_eq!(lab.host("ls /sys/class/net/fly1/queues | xargs"), "rx-0 rx-1 tx-0 tx-1", "{backend}");
        for _ in 0..4 {
            let back = "curl -sf -m 60 http://127.0.0.1:8084/data | sha256sum";
            assert_eq!(lab.host(back), sum, "{backend}");
        }
        machine.end(Signal::TERM);
    }
    let told = lab.run(&[&busybox(), "ls", "/sys/class/net/eth0/queues"]).code(0);
    assert_eq!(told.text(), "rx-0\ntx-0");
}

#[test]
fn machines_of_one_network_find_each_other_and_others_do_not() {
    let lab = Lab::new("");
    let image = busybox();
    let server = lab.machine(&["--network", "one", "--name", "web-net", &image, "sh", "-c", SERVE]);
    lab.wait_for("curl -s -m 5 http://10.91.0.3/");
    let fetch = ["python3", "-c", FETCH, "http://web-net/", "http://[fd66:6c79:7200::3]/"];
    let python = layout("python");
    let joined = [&["--network", "one", python.as_str()], &fetch[..]].concat();
    lab.run(&joined).code(0).prints("served\nserved");
    lab.command(&["rename", "web-net", "shop-net"]).code(0);
    let fetch = ["python3", "-c", FETCH, "http://shop-net/", "http://web-net/"];
    lab.run(&[&["--network", "one", python.as_str()], &fetch[..]].concat()).code(0).prints("served\napart");
    for network in ["two", "default"] {
        let urls = ["http://web-net/", "http://10.91.0.3/"];
        let apart = [&["--network", network, python.as_str(), "python3", "-c", FETCH], &urls[..]].concat();
        lab.run(&apart).code(0).prints("apart\napart");
    }
    assert!(!lab.traces().contains("fly2"), "a machine that has ended is in {}", lab.traces());
    server.end(Signal::TERM);
    assert_eq!(lab.traces(), "");
}

#[test]
fn names_are_asked_of_a_server_on_the_hosts_loopback() {
    let lab = Lab::new("nameserver 127.0.0.1\nsearch lab.example\n");
    let _server = lab.on_host(&["python3", "-c", NAME_SERVER]);
    lab.wait_for("ss -lnu | grep 127.0.0.1:53");
    let ask = "import socket; print(open('/etc/resolv.conf').read(), open('/etc/hosts').read());\
               print(socket.gethostbyname('some.example'), socket.gethostbyname('long.example'))";
    let told = lab.run(&[
        "--hostname",
        "box",
        "--add-host",
        "db:192.0.2.7",
        &layout("python"),
        "python3",
        "-c",
        ask,
    ]);
    let told = told.code(0).prints_something_with("nameserver 10.91.0.2\nsearch lab.example");
    told.prints_something_with("203.0.113.9 203.0.113.9").prints_something_with("192.0.2.7\tdb");
}

#[test]
fn a_udp_port_is_published_and_answers_come_back() {
    let lab = Lab::new("");
    let directory = scratch();
    let serve = "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((\"\", 9000))
while True: s.sendto(*s.recvfrom(2000))";
    let _machine = lab.machine(&["-p", "9000:9000/udp", &layout("python"), "python3", "-c", serve]);
    for target in ["127.0.0.1", HOST] {
        let ask = format!(
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); \
             s.sendto(b\"hello\", (\"{target}\", 9000)); print(s.recv(100).decode())"
        );
        let client = directory.path().join("client.py");
        std::fs::write(&client, ask).unwrap();
        let said = lab.wait_for(&format!("python3 {} 2> /dev/null", client.display()));
        assert_eq!(said, "hello", "{target}");
    }
}

#[test]
fn a_machine_without_a_network_has_its_loopback_only() {
    let lab = Lab::new("");
    let script = "ls /sys/class/net; ping -c 1 127.0.0.1 > /dev/null && echo loopback";
    lab.run(&["--network", "none", &busybox(), "sh", "-c", script]).code(0).prints("lo\nloopback");
    let refused = lab.run(&["--network", "none", "-p", "80:80", &busybox(), "true"]);
    refused.fails_clearly().complains_about("cannot publish");
}

#[test]
fn a_port_that_is_taken_is_one_clear_error() {
    let lab = Lab::new("");
    let _server = lab.on_host(&["busybox", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/tmp"]);
    lab.wait_for("ss -lnt | grep 127.0.0.1:8080");
    let refused = lab.run(&["-p", "8080:80", &busybox(), "true"]);
    refused.fails_clearly().complains_about("TCP port 8080 is already in use");
    assert_eq!(lab.traces(), "");
    lab.run(&["-p", "x:80", &busybox(), "true"]).code(125).complains_about("'x' is not a port");
    lab.run(&["-p", "192.0.2.99:80:80", &busybox(), "true"]).fails_clearly().complains_about("address");
}

#[test]
fn what_a_killed_flyrun_left_goes_with_the_next_command() {
    let lab = Lab::new("");
    let image = busybox();
    let living = lab.machine(&["--network", "one", "--name", "living-net", &image, "sh", "-c", SERVE]);
    lab.wait_for("curl -s -m 5 http://10.91.0.3/");
    let killed = lab.machine(&["--network", "one", "-p", "8082:80", &image, "sh", "-c", SERVE]);
    lab.wait_for("curl -s -m 5 http://127.0.0.1:8082/");
    assert!(lab.traces().contains("fly2"));
    killed.end(Signal::KILL);
    lab.run(&["--network", "none", &image, "true"]).code(0);
    let traces = lab.traces();
    assert!(!traces.contains("fly2") && !traces.contains("8082"), "{traces}");
    assert!(traces.contains("fly1"), "{traces}");
    living.end(Signal::KILL);
    lab.run(&["--network", "none", &image, "true"]).code(0);
    assert_eq!(lab.traces(), "");
}

#[test]
fn a_host_without_rights_is_told_what_to_do() {
    let lab = Lab::new("");
    let refused = lab.run_without_rights(&[&busybox(), "true"]);
    refused.fails_clearly().complains_about("--network none");
    lab.run_without_rights(&["--network", "none", &busybox(), "echo", "on"]).code(0).prints("on");
}
