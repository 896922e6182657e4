//! Several apps behind one proxy.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

use app::config::{File, read, together};

fn file(name: &str, app: &str, more: &str) -> File {
    let text = format!("app = '{app}'\nbuild.image = 'x'\n{more}");
    read(name, text.as_bytes()).unwrap_or_else(|refused| panic!("{refused}"))
}

fn told(files: &[File]) -> Vec<String> {
    match together(files) {
        Ok(_) => Vec::new(),
        Err(refused) => {
            refused.problems.iter().map(|problem| problem.to_string().replace("\n  ", " | ")).collect()
        }
    }
}

const HTTP: &str = "[http_service]\n";
const RAW: &str = "[[services]]\ninternal_port = 1\nports = [{ port = 5432 }]\n";

#[test]
fn requests_tell_apps_apart_by_host_name() {
    let one = file("a.toml", "a", &format!("{HTTP}[flyrun]\nhostnames = ['a.example.com']"));
    let two =
        file("b.toml", "b", &format!("{HTTP}[flyrun]\nhostnames = ['b.example.com', '*.b.example.com']"));
    let rest = file("c.toml", "c", HTTP);
    assert_eq!(told(&[one, two, rest]), Vec::<String>::new());
}

#[test]
fn two_apps_cannot_have_one_host_name() {
    let one = file("a.toml", "a", &format!("{HTTP}[flyrun]\nhostnames = ['x.example.com']"));
    let two = file("b.toml", "b", &format!("{HTTP}[flyrun]\nhostnames = ['y.example.com', 'X.example.com']"));
    let elsewhere = file(
        "c.toml",
        "c",
        "[[services]]\ninternal_port = 1\nports = [{ port = 8080, handlers = ['http'] }]\n[flyrun]\nhostnames = ['x.example.com']",
    );
    let wanted = "b.toml:5:31: the host name 'x.example.com' on port 80 is a.toml:5's too | Give each app [flyrun] hostnames of its own.";
    assert_eq!(told(&[one, two, elsewhere]), [wanted]);
    let both = told(&[file("a.toml", "a", HTTP), file("b.toml", "b", HTTP)]);
    assert!(both.len() == 1 && both[0].contains("every host name on port 80 is a.toml:1's too"), "{both:#?}");
}

#[test]
fn what_counts_before_a_host_is_named_is_the_same_for_all_apps_of_a_port() {
    let app = |name: &str, proxies: &str| {
        let host = format!("{name}.example.com");
        file(&format!("{name}.toml"), name, &format!("{HTTP}[flyrun]\nhostnames = ['{host}']\n{proxies}"))
    };
    let with = "trusted_proxies = ['192.0.2.1', '192.0.2.2']\naccept_proxy_protocol = true";
    let other = "trusted_proxies = ['192.0.2.3']\naccept_proxy_protocol = true";
    let order = "trusted_proxies = ['192.0.2.2', '192.0.2.1']\naccept_proxy_protocol = true";
    assert_eq!(told(&[app("a", with), app("b", order)]), Vec::<String>::new());
    assert_eq!(told(&[app("a", ""), app("b", "trusted_proxies = ['192.0.2.1']")]), Vec::<String>::new());
    for proxies in ["", other] {
        let told = told(&[app("a", with), app("b", proxies)]);
        assert!(told.len() == 1 && told[0].starts_with("b.toml:3:1: port 80 is a.toml:3's too"), "{told:#?}");
        assert!(told[0].contains("differ in accept_proxy_protocol"), "{told:#?}");
    }
}

#[test]
fn two_apps_cannot_have_one_name() {
    let told = told(&[file("a.toml", "same", RAW), file("b.toml", "same", "")]);
    assert_eq!(told, ["b.toml:1:7: the app 'same' is in a.toml:1 too | Give one of them another name."]);
}

#[test]
fn raw_tcp_ports_are_one_apps_alone() {
    let raw = told(&[file("a.toml", "a", RAW), file("b.toml", "b", RAW)]);
    assert!(
        raw.len() == 1 && raw[0].contains("port 5432 is a.toml:5's too: raw TCP has no host name"),
        "{raw:#?}"
    );
    let range = "[[services]]\ninternal_port = 1\nports = [{ start_port = 70, end_port = 90 }]\n";
    let mixed = told(&[file("a.toml", "a", HTTP), file("b.toml", "b", range)]);
    assert!(
        mixed.len() == 1 && mixed[0].contains("port 80 is a.toml:3's too: the handlers differ"),
        "{mixed:#?}"
    );
}

#[test]
fn each_pair_of_apps_is_told_once() {
    let range = "[[services]]\ninternal_port = 1\nports = [{ start_port = 70, end_port = 90 }]\n";
    let apps: Vec<_> =
        ["a", "b", "c"].iter().map(|name| file(&format!("{name}.toml"), name, range)).collect();
    assert_eq!(told(&apps).len(), 2);
    let tls = "[http_service]\n[flyrun]\ntls = { certificate = 'c', key = 'k' }";
    let apps: Vec<_> = ["a", "b", "c"].iter().map(|name| file(&format!("{name}.toml"), name, tls)).collect();
    assert_eq!(told(&apps).len(), 2);
}
