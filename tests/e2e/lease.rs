//! The lease of a workload that works though nobody asks it anything.

use rustix::process::Signal;
use serde_json::Value;
use tests::image::layout;
use tests::serving::Serving;
use tests::suspended::{command, wait_until};

/// An app that is suspended when it is idle, whose machine has curl's part done by python.
fn file(app: &str) -> String {
    let image = layout("python");
    format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n\
         [processes]\napp = 'python3 -m http.server 8080'\n\
         [http_service]\nauto_stop_machines = 'suspend'\n[flyrun]\nidle_timeout = 12\n"
    )
}

/// Asks for the lease in a machine, as its workload would; gives status and body.
fn ask(machine: &str, method: &str, target: &str, body: &str) -> (u16, Value) {
    let script = format!(
        "import http.client, socket
class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect('/run/flyrun/api.sock')
connection = Unix('localhost')
connection.request('{method}', '{target}', body='{body}' or None)
answer = connection.getresponse()
print(answer.status, answer.read().decode())"
    );
    let told = command(&["exec", machine, "python3", "-c", &script]).end().code(0).text();
    let (status, body) = told.split_once(' ').unwrap();
    (status.parse().unwrap(), serde_json::from_str(body).unwrap())
}

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
    // A request wakes it, and its work begins with that.
    serving.get("x", 80);
    let machine = format!("{app}-app-0");
    assert_eq!(seconds(&ask(&machine, "PUT", BUSY, "3000")), 3000);
    let is_busy =
        |serving: &Serving| serving.machines(app)[0]["busy_seconds"].as_u64().is_some_and(|left| left > 2000);
    wait_until("serve knows", || is_busy(&serving));
    assert!(seconds(&ask(&machine, "GET", BUSY, "")) > 2000);
    let inspected = command(&["inspect", &machine]).end().code(0).json();
    assert!(inspected[0]["busy_seconds"].as_u64().is_some_and(|left| left > 2000), "{inspected}");
    // Neither a shorter one nor another serve takes it away, and the idle time passes meanwhile.
    assert!(seconds(&ask(&machine, "PUT", &format!("{BUSY}?seconds=1"), "")) > 2000);
    serving.end(Signal::KILL);
    serving.again();
    wait_until("the next one knows", || is_busy(&serving));
    for _ in 0..18 {
        assert_eq!(serving.state(app), "ready");
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    assert!(serving.lab.command(&["status", app]).text().contains("busy "));
    assert_eq!(seconds(&ask(&machine, "DELETE", BUSY, "")), 0);
    serving.wait_for_state(app, "suspended");
    // One that is not taken back runs out.
    serving.get("x", 80);
    assert_eq!(seconds(&ask(&machine, "PUT", &format!("{BUSY}?seconds=20"), "")), 20);
    serving.wait_for_state(app, "suspended");
    let log = serving.log();
    assert!(log.contains("\"event\":\"busy\"") && log.contains("\"event\":\"busy no more\""), "{log}");
    // What is no request is told so.
    serving.get("x", 80);
    assert_eq!(ask(&machine, "PUT", BUSY, "3601").0, 400);
    assert_eq!(ask(&machine, "GET", "/", "").0, 404);
}
