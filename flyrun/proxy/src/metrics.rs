//! What is counted, and how Prometheus reads it. Fly's names where they exist.
//!
//! Counters are atomics that a route has at hand: a request takes no lock and looks up no label.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Upper ends in microseconds, with their names in seconds.
const BUCKETS: [(u64, &str); 14] = [
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (500_000, "0.5"),
    (1_000_000, "1"),
    (2_500_000, "2.5"),
    (10_000_000, "10"),
    (60_000_000, "60"),
];

/// The statuses that are counted apart, 100 to 599.
const STATUSES: usize = 500;

/// All that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    apps: Mutex<BTreeMap<Arc<str>, Arc<AppMetrics>>>,
    /// Connections of clients that are open.
    pub(crate) connections: AtomicI64,
    /// Connections that were closed at once, as there were too many.
    pub(crate) too_many: AtomicU64,
    /// Connections that could not be accepted.
    pub(crate) accept_errors: AtomicU64,
    /// Handshakes that failed.
    pub(crate) tls_errors: AtomicU64,
    /// Connections of trusted proxies that did not begin with the header that they were to begin with.
    pub(crate) proxy_protocol_errors: AtomicU64,
    /// Requests that were refused before an app was known.
    pub(crate) refused: AtomicU64,
}

/// What is counted of an app.
#[derive(Debug)]
pub(crate) struct AppMetrics {
    region: String,
    statuses: Box<[AtomicU64; STATUSES]>,
    answered: Box<[AtomicU64; STATUSES]>,
    /// From a request's head to the end of its answer.
    pub edge_seconds: Histogram,
    /// From a machine's lease to the end of its answer.
    pub app_seconds: Histogram,
    /// How long connecting to a machine took.
    pub connect_seconds: Histogram,
    /// How long the handshake with a client took.
    pub handshake_seconds: Histogram,
    pub tcp_connects: AtomicU64,
    pub tcp_disconnects: AtomicU64,
    pub app_connects: AtomicU64,
    pub app_connect_errors: AtomicU64,
    pub retries: AtomicU64,
    pub replays: AtomicU64,
    /// Bytes of bodies from clients.
    pub data_in: AtomicU64,
    /// Bytes of bodies to clients.
    pub data_out: AtomicU64,
    /// What is under way at machines.
    pub concurrency: AtomicI64,
}

impl Metrics {
    /// The counters of an app, which stay when it is served no more.
    pub(crate) fn app(&self, name: &Arc<str>, region: &str) -> Arc<AppMetrics> {
        let mut apps = self.apps.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || {
            Arc::new(AppMetrics {
                region: region.to_string(),
                statuses: Box::new([const { AtomicU64::new(0) }; STATUSES]),
                answered: Box::new([const { AtomicU64::new(0) }; STATUSES]),
                edge_seconds: Histogram::default(),
                app_seconds: Histogram::default(),
                connect_seconds: Histogram::default(),
                handshake_seconds: Histogram::default(),
                tcp_connects: AtomicU64::new(0),
                tcp_disconnects: AtomicU64::new(0),
                app_connects: AtomicU64::new(0),
                app_connect_errors: AtomicU64::new(0),
                retries: AtomicU64::new(0),
                replays: AtomicU64::new(0),
                data_in: AtomicU64::new(0),
                data_out: AtomicU64::new(0),
                concurrency: AtomicI64::new(0),
            })
        };
        apps.entry(name.clone()).or_insert_with(fresh).clone()
    }

