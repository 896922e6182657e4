//! Random traffic to many apps whose machines are suspended after a second, while monitors, VMMs and `flyrun serve` itself are
//! killed and new versions are deployed. `make soak NAME=serve MINUTES=20`; FLYRUN_SOAK_SEED repeats a run's choices.

mod chaos;
mod rest;
mod traffic;
mod world;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::bursts;
use tests::image::busybox;
use tests::serving::Serving;
use tests::suspended::wait_until;

use chaos::Chaos;
use rest::Rest;
use traffic::Client;
use world::World;

use super::{Random, setting};

const APPS: usize = 30;
const CLIENTS: u64 = 10;
/// Machines that fit into the memory that they have together, of those that there are.
const FIT: usize = 10;
const MACHINE_MIB: usize = 48;
/// How long before the end `flyrun serve` is not killed any more, so that its own memory can be looked at.
const LAST_LIFE: f64 = 0.35;

/// What an app's file says. Every fifth has two machines, and every third is stopped, not suspended.
fn file(app: usize, version: u64) -> String {
    // Says who it is, what it was asked, and all that it was sent; `sleep` is the last word of the query.
    let script = "#!/bin/sh\\necho Content-Type: text/plain\\r\\necho $NOTHING\\r\\necho $FLY_APP_NAME $VERSION $QUERY_STRING\\n\
                  sleep ${QUERY_STRING##*-}\\ncat\\necho end of $QUERY_STRING\\n";
    let page = format!(
        "mkdir -p /tmp/cgi-bin; echo $FLY_APP_NAME $VERSION > /tmp/index.html; printf '{script}' > /tmp/cgi-bin/echo; \
         chmod 755 /tmp/cgi-bin/echo; exec httpd -f -p 8080 -h /tmp"
    );
    let (image, name, machines) = (busybox(), name(app), machines(app));
    let rest = if app % 3 == 2 { "stop" } else { "suspend" };
    format!(
        "app = '{name}'\nbuild.image = '{image}'\nkill_signal = 'SIGKILL'\n\
         [processes]\napp = '''sh -c \"{page}\"'''\n[env]\nVERSION = 'v{version}'\n\
         [http_service]\nauto_stop_machines = '{rest}'\nconcurrency.soft_limit = 2\n\
         [[vm]]\nmemory = '{MACHINE_MIB}mb'\n\
         [flyrun]\nhostnames = ['{name}.test']\nidle_timeout = 1\nqueue_timeout = 120\nmax_machines = {machines}\n"
    )
}

fn name(app: usize) -> String {
    format!("soak{app:02}")
}

fn machines(app: usize) -> usize {
    if app % 5 == 4 { 2 } else { 1 }
}

#[test]
fn serve_starts_a_hundred_apps_at_once() {
    let count = setting("FLYRUN_SOAK_APPS", 100) as usize;
    bursts::apps_at_once(count, count / 5, 4);
}

#[test]
fn serve_passes_a_gibibyte_both_ways_in_constant_memory() {
    let (before, peak) = bursts::large_bodies(1 << 30);
    println!("flyrun serve: {before} KiB before, {peak} KiB at most");
    assert!(peak < before + (4 << 10), "{before} KiB before, {peak} KiB at most");
}

#[test]
fn serve_answers_rightly_whatever_is_killed() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (minutes, seed) = (setting("FLYRUN_SOAK_MINUTES", 20), setting("FLYRUN_SOAK_SEED", now));
    println!("{minutes} minutes, FLYRUN_SOAK_SEED={seed}");
    let names: Vec<_> = (0..APPS).map(name).collect();
    let texts: Vec<_> = (0..APPS).map(|app| file(app, 1)).collect();
    let files: Vec<_> = names.iter().zip(&texts).map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let memory = format!("{}m", FIT * MACHINE_MIB);
    let mut serving =
        Serving::start_with(&["--max-starts", "3", "--memory", &memory, "--drain", "5"], &files);
    wait_until("all have begun", || rest::is_calm(&serving));
    let before = Rest::of(&serving);
    println!("at rest: {before:?}");

    let world = World::new(APPS);
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let calm = end - Duration::from_secs_f64(minutes as f64 * 60.0 * LAST_LIFE);
    let lab = serving.lab.clone();
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (world, lab) = (&world, &lab);
            let random = Random((seed ^ (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1);
            scope.spawn(move || {
                lab.enter();
                Client::new(world, random).run(end);
            });
        }
        let mut chaos = Chaos::new(&world, Random(seed | 1));
        chaos.run(&mut serving, end, calm);
    });
    world.tell();
    // A deploy whose machine was killed has failed, and is not tried again before somebody asks for it.
    serving.signal(Signal::HUP);
    rest::check_all_new(&serving, &world);
    wait_until("all rest", || rest::is_calm(&serving));
    rest::check(&mut serving, &before, &world);
}
