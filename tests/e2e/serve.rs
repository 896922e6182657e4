//! `flyrun serve`: a request boots the machine.

use rustix::process::{Pid, Signal, kill_process};
use tests::bursts::{all_at_once, apps_at_once};
use tests::flyrun::scratch;
use tests::http::get;
use tests::image::layout;
use tests::lab::Lab;
use tests::serving::Serving;
use tests::suspended::{command, pid_of, wait_until};

const WELCOME: &str = "Welcome to nginx";

/// An app of nginx that is suspended when it is idle.
fn nginx(app: &str, more: &str) -> String {
    let image = layout("nginx");
    format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGTERM'\n\
         [http_service]\ninternal_port = 80\nauto_stop_machines = 'suspend'\n[flyrun]\n{more}\n"
    )
}

/// An app whose page is what a script prints, by busybox.
fn busybox(app: &str, page: &str, more: &str) -> String {
    let image = layout("busybox");
    format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n\
         [processes]\napp = '''sh -c \"{page} > /tmp/index.html; exec httpd -f -p 8080 -h /tmp\"'''\n\
         [http_service]\nauto_stop_machines = 'suspend'\n{more}\n"
    )
}

#[test]
fn from_nothing_running_a_request_gets_its_page() {
    let mut serving = Serving::start(&[("s-web", &nginx("s-web", "idle_timeout = 5"))]);
    // The first snapshot is made at once.
    serving.wait_for_state("s-web", "suspended");
    assert!(serving.get("x", 80).contains(WELCOME));
    let machine = &serving.machines("s-web")[0];
    assert_eq!(machine["last_start"], "resumed");
    serving.wait_for_state("s-web", "suspended");
    assert!(serving.get("x", 80).contains(WELCOME));
    assert_eq!(serving.figure("flyrun_start_seconds_count{kind=\"resumed\"}"), 2.0);
    // It is a machine as others are.
    let name = "s-web-app-0";
    let record = command(&["inspect", name]).end().code(0).json();
    assert_eq!(record[0]["config"]["labels"]["flyrun.app"], "s-web");
    let listed = command(&["ps", "-a", "--filter", "label=flyrun.app=s-web", "--json"]).end().code(0).json();
    assert_eq!(listed[0]["name"], name);
    wait_until("its log has the request", || {
        command(&["logs", "-a", "s-web"]).end().text().contains("s-web-app-0 | ")
    });
    // And it stays as it is.
    let before = command(&["inspect", name]).end().json()[0]["state"].clone();
    assert_eq!(serving.end(Signal::TERM), Some(0));
    assert!(["started", "suspended", "suspending"].iter().any(|state| before == **state), "{before}");
    let after = command(&["inspect", name]).end().json()[0]["state"].clone();
    assert!(["started", "suspended"].iter().any(|state| after == **state), "{after}");
}

#[test]
fn many_requests_at_once_are_one_start_and_all_are_answered() {
    const REQUESTS: usize = 1000;
    // As Debian has it, nginx takes 768 connections.
    let file = nginx("s-many", "idle_timeout = 2\nqueue_timeout = 1800")
        + "[http_service.concurrency]\nhard_limit = 200\n";
    let serving = Serving::start(&[("s-many", &file)]);
    serving.wait_for_state("s-many", "suspended");
    let answers = all_at_once(&serving, &vec![get("x", "/"); REQUESTS]);
    for answer in &answers {
        assert!(answer.status == 200 && answer.text().contains(WELCOME), "{answer:?}");
    }
    assert_eq!(serving.figure("flyrun_start_seconds_count{kind=\"resumed\"}"), 1.0);
    let log = serving.log();
    let answered =
        log.lines().filter(|line| line.contains("\"event\":\"request\"") && line.contains("\"status\":200"));
    assert_eq!(answered.count(), REQUESTS, "{log}");
}

#[test]
fn many_apps_at_once_make_room_for_each_other() {
    apps_at_once(10, 3, 2);
}

#[test]
fn apps_are_told_apart_by_host_and_know_who_they_are() {
    let page = "echo $FLY_APP_NAME $FLY_PROCESS_GROUP $FLY_REGION $GREETING $FLY_MACHINE_ID $HOSTNAME";
    let file = |app: &str, host: &str| {
        busybox(app, page, &format!("[env]\nGREETING = 'hello'\n[flyrun]\nhostnames = ['{host}']"))
    };
    let (one, two) = (file("s-one", "one.test"), file("s-two", "*.two.test"));
    let serving = Serving::start(&[("s-one", &one), ("s-two", &two)]);
    for (app, host) in [("s-one", "one.test"), ("s-two", "a.two.test")] {
        let page = serving.get(host, 80);
        assert!(page.starts_with(&format!("{app} app local hello ")), "{page}");
        let id = serving.machines(app)[0]["id"].as_str().unwrap().to_string();
        assert!(page.ends_with(&format!("{id} {id}")), "{page} is not {id}'s");
    }
    let status = "curl -s -o /dev/null -w %{http_code} -H host:three.test http://127.0.0.1/";
    assert_eq!(serving.lab.host(status), "404");
}