    /// Prometheus' text format, version 0.0.4.
    pub fn render(&self) -> String {
        let apps: Vec<_> = {
            let apps = self.apps.lock().unwrap_or_else(PoisonError::into_inner);
            apps.iter().map(|(name, app)| (name.clone(), app.clone())).collect()
        };
        let mut page = Page { text: String::new(), apps };
        page.statuses("fly_edge_http_responses_count", "Answers to clients.", |app| &app.statuses);
        page.histogram(
            "fly_edge_http_response_time_seconds",
            "From a request's head to the end of its answer.",
            |app| &app.edge_seconds,
        );
        page.counter("fly_edge_tcp_connects_count", "Connections of clients.", |app| &app.tcp_connects);
        page.counter("fly_edge_tcp_disconnects_count", "Connections of clients that ended.", |app| {
            &app.tcp_disconnects
        });
        page.counter("fly_edge_data_in", "Bytes of bodies from clients.", |app| &app.data_in);
        page.counter("fly_edge_data_out", "Bytes of bodies to clients.", |app| &app.data_out);
        page.histogram("fly_edge_tls_handshake_time_seconds", "Handshakes with clients.", |app| {
            &app.handshake_seconds
        });
        page.statuses("fly_app_http_responses_count", "Answers of machines.", |app| &app.answered);
        page.histogram(
            "fly_app_http_response_time_seconds",
            "From having a machine to the end of its answer.",
            |app| &app.app_seconds,
        );
        page.histogram("fly_app_connect_time_seconds", "Connecting to a machine.", |app| {
            &app.connect_seconds
        });
        page.gauge("fly_app_concurrency", "Requests or connections under way at machines.", |app| {
            &app.concurrency
        });
        page.counter("flyrun_app_connects_count", "Connections to machines.", |app| &app.app_connects);
        page.counter("flyrun_app_connect_errors_count", "Connections that machines did not accept.", |app| {
            &app.app_connect_errors
        });
        page.counter("flyrun_app_retries_count", "Requests sent once more.", |app| &app.retries);
        page.counter("flyrun_app_replays_count", "Requests replayed by fly-replay.", |app| &app.replays);
        page.own(
            "flyrun_edge_connections",
            "gauge",
            "Connections of clients.",
            self.connections.load(Relaxed),
        );
        for (name, help, count) in [
            (
                "flyrun_edge_connections_refused_count",
                "Connections closed at once, being too many.",
                &self.too_many,
            ),
            (
                "flyrun_edge_accept_errors_count",
                "Connections that could not be accepted.",
                &self.accept_errors,
            ),
            ("fly_edge_tls_handshake_errors", "Handshakes that failed.", &self.tls_errors),
            (
                "flyrun_edge_proxy_protocol_errors_count",
                "Connections of trusted proxies without the header of the PROXY protocol.",
                &self.proxy_protocol_errors,
            ),
            (
                "flyrun_edge_requests_refused_count",
                "Requests refused before an app was known.",
                &self.refused,
            ),
        ] {
            page.own(name, "counter", help, count.load(Relaxed));
        }
        page.text
    }
}

impl AppMetrics {
    /// An answer went to a client.
    pub fn sent(&self, status: u16) {
        count(&self.statuses, status);
    }

    /// A machine answered.
    pub fn answered(&self, status: u16) {
        count(&self.answered, status);
    }
}

fn count(statuses: &[AtomicU64; STATUSES], status: u16) {
    if let Some(count) = usize::from(status).checked_sub(100).and_then(|index| statuses.get(index)) {
        count.fetch_add(1, Relaxed);
    }
}

/// How often something took how long.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// The last is of what took longer than all.
    buckets: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    pub fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let index = BUCKETS.iter().position(|(end, _)| micros <= *end).unwrap_or(BUCKETS.len());
        if let Some(bucket) = self.buckets.get(index) {
            bucket.fetch_add(1, Relaxed);
        }
        self.micros.fetch_add(micros, Relaxed);
    }
}

/// How long certificates hold, by their files. Those of an app that is served no more are none.
pub(crate) fn render_certificates(text: &mut String, left: &[(PathBuf, f64)]) {
    let mut page = Page { text: std::mem::take(text), apps: Vec::new() };
    let name = "flyrun_certificate_expiry_seconds";
    page.family(name, "gauge", "Seconds until a certificate holds no more, below zero afterwards.");
    for (file, left) in left {
        let file = file.to_string_lossy();
        let _ = writeln!(page.text, "{name}{{file=\"{}\"}} {left:.0}", Escaped(&file));
    }
    *text = page.text;
}

