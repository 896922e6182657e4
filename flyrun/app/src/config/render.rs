//! An app as a fly.toml that says everything.

use std::collections::BTreeMap;
use std::time::Duration;

use toml::{Table, Value};

use super::model::*;
use super::names::Named;
use super::units::duration_text;

/// The app as TOML that reads as the same app. `[http_service]` is among `[[services]]`, as what it stands for.
pub fn to_toml(app: &App) -> Table {
    let each = |table: fn(&Group) -> Build| -> Vec<Table> {
        app.groups.iter().map(|(name, group)| table(group).groups(vec![name.clone()])).collect()
    };
    Build::default()
        .put("app", &*app.name)
        .put("primary_region", &*app.primary_region)
        .put("kill_signal", app.kill_signal.name())
        .put("kill_timeout", duration_text(app.kill_timeout))
        .put("build", Build::default().put("image", &*app.image).table)
        .put("deploy", deploy(&app.deploy))
        .put("env", texts(&app.env))
        .put("processes", processes(&app.groups))
        .tables("services", app.services.iter().map(service).collect())
        .some("checks", (!app.checks.is_empty()).then(|| checks(&app.checks)))
        .tables("vm", each(|group| vm(&group.vm)))
        .tables("restart", each(|group| restart(&group.restart)))
        .tables("mounts", shared(app, |group| &group.mounts, mount))
        .tables("files", shared(app, |group| &group.files, file))
        .tables("metrics", shared(app, |group| group.metrics.as_slice(), metrics))
        .put("flyrun", flyrun(app))
        .table
}

/// A table under construction.
#[derive(Default)]
struct Build {
    table: Table,
}

impl Build {
    fn put(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.table.insert(key.to_string(), value.into());
        self
    }

    fn some(self, key: &str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.put(key, value),
            None => self,
        }
    }

    /// `[[key]]` as often as there are tables.
    fn tables(self, key: &str, tables: Vec<Table>) -> Self {
        self.some(key, (!tables.is_empty()).then_some(tables))
    }

    fn groups(self, names: Vec<String>) -> Table {
        self.put("processes", names).table
    }
}

/// What several groups have is written once.
fn shared<T: PartialEq>(app: &App, of: fn(&Group) -> &[T], table: fn(&T) -> Build) -> Vec<Table> {
    let mut found: Vec<(&T, Vec<String>)> = Vec::new();
    for (name, group) in &app.groups {
        for item in of(group) {
            match found.iter_mut().find(|(known, _)| *known == item) {
                Some((_, names)) => names.push(name.clone()),
                None => found.push((item, vec![name.clone()])),
            }
        }
    }
    found.into_iter().map(|(item, names)| table(item).groups(names)).collect()
}

fn texts(map: &BTreeMap<String, String>) -> Table {
    map.iter().map(|(name, text)| (name.clone(), Value::from(&**text))).collect()
}

fn number(value: u32) -> Value {
    Value::from(i64::from(value))
}

fn time(duration: Duration) -> Value {
    Value::from(duration_text(duration))
}

fn words(command: &[String]) -> Value {
    // No word has a zero byte, which is all that cannot be quoted.
    Value::from(shlex::try_join(command.iter().map(String::as_str)).unwrap_or_default())
}

fn processes(groups: &BTreeMap<String, Group>) -> Table {
    groups.iter().map(|(name, group)| (name.clone(), words(&group.command))).collect()
}

fn deploy(deploy: &Deploy) -> Table {
    Build::default()
        .put("strategy", deploy.strategy.name())
        .put("wait_timeout", time(deploy.wait_timeout))
        .some("release_command", deploy.release_command.as_deref().map(words))
        .put("release_command_timeout", time(deploy.release_command_timeout))
        .table
}

fn service(service: &Service) -> Table {
    let concurrency = Build::default()
        .put("type", service.concurrency.by.name())
        .put("soft_limit", number(service.concurrency.soft_limit))
        .some("hard_limit", service.concurrency.hard_limit.map(number));
    let (tcp, http): (Vec<_>, Vec<_>) = service.checks.iter().partition(|check| check.asks == Asks::Tcp);
    let checks =
        |checks: Vec<&Check>| checks.into_iter().map(|one| check(Build::default(), one).table).collect();
    Build::default()
        .put("internal_port", number(service.internal_port.into()))
        .put("protocol", "tcp")
        .put("processes", service.groups.clone())
        .put("auto_stop_machines", service.auto_stop.name())
        .put("auto_start_machines", service.auto_start)
        .put("min_machines_running", number(service.min_machines_running))
        .put("concurrency", concurrency.table)
        .tables("ports", service.ports.iter().map(port).collect())
        .tables("tcp_checks", checks(tcp))
        .tables("http_checks", checks(http))
        .table
}

