//! The edge of `flyrun serve`: protocols through to a real app, certificates, the web page.

use tests::image::layout;
use tests::lab::HOST;
use tests::serving::Serving;
use tests::suspended::wait_until;

/// Echoes WebSockets, and tells events when it is asked to.
const APP: &str = r#"
import base64, hashlib, http.server, queue, socketserver
events = queue.Queue()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def say(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/echo": self.echo()
        elif self.path == "/events": self.events()
        elif self.path.startswith("/tell/"):
            events.put(self.path[6:])
            self.say(b"told")
        else: self.say(str(self.headers).encode())
    def events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"data: begun\n\n")
        while True:
            event = events.get()
            if event == "end": break
            self.wfile.write(b"data: " + event.encode() + b"\n\n")
        self.close_connection = True
    def echo(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while len(head := self.rfile.read(2)) == 2 and head[0] & 15 != 8:
            size = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[index % 4] for index, byte in enumerate(self.rfile.read(size)))
            self.wfile.write(bytes([head[0], 126]) + size.to_bytes(2, "big") + data)
class Server(socketserver.ThreadingTCPServer): allow_reuse_address = True
Server(("", 8080), Handler).serve_forever()
"#;

/// Speaks WebSocket (RFC 6455) with frames of 16-bit lengths, and reads events one by one.
const CLIENT: &str = r#"
import base64, hashlib, http.client, os, socket, sys, time, urllib.request
def recv(stream, size):
    data = stream.read(size)
    assert len(data) == size, f"{len(data)} of {size} bytes, and then the end"
    return data