#[test]
fn a_serve_that_is_killed_finds_its_machines_as_they_are() {
    let page = "cat /proc/sys/kernel/random/boot_id";
    let never = busybox("s-stays", page, "[flyrun]\nidle_timeout = 3600");
    let soon = busybox("s-rests", page, "[flyrun]\nidle_timeout = 1\nhostnames = ['rests']");
    let mut serving = Serving::start(&[("s-stays", &never), ("s-rests", &soon)]);
    let (stays, rests) = (serving.get("x", 80), serving.get("rests", 80));
    serving.wait_for_state("s-rests", "suspended");
    serving.end(Signal::KILL);
    serving.again();
    assert_eq!((serving.get("x", 80), serving.get("rests", 80)), (stays, rests), "the same lives go on");
    assert_eq!(serving.figure("flyrun_start_seconds_count{kind=\"resumed\"}"), 1.0, "only one had to start");
    assert_eq!(serving.figure("flyrun_start_seconds_count{kind=\"base\"}"), 0.0);
}

#[test]
fn what_is_killed_is_started_again_for_the_next_request() {
    let serving = Serving::start(&[("s-killed", &nginx("s-killed", "idle_timeout = 3600"))]);
    assert!(serving.get("x", 80).contains(WELCOME));
    for process in ["flyrun-vmm", "flyrun monitor"] {
        let id = serving.machines("s-killed")[0]["id"].as_str().unwrap().to_string();
        let pid = pid_of(process, &id);
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        // At once: whether it is known to be gone or not.
        assert!(serving.get("x", 80).contains(WELCOME), "after {process} was killed");
    }
    assert_eq!(serving.figure("flyrun_machine_deaths_total"), 2.0);
}

#[test]
fn a_changed_file_is_followed_without_losing_a_request() {
    let file = |greeting: &str| {
        let more =
            format!("min_machines_running = 1\n[env]\nGREETING = '{greeting}'\n[flyrun]\nmax_machines = 2");
        busybox("s-new", "echo $GREETING", &more)
    };
    let mut serving = Serving::start(&[("s-new", &file("one"))]);
    assert_eq!(serving.get("x", 80), "one");
    serving.write("s-new", "app = 's-new'\nnonsense = 1");
    wait_until("a file that is wrong is told of", || serving.log().contains("files refused"));
    serving.write("s-new", &file("two"));
    serving.signal(Signal::HUP);
    let mut seen = vec!["one".to_string()];
    wait_until("the new one answers", || {
        let page = serving.get("x", 80);
        if seen.last() != Some(&page) {
            seen.push(page);
        }
        seen.last().is_some_and(|page| page == "two")
    });
    assert_eq!(seen, ["one", "two"]);
    // Also by one that was not there when it changed: what runs goes on until another takes its place.
    serving.end(Signal::KILL);
    serving.write("s-new", &file("three"));
    serving.again();
    let mut seen = Vec::new();
    wait_until("the newest answers", || {
        seen.push(serving.get("x", 80));
        seen.last().is_some_and(|page| page == "three")
    });
    assert!(seen.iter().all(|page| page == "two" || page == "three"), "{seen:?}");
}

#[test]
fn a_job_that_has_done_its_work_is_not_started_again() {
    let image = layout("busybox");
    let file = format!(
        "app = 's-job'\nbuild.image = '{image}'\n[processes]\njob = 'sh -c \"echo work; exit 0\"'\n\
         [[restart]]\npolicy = 'on-failure'\n"
    );
    let mut serving = Serving::start(&[("s-job", &file)]);
    wait_until("it has ended", || serving.log().contains("machine is not started again"));
    serving.end(Signal::TERM);
    serving.again();
    assert_eq!(serving.state("s-job"), "none");
    assert_eq!(command(&["logs", "-a", "s-job"]).end().code(0).text(), "s-job-job-0 | work");
}

#[test]
fn a_release_command_that_fails_is_shown_and_nothing_is_served() {
    let deploy = "[deploy]\nrelease_command = '''sh -c \"echo no database >&2; exit 4\"'''";
    let file = busybox("s-release", "echo served", deploy);
    let lab = Lab::new("");
    let directory = scratch();
    let path = directory.path().join("fly.toml");
    std::fs::write(&path, &file).unwrap();
    let word = path.display().to_string();
    lab.command(&["serve", &word])
        .fails_clearly()
        .complains_about("exit code 4")
        .complains_about("no database");
    let listed = command(&["ps", "-aq", "--filter", "label=flyrun.app=s-release"]).end().code(0).text();
    assert_eq!(listed, "", "nothing is left");
    let serving = Serving::start(&[("s-release", &file.replace("exit 4", "exit 0"))]);
    assert_eq!(serving.get("x", 80), "served");
}

