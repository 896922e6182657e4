//! `flyrun deploy` and `flyrun scale`: a new version takes an old one's place, or does not, and no request is lost.

use rustix::process::Signal;
use tests::flyrun::scratch;
use tests::image::layout;
use tests::lab::Background;
use tests::serving::Serving;
use tests::suspended::{command, wait_until};

/// An app whose pages say which version they are of; /up is there if it is well.
fn file(app: &str, version: &str, up: &str, more: &str) -> String {
    let image = layout("busybox");
    format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n[env]\nVERSION = '{version}'\n\
         [processes]\napp = '''sh -c \"mkdir /tmp/w; cd /tmp/w; echo $VERSION > index.html; {up}; echo $VERSION runs; exec httpd -f -p 8080\"'''\n\
         [http_service]\n{more}\n[[http_service.checks]]\npath = '/up'\ninterval = '2s'\n"
    )
}

const IS_UP: &str = "echo yes > up";
const IS_DOWN: &str = "true";

/// Requests, one after another, until it is dropped.
struct Load {
    directory: tempfile::TempDir,
    _clients: [Background; 2],
}

impl Load {
    fn on(serving: &Serving) -> Load {
        let directory = scratch();
        let client = |number: usize| {
            let path = directory.path().join(number.to_string());
            let get = "curl -s --max-time 120 -w \"%{http_code}\" http://127.0.0.1/ | tr \"\\n\" \" \"";
            let script = format!("while :; do echo \"$({get})\"; done > {}", path.display());
            serving.lab.on_host(&["sh", "-c", &script])
        };
        Load { _clients: [client(0), client(1)], directory }
    }

    fn answers(&self) -> Vec<String> {
        let read = |number: usize| {
            let text =
                std::fs::read_to_string(self.directory.path().join(number.to_string())).unwrap_or_default();
            // The last line may not be whole.
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            whole.lines().map(str::to_string).collect::<Vec<_>>()
        };
        [read(0), read(1)].concat()
    }

    /// Waits for so many more.
    fn goes_on(&self, more: usize) {
        let wanted = self.answers().len() + more;
        wait_until("requests are answered", || self.answers().len() >= wanted);
    }
}

/// The names of all machines that an app has, whatever they do.
fn names(app: &str) -> Vec<String> {
    let filter = format!("label=flyrun.app={app}");
    let listed = command(&["ps", "-a", "--filter", &filter, "--json"]).end().code(0).json();
    let mut names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|machine| machine["name"].as_str().unwrap().to_string())
        .collect();
    names.sort();
    names
}

/// Two machines run, are replaced under load, and each request is answered by one of them.
fn is_replaced_under_load(app: &str, strategy: &str) {
    let more =
        "min_machines_running = 2\n[flyrun]\nmax_machines = 2\n[http_service.concurrency]\ntype = 'requests'";
    let serving = Serving::start(&[(app, &file(app, "one", IS_UP, more))]);
    wait_until("both run", || {
        serving.machines(app).iter().filter(|machine| machine["state"] == "ready").count() == 2
    });
    let load = Load::on(&serving);
    load.goes_on(4);
    let own = scratch();
    let path = own.path().join("fly.toml");
    let text = file(app, "two", IS_UP, more);
    std::fs::write(&path, &text).unwrap();
    let config = path.display().to_string();
    let told = serving.lab.command(&["deploy", "-c", &config, "--strategy", strategy]);
    let told = told.code(0).prints_something_with("deployed: app ");
    assert!(told.errors().contains("is healthy"), "{}", told.errors());
    load.goes_on(4);
    let answers = load.answers();
    assert!(answers.iter().all(|answer| answer == "one 200" || answer == "two 200"), "{answers:?}");
    assert!(answers.iter().any(|answer| answer == "one 200"));
    drop(load);
    assert_eq!(serving.get("x", 80), "two");
    assert_eq!(names(app), [format!("{app}-app-2"), format!("{app}-app-3")]);
    // What is served is what was deployed, also by the next one.
    assert_eq!(std::fs::read_to_string(serving.path().join(format!("{app}.toml"))).unwrap(), text);
    let again = serving.lab.command(&["deploy", "-a", app, "--json"]).code(0);
    let last: serde_json::Value = serde_json::from_str(again.text().lines().last().unwrap()).unwrap();
    assert_eq!((last["event"].as_str(), last["changed"].as_bool()), (Some("done"), Some(false)), "{last}");
    assert_eq!(names(app), [format!("{app}-app-2"), format!("{app}-app-3")]);
}

