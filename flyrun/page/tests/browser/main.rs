//! The page in a real browser: `tests/setup` installs it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chromium;
mod server;

use chromium::Chromium;
use page::{App, Event, LastStart, Latencies, Machine, State, What};
use server::Server;

/// Would run, or change the page, if it were taken for markup.
const MARKUP: &str = "<img src=x onerror=\"document.title='broken'\"><b class=bold>x</b>";

/// The time of day, which does not pass: how long a test takes makes no difference.
const NOW_MS: u64 = 1_795_000_000_000;

fn machine(name: &str, state: &str, load: u32, kind: What, ms: u64, ago_s: u64) -> Machine {
    let last_start = Some(LastStart { kind, ms, at: NOW_MS - ago_s * 1000 });
    Machine {
        id: format!("id-{name}"),
        name: name.into(),
        state: state.into(),
        load,
        limit: Some(20),
        last_start,
    }
}

fn event(ago_s: u64, app: &str, machine: &str, what: What, ms: Option<u64>) -> Event {
    Event { at: NOW_MS - ago_s * 1000, app: app.into(), machine: format!("id-{machine}"), what, ms }
}

fn latencies(p50: f64, p99: f64, p99_9: f64, count: u64) -> Latencies {
    Latencies { p50: Some(p50), p99: Some(p99), p99_9: Some(p99_9), count }
}

/// A busy evening.
fn state() -> State {
    let app = |name: &str, group: &str, machines: Vec<Machine>, queue, latencies| App {
        name: name.into(),
        group: group.into(),
        machines,
        queue,
        latencies,
    };
    State {
        apps: vec![
            app(
                "shop",
                "web",
                vec![
                    machine("shop-web-1", "started", 17, What::Resumed, 14, 70),
                    machine("shop-web-2", "started", 4, What::Base, 43, 200),
                    machine("shop-web-3", "suspended", 0, What::Resumed, 16, 150),
                ],
                3,
                latencies(2.4, 18.0, 41.5, 48_210),
            ),
            app(
                "shop",
                "jobs",
                vec![machine("shop-jobs-1", "started", 1, What::ColdBoot, 212, 4000)],
                0,
                Latencies::default(),
            ),
            app(
                "blog",
                "app",
                vec![machine("blog-1", "suspended", 0, What::Resumed, 12, 120)],
                0,
                latencies(5.1, 22.0, 22.0, 310),
            ),
            app(
                "api",
                "app",
                vec![
                    machine("api-1", "failed", 0, What::ColdBoot, 180, 260),
                    machine("api-2", "starting", 0, What::Base, 51, 230),
                ],
                12,
                latencies(7.7, 95.0, 1240.0, 9_004),
            ),
        ],
        events: vec![
            event(260, "api", "api-1", What::ColdBoot, Some(180)),
            event(230, "api", "api-2", What::Base, Some(51)),
            event(210, "shop", "shop-web-1", What::Suspended, Some(38)),
            event(200, "shop", "shop-web-2", What::Base, Some(43)),
            event(150, "shop", "shop-web-3", What::Resumed, Some(16)),
            event(120, "blog", "blog-1", What::Resumed, Some(12)),
            event(90, "api", "api-1", What::Failed, None),
            event(70, "shop", "shop-web-1", What::Resumed, Some(14)),
            event(55, "blog", "blog-1", What::Suspended, Some(31)),
            event(40, "api", "api-2", What::Stopped, Some(120)),
            event(12, "shop", "shop-web-3", What::Suspended, Some(35)),
        ],
    }
}

fn text_of(selector: &str) -> String {
    format!("document.querySelector({selector:?}).innerText")
}

