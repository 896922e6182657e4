//! The lease of a workload that works though nobody asks it anything.

use rustix::process::Signal;
use serde_json::Value;
use tests::image::layout;
use tests::serving::Serving;
use tests::suspended::{command, wait_until};

/// An app that is suspended when it is idle. A request for /METHOD/TARGET has it ask that of its machine's socket.
fn file(app: &str) -> String {
    let image = layout("python");
    let script = "import http.server, socket
end = chr(13) + chr(10)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        method, target = self.path[1:].split('/', 1)
        asked = socket.socket(socket.AF_UNIX)
        asked.connect('/run/flyrun/api.sock')
        asked.sendall((method + ' /' + target + ' HTTP/1.1' + end + end).encode())
        answer = asked.makefile('rb').read()
        self.send_response(200); self.end_headers(); self.wfile.write(answer)
http.server.HTTPServer((str(), 8080), Handler).serve_forever()";
    format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n\
         [processes]\napp = \"\"\"python3 -c \\\"{script}\\\"\"\"\"\n\
         [http_service]\nauto_stop_machines = 'suspend'\n[flyrun]\nidle_timeout = 4\n"
    )
}

/// Has the workload ask for this; gives status and body.
#[track_caller]
fn ask(serving: &Serving, method: &str, target: &str) -> (u16, Value) {
    let told =
        serving.lab.host(&format!("curl -sS --max-time 120 --fail \"http://127.0.0.1/{method}{target}\""));
    let status = told.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(told.lines().last().unwrap()).unwrap())
}

#[track_caller]
fn seconds(answer: &(u16, Value)) -> u64 {
    assert_eq!(answer.0, 200, "{answer:?}");
    answer.1["seconds"].as_u64().unwrap()
}

const BUSY: &str = "/.flyrun/busy";

#[test]
fn a_machine_that_is_busy_is_left_running_until_it_says_otherwise() {
    let app = "l-busy";
    let mut serving = Serving::start(&[(app, &file(app))]);
    serving.wait_for_state(app, "suspended");
    assert_eq!(seconds(&ask(&serving, "PUT", &format!("{BUSY}?seconds=3000"))), 3000);
    let is_busy =
        |serving: &Serving| serving.machines(app)[0]["busy_seconds"].as_u64().is_some_and(|left| left > 2000);
    wait_until("serve knows", || is_busy(&serving));
    let inspected = command(&["inspect", "l-busy-app-0"]).end().code(0).json();
    assert!(inspected[0]["busy_seconds"].as_u64().is_some_and(|left| left > 2000), "{inspected}");
    // Neither a shorter one nor another serve takes it away, and the idle time passes meanwhile.
    assert!(seconds(&ask(&serving, "PUT", BUSY)) > 2000);
    serving.end(Signal::KILL);
    serving.again();
    wait_until("the next one knows", || is_busy(&serving));
    for _ in 0..8 {
        assert_eq!(serving.state(app), "ready");
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    assert!(serving.lab.command(&["status", app]).text().contains("busy "));
    assert!(seconds(&ask(&serving, "GET", BUSY)) > 2000);
    assert_eq!(seconds(&ask(&serving, "DELETE", BUSY)), 0);
    serving.wait_for_state(app, "suspended");
    // One that is not taken back runs out.
    assert_eq!(seconds(&ask(&serving, "PUT", &format!("{BUSY}?seconds=8"))), 8);
    serving.wait_for_state(app, "suspended");
    let log = serving.log();
    assert!(log.contains("\"event\":\"busy\"") && log.contains("\"event\":\"busy no more\""), "{log}");
    // What is no request is told so.
    assert_eq!(ask(&serving, "PUT", &format!("{BUSY}?seconds=3601")).0, 400);
    assert_eq!(ask(&serving, "GET", "/").0, 404);
}