#[test]
fn rolling_replaces_machines_under_load_and_loses_no_request() {
    is_replaced_under_load("d-roll", "rolling");
}

#[test]
fn bluegreen_replaces_machines_under_load_and_loses_no_request() {
    is_replaced_under_load("d-green", "bluegreen");
}

#[test]
fn a_version_whose_check_fails_is_taken_back_and_the_old_one_answers_throughout() {
    let app = "d-back";
    let more = "min_machines_running = 1";
    let mut serving = Serving::start(&[(app, &file(app, "one", IS_UP, more))]);
    serving.wait_for_state(app, "ready");
    let load = Load::on(&serving);
    load.goes_on(2);
    let own = scratch();
    let path = own.path().join("fly.toml");
    std::fs::write(&path, file(app, "two", IS_DOWN, more)).unwrap();
    let config = path.display().to_string();
    for strategy in ["rolling", "bluegreen"] {
        let words = ["deploy", "-c", &config, "--strategy", strategy, "--wait-timeout", "20s"];
        let told = serving.lab.command(&words).code(125).complains_about("the old version goes on");
        told.complains_about("/up is answered with status 404").complains_about("last line was: two runs");
    }
    // One that ends does not have to be waited for, and its file changes nothing either.
    std::fs::write(&path, file(app, "three", "exit 7", more)).unwrap();
    let told = serving.lab.command(&["deploy", "-c", &config]).code(125);
    told.complains_about("exit code 7").complains_about("nothing");
    serving.write(app, &file(app, "four", "exit 8", more));
    wait_until("the change of the file has failed too", || serving.log().contains("exit code 8"));
    load.goes_on(2);
    let answers = load.answers();
    assert!(answers.iter().all(|answer| answer == "one 200"), "{answers:?}");
    drop(load);
    wait_until("only the old one is left", || names(app) == [format!("{app}-app-0")]);
    // A good one comes through after all of that.
    std::fs::write(&path, file(app, "five", IS_UP, more)).unwrap();
    serving.lab.command(&["deploy", "-c", &config]).code(0);
    assert_eq!(serving.get("x", 80), "five");
    assert_eq!(serving.end(Signal::TERM), Some(0));
    serving.again();
    assert_eq!(serving.get("x", 80), "five", "the next one finds it");
}

#[test]
fn what_cannot_be_deployed_is_told_with_the_next_step() {
    let app = "d-none";
    let serving = Serving::start(&[(app, &file(app, "one", IS_UP, ""))]);
    let deploy = |words: &[&str]| serving.lab.command(&[&["deploy"], words].concat());
    deploy(&["-a", "d-other"]).fails_clearly().complains_about("d-other").complains_about("flyrun status");
    deploy(&["-a", app, "--image", "oci:/none"]).fails_clearly().complains_about("/none");
    assert!(deploy(&["-a", app, "--strategy", "canary"]).code(125).errors().contains("canary is not built"));
    assert_eq!(serving.get("x", 80), "one");
    drop(serving);
    let lab = tests::lab::Lab::new("");
    // Another test may have its own.
    lab.command(&["deploy", "-a", app]).fails_clearly().complains_about("flyrun");
}

#[test]
fn a_count_is_kept_and_machines_beyond_it_go() {
    let app = "d-count";
    let image = layout("busybox");
    let text = format!(
        "app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n\
         [processes]\nwork = 'sleep 100000'\nmore = 'sleep 100000'\n"
    );
    let mut serving = Serving::start(&[(app, &text)]);
    let ready = |serving: &Serving, count: usize| {
        wait_until(&format!("{count} run: {:?}", serving.machines(app)), || {
            serving.machines(app).iter().filter(|machine| machine["state"] == "ready").count() == count
        });
    };
    ready(&serving, 2);
    let scale = |serving: &Serving, words: &[&str]| {
        serving.lab.command(&[&["scale", "count", "-a", app], words].concat())
    };
    scale(&serving, &["3"]).fails_clearly().complains_about("several groups").complains_about("work=N");
    scale(&serving, &["job=3"]).fails_clearly().complains_about("no group 'job'");
    scale(&serving, &["work=3"]).code(0).prints_something_with("work");
    ready(&serving, 4);
    serving.end(Signal::KILL);
    serving.again();
    ready(&serving, 4);
    scale(&serving, &["work=1", "more=0"]).code(0);
    ready(&serving, 1);
    wait_until("the others are gone", || names(app) == [format!("{app}-work-0")]);
    let shown = serving.lab.command(&["scale", "show", "-a", app, "--json"]).code(0).json();
    let of = |group: &str| {
        shown.as_array().unwrap().iter().find(|row| row["group"] == group).unwrap()["count"].clone()
    };
    assert_eq!((of("work"), of("more")), (1.into(), 0.into()));
}