stream = socket.create_connection(("127.0.0.1", 80), 60)
key = base64.b64encode(os.urandom(16)).decode()
stream.sendall(f"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
file = stream.makefile("rb")
head = b""
while not head.endswith(b"\r\n\r\n"): head += recv(file, 1)
assert head.startswith(b"HTTP/1.1 101 "), head
accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
assert b"sec-websocket-accept: " + accept in head.replace(b"Sec-WebSocket-Accept", b"sec-websocket-accept"), head
def echo(size):
    data, mask = os.urandom(size), os.urandom(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
    stream.sendall(bytes([0x82, 0x80 | 126]) + size.to_bytes(2, "big") + mask + masked)
    assert recv(file, 4) == bytes([0x82, 126]) + size.to_bytes(2, "big")
    assert recv(file, size) == data
echo(5)
time.sleep(4)  # Longer than a machine is left alone that nobody uses.
echo(60000)
stream.sendall(bytes([0x88, 0x80 | 126, 0, 0, 1, 2, 3, 4]))
assert file.read(1) == b"", "the app's end is the client's"
connection = http.client.HTTPConnection("127.0.0.1", 80, timeout=60)
connection.request("GET", "/events")
answer = connection.getresponse()
assert answer.getheader("Content-Type") == "text/event-stream"
def event():
    line = answer.readline()
    assert answer.readline() == b"\n"
    return line
assert event() == b"data: begun\n"
for number in range(5):
    # Only now: whoever held events back would never tell this one.
    urllib.request.urlopen(f"http://127.0.0.1/tell/{number}", timeout=60).read()
    assert event() == f"data: {number}\n".encode()
urllib.request.urlopen("http://127.0.0.1/tell/end", timeout=60).read()
assert answer.read() == b""
print("good")
"#;

fn python(app: &str, more: &str) -> String {
    let image = layout("python");
    format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n[processes]\napp = 'python3 /srv/app.py'\n\
         [[files]]\nguest_path = '/srv/app.py'\nraw_value = '''{APP}'''\n\
         [http_service]\nauto_stop_machines = 'suspend'\n{more}"
    )
}

#[test]
fn websockets_and_events_pass_through_to_an_app_and_keep_it_awake() {
    let serving = Serving::start(&[("s-live", &python("s-live", "[flyrun]\nidle_timeout = 1\n"))]);
    serving.wait_for_state("s-live", "suspended");
    let client = serving.path().join("client");
    std::fs::write(&client, CLIENT).unwrap();
    assert_eq!(serving.lab.host(&format!("python3 {}", client.display())), "good");
    assert_eq!(
        serving.figure("flyrun_start_seconds_count{kind=\"resumed\"}"),
        1.0,
        "it was in use all the time"
    );
    serving.wait_for_state("s-live", "suspended");
}

/// Speaks HTTP/2 without TLS alone, and says at the end how it went, as gRPC does. A filter that finds nothing takes the length away: nginx
/// has trailers only then.
const NGINX: &str = "daemon off; pid /tmp/pid; error_log stderr;\nevents {}\nhttp { server { listen 8080 http2;\n\
    default_type application/grpc; add_trailer grpc-status 0; add_trailer grpc-message fine; sub_filter nothing else; sub_filter_types *;\n\
    location / { return 200 \"$request_method $server_protocol $http_x_forwarded_proto $http_te\\n\"; } } }\n";

#[test]
fn grpcs_trailers_come_from_an_app_that_speaks_http_2() {
    let image = layout("nginx");
    let file = |tls: &str| {
        format!(
            "app = 's-grpc'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n[processes]\napp = 'nginx -c /srv/nginx.conf'\n\
             [[files]]\nguest_path = '/srv/nginx.conf'\nraw_value = '''{NGINX}'''\n\
             [http_service]\nhttp_options.h2_backend = true\n[flyrun]\n{tls}\n"
        )
    };
    let serving = Serving::start(&[("s-grpc", &file(""))]);
    let ask = "--max-time 60 -sS -D - -H te:trailers -H content-type:application/grpc --data-binary hello";
    let check = |answer: &str, body: &str| {
        let answer = answer.replace('\r', "").to_lowercase();
        assert!(answer.starts_with("http/2 200") && answer.contains(body), "{answer}");
        // After the head's end.
        let (_, rest) = answer.split_once("\n\n").unwrap();
        assert!(rest.contains("grpc-status: 0") && rest.contains("grpc-message: fine"), "{answer}");
    };
    let plain = serving.lab.host(&format!("curl {ask} --http2-prior-knowledge http://127.0.0.1/"));
    check(&plain, "post http/2.0 http trailers");
    // The same in TLS, by what client and proxy agree on.
    let at = serving.path().display().to_string();
    serving.lab.host(&format!(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=grpc.test \
         -addext subjectAltName=DNS:grpc.test -keyout {at}/key -out {at}/certificate 2>&1"
    ));
    serving.write("s-grpc", &file("tls = { certificate = 'certificate', key = 'key' }"));
    serving.lab.wait_for("ss -lnt | grep :443");
    let tls =
        format!("curl {ask} --cacert {at}/certificate --resolve grpc.test:443:127.0.0.1 https://grpc.test/");
    check(&serving.lab.wait_for(&tls), "post http/2.0 https trailers");
    // And HTTP/1.1 in front of it: the trailers come after chunks.
    let old = serving.lab.host(&format!("curl {ask} --http1.1 --raw http://127.0.0.1/")).replace('\r', "");
    assert!(old.starts_with("HTTP/1.1 200 OK") && old.contains("\n0\n"), "{old}");
    assert!(old.split_once("\n0\n").unwrap().1.contains("grpc-status: 0"), "{old}");
}

#[test]
fn a_certificate_is_ordered_for_an_app_and_shown() {
    let more = "[flyrun]\nhostnames = ['acme.test']\nidle_timeout = 3600\n";
    let mut serving = Serving::start(&[("s-acme", &python("s-acme", more))]);
    let at = serving.path().display().to_string();
    let config = serde_json::json!({"pebble": {
        "listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
        "certificate": format!("{at}/pebble.pem"), "privateKey": format!("{at}/pebble.key"), "httpPort": 80, "tlsPort": 443,
    }});
    std::fs::write(serving.path().join("pebble.json"), config.to_string()).unwrap();
    // No certificate of an authority, as openssl makes them by itself: clients do not take those for servers'.
    let leaf = "[req]\nprompt=no\ndistinguished_name=name\nx509_extensions=leaf\n[name]\nCN=pebble\n\
        [leaf]\nbasicConstraints=critical,CA:FALSE\nsubjectAltName=IP:127.0.0.1\n";
    std::fs::write(serving.path().join("leaf.cnf"), leaf).unwrap();
    serving.lab.host(&format!(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config {at}/leaf.cnf \
         -keyout {at}/pebble.key -out {at}/pebble.pem 2>&1"
    ));

    let _names = serving.lab.on_host(&[
        "pebble-challtestsrv",
        "-defaultIPv6",
        "",
        "-http01",
        "",
        "-https01",
        "",
        "-tlsalpn01",
        "",
    ]);
    let config = format!("{at}/pebble.json");
    let words = ["env", "PEBBLE_VA_NOSLEEP=1", "pebble", "-config", &config, "-dnsserver", "127.0.0.1:8053"];
    let _pebble = serving.lab.on_host(&words);
    let root = format!("curl -sS --cacert {at}/pebble.pem https://127.0.0.1:15000/roots/0");
    serving.lab.wait_for(&format!("{root} > {at}/root.pem; cat {at}/root.pem"));
    let acme = "[flyrun.acme]\nterms_of_service_agreed = true\nca = 'pebble.pem'\ndirectory = 'https://127.0.0.1:14000/dir'\n";
    serving.write("s-acme", &python("s-acme", &format!("{more}{acme}")));
    let get = format!("curl -sS --cacert {at}/root.pem --resolve acme.test:443:127.0.0.1 https://acme.test/");
    assert!(serving.lab.wait_for(&get).to_lowercase().contains("x-forwarded-proto: https"));
    wait_until("it is told", || serving.log().contains("\"certificate ordered\""));
    assert_eq!(serving.figure("flyrun_acme_orders_total{app=\"s-acme\",outcome=\"issued\"}"), 1.0);
    // Whoever serves next has it.
    drop(_pebble);
    serving.end(rustix::process::Signal::TERM);
    serving.again();
    assert!(serving.lab.host(&get).to_lowercase().contains("x-forwarded-proto: https"));
}

#[test]
fn the_page_tells_of_machines_as_they_start_and_is_for_this_host_alone() {
    let image = layout("busybox");
    let file = format!(
        "app = 's-page'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n[processes]\napp = 'httpd -f -p 8080'\n[http_service]\n"
    );
    let serving = Serving::start_with(&["--page", "127.0.0.1:9465"], &[("s-page", &file)]);
    let page = "http://127.0.0.1:9465/_flyrun";
    assert!(serving.log().contains(&format!("{page}/")), "where it is, is told");
    let html = serving.lab.host(&format!("curl -sS -L --fail --max-time 60 {page}"));
    assert!(html.starts_with("<!doctype html>") && html.contains("page.js"), "{html}");
    assert!(
        serving.lab.host(&format!("curl -sS --fail --max-time 60 {page}/page.js")).contains("EventSource")
    );
    let state = || -> serde_json::Value {
        serde_json::from_str(&serving.lab.host(&format!("curl -sS --fail --max-time 60 {page}/state.json")))
            .unwrap()
    };
    assert_eq!(state()["apps"][0]["name"], "s-page");
    // A stream that is open while a machine starts.
    let events = serving.path().join("events");
    let words = ["curl", "-sS", "-N", "-o", events.to_str().unwrap(), &format!("{page}/events")];
    let _stream = serving.lab.on_host(&words);
    let told = || std::fs::read_to_string(&events).unwrap_or_default();
    wait_until("the stream begins", || told().contains("event: state\ndata: {"));
    serving.lab.host("curl -s -o /dev/null --max-time 120 http://127.0.0.1/");
    wait_until("the machine is on the page", || {
        let last = told()
            .rsplit("\n\n")
            .find_map(|event| event.strip_prefix("event: state\ndata: ").map(str::to_string));
        last.is_some_and(|last| {
            last.contains("s-page-app-0")
                && ["\"base\"", "\"cold_boot\""].iter().any(|what| last.contains(what))
        })
    });
    assert!(state().to_string().contains("s-page-app-0"));
    // Not by another name, nor from elsewhere, nor at another address.
    let status = "curl -sS -o /dev/null -w %{http_code} --max-time 60";
    assert_eq!(serving.lab.host(&format!("{status} -H host:evil.example {page}/state.json")), "403");
    let outside = format!("curl -sS --max-time 20 http://{HOST}:9465/_flyrun/ 2>&1 || echo ended with $?");
    assert!(serving.lab.outside(&outside).contains("ended with 7"), "nobody listens there");
    let path = serving.path().display().to_string();
    let refused = serving.lab.command(&["serve", "--page", &format!("{HOST}:9466"), &path]).fails_clearly();
    refused.complains_about("no loopback address");
}