struct Page {
    text: String,
    apps: Vec<(Arc<str>, Arc<AppMetrics>)>,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn own(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        let _ = writeln!(self.text, "{name} {value}");
    }

    fn counter(&mut self, name: &str, help: &str, of: impl Fn(&AppMetrics) -> &AtomicU64) {
        self.each(name, "counter", help, |app| of(app).load(Relaxed));
    }

    fn gauge(&mut self, name: &str, help: &str, of: impl Fn(&AppMetrics) -> &AtomicI64) {
        self.each(name, "gauge", help, |app| of(app).load(Relaxed));
    }

    fn each<V: std::fmt::Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        of: impl Fn(&AppMetrics) -> V,
    ) {
        self.family(name, kind, help);
        for (app, metrics) in &self.apps {
            let value = of(metrics);
            let _ = writeln!(
                self.text,
                "{name}{{app=\"{app}\",region=\"{}\"}} {value}",
                Escaped(&metrics.region)
            );
        }
    }

    fn statuses(&mut self, name: &str, help: &str, of: impl Fn(&AppMetrics) -> &[AtomicU64; STATUSES]) {
        self.family(name, "counter", help);
        for (app, metrics) in &self.apps {
            for (index, count) in of(metrics).iter().enumerate() {
                let count = count.load(Relaxed);
                if count > 0 {
                    let (status, region) = (index + 100, Escaped(&metrics.region));
                    let _ = writeln!(
                        self.text,
                        "{name}{{app=\"{app}\",region=\"{region}\",status=\"{status}\"}} {count}"
                    );
                }
            }
        }
    }

    fn histogram(&mut self, name: &str, help: &str, of: impl Fn(&AppMetrics) -> &Histogram) {
        self.family(name, "histogram", help);
        for (app, metrics) in &self.apps {
            let (histogram, region) = (of(metrics), Escaped(&metrics.region));
            let mut total = 0;
            let ends = BUCKETS.iter().map(|(_, end)| *end).chain(["+Inf"]);
            for (bucket, end) in histogram.buckets.iter().zip(ends) {
                total += bucket.load(Relaxed);
                let _ = writeln!(
                    self.text,
                    "{name}_bucket{{app=\"{app}\",region=\"{region}\",le=\"{end}\"}} {total}"
                );
            }
            let micros = histogram.micros.load(Relaxed);
            let _ = writeln!(
                self.text,
                "{name}_sum{{app=\"{app}\",region=\"{region}\"}} {}.{:06}",
                micros / 1_000_000,
                micros % 1_000_000
            );
            let _ = writeln!(self.text, "{name}_count{{app=\"{app}\",region=\"{region}\"}} {total}");
        }
    }
}

/// A label's value: a region is any text.
struct Escaped<'t>(&'t str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_each_family_once_and_buckets_that_add_up() {
        let metrics = Metrics::default();
        let app = metrics.app(&"shop".into(), "a\"b");
        app.sent(200);
        app.sent(200);
        app.sent(404);
        app.sent(99);
        app.edge_seconds.add(Duration::from_millis(3));
        app.edge_seconds.add(Duration::from_secs(100));
        let page = metrics.render();
        assert!(
            page.contains("fly_edge_http_responses_count{app=\"shop\",region=\"a\\\"b\",status=\"200\"} 2\n"),
            "{page}"
        );
        assert!(page.contains(
            "fly_edge_http_response_time_seconds_bucket{app=\"shop\",region=\"a\\\"b\",le=\"0.005\"} 1\n"
        ));
        assert!(page.contains(
            "fly_edge_http_response_time_seconds_bucket{app=\"shop\",region=\"a\\\"b\",le=\"+Inf\"} 2\n"
        ));
        assert!(page.contains(
            "fly_edge_http_response_time_seconds_sum{app=\"shop\",region=\"a\\\"b\"} 100.003000\n"
        ));
        let types: Vec<_> = page.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let mut once = types.clone();
        once.dedup();
        assert_eq!(types, once);
    }
}