#[test]
fn a_volume_is_in_one_machine_and_what_it_holds_outlives_both_versions() {
    let app = "d-volume";
    let text = |version: &str, up: &str| {
        let up = format!("echo $VERSION >> /data/seen; cp /data/seen index.html; {up}");
        file(
            app,
            version,
            &up,
            "min_machines_running = 1\n[mounts]\nsource = 'd-data'\ndestination = '/data'",
        )
    };
    let serving = Serving::start(&[(app, &text("one", IS_UP))]);
    serving.wait_for_state(app, "ready");
    let own = scratch();
    let path = own.path().join("fly.toml");
    let config = path.display().to_string();
    let deploy = |text: &str| {
        std::fs::write(&path, text).unwrap();
        serving.lab.command(&["deploy", "-c", &config, "--wait-timeout", "20s"])
    };
    deploy(&text("two", IS_UP)).code(0);
    assert_eq!(serving.get("x", 80), "one\ntwo");
    deploy(&text("three", IS_DOWN)).code(125).complains_about("status 404");
    serving.wait_for_state(app, "ready");
    assert_eq!(serving.get("x", 80), "one\ntwo\nthree\ntwo", "the old one has it again");
    let green = serving.lab.command(&["deploy", "-a", app, "--strategy", "bluegreen"]);
    green.fails_clearly().complains_about("a volume can be in one machine");
    drop(serving);
    command(&["volume", "rm", "d-data"]).end().code(0);
}

#[test]
fn a_serve_that_is_killed_in_a_deploy_goes_on_with_what_it_served() {
    let app = "d-killed";
    let more = "min_machines_running = 1";
    let mut serving = Serving::start(&[(app, &file(app, "one", IS_UP, more))]);
    serving.wait_for_state(app, "ready");
    let own = scratch();
    let path = own.path().join("fly.toml");
    std::fs::write(&path, file(app, "two", IS_DOWN, more)).unwrap();
    let config = path.display().to_string();
    let errors = own.path().join("errors");
    let _deploy = serving.lab.background(&["deploy", "-c", &config], &errors);
    let told = || std::fs::read_to_string(&errors).unwrap();
    wait_until("the new one is tried", || told().contains("status 404"));
    assert_eq!(names(app), [format!("{app}-app-0"), format!("{app}-app-1")]);
    serving.end(Signal::KILL);
    wait_until("who asked is told", || told().contains("has ended before this was done"));
    serving.again();
    assert_eq!(serving.get("x", 80), "one");
    wait_until("the new one is gone", || names(app) == [format!("{app}-app-0")]);
    assert_eq!(serving.get("x", 80), "one");
}

#[test]
fn a_process_that_nothing_is_asked_of_must_last_a_while() {
    let app = "d-worker";
    let image = layout("busybox");
    let text = |command: &str| {
        let head = format!("app = '{app}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n");
        format!("{head}[processes]\nwork = \"{command}\"\n")
    };
    let serving = Serving::start(&[(app, &text("sleep 100000"))]);
    serving.wait_for_state(app, "ready");
    let own = scratch();
    let path = own.path().join("fly.toml");
    let config = path.display().to_string();
    std::fs::write(&path, text("sh -c 'sleep 1; echo no work; exit 9'")).unwrap();
    let told = serving.lab.command(&["deploy", "-c", &config]).code(125);
    told.complains_about("exit code 9").complains_about("last line was: no work");
    wait_until("the old one is left", || names(app) == [format!("{app}-work-0")]);
    assert_eq!(serving.state(app), "ready");
    // One that has done its work has not failed.
    std::fs::write(&path, text("true")).unwrap();
    serving.lab.command(&["deploy", "-c", &config]).code(0);
}
