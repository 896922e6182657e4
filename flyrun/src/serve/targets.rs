//! Where Prometheus finds what machines themselves tell it, `[[metrics]]` of fly.toml: as its HTTP service discovery wants it
//! (`http_sd_configs`, <https://prometheus.io/docs/prometheus/latest/http_sd/>).
//!
//! Prometheus asks the machines at their own addresses, not through the proxy: that starts none and keeps none awake.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::group::View;

/// Where the machines of a group tell of themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrape {
    pub port: u16,
    pub path: String,
    pub region: String,
}

#[derive(Debug, Serialize)]
struct Target<'a> {
    targets: [SocketAddr; 1],
    labels: Labels<'a>,
}

/// Fly.io's labels, and the path.
#[derive(Debug, Serialize)]
struct Labels<'a> {
    #[serde(rename = "__metrics_path__")]
    path: &'a str,
    app: &'a str,
    region: &'a str,
    instance: &'a str,
    process_group: &'a str,
}

/// All machines that run and have something to tell, as JSON.
pub fn render(views: &[View]) -> String {
    let mut targets = Vec::new();
    for View { app, group, metrics, machines, .. } in views {
        let Some(Scrape { port, path, region }) = metrics else { continue };
        targets.extend(machines.iter().filter_map(|machine| {
            let labels = Labels { path, app, region, instance: machine.id.as_deref()?, process_group: group };
            Some(Target { targets: [(machine.address?, *port).into()], labels })
        }));
    }
    serde_json::to_string(&targets).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::group::MachineView;
    use super::*;

    #[test]
    fn machines_that_run_are_told_of_with_what_names_them() {
        let running =
            MachineView { id: Some("01".into()), address: "10.0.0.2".parse().ok(), ..MachineView::example() };
        let suspended = MachineView { id: Some("02".into()), ..MachineView::example() };
        let scrape = Scrape { port: 9091, path: "/m".into(), region: "fra".into() };
        let silent = View::example(vec![running.clone()]);
        let telling = View { metrics: Some(scrape), ..View::example(vec![running, suspended]) };
        assert_eq!(
            render(&[silent, telling]),
            r#"[{"targets":["10.0.0.2:9091"],"labels":{"__metrics_path__":"/m","app":"web","region":"fra","instance":"01","process_group":"app"}}]"#
        );
        assert_eq!(render(&[]), "[]");
    }
}
