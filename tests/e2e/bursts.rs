//! Many requests in one moment, and large ones: what `make test` has in small and `make soak` in large.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::http::{self, Answer};
use crate::image::layout;
use crate::serving::Serving;
use crate::suspended::wait_until;

/// The least that a machine may have.
const MACHINE_MIB: usize = 48;

/// Sends each of these requests on a connection of its own, all in one moment, and gives the answers.
pub fn all_at_once(serving: &Serving, requests: &[Vec<u8>]) -> Vec<Answer> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    serving.lab.within(|| {
        let mut clients: Vec<_> = requests.iter().map(|_| http::Client::connect(80).unwrap()).collect();
        let split: Vec<_> = requests.iter().map(|request| request.split_at(request.len() - 1)).collect();
        for (client, (most, _)) in clients.iter_mut().zip(&split) {
            client.send(most).unwrap();
        }
        for (client, (_, last)) in clients.iter_mut().zip(&split) {
            client.send(last).unwrap();
        }
        clients.iter_mut().map(|client| client.answer().unwrap()).collect()
    })
}

/// A request to each of so many suspended apps, of whose machines so few have memory at a time, and may start at a time.
pub fn apps_at_once(count: usize, fit: usize, starts: usize) {
    let image = layout("busybox");
    let names: Vec<_> = (0..count).map(|number| format!("burst{number}")).collect();
    let file = |name: &String| {
        format!(
            "app = '{name}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n[processes]\n\
             app = '''sh -c \"echo $FLY_APP_NAME > /tmp/index.html; exec httpd -f -p 8080 -h /tmp\"'''\n\
             [http_service]\nauto_stop_machines = 'suspend'\n[[vm]]\nmemory = '{MACHINE_MIB}mb'\n\
             [flyrun]\nhostnames = ['{name}.test']\nidle_timeout = 3600\nqueue_timeout = 1800\n"
        )
    };
    let texts: Vec<_> = names.iter().map(file).collect();
    let files: Vec<_> = names.iter().zip(&texts).map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let memory = format!("{}m", fit * MACHINE_MIB);
    let serving = Serving::start_with(&["--memory", &memory, "--max-starts", &starts.to_string()], &files);
    wait_until("all are on disk", || {
        let machines = serving.all_machines();
        machines.len() == count && machines.iter().all(|machine| machine["state"] == "suspended")
    });
    let requests: Vec<_> = names.iter().map(|name| http::get(&format!("{name}.test"), "/")).collect();
    let (is_over, answers) = (AtomicBool::new(false), std::sync::OnceLock::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let used = serving.figure("flyrun_memory_in_use_bytes") as usize >> 20;
                assert!(used <= fit * MACHINE_MIB, "{used} MiB are more than may be had");
                sleep(Duration::from_millis(500));
            }
        });
        let _ = answers.set(all_at_once(&serving, &requests));
        is_over.store(true, Ordering::Relaxed);
    });
    // No idle_timeout has passed: whoever was served makes room for the others.
    for (name, answer) in names.iter().zip(answers.get().unwrap()) {
        assert_eq!((answer.status, answer.text()), (200, name.clone()), "{}", answer.head);
    }
    assert_eq!(serving.figure("flyrun_start_seconds_count{kind=\"resumed\"}"), count as f64);
    assert_eq!(serving.figure("flyrun_start_failures_total"), 0.0);
}

/// Uploads and downloads so much, and gives what `flyrun serve` needed of memory before, and at most since, in KiB.
pub fn large_bodies(bytes: usize) -> (u64, u64) {
    let image = layout("busybox");
    let script = "#!/bin/sh\\necho Content-Type: text/plain\\r\\necho $NOTHING\\r\\nwc -c\\n";
    let page = format!(
        "mkdir -p /tmp/cgi-bin; printf '{script}' > /tmp/cgi-bin/count; chmod 755 /tmp/cgi-bin/count; \
         truncate -s {bytes} /tmp/large; exec httpd -f -p 8080 -h /tmp"
    );
    let file = format!(
        "app = 's-large'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n\
         [processes]\napp = '''sh -c \"{page}\"'''\n[http_service]\nauto_stop_machines = 'off'\nmin_machines_running = 1\n"
    );
    let serving = Serving::start(&[("s-large", &file)]);
    let small = [http::get("x", "/cgi-bin/count")];
    assert_eq!(all_at_once(&serving, &small)[0].text(), "0");
    let before = serving.peak_kib();
    let (received, told) = serving
        .lab
        .within(|| (http::download(80, "x", "/large"), http::upload(80, "x", "/cgi-bin/count", bytes)));
    assert_eq!(received, bytes);
    assert_eq!(told.text(), bytes.to_string());
    (before, serving.peak_kib())
}