fn port(port: &Port) -> Table {
    let (first, last) = (u32::from(*port.numbers.start()), u32::from(*port.numbers.end()));
    let build = match first == last {
        true => Build::default().put("port", number(first)),
        false => Build::default().put("start_port", number(first)).put("end_port", number(last)),
    };
    let handlers = [
        ("tls", port.tls.is_some()),
        ("http", matches!(port.carries, Carries::Http(_))),
        ("proxy_proto", matches!(port.carries, Carries::Tcp { proxy_protocol: Some(_) })),
    ];
    let handlers: Vec<Value> =
        handlers.iter().filter(|(_, has)| *has).map(|(name, _)| Value::from(*name)).collect();
    let build = build.put("handlers", handlers);
    let build = match &port.carries {
        Carries::Http(options) => build
            .some("force_https", port.tls.is_none().then_some(options.force_https))
            .put("http_options", http(options)),
        Carries::Tcp { proxy_protocol: None } => build,
        Carries::Tcp { proxy_protocol: Some(version) } => {
            build.put("proxy_proto_options", Build::default().put("version", version.name()).table)
        }
    };
    let tls = |tls: &Tls| {
        let versions: Vec<Value> = tls.versions.iter().map(|version| Value::from(version.name())).collect();
        Build::default().put("alpn", tls.alpn.clone()).put("versions", versions).table
    };
    build.some("tls_options", port.tls.as_ref().map(tls)).table
}

fn http(options: &Http) -> Table {
    let rule = |rule: &HeaderRule| match rule {
        HeaderRule::Remove => Value::from(false),
        HeaderRule::Set(values) => Value::from(values.clone()),
    };
    let headers: Table =
        options.response_headers.iter().map(|(name, one)| (name.clone(), rule(one))).collect();
    let response = Build::default().put("pristine", options.pristine).put("headers", headers);
    Build::default()
        .put("h2_backend", options.h2_backend)
        .put("idle_timeout", time(options.idle_timeout))
        .put("headers_read_timeout", time(options.headers_read_timeout))
        .put("response", response.table)
        .table
}

fn check(start: Build, check: &Check) -> Build {
    let build = start
        .put("interval", time(check.interval))
        .put("timeout", time(check.timeout))
        .put("grace_period", time(check.grace_period));
    match &check.asks {
        Asks::Tcp => build,
        Asks::Http { method, path, headers } => build
            .put("method", method.name())
            .put("path", &**path)
            .put("protocol", "http")
            .put("headers", texts(headers)),
    }
}

fn checks(checks: &BTreeMap<String, NamedCheck>) -> Table {
    let one = |named: &NamedCheck| {
        let kind = if named.check.asks == Asks::Tcp { "tcp" } else { "http" };
        let start = Build::default().put("type", kind).put("port", number(named.port.into()));
        check(start, &named.check).put("processes", named.groups.clone()).table
    };
    checks.iter().map(|(name, named)| (name.clone(), Value::from(one(named)))).collect()
}

fn vm(vm: &Vm) -> Build {
    Build::default()
        .put("cpu_kind", vm.cpu_kind.name())
        .put("cpus", number(vm.cpus.into()))
        .put("memory", vm.memory.to_string())
}

fn restart(restart: &Restart) -> Build {
    match restart {
        Restart::Never => Build::default().put("policy", "never"),
        Restart::OnFailure { retries } => {
            Build::default().put("policy", "on-failure").put("retries", number(*retries))
        }
        Restart::Always => Build::default().put("policy", "always"),
    }
}

fn mount(mount: &Mount) -> Build {
    Build::default()
        .put("source", &*mount.source)
        .put("destination", &*mount.destination)
        .put("initial_size", mount.initial_size.to_string())
}

fn file(file: &GuestFile) -> Build {
    let (key, text) = match &file.content {
        Content::Text(text) => ("raw_value", text),
        Content::HostFile(path) => ("local_path", path),
        Content::Secret(name) => ("secret_name", name),
    };
    Build::default().put("guest_path", &*file.guest_path).put(key, &**text)
}

fn metrics(metrics: &Metrics) -> Build {
    Build::default().put("port", number(metrics.port.into())).put("path", &*metrics.path)
}

fn acme(acme: &Acme) -> Table {
    Build::default()
        .put("terms_of_service_agreed", true)
        .put("directory", &*acme.directory)
        .some("email", acme.email.as_deref())
        .some("ca", acme.ca.as_deref())
        .table
}

fn flyrun(app: &App) -> Table {
    let hostnames: Vec<String> = app.hostnames.iter().map(ToString::to_string).collect();
    let tls = |one: &Certificate| {
        Build::default().put("certificate", &*one.certificate).put("key", &*one.key).table
    };
    Build::default()
        .put("hostnames", hostnames)
        .put("idle_timeout", time(app.idle_timeout))
        .put("start_timeout", time(app.start_timeout))
        .put("queue_timeout", time(app.queue_timeout))
        .put("queue_limit", number(app.queue_limit))
        .put("max_machines", number(app.max_machines))
        .some("body_timeout", app.body_timeout.map(time))
        .some("total_timeout", app.total_timeout.map(time))
        .put("trusted_proxies", app.trusted_proxies.iter().map(ToString::to_string).collect::<Vec<_>>())
        .put("accept_proxy_protocol", app.accept_proxy_protocol)
        .tables("tls", app.certificates.iter().map(tls).collect())
        .some("acme", app.acme.as_ref().map(acme))
        .table
}