#[test]
fn it_shows_what_there_is_and_what_happens() {
    let server = Server::start(state());
    let mut browser = Chromium::start(NOW_MS);
    browser.open(&server.url(), 1200, "light");
    assert_eq!(browser.evaluate("location.pathname"), "/_flyrun/");
    assert_eq!(browser.evaluate("document.querySelectorAll('.app').length"), 4);
    assert_eq!(browser.evaluate("document.querySelectorAll('.machine').length"), 7);
    assert_eq!(browser.evaluate("document.querySelectorAll('#timeline circle').length"), 11);
    assert_eq!(browser.evaluate("document.querySelectorAll('#events tr').length"), 11);
    let shop = browser.evaluate(&text_of(".app")).to_string();
    for part in [
        "shop",
        "web",
        "3 waiting",
        "2.4 ms",
        "18 ms",
        "shop-web-1",
        "17 of 20",
        "resumed in 14 ms",
        "suspended",
    ] {
        assert!(shop.contains(part), "{part} is not in {shop}");
    }
    browser.picture("wide-light");

    server.change(|state| {
        state.apps[2].machines[0].state = "started".into();
        state.apps[2].machines[0].load = 5;
        state.events.push(event(0, "blog", "blog-1", What::Resumed, Some(13)));
    });
    browser.wait_for("document.querySelectorAll('#events tr').length === 12");
    assert_eq!(browser.evaluate("document.querySelectorAll('.fresh').length"), 1);
    browser.wait_for("document.querySelector('#events tr').innerText.includes('13 ms')");
    browser.wait_for("document.querySelectorAll('.app')[2].innerText.includes('5 of 20')");
    browser.wait_for("document.querySelectorAll('#timeline circle').length === 12");

    browser.evaluate("document.querySelector('[data-minutes=\"1\"]').click()");
    browser.wait_for("document.querySelectorAll('#timeline circle').length === 4");
    browser.evaluate("{ const f = document.getElementById('filter'); f.value = 'BLOG'; f.dispatchEvent(new Event('input')); }");
    assert_eq!(browser.evaluate("document.querySelectorAll('.app').length"), 1);
    assert_eq!(browser.complaints(), [] as [String; 0]);
}

#[test]
fn it_fits_on_a_phone_and_in_the_dark_and_when_there_is_nothing() {
    let server = Server::start(state());
    let mut browser = Chromium::start(NOW_MS);
    browser.open(&server.url(), 400, "dark");
    assert_eq!(browser.evaluate("document.documentElement.scrollWidth"), 400);
    // The table neither.
    let hidden = "(() => { const box = document.querySelector('.scroll'); return box.scrollWidth - box.clientWidth; })()";
    assert_eq!(browser.evaluate(hidden), 0);
    let lowest = "getComputedStyle(document.body).backgroundColor";
    assert_eq!(browser.evaluate(lowest), "rgb(15, 20, 26)");
    browser.picture("narrow-dark");
    browser.open(&server.url(), 1200, "dark");
    browser.picture("wide-dark");
    // Whoever does not see it finds names for what can be used, and a heading for each part.
    let unnamed = "[...document.querySelectorAll('button, input, meter, svg')].filter((e) => \
                   !e.textContent && !e.getAttribute('aria-label') && !e.labels?.length).length";
    assert_eq!(browser.evaluate(unnamed), 0);
    assert_eq!(browser.evaluate("document.querySelectorAll('h1, h2').length"), 4);
    server.change(|state| *state = State::default());
    browser.wait_for("document.querySelector('#apps').innerText === 'No apps yet.'");
    browser.picture("empty");
    assert_eq!(browser.complaints(), [] as [String; 0]);
}

#[test]
fn names_with_markup_are_text() {
    let mut evil = state();
    evil.apps[0].name = MARKUP.into();
    evil.apps[0].group = MARKUP.into();
    evil.apps[0].machines[0].name = MARKUP.into();
    evil.apps[0].machines[0].state = MARKUP.into();
    evil.apps[0].machines[1].id = "\" onmouseover=\"document.title='broken'".into();
    evil.events[3].app = MARKUP.into();
    evil.events[3].machine = format!("</script>{MARKUP}");
    let server = Server::start(evil);
    let mut browser = Chromium::start(NOW_MS);
    browser.open(&server.url(), 1200, "light");
    assert_eq!(browser.evaluate("document.querySelector('.app h3').textContent"), MARKUP);
    assert_eq!(
        browser.evaluate("document.querySelectorAll('img, .bold, [onmouseover], script:not([src])').length"),
        0
    );
    assert_eq!(browser.evaluate("document.title"), "flyrun");
    assert_eq!(browser.complaints(), [] as [String; 0]);
}

#[test]
fn a_lost_connection_is_told_and_comes_back() {
    let mut browser = Chromium::start(NOW_MS);
    let server = Server::start(state());
    browser.open(&server.url(), 800, "light");
    server.cut(true);
    browser.wait_for("document.querySelector('.live') === null");
    assert!(browser.evaluate(&text_of("#link")).to_string().contains("Connection lost"));
    // What was known is still there.
    assert_eq!(browser.evaluate("document.querySelectorAll('.app').length"), 4);
    server.change(|state| state.apps.truncate(1));
    server.cut(false);
    browser.wait_for("document.querySelectorAll('.app').length === 1");
    assert_eq!(browser.evaluate(&text_of("#link")), "Live");
}