#[test]
fn more_requests_than_a_machine_takes_start_others_from_where_the_first_was() {
    let image = layout("python");
    let script = "import http.server, socketserver, time, uuid
me = uuid.uuid4().hex
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(3)
        self.send_response(200); self.end_headers(); self.wfile.write((me + chr(10)).encode())
class Server(socketserver.ThreadingTCPServer): allow_reuse_address = True
Server((str(), 8080), Handler).serve_forever()";
    let file = format!(
        "app = 's-scale'\nbuild.image = '{image}'\n[processes]\napp = '''python3 -c \"{script}\"'''\n\
         [http_service]\nauto_stop_machines = 'suspend'\n[http_service.concurrency]\ntype = 'requests'\n\
         soft_limit = 1\nhard_limit = 1\n[flyrun]\nmax_machines = 3\nidle_timeout = 3\n"
    );
    let serving = Serving::start(&[("s-scale", &file)]);
    serving.wait_for_state("s-scale", "suspended");
    let snapshot = || {
        let listed = command(&["snapshot", "ls"]).end().text();
        listed
            .split_whitespace()
            .find(|word| word.starts_with("s-scale-app-") && word.len() > 20)
            .map(str::to_string)
    };
    wait_until("there is a snapshot for further machines", || snapshot().is_some());
    let get = "curl -sS --fail --max-time 120 http://127.0.0.1/";
    let pages = serving.lab.host(&format!("for i in 1 2 3; do {get} & done; wait"));
    // Their memory is one, so they are called the same inside; the proxy knows them apart.
    assert_eq!(pages.lines().count(), 3, "{pages}");
    let machines = serving.machines("s-scale");
    assert_eq!(machines.len(), 3, "{machines:?}");
    assert!(machines.iter().all(|machine| machine["last_start"] == "resumed"), "{machines:?}");
    wait_until("all rest", || {
        serving.machines("s-scale").iter().all(|machine| machine["state"] == "suspended")
    });
    command(&["snapshot", "rm", &snapshot().unwrap()]).end().code(0);
}

#[test]
fn a_machine_that_does_not_start_is_told_of_with_an_id_that_finds_the_reason() {
    let file = busybox("s-bad", "exit 3", "auto_start_machines = true\n[flyrun]\nstart_timeout = 20");
    let serving = Serving::start(&[("s-bad", &file)]);
    wait_until("it has failed", || serving.log().contains("machine ended"));
    let page = serving.lab.host("curl -sS --max-time 120 -w \" %{http_code}\" http://127.0.0.1/");
    assert!(page.ends_with("503") && page.contains("does not start"), "{page}");
    // The id on the page is the request's; its line has that of the reason's line.
    let log = serving.log();
    let lines =
        || log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap_or_default());
    let text = |line: &serde_json::Value, key: &str| line[key].as_str().unwrap_or_default().to_string();
    let request =
        lines().find(|line| line["event"] == "request" && page.contains(&text(line, "id"))).unwrap();
    let reason = lines()
        .find(|line| line["event"] == "machine ended" && text(&request, "error").contains(&text(line, "id")));
    assert_eq!(reason.unwrap_or_else(|| panic!("{page}\n{log}"))["exit_code"], 3);
}

#[test]
fn what_cannot_be_served_is_told_before_anything_is() {
    let lab = Lab::new("");
    let directory = scratch();
    let path = directory.path().join("fly.toml");
    let word = path.display().to_string();
    lab.command(&["serve", &word]).fails_clearly().complains_about("fly.toml");
    std::fs::write(&path, "app = 's-x'\nbuild.image = 'x'\nnonsense = 1").unwrap();
    lab.command(&["serve", &word]).fails_clearly().complains_about("nonsense");
    std::fs::write(&path, nginx("s-x", "")).unwrap();
    let _other = lab.on_host(&["python3", "-m", "http.server", "80"]);
    lab.wait_for("ss -lnt | grep :80");
    let told = lab.command(&["serve", &word]).fails_clearly();
    let told = told.complains_about("app s-x").complains_about("port 80").errors();
    assert!(told.contains("ss -ltnp"), "{told}");
    lab.command(&["status", "s-none"]).fails_clearly();
    lab.command(&["logs", "-a", "s-none"]).fails_clearly().complains_about("no machines");
}

#[test]
fn an_app_has_one_who_serves_it() {
    let serving = Serving::start(&[("s-twice", &nginx("s-twice", ""))]);
    let path = serving.path().join("s-twice.toml").display().to_string();
    serving.lab.command(&["serve", &path]).fails_clearly().complains_about("served already");
}
